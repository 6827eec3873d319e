"""A store of weights: a module's next start reads it, whatever fails reads the files, and nothing wrong is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import shoal
from shoal import testing

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
shoal_torch = pytest.importorskip("shoal.torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAME = "0123456789abcdef"
MIB = 1 << 20


def make(seed: int = 0) -> torch.nn.Module:
    """Two matrices of a few MiB, something small between them, and an odd length."""
    torch.manual_seed(seed)
    parts = [torch.nn.Linear(1024, 1000), torch.nn.LayerNorm(1000), torch.nn.Linear(1000, 1024), torch.nn.Linear(7, 3)]
    return torch.nn.Sequential(*parts)


def saved(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write the module's files; gives its tensors."""
    folder.mkdir(exist_ok=True)
    state = {name: value.clone() for name, value in make(seed).state_dict().items()}
    safetensors_torch.save_file(state, folder / "model.safetensors")
    return state


def place(mem: shoal.MemoryManager, folder: Path, module: torch.nn.Module, stored: shoal.StoredWeights | None):
    return shoal_torch.place(
        module,
        mem,
        sources=lambda: shoal_torch.safetensors_sources(folder, module),
        stored=stored,
        directory=folder,
    )


def is_right(mem: shoal.MemoryManager, module: torch.nn.Module, want: dict[str, torch.Tensor]) -> bool:
    with mem.guard():
        return all(torch.equal(value, want[name]) for name, value in module.state_dict().items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def store(tmp_path: Path) -> shoal.WeightStore:
    return shoal.WeightStore(tmp_path / "store", "64MiB")


def first_start(store: shoal.WeightStore, folder: Path, seed: int = 0, name: str = NAME) -> dict[str, torch.Tensor]:
    want = saved(folder, seed)
    with testing.simulated_memory("64MiB") as mem:
        placement = place(mem, folder, make(seed), store.find(name))
        assert not placement.from_store
        filled = shoal_torch.store_weights(placement, store, name)
        assert filled["bytes"] == placement.region.bytes
    return want


@pytest.mark.parametrize("host_budget", ["64MiB", "1MiB"])
def test_the_next_start_reads_the_store_alone(store: shoal.WeightStore, folder: Path, host_budget: str) -> None:
    want = first_start(store, folder)
    # A module of the same shapes, whose own bytes are others, and no files at all.
    (folder / "model.safetensors").unlink()
    module = make(seed=5)
    with testing.simulated_memory("64MiB", host_budget=host_budget) as mem:
        placement = place(mem, folder, module, store.find(NAME))
        assert placement.from_store
        assert all(placed.source for placed in placement)
        held = placement.region.usage()["host"]
        assert (held == 0) == (host_budget == "1MiB")
        for _ in range(2):
            assert is_right(mem, module, want)
            placement.region.sleep()


def test_a_wake_from_the_source_goes_on_with_the_files_where_the_store_fails(
    store: shoal.WeightStore, folder: Path, tmp_path: Path
) -> None:
    want = first_start(store, folder)
    module = make()
    with testing.simulated_memory("64MiB", host_budget="1MiB") as mem:
        placement = place(mem, folder, module, store.find(NAME))
        (pack,) = (tmp_path / "store/packs").iterdir()
        pack.write_bytes(bytes(len(pack.read_bytes())))
        assert placement.region.reads_stored
        assert is_right(mem, module, want)
        assert not placement.region.reads_stored
        assert not pack.exists(), "what is damaged is dropped"
        assert store.find(NAME) is None
        placement.region.sleep()
        assert is_right(mem, module, want)


def test_what_is_damaged_is_not_used_at_a_start(store: shoal.WeightStore, folder: Path, tmp_path: Path) -> None:
    want = first_start(store, folder)
    stored = store.find(NAME)
    (pack,) = (tmp_path / "store/packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    module = make()
    with testing.simulated_memory("64MiB") as mem:
        placement = place(mem, folder, module, stored)
        assert not placement.from_store
        assert is_right(mem, module, want)
        shoal_torch.store_weights(placement, store, NAME)
    assert store.find(NAME) is not None


def test_another_layout_is_not_used(store: shoal.WeightStore, folder: Path) -> None:
    first_start(store, folder)
    torch.manual_seed(9)
    other = torch.nn.Sequential(torch.nn.Linear(1024, 1000), torch.nn.LayerNorm(1000))
    want = {name: value.clone() for name, value in other.state_dict().items()}
    with testing.simulated_memory("64MiB") as mem:
        placement = shoal_torch.place(other, mem, stored=store.find(NAME))
        assert not placement.from_store
        assert is_right(mem, other, want)


def test_tensors_of_two_models_lie_there_once(store: shoal.WeightStore, folder: Path) -> None:
    first_start(store, folder)
    before = store.usage()["bytes"]
    want = saved(folder)
    module = make()
    with torch.no_grad():
        module[2].weight += 1
        want["2.weight"] += 1
    safetensors_torch.save_file(want, folder / "model.safetensors")
    with testing.simulated_memory("64MiB") as mem:
        placement = place(mem, folder, module, None)
        filled = shoal_torch.store_weights(placement, store, "fedcba98")
        # The matrix that differs (not a whole number of units: its end lies with what follows), and not the other one.
        assert placement.region.bytes - filled["shared"] == filled["written"] < placement.region.bytes / 2
    assert store.usage() == {
        "models": 2,
        "bytes": before + filled["written"],
        "unshared": 2 * filled["bytes"],
    }
    again = make(seed=5)
    with testing.simulated_memory("64MiB") as mem:
        assert place(mem, folder, again, store.find("fedcba98")).from_store
        assert is_right(mem, again, want)


def test_why_nothing_is_stored_is_told(store: shoal.WeightStore, folder: Path, tmp_path: Path) -> None:
    saved(folder)
    with testing.simulated_memory("64MiB") as mem:
        placement = place(mem, folder, make(), None)
        cases = [(store, "no name", "bad_name"), (shoal.WeightStore(tmp_path / "small", "1MiB"), NAME, "no_room")]
        worn = shoal.WeightStore(tmp_path / "worn", "64MiB", write_bytes_per_hour="8MiB")
        first_start(worn, folder)
        with pytest.raises(shoal.TierError) as raised:
            first_start(worn, folder, seed=3, name="00000003")
        assert raised.value.kind == "too_soon"
        assert 0 < raised.value.wait_s <= 3600
        with pytest.raises(ValueError, match="keep_s"):
            shoal.WeightStore(tmp_path / "worn", "64MiB", keep_s=-1)
        stopped = shoal.WeightStore(tmp_path / "stopped", "64MiB")
        stopped.stop()
        for where, name, kind in [*cases, (stopped, NAME, "stopped")]:
            with pytest.raises(shoal.TierError) as raised:
                shoal_torch.store_weights(placement, where, name)
            assert raised.value.kind == kind
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary/today.txt").write_text("mine")
    with pytest.raises(shoal.TierError) as raised:
        shoal.WeightStore(tmp_path / "diary", "64MiB")
    assert (raised.value.kind, raised.value.path) == ("foreign", str(tmp_path / "diary"))


def test_a_room_that_is_full_gives_up_what_was_used_least_lately(folder: Path, tmp_path: Path) -> None:
    store = shoal.WeightStore(tmp_path / "store", "20MiB", keep_s=0)
    for seed, name in enumerate(["00000001", "00000002", "00000003"]):
        first_start(store, folder, seed, name)
        store.find("00000001")
    assert [store.find(name) is not None for name in ("00000001", "00000002", "00000003")] == [True, False, True]
