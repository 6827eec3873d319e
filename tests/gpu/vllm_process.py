"""One engine of vLLM's in a process of its own, stock or on Shoal: what `tests/gpu/vllm_part.py` starts.

    python3 -m tests.gpu.vllm_process CASE MODEL OUT.json

It writes what it generated and measured; who compares is the parent. Each prompt is a list of token numbers, so no
tokenizer is needed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GIB = 1 << 30
PROMPTS = 160
TOKENS = 40
BURST_BYTES = 640 << 20
SLEEPS = 4


def say(*words: object) -> None:
    print(f"[{time.perf_counter():8.2f}]", *words, flush=True)


def used_bytes() -> int:
    """Device memory that is in use, as the driver shows it to everyone."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(asked.stdout.split()[0]) << 20


def prompts() -> list[list[int]]:
    """Make the prompts, the same in each process: half of them begin as another one does."""
    chance = random.Random(7)
    beginnings = [[chance.randrange(10, 31000) for _ in range(chance.randrange(64, 400))] for _ in range(8)]
    made = []
    for number in range(PROMPTS):
        own = [chance.randrange(10, 31000) for _ in range(chance.randrange(16, 400))]
        made.append(chance.choice(beginnings) + own if number % 2 else own)
    return made


class Process:
    """The engine, and what was measured of it."""

    def __init__(self, case: str, model: str) -> None:
        import torch

        from vllm import LLM, SamplingParams

        self.torch = torch
        self.case = case
        self.is_shoal = case.startswith("shoal")
        self.is_large = "large" in case
        self.found: dict[str, Any] = {"case": case, "tokens": {}, "baseline": used_bytes()}
        options: dict[str, Any] = {
            "model": model, "skip_tokenizer_init": True, "seed": 0, "max_model_len": 4096,
            "enable_prefix_caching": True, "disable_log_stats": False, "enforce_eager": "eager" in case,
            "kv_cache_memory_bytes": (16 if self.is_large else 6) * GIB,
            "load_format": "dummy" if self.is_large else "auto",
        }  # fmt: skip
        if not self.is_shoal and "eager" not in case:
            options["enable_sleep_mode"] = True
        if not options["enforce_eager"]:
            options["compilation_config"] = {
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
                # Else the compiler chooses kernels by how long they take, so two compilations give other tokens.
                "inductor_compile_config": {"combo_kernels": False, "benchmark_combo_kernel": False},
            }
        began = time.perf_counter()
        self.llm = LLM(**options)
        self.found["start_s"] = time.perf_counter() - began
        say(case, "started in", round(self.found["start_s"], 1), "s")
        self.sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
        self.prompts = prompts()

    def generate(self, name: str, order: list[int] | None = None) -> float:
        """Generate for all prompts in some order; keep the tokens in the prompts' own order."""
        order = list(range(len(self.prompts))) if order is None else order
        began = time.perf_counter()
        made = self.llm.generate(
            [{"prompt_token_ids": self.prompts[at]} for at in order], self.sampling, use_tqdm=False
        )
        seconds = time.perf_counter() - began
        tokens: list[list[int]] = [[] for _ in self.prompts]
        cached = 0
        for at, one in zip(order, made, strict=True):
            tokens[at] = list(one.outputs[0].token_ids)
            cached += one.num_cached_tokens or 0
        self.cached = cached
        self.found["tokens"][name] = tokens
        say(name, round(seconds, 2), "s", len({token for one in tokens for token in one}), "different tokens")
        return seconds

    def shuffled(self, seed: int) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(seed).shuffle(order)
        return order

    def metric(self, name: str) -> float:
        return sum(one.value for one in self.llm.get_metrics() if one.name == name)

    def usage(self) -> dict[str, Any]:
        return self.llm.collective_rpc("shoal_usage")[0]

    def link(self) -> dict[str, float]:
        """Bytes a second of long copies from and to page-locked memory of torch's; the engine sleeps."""
        torch = self.torch
        host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        rates = {}
        for way, (into, source) in {"up": (device, host), "down": (host, device)}.items():
            best = float("inf")
            for _ in range(5):
                torch.cuda.synchronize()
                began = time.perf_counter()
                into.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                best = min(best, time.perf_counter() - began)
            rates[way] = GIB / best
        del host, device
        torch.cuda.empty_cache()
        return rates

    def throughput(self) -> None:
        """Tokens a second with 32 requests of 256 tokens each that nobody had before."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=128, temperature=0, ignore_eos=True, detokenize=False)
        rates, single = [], []
        for turn in range(5):
            chance = random.Random(100 + turn)
            asked = [{"prompt_token_ids": [chance.randrange(10, 31000) for _ in range(256)]} for _ in range(32)]
            began = time.perf_counter()
            self.llm.generate(asked, sampling, use_tqdm=False)
            rates.append(32 * 128 / (time.perf_counter() - began))
            began = time.perf_counter()
            self.llm.generate(asked[:1], sampling, use_tqdm=False)
            single.append((time.perf_counter() - began) / 128)
        self.found["tokens_per_s"], self.found["s_per_token_alone"] = rates[1:], single[1:]
        say("tokens a second", [round(rate) for rate in rates], "alone", [round(1e3 * one, 2) for one in single], "ms")

    # Stock.

    def stock_sleeps(self) -> None:
        sleeps = []
        for turn in range(SLEEPS):
            before = self.torch.cuda.mem_get_info()[0]
            began = time.perf_counter()
            self.llm.sleep(level=1)
            slept = time.perf_counter() - began
            residual = used_bytes() - self.found["baseline"]
            freed = self.torch.cuda.mem_get_info()[0] - before
            began = time.perf_counter()
            self.llm.wake_up()
            self.torch.cuda.synchronize()
            woke = time.perf_counter() - began
            sleeps.append({"sleep_s": slept, "wake_s": woke, "residual": residual, "freed": freed})
            say("stock", sleeps[-1])
            if turn == 0 and not self.is_large:
                self.generate("after a sleep")
        self.found["sleeps"] = sleeps

    # On Shoal.

    def one_sleep(self, kv: str) -> dict[str, Any]:
        from shoal.vllm import resume, suspend

        began = time.perf_counter()
        asleep = suspend(self.llm, kv)
        slept = time.perf_counter() - began
        residual = used_bytes() - self.found["baseline"]
        usage = self.usage()
        if "link" not in self.found and "mp" not in self.case:
            self.found["link"] = self.link()
            self.found["asleep_usage"] = usage
            say("link", self.found["link"], "asleep", usage["torch"])
        began = time.perf_counter()
        awake = resume(self.llm)
        woke = time.perf_counter() - began
        one = {
            "kv": kv, "sleep_s": slept, "wake_s": woke, "residual": residual, "asleep": asleep, "awake": awake,
            "torch_reserved": usage["torch"]["reserved"], "torch_allocated": usage["torch"]["allocated"],
        }  # fmt: skip
        say("shoal", one)
        return one

    def shoal_sleeps(self) -> None:
        # The copy to the host that began after loading ends meanwhile, as it would while an engine serves.
        self.found["usage"] = self.usage()
        self.found["sleeps"] = [self.one_sleep("forget")]
        if not self.is_large:
            self.generate("after the first sleep", self.shuffled(1))
        for turn in range(SLEEPS - 1):
            time.sleep(0.5)
            self.found["sleeps"].append(self.one_sleep("forget"))
            if not self.is_large:
                self.generate(f"after sleep {turn + 2}", self.shuffled(turn + 2))
        for turn in range(2):
            self.found["sleeps"].append(self.one_sleep("keep"))
            if not self.is_large:
                self.generate(f"after keeping the cache {turn}", self.shuffled(turn + 10))
                self.found["hits_after_keeping"] = self.cached
        if not self.is_large:
            self.llm.sleep(level=1)
            self.llm.wake_up()
            self.generate("after vLLM's own sleep", self.shuffled(20))

    def elastic(self) -> None:
        """A burst, then nothing; a limit far under what the burst needs; all of it again."""
        from shoal.vllm import resume, suspend

        self.llm.reset_prefix_cache()
        time.sleep(4)
        kv = {"idle before": self.usage()["kv"]["mapped"]}
        self.generate("in a burst", self.shuffled(30))
        kv["after a burst"] = self.usage()["kv"]["mapped"]
        kv["shrunk by"] = self.llm.collective_rpc("shoal_kv_shrink", args=(GIB,))[0]
        kv["after shrinking"] = self.usage()["kv"]["mapped"]
        self.generate("after shrinking", self.shuffled(31))
        before = self.metric("vllm:num_preemptions")
        self.llm.collective_rpc("shoal_kv_limit", args=(BURST_BYTES,))
        kv["limit"] = BURST_BYTES
        self.generate("under a limit", self.shuffled(32))
        kv["mapped under a limit"] = self.usage()["kv"]["mapped"]
        suspend(self.llm, "keep")
        resume(self.llm)
        self.generate("under a limit, after a sleep", self.shuffled(33))
        kv["preemptions"] = self.metric("vllm:num_preemptions") - before
        self.llm.collective_rpc("shoal_kv_limit", args=(6 * GIB,))
        self.generate("without the limit", self.shuffled(34))
        kv["without the limit"] = self.usage()["kv"]["mapped"]
        self.llm.reset_prefix_cache()
        time.sleep(4)
        kv["idle after"] = self.usage()["kv"]["mapped"]
        self.found["kv"] = kv
        say("kv", kv)

    def run(self) -> None:
        if self.is_large:
            self.throughput()
        else:
            self.found["first_s"] = self.generate("first")
            self.found["second_s"] = self.generate("again", self.shuffled(0))
            if not self.is_shoal:
                for turn in range(1, 6):
                    if turn % 2:
                        self.llm.reset_prefix_cache()
                    self.generate(f"again, {turn}", self.shuffled(turn))
        if self.is_shoal:
            self.shoal_sleeps()
            if self.is_large:
                self.throughput()
            else:
                self.elastic()
        elif "eager" not in self.case:
            self.stock_sleeps()


def main() -> None:
    case, model, out = sys.argv[1:4]
    process = Process(case, model)
    try:
        process.run()
        process.found["done"] = True
    finally:
        Path(out).write_text(json.dumps(process.found))
    say("done")
    sys.stdout.flush()
    if "mp" in case:
        process.llm.llm_engine.engine_core.shutdown()
    # Whatever else an engine does at its end is not measured here.
    os._exit(0)


if __name__ == "__main__":
    main()
