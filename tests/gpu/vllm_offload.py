"""Shoal's tiers under vLLM's own KV offloading, on a GPU: the same tokens, and first tokens of restored prompts.

Run by `tests/gpu/run.sh vllm_offload`; needs vLLM 0.26 importable. Each engine has a process of its own, one after the
other, eager. Tokens are compared with `VLLM_BATCH_INVARIANT=1` and the normalisation of `tests/gpu/invariant.py`, for 8
layers of the 8B shape, and so are the bytes of each cached block with those it had when it was computed; the case with
`stock norm` shows what that setting is worth without it. First tokens of prompts of 4,096 tokens are timed for 32
layers with vLLM's dummy weights, without either. `SHOAL_VLLM_CASES` names the cases to run; what the time does not
allow is listed as not run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benches.results import Row, of_samples, save_gpu
from tests.gpu import invariant
from tests.gpu.vllm_part import LARGE_LAYERS, entry_points, make_models, wait_until_free

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
CASES = (
    "norm", "tokens none", "tokens shoal", "tokens shoal again", "tokens elastic", "tokens fs",
    "tokens none stock norm",
    "large none", "large cpu", "large shoal", "large shoal again", "large fs", "large fs again",
)  # fmt: skip
TIME_S = float(os.environ.get("SHOAL_VLLM_TIME", "290"))
"""No case begins later."""
CASE_S = 120.0
PROMPT = 4096
PROMPTS = 5
LIMIT = 160 << 20
"""A third of the KV of these prompts: memory goes while what was in it is still to be stored."""
FOLDERS = ("kv-small", "kv-elastic", "kv-large", "fs")
STAGING = min(4 * GIB, int(0.8 * shutil.disk_usage("/dev/shm").free))
"""vLLM keeps it there."""


def settings(case: str, folder: Path) -> dict[str, Any] | None:
    """Give `--kv-transfer-config` of a case."""
    extra: dict[str, Any] = {"cpu_bytes_to_use": STAGING}
    if "none" in case:
        return None
    if "fs" in case:
        extra |= {
            "spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": str(folder / "fs")}],
        }  # fmt: skip
    if "shoal" in case or "elastic" in case:
        size = "large" if "large" in case else "elastic" if "elastic" in case else "small"
        extra |= {
            "spec_name": "ShoalOffloadingSpec", "spec_module_path": "shoal.vllm.offloading", "host": "6GiB",
            "disks": [{"path": str(folder / f"kv-{size}"), "bytes": "12GiB"}],
        }  # fmt: skip
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


class Process:
    """One engine, and what was found of it."""

    def __init__(self, case: str, folder: Path) -> None:
        from vllm import LLM

        self.case = case
        self.found: dict[str, Any] = {"case": case}
        self.is_large = "large" in case
        options: dict[str, Any] = {
            "model": str(folder / ("large" if self.is_large else "small")), "skip_tokenizer_init": True, "seed": 0,
            "max_model_len": PROMPT + 64, "max_num_batched_tokens": 8192, "enable_prefix_caching": True,
            "disable_log_stats": False, "enforce_eager": True,
            "kv_cache_memory_bytes": (8 if self.is_large else 4) * GIB,
            "load_format": "dummy" if self.is_large else "auto",
        }  # fmt: skip
        if (given := settings(case, folder)) is not None:
            options["kv_transfer_config"] = given
        if "elastic" in case:
            options["worker_cls"] = "shoal.vllm.Worker"
        began = time.perf_counter()
        self.llm = LLM(**options)
        say(case, "started in", round(time.perf_counter() - began, 1), "s")

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], int]:
        """Give the tokens, and how many of the prompts' were found."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        made = self.llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made], sum(one.num_cached_tokens or 0 for one in made)

    def first_tokens(self, prompts: list[list[int]], what: str) -> None:
        """Ask for one token of each prompt, one after the other."""
        times, found = [], 0
        for prompt in prompts:
            began = time.perf_counter()
            _, cached = self.generate([prompt], 1)
            times.append(time.perf_counter() - began)
            found += cached
        self.found[what] = {"s": times, "cached": found, "asked": PROMPT * len(prompts)}
        say(self.case, what, [round(1e3 * one, 1) for one in times], "ms,", found, "tokens found")

    def settle(self) -> None:
        """Go on until all that was computed is stored: vLLM stores in the steps that follow."""
        for turn in range(6):
            self.generate([[11 + turn] * 17], 8)
            time.sleep(0.1)
        manager = self.manager()
        for tier in getattr(manager, "secondary_tiers", ()):
            tier.drain_jobs()
            if hasattr(tier, "_rows"):
                self.found["flushed"] = tier._rows.flush(60)
                self.found["usage"] = tier._rows.usage()
        say(self.case, "stored:", self.found.get("usage"))

    def digests(self) -> dict[str, list[int]]:
        """Give a sum over the bytes of each cached block in all layers, by its hash; two blocks may have one hash."""
        import torch

        core = self.llm.llm_engine.engine_core.engine_core
        blocks = core.scheduler.kv_cache_manager.block_pool.blocks
        cached = [block for block in blocks if block.block_hash is not None]
        (tensors,) = self.llm.collective_rpc(kv_tensors)
        sums = torch.zeros(len(cached), dtype=torch.int64, device=tensors[0].device)
        numbers = torch.tensor([block.block_id for block in cached], device=sums.device)
        for tensor in tensors:
            raw = torch.empty(0, dtype=torch.int8, device=sums.device).set_(tensor.untyped_storage())
            first_byte = tensor.storage_offset() * tensor.element_size()
            raw = raw[first_byte : first_byte + tensor.numel() * tensor.element_size()]
            words = raw.view(torch.int64).view(len(blocks), -1)
            weights = 2 * torch.arange(words.shape[1], device=sums.device) + 1
            for first in range(0, len(cached), 256):
                part = slice(first, first + 256)
                sums[part] = sums[part] * 1_000_003 + (words[numbers[part]] * weights).sum(1)
        found: dict[str, list[int]] = {}
        for block, one in zip(cached, sums.tolist(), strict=True):
            found.setdefault(bytes(block.block_hash).hex(), []).append(one)
        return found

    def elastic(self, prompts: list[list[int]]) -> None:
        """With less memory than these prompts take, and with sleeps, on Shoal's worker."""
        from shoal.vllm import resume, suspend

        turns = {"under a limit": LIMIT, "under a limit again": LIMIT, "without it": 4 * GIB}
        for turn, limit in turns.items():
            self.llm.collective_rpc("shoal_kv_limit", args=(limit,))
            suspend(self.llm, "forget" if turn == "under a limit again" else "keep")
            resume(self.llm)
            self.found["tokens"][turn], self.found["cached"][turn] = self.generate(prompts, 24)
            self.found["digests"][turn] = self.digests()
        say(self.case, self.llm.collective_rpc("shoal_usage")[0]["kv"])

    def manager(self) -> Any:
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        return None if connector is None else connector.connector_scheduler.manager

    def forget(self, *, staged: bool) -> None:
        """Let the GPU forget, and staging memory too."""
        assert self.llm.reset_prefix_cache(reset_connector=staged)

    def run(self) -> None:
        if not self.is_large:
            prompts = tokens_prompts()
            self.found["tokens"] = {}
            for turn in ("first", "again", "after all but tiers forgot"):
                began = time.perf_counter()
                made, cached = self.generate(prompts, 24)
                self.found["tokens"][turn] = made
                self.found.setdefault("cached", {})[turn] = cached
                say(self.case, turn, round(time.perf_counter() - began, 2), "s,", cached, "tokens found")
                self.found.setdefault("digests", {})[turn] = self.digests()
                self.settle()
                self.forget(staged=turn == "again" and "none" not in self.case)
            if "elastic" in self.case:
                self.elastic(prompts)
            if "none" in self.case:
                # Each in short steps, whose batches are other ones than before.
                alone = [self.generate([prompt], 24) for prompt in prompts]
                self.found["tokens"]["one at a time"] = [made[0] for made, _ in alone]
                self.found["cached"]["one at a time"] = sum(cached for _, cached in alone)
            return
        prompts = timed_prompts()
        # Whatever is compiled or measured at the first prompt of this length is done with others.
        for warm in timed_prompts(2, seed=77):
            self.generate([warm], 1)
        self.settle()
        self.forget(staged=False)
        is_again = "again" in self.case
        self.first_tokens(prompts, "from disk after a restart" if is_again else "computed")
        if is_again or "none" in self.case:
            return
        for prompt in prompts:
            self.generate([prompt], 1)
            self.settle()
        self.forget(staged=False)
        self.first_tokens(prompts, "from staging")
        if "shoal" in self.case:
            self.settle()
            self.forget(staged=True)
            self.first_tokens(prompts, "from the host tier")


