"""What several vLLM models in less memory than they need give their clients, on Shoal and on what people use instead.

Run by `tests/gpu/run.sh vllm_burst` and `tests/gpu/run.sh vllm_all_active`; needs vLLM 0.26 and aiohttp importable. The
models are three names for one file of random weights: `$SHOAL_LAYERS` of 8B's layers (8; 32 are the whole shape), a
vocabulary of 257. `$SHOAL_ARMS` says which ways are tried (`shoal`, `lru`, `static`, `kvcached`, `llama-swap`): all of
them take longer than a part may, so that rows of `$SHOAL_EARLIER`, a result of this program on the same machine, are
kept beside the new ones. `lru` is the same server after `shoal`, told to use that policy. What could not be run is said
in a row. `$SHOAL_SHELF_DEVICE=sim` makes a small dry run over the stand-in for vLLM of the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from benches.results import Row, save_gpu
from tests.gpu.shelf import smi
from tests.gpu.shelf_8b import in_child
from tests.gpu.vllm_arms import ARMS, ON_GPU, Arm, NotRunError, Shelf, shoal, use_policy
from tests.gpu.vllm_traffic import Seen, all_active, burst, ramps, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
NAMES = ["ash", "birch", "cedar"]
LAYERS = int(os.environ.setdefault("SHOAL_LAYERS", "8"))
IS_WHOLE = LAYERS > 16
BESIDE = int((1.75 if IS_WHOLE else 1.25) * GIB) if ON_GPU else 0
"""A context, loaded kernels, a step's activations: what vLLM's profile gives with these limits, rounded up."""
ROOM = int(float(os.environ.get("SHOAL_KV_GIB", "9" if IS_WHOLE else "1.2")) * GIB)
"""KV of all models at once, beside all their weights: about what one of them fills at its peak."""
CONTEXT = 2048 if ON_GPU else 512
PROMPT, TOKENS = (1024, 256) if ON_GPU else (60, 12)
PEAK = float(os.environ.get("SHOAL_PEAK", "16" if ON_GPU else "4"))
RISE_S = float(os.environ.get("SHOAL_RISE_S", "10" if ON_GPU else "3"))
CLIENTS = int(os.environ.get("SHOAL_CLIENTS", "16" if ON_GPU else "3"))
SECONDS = float(os.environ.get("SHOAL_SECONDS", "20" if ON_GPU else "5"))
SHARES = [float(share) for share in os.environ.get("SHOAL_SHELF_SHARES", "1,0.75,0.5").split(",")]
ARGS = (
    "--max-num-seqs", "128", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching", "--enforce-eager",
) if ON_GPU else ()  # fmt: skip
KV_TOKEN_BYTES = 2 * LAYERS * 8 * 128 * 2 if ON_GPU else 4096
METRICS = ("first token mean", "first token p50", "first token p99", "time a token p50", "tokens a second")


def models(folder: Path) -> tuple[dict[str, Path], int]:
    """Write the model once, and give its folders by name and the bytes of its weights."""
    if ON_GPU:
        weights = int(in_child(f"make(Path({str(folder / 'model')!r}))", folder))
        return dict.fromkeys(NAMES, folder / "model"), weights
    found = {}
    for name in NAMES:
        chance = random.Random(name)
        (folder / name).mkdir()
        values = array("i", (chance.randrange(1, 200) for _ in range(1_000_000)))
        (folder / name / "model.bin").write_bytes(values.tobytes())
        (folder / name / "config.json").write_text("{}")
        found[name] = folder / name
    return found, 4_000_000


def warm(arm: Arm) -> None:
    """Let each model answer twice, so that no first kernel is measured."""
    for _ in range(2):
        for name, url in arm.urls.items():
            (answer,) = burst({name: url}, [(0.0, name)], PROMPT, TOKENS)
            if answer.status != 200:
                raise NotRunError(f"{name} answered {answer}")


def what_moved(arm: Arm, case: str, before: dict[str, int]) -> tuple[list[Row], dict[str, int]]:
    """Give what Shoal moved since `before`, and the counts now."""
    if arm.server is None:
        return [], {}
    counts = [model["counts"] for model in arm.server.state()["models"]]
    now = {name: sum(count[name] for count in counts) for name in ("wakes", "evictions", "restored", "evicted")}
    rows = [
        Row(case, {"restored": "moved to the device", "evicted": "given up"}.get(name, name),
            (now[name] - before.get(name, 0)) / (GIB if name in ("restored", "evicted") else 1),
            "GiB" if name in ("restored", "evicted") else "count", "lower")
        for name in now
    ]  # fmt: skip
    return rows, now


def measured(case: str, arm: Arm, seen: list[Seen], seconds: float, before: dict[str, int]) -> list[Row]:
    moved, _ = what_moved(arm, case, before)
    return [*rows_of(case, seen, seconds), Row(case, "all engines up", arm.ready_s, "s", "lower"), *moved]


def not_run(case: str, error: Exception) -> Row:
    print(f"{case}: not run: {error}", flush=True)
    return Row(f"{case}: not run: {' '.join(str(error).split())[:160]}", "run", 0, "count", "higher")


def bursts(shelf: Shelf) -> list[Row]:
    """Each way in turn: the same requests at the same times."""
    rows: list[Row] = []
    plan = ramps(NAMES, PEAK, RISE_S)
    print(f"{len(plan)} requests, {PEAK:g} a second at a model's peak", flush=True)
    names = os.environ.get("SHOAL_ARMS", "shoal,lru,static").split(",")

    def one(name: str, arm: Arm) -> None:
        case = case_of(name)
        warm(arm)
        _, before = what_moved(arm, case, {})
        begun = time.monotonic()
        seen = burst(arm.urls, plan, PROMPT, TOKENS)
        rows.extend(measured(case, arm, seen, time.monotonic() - begun, before))
        save_gpu(Path(os.environ["SHOAL_RESULT"]), compared(rows))

    for name in names:
        if name == "lru" and "shoal" in names:
            continue
        running = name
        try:
            with ARMS[name](shelf) as arm:
                one(name, arm)
                if name == "shoal" and "lru" in names:
                    running = "lru"
                    use_policy(arm, "lru")
                    one("lru", arm)
        except (NotRunError, TimeoutError, RuntimeError) as error:
            rows.append(not_run(case_of(running), error))
        save_gpu(Path(os.environ["SHOAL_RESULT"]), compared(rows))
    for name in sorted(set(ARMS) - set(names)):
        if not any(row.case.startswith(f"{name}:") for row in compared(rows)):
            rows.append(not_run(case_of(name), NotRunError("not asked for in this run")))
    save_gpu(Path(os.environ["SHOAL_RESULT"]), compared(rows))
    return rows


def case_of(name: str) -> str:
    return f"{name}: bursts to {PEAK:g} requests/s"


def actives(shelf: Shelf) -> list[Row]:
    """All models busy with all, three quarters and half of the memory that they need."""
    rows: list[Row] = []
    mps = os.environ.get("SHOAL_MPS") == "1"
    kv = 1.25 * CLIENTS * (PROMPT + TOKENS) * KV_TOKEN_BYTES
    if ON_GPU:
        shelf = dataclasses.replace(shelf, budget=int(len(NAMES) * (shelf.weights + BESIDE + kv)))
    if mps and not can_share():
        rows.append(not_run("all busy, with MPS", NotRunError("nvidia-cuda-mps-control cannot be started here")))
        save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
        return rows
    with multi_process_service() if mps else contextlib.nullcontext():
        for share in SHARES:
            case = f"{share:.0%} of the memory" + (", with MPS" if mps else "")
            try:
                with shoal(shelf, share=share) as arm:
                    warm(arm)
                    _, before = what_moved(arm, case, {})
                    begun = time.monotonic()
                    seen = all_active(arm.urls, CLIENTS, SECONDS, PROMPT, TOKENS)
                    rows += measured(case, arm, seen, time.monotonic() - begun, before)
                    per_model = [sum(one.tokens for one in seen if one.model == name) for name in NAMES]
                    rows.append(Row(case, "tokens, fewest of a model by most", min(per_model) / max(*per_model, 1),
                                    "share", "higher", ceiling=1.0))  # fmt: skip
            except (NotRunError, TimeoutError, RuntimeError) as error:
                rows.append(not_run(case, error))
            whole = {row.metric: row.value for row in rows if row.case.startswith("100%")}
            for row in rows:
                if row.metric in METRICS and not row.case.startswith("100%"):
                    row.ceiling = whole.get(row.metric)
            save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """Add the rows of an earlier call, and name for each of Shoal's the best of the others."""
    earlier = os.environ.get("SHOAL_EARLIER")
    every = [*rows]
    if earlier:
        found = json.loads(Path(earlier).read_text())
        if found["shoal_commit"] != os.environ.get("SHOAL_COMMIT"):
            raise SystemExit(f"{earlier} is of another commit: {found['shoal_commit']}")
        cases = {row.case for row in rows}
        every = [Row(**row) for row in found["rows"] if row["case"] not in cases] + every
    for row in every:
        others = [
            (one.value, one.case.partition(":")[0])
            for one in every
            if one.metric == row.metric and not one.case.startswith("shoal:")
        ]
        if row.case.startswith("shoal:") and row.metric in METRICS and others:
            row.peer_value, row.peer = (max if row.better == "higher" else min)(others)
    return every


