"""A model's weights from a store of weights against its safetensors files, and against plain direct I/O.

Two cases: the next start (a module is made and a new region filled, with host memory for all of it) and a wake of a
model that is asleep at its source (no host memory). The page cache forgets the files before each, since a model that
is cold is not there; beside that the files are measured warm, when the page cache has all of them, which the store
never gains from. Each with the processor's time that it took. All in turn in one process, `ROUNDS` times; rates are
bytes of the region over the time from nothing to the region filled, or from asleep to awake. The ceiling of a start is
direct I/O, 32 requests of 1 MiB at a time (threads), of the same bytes; that of a wake is the slower of this and a wake
from host memory, since a simulated device's memory is made as it is touched.

`$SHOAL_DISK` names a directory on the disk to measure (the build folder by default), `$SHOAL_WEIGHTS_MIB` how much: it
needs twice that there, and four times that in RAM with the simulated device. Nothing else should use the disk.
`tests/gpu/run.sh tiers_weights` does the same on a GPU.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benches.results import Row, of_samples, save  # noqa: E402

if TYPE_CHECKING:
    import torch

    from shoal import MemoryManager, StoredWeights
    from shoal.torch import Placement

MIB = 1 << 20
DEPTH = 32
NAME = "0badcafe"
WAIT_S = 300.0


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes
    ----------
    device
        ``"sim"`` or ``"cuda:N"``.
    nbytes
        About how long the model is.
    rounds
        How often all is measured, at most.
    late_s
        No round begins after this, but for the first.
    """

    device: str
    nbytes: int
    rounds: int
    late_s: float = float("inf")

    @classmethod
    def given(cls, device: str, mib: int, rounds: int, late_s: float = float("inf")) -> Setting:
        """Make one of what the environment says, and of these where it says nothing."""
        mib = int(os.environ.get("SHOAL_WEIGHTS_MIB", str(mib)))
        return cls(device, mib * MIB, int(os.environ.get("SHOAL_ROUNDS", str(rounds))), late_s)

    def memory(self, host_bytes: int) -> MemoryManager:
        """Open a manager with room on the device for all of the model."""
        from shoal import MemoryManager

        room = self.nbytes + self.nbytes // 8 + 256 * MIB
        capacity = room if self.device == "sim" else None
        return MemoryManager(self.device, device_budget=room, device_capacity=capacity, host_budget=host_bytes)


def make_module(layers: int) -> torch.nn.Module:
    """Layers of three matrices and a norm each, in bfloat16, as in a language model's; uninitialised."""
    import torch

    def layer() -> torch.nn.Module:
        options = {"bias": False, "dtype": torch.bfloat16}
        parts = [torch.nn.Linear(2048, 2048, **options), torch.nn.Linear(2048, 5632, **options)]
        return torch.nn.Sequential(*parts, torch.nn.Linear(5632, 2048, **options), torch.nn.RMSNorm(2048))

    with torch.device("meta"):
        return torch.nn.Sequential(*(layer() for _ in range(layers)))


