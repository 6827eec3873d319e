"""How soon the first token comes when a prompt's first 1,024 tokens were computed before, in the worker's own engine.

A small Llama (48 MiB in float32) on the simulated device, one request at a time, through the engine's queue and thread:
no HTTP. The ceiling of a hit is a prompt of only the tokens that a hit still has to compute: work that nothing saves.
Each prompt has a stem of its own, asked for twice: first it misses, then it hits. `python -m benches.prefix_first_token
[--quick]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benches.results import of_samples, save
from shoal.testing import simulated_memory
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.sampling import Sampling
from shoal.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from benches.results import Row

STEM, END = 1024, 16
CONTEXT = 2048
VOCABULARY = 1024


def model(context: int = CONTEXT) -> LlamaForCausalLM:
    """Make the model, for so many tokens: seeded, the same in every run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=context, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


async def first_token(engine: CausalEngine, prompt: list[int]) -> tuple[float, int]:
    """Give the seconds to a prompt's first token, and how much of it was found."""
    start = time.perf_counter()
    generation = engine.submit(prompt, Sampling(temperature=0.0), 1)
    async for _ in generation:
        return time.perf_counter() - start, generation.cached_tokens
    raise RuntimeError("there was no token")


async def measure(engine: CausalEngine, rounds: int) -> dict[str, list[float]]:
    """Ask in turn for what misses, what hits, and what has no stem."""
    draw = random.Random(1)  # noqa: S311 - made-up prompts

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(count)]

    seconds: dict[str, list[float]] = {"miss": [], "hit": [], "no stem": []}
    for number in range(rounds + 1):
        stem = tokens(STEM)
        for case, prompt, expected in (
            ("miss", [*stem, *tokens(END)], 0),
            ("hit", [*stem, *tokens(END)], STEM),
            ("no stem", tokens(END), 0),
        ):
            taken, found = await first_token(engine, prompt)
            if found != expected:
                raise RuntimeError(f"{case}: {found} tokens were found, not {expected}")
            if number:  # the first round brings the weights
                seconds[case].append(taken)
    return seconds


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and nothing is written")
    options = parser.parse_args()
    with simulated_memory("512MiB") as mem:
        spec = WorkerSpec(source="x", kv_max_bytes=128 << 20)
        torch.set_num_threads(spec.threads)
        memory, llama = DeviceMemory(mem), model()
        memory.place(llama)
        layout = KvLayout.of(llama.config, llama.dtype, spec.block_tokens)
        engine = CausalEngine(llama, memory, spec, CausalLimits.of(layout, CONTEXT, spec))
        engine.start()
        try:
            seconds = asyncio.run(measure(engine, 3 if options.quick else 30))
        finally:
            engine.stop()
    of = {case: of_samples(case, "first token", values, "s", "lower") for case, values in seconds.items()}
    hit = of["hit"]
    hit.case = f"{STEM} of {STEM + END} tokens cached"
    hit.ceiling, hit.peer, hit.peer_value = of["no stem"].value, "without the cache", of["miss"].value
    of["miss"].case, of["no stem"].case = f"{STEM + END} tokens, none cached", f"{END} tokens, alone"
    rows: list[Row] = [hit, of["miss"], of["no stem"]]
    if options.quick:
        for row in rows:
            print(row.line())
    else:
        save("prefix_first_token", rows)


if __name__ == "__main__":
    main()