def can_share() -> bool:
    """Say whether MPS can be started: a machine may have no program for it, or not allow it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError), multi_process_service():
        code = "import torch; print(torch.zeros(1, device='cuda').item())"
        return subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    return False


@contextlib.contextmanager
def multi_process_service() -> Iterator[None]:
    """Run NVIDIA's MPS, with which kernels of several processes share the GPU at the same time."""
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        pipe = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(pipe)
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
            yield
        finally:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False, timeout=60)
            for name in pipe:
                os.environ.pop(name)


def main() -> int:
    what = {"burst": bursts, "all_active": actives}[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="vllm-load-") as directory:
        folder = Path(directory)
        os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"})
        # What was compiled for one part serves the next, where whoever runs them keeps it.
        for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(name, str(folder / name.lower()))
        found, weights = models(folder)
        budget = len(NAMES) * (weights + BESIDE) + ROOM if ON_GPU else 64 << 20
        if given := os.environ.get("SHOAL_SHELF_GIB"):
            budget = int(float(given) * GIB)
        total = (int(smi("memory.total")) << 20) if ON_GPU else budget
        print(
            f"{LAYERS} layers: {weights / GIB:.2f} GiB of weights each, a budget of {budget / GIB:.2f} GiB", flush=True
        )
        rows = what(Shelf(folder, found, weights, budget, BESIDE, CONTEXT, total, ARGS))
    # What could not be run is said in the result, and is no failure of what could.
    return 0 if any(row.metric != "run" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