def write_model(folder: Path, nbytes: int) -> int:
    """Write a safetensors file of about so many bytes; gives how many layers it has."""
    import torch
    from safetensors.torch import save_file

    layers = max(1, nbytes // (2 * (2048 * 2048 + 2 * 2048 * 5632)))
    module = make_module(layers).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(7)
    noise: dict[torch.Size, torch.Tensor] = {}
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            shape = parameter.shape
            if shape not in noise:
                noise[shape] = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
            # None is another's, or they would be stored once.
            bits = noise[shape] ^ number
            parameter.copy_(bits.view(torch.bfloat16) if parameter.dtype == torch.bfloat16 else bits.float())
    save_file(dict(module.state_dict()), folder / "model.safetensors")
    return layers


def open_model(folder: Path, layers: int) -> torch.nn.Module:
    """Make the module of its file, as transformers does."""
    from safetensors.torch import load_file

    module = make_module(layers)
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return module


def forget(*folders: Path) -> None:
    """Let the page cache have nothing of these files."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def direct_s(path: Path) -> float:
    """Read a file past the page cache, `DEPTH` requests at a time."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        rooms = [mmap.mmap(-1, MIB) for _ in range(DEPTH)]
        for room in rooms:
            room.write(b"\0" * MIB)

        def read(worker: int) -> None:
            for offset in range(worker * MIB, size - size % 4096, DEPTH * MIB):
                os.preadv(descriptor, [rooms[worker]], offset)

        with ThreadPoolExecutor(DEPTH) as pool:
            begun = time.perf_counter()
            list(pool.map(read, range(DEPTH)))
            return time.perf_counter() - begun
    finally:
        os.close(descriptor)


class Taken(NamedTuple):
    """How long something took, and how much of a processor's time."""

    wall_s: float
    cpu_s: float

    @classmethod
    def since(cls, begun: tuple[float, float]) -> Taken:
        """Take what passed from then on."""
        return cls(time.perf_counter() - begun[0], time.process_time() - begun[1])


def now() -> tuple[float, float]:
    """Give both clocks."""
    return time.perf_counter(), time.process_time()


def place(
    mem: MemoryManager, folder: Path, layers: int, stored: StoredWeights | None
) -> tuple[Taken, torch.nn.Module, Placement]:
    """Open the model and place it; what that took, the module, and the placement."""
    import shoal.torch

    begun = now()
    module = open_model(folder, layers) if stored is None else make_module(layers).to_empty(device="cpu")
    placement = shoal.torch.place(
        module,
        mem,
        sources=lambda: shoal.torch.safetensors_sources(folder, module),
        stored=stored,
        directory=folder,
        is_blank=stored is not None,
        release_early=True,
    )
    took = Taken.since(begun)
    assert placement.from_store == (stored is not None)
    return took, module, placement


def check(module: torch.nn.Module, folder: Path) -> None:
    """Compare all of a module that is awake with its file."""
    import torch
    from safetensors.torch import load_file

    for name, want in load_file(folder / "model.safetensors").items():
        have = module.get_parameter(name).detach().cpu()
        # As bytes: some of the noise is no number.
        assert torch.equal(have.view(torch.uint8), want.view(torch.uint8)), f"other bytes in {name}"


def wake(placement: Placement) -> Taken:
    """Wake the region; what that took."""
    region = placement.region
    region.sleep(timeout_s=WAIT_S)
    begun = now()
    region.wake(timeout_s=WAIT_S).wait(WAIT_S)
    return Taken.since(begun)


def measure(setting: Setting) -> list[Row]:
    """Measure all of it; gives the figures."""
    import shoal
    import shoal.torch

    base = Path(os.environ.get("SHOAL_DISK", ROOT / "target"))
    base.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(dir=base, prefix="tiers-weights-"))
    clock = time.monotonic()
    try:
        folder, at = home / "model", home / "store"
        folder.mkdir()
        layers = write_model(folder, setting.nbytes)
        store = shoal.WeightStore(at, 4 * setting.nbytes)

        def start(host_bytes: int, stored: StoredWeights | None) -> tuple[Taken, torch.nn.Module, Placement]:
            return place(setting.memory(host_bytes), folder, layers, stored)

        whole = 2 * setting.nbytes
        _, module, placement = start(whole, None)
        begun = time.perf_counter()
        filled = shoal.torch.store_weights(placement, store, NAME)
        fill_s = time.perf_counter() - begun
        nbytes = placement.region.bytes
        del module, placement
        (pack,) = (at / "packs").iterdir()
        direct: list[float] = []
        cases = [f"{case}, {way}" for case in ("start", "wake") for way in ("files", "store", "warm files")]
        times: dict[str, list[Taken]] = {name: [] for name in [*cases, "wake, memory"]}
        for number in range(setting.rounds):
            if number and time.monotonic() - clock > setting.late_s:
                print(f"{number} rounds: there is no time for more")
                break
            forget(home)
            direct.append(direct_s(pack))
            for way in ("files", "store"):
                forget(home)
                stored = store.find(NAME) if way == "store" else None
                took, module, placement = start(whole, stored)
                times[f"start, {way}"].append(took)
                if way == "store":
                    times["wake, memory"].append(wake(placement))
                del module, placement
                # No host memory but for the buffers that files are read through: it is asleep at its source.
                _, module, placement = start(64 * MIB, stored)
                forget(home)
                times[f"wake, {way}"].append(wake(placement))
                assert placement.region.reads_stored == (way == "store")
                if way == "files":
                    # It has just read all of them.
                    times["wake, warm files"].append(wake(placement))
                    del module, placement
                    took, module, placement = start(whole, None)
                    times["start, warm files"].append(took)
                elif number == 0:
                    check(module, folder)
                del module, placement, stored
        return rows_of(direct, times, nbytes, fill_s, filled["written"])
    finally:
        shutil.rmtree(home)


def main() -> None:
    """Measure and save."""
    save("tiers_weights", measure(Setting.given("sim", 1024, 5)))


def rows_of(direct: list[float], times: dict[str, list[Taken]], nbytes: int, fill_s: float, written: int) -> list[Row]:
    """Make the figures: rates, against the disk's and against the files', and the processor's time."""
    gib = nbytes / (1 << 30)
    rates = {name: [gib / took.wall_s for took in taken] for name, taken in times.items()}
    best = of_samples("direct I/O, 32 at a time", "rate", [gib / took for took in direct], "GiB/s", "higher")
    memory = of_samples("wake from host memory", "rate", rates["wake, memory"], "GiB/s", "higher")
    rows = [best, memory]
    for case, ceiling in (("start", best.value), ("wake", min(best.value, memory.value))):
        files = of_samples(f"{case} from safetensors files", "rate", rates[f"{case}, files"], "GiB/s", "higher")
        stored = of_samples(f"{case} from the store", "rate", rates[f"{case}, store"], "GiB/s", "higher")
        files.ceiling = stored.ceiling = ceiling
        stored.peer, stored.peer_value = "safetensors files", files.value
        stored.target = 0.95 * ceiling
        stored.met = stored.value >= stored.target
        warm = f"{case} from safetensors files in the page cache"
        rows += [files, stored, of_samples(warm, "rate", rates[f"{case}, warm files"], "GiB/s", "higher")]
        for way in ("files", "store", "warm files"):
            cpu = [took.cpu_s / gib for took in times[f"{case}, {way}"]]
            rows.append(of_samples(f"{case}, {way}", "CPU", cpu, "s/GiB", "lower"))
    pace = Row("fill, at most 512 MiB a second", "rate", written / (1 << 30) / fill_s, "GiB/s", "higher")
    return [*rows, pace]


if __name__ == "__main__":
    main()