def say(*words: object) -> None:
    print(f"[{time.perf_counter():8.2f}]", *words, flush=True)


def normalised() -> dict[str, Any]:
    """Normalise the same 512 rows in one launch and in four; count rows that are other ones, by vLLM's way and ours."""
    import torch
    from vllm.model_executor.layers import layernorm

    from vllm import _custom_ops as ops

    invariant.register()
    chance = torch.Generator("cuda").manual_seed(3)
    x, residual = (torch.randn(512, 4096, generator=chance, device="cuda").to(torch.bfloat16) for _ in range(2))
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")

    def stock(one: Any, other: Any) -> Any:
        one, other = one.clone(), other.clone()
        ops.fused_add_rms_norm(one, other, weight, 1e-5)
        return one

    def pinned(one: Any, other: Any) -> Any:
        return layernorm.rms_norm_batch_invariant(one, weight, 1e-5, residual=other)[0]

    found: dict[str, Any] = {"done": True}
    for name, norm in (("stock", stock), ("pinned", pinned)):
        parts = [norm(x[first : first + 128], residual[first : first + 128]) for first in range(0, 512, 128)]
        found[name] = int((norm(x, residual) != torch.cat(parts)).any(1).sum())
    return found


def kv_tensors(worker: Any) -> list[Any]:
    """Give a worker's KV tensors, one a layer. Called in its process."""
    return list(worker.model_runner.kv_caches)


def tokens_prompts() -> list[list[int]]:
    """Half of them begin as another one does."""
    chance = random.Random(7)
    beginnings = [[chance.randrange(10, 31000) for _ in range(chance.randrange(200, 900))] for _ in range(6)]
    made = []
    for number in range(64):
        own = [chance.randrange(10, 31000) for _ in range(chance.randrange(16, 400))]
        made.append(chance.choice(beginnings) + own if number % 2 else own)
    return made


def timed_prompts(count: int = PROMPTS, seed: int = 9) -> list[list[int]]:
    """Prompts whose last token lies in a block of its own: all before it can be found."""
    chance = random.Random(seed)
    return [[chance.randrange(10, 31000) for _ in range(PROMPT + 1)] for _ in range(count)]


def run_case(case: str, folder: Path, logs: Path) -> dict[str, Any] | None:
    """Run one process; give what it found, or nothing if it failed."""
    name = case.replace(" ", "_")
    out = folder / f"{name}.json"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "triton"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "0" if "large" in case else "1",
        "PYTHONUNBUFFERED": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{folder / 'site'}",
    }  # fmt: skip
    env.pop("SHOAL", None)
    if "large" not in case and "stock norm" not in case:
        env["PYTHONPATH"] += f":{folder / 'invariant'}"
    # The same blocks have the same hashes in all engines. vLLM's own tier finds nothing again without it; Shoal's spec
    # sets it by itself.
    env["PYTHONHASHSEED"] = "0"
    began = time.perf_counter()
    with (logs / f"vllm_offload_{name}.log").open("w") as log:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.vllm_offload", case, str(folder), str(out)]
        try:
            status = subprocess.run(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=CASE_S, cwd=ROOT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    found = json.loads(out.read_text()) if out.exists() else None
    print(f"{case}: exit status {status} after {time.perf_counter() - began:.0f} s", flush=True)
    if status or not found or not found.get("done"):
        print((logs / f"vllm_offload_{name}.log").read_text()[-4000:], flush=True)
    return found


def token_rows(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Compare with the engine that has no connector, whose own rounds say how far it agrees with itself."""
    rows = []
    if norm := found.get("norm"):
        what = "512 rows normalised in one launch and in four, VLLM_BATCH_INVARIANT=1: rows that differ"
        rows.append(Row(what, "count", norm["pinned"], "rows", "lower", peer="vLLM 0.26's own kernel",
                        peer_value=norm["stock"], target=0, met=norm["pinned"] == 0))  # fmt: skip
    for case, one in found.items():
        twin = case if "stock norm" in case else "tokens none"
        if "tokens" not in case or "first" not in found.get(twin, {}).get("tokens", {}):
            continue
        right = found[twin]["tokens"]["first"]
        for turn, made in one["tokens"].items():
            if case == twin and turn == "first":
                continue
            wrong = [number for number, (mine, its) in enumerate(zip(made, right, strict=True)) if mine != its]
            first = [next(at for at in range(24) if made[number][at] != right[number][at]) for number in wrong]
            print(f"{case}, {turn}: other tokens in requests {wrong}, from token {first} on", flush=True)
            what = f"{case}, {turn} ({one['cached'][turn]} tokens found): requests of {len(right)} with other tokens"
            row = Row(what, "count", len(wrong), "requests", "lower", samples=len(right))
            if "stock norm" not in case:
                row.target, row.met = 0, not wrong
            rows.append(row)
        rows += byte_rows(case, one.get("digests", {}))
    again = found.get("tokens shoal again", {}).get("cached", {}).get("first")
    if again is not None:
        rows.append(Row("tokens found by an engine that was started again", "count", again, "tokens", "higher",
                        target=1, met=again >= 1))  # fmt: skip
    return rows


def byte_rows(case: str, digests: dict[str, dict[str, list[int]]]) -> list[Row]:
    """Compare each cached block's bytes with those of the block of that hash in this engine's first turn.

    Not with another engine's: with a connector vLLM lays a block's bytes out in another order.
    """
    rows = []
    known = digests.get("first", {})
    for turn, blocks in digests.items():
        compared = [name for name in blocks if name in known and turn != "first"]
        if not compared:
            continue
        other = sum(not set(blocks[name]) <= set(known[name]) for name in compared)
        row = Row(f"{case}, {turn}: cached blocks of {len(compared)} with other bytes", "count", other, "blocks",
                  "lower", samples=len(compared))  # fmt: skip
        if "stock norm" not in case:
            row.target, row.met = 0, other == 0
        rows.append(row)
    return rows


def time_rows(found: dict[str, dict[str, Any]]) -> list[Row]:
    """First tokens of prompts that are computed, and of those that come from each place."""
    rows: list[Row] = []
    shape = f"{LARGE_LAYERS} layers of the 8B shape, a prompt of {PROMPT} tokens"
    bare = found.get("large none", {}).get("computed")
    computed = statistics.median(bare["s"]) if bare else None
    staged = found.get("large cpu", {}).get("from staging")
    from_disk = found.get("large fs again", {}).get("from disk after a restart")
    peers = {
        "from staging": ("vLLM's CPU offload", staged), "from the host tier": ("vLLM's CPU offload", staged),
        "from disk after a restart": ("vLLM's fs tier", from_disk),
    }  # fmt: skip
    if bare:
        rows.append(of_samples(f"{shape}: first token, computed, no connector", "time", bare["s"], "s", "lower"))
    for case in ("large cpu", "large fs", "large fs again", "large shoal", "large shoal again"):
        for what in ("computed", "from staging", "from the host tier", "from disk after a restart"):
            one = found.get(case, {}).get(what)
            if one is None:
                continue
            share = f"{100 * one['cached'] / one['asked']:.0f} % found"
            name = case.removeprefix("large ").removesuffix(" again")
            row = of_samples(f"{shape}: first token, {name}, {what} ({share})", "time", one["s"], "s", "lower")
            peer, theirs = peers.get(what, ("", None))
            if name == "shoal" and theirs is not None:
                row.peer, row.peer_value = peer, statistics.median(theirs["s"])
            elif name == "shoal" and what == "computed" and computed is not None:
                row.peer, row.peer_value = "no connector", computed
            if name == "shoal" and what != "computed" and computed is not None:
                row.target = computed
                row.met = row.value < computed
            rows.append(row)
    return rows


def main() -> int:
    if len(sys.argv) == 4:
        return child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    began = time.monotonic()
    out = Path(os.environ["SHOAL_RESULT"])
    cases = [case for case in (os.environ.get("SHOAL_VLLM_CASES") or ",".join(CASES)).split(",") if case]
    folder = Path(os.environ.get("SHOAL_VLLM_FOLDER") or tempfile.mkdtemp(prefix="shoal-vllm-"))
    folder.mkdir(parents=True, exist_ok=True)
    for left in FOLDERS:
        shutil.rmtree(folder / left, ignore_errors=True)
    print("staging memory of", STAGING >> 20, "MiB", flush=True)
    make_models(folder)
    entry_points(folder)
    invariant.found_by_vllm(folder / "invariant")
    found: dict[str, dict[str, Any]] = {}
    not_run = []
    rows: list[Row] = []
    for case in cases:
        if time.monotonic() - began > TIME_S:
            not_run.append(case)
            continue
        wait_until_free()
        got = run_case(case, folder, out.parent)
        if got is not None:
            found[case] = got
        rows = [*token_rows(found), *time_rows(found)]
        if rows:
            save_gpu(out, rows)
        slim = {case: {key: value for key, value in one.items() if key not in ("tokens", "digests")}
                for case, one in found.items()}  # fmt: skip
        (out.parent / "vllm_offload_found.json").write_text(json.dumps(slim, indent=1))
    for left in FOLDERS:
        shutil.rmtree(folder / left, ignore_errors=True)
    print("not run:", ", ".join(not_run) or "nothing", flush=True)
    return 0 if rows and all(found.get(case, {}).get("done") for case in cases if case not in not_run) else 1


def child(case: str, folder: Path, out: Path) -> int:
    if case == "norm":
        out.write_text(json.dumps(normalised()))
        return 0
    process = Process(case, folder)
    try:
        process.run()
        process.found["done"] = True
    finally:
        out.write_text(json.dumps(process.found))
    # What is queued for the disk is written, and the directory given up, as at the end of any engine.
    process.llm.llm_engine.engine_core.shutdown()
    say("done")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
