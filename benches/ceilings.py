"""What the machine and plain transformers do without Shoal, measured in the same run as what they are held against."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

# As the workers have it, so that the peer is not the slower for threads that spin; read as torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def memcpy_s(nbytes: int, repeats: int = 7) -> list[float]:
    """Copy as many bytes between two touched buffers, as fast as this machine does it on one thread."""
    source, target = ctypes.create_string_buffer(nbytes), ctypes.create_string_buffer(nbytes)
    ctypes.memset(source, 1, nbytes)
    ctypes.memset(target, 2, nbytes)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ctypes.memmove(target, source, nbytes)
        times.append(time.perf_counter() - start)
    return times


def plain_first_token_s(path: Path, prompt: str, repeats: int) -> list[float]:
    """Plain transformers, model loaded: tokenise, prefill, one token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
        times.append(time.perf_counter() - start)
    return times[2:]


def plain_tokens_per_s(paths: Sequence[Path], prompt: str, batch: int, tokens: int, seconds: float) -> float:
    """Plain transformers, all models loaded in one process: batches of `batch` equal prompts, model after model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    loaded = [
        (AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
        for path in paths
    ]

    def generate(number: int) -> int:
        tokenizer, model = loaded[number % len(loaded)]
        ids = torch.tensor([tokenizer(prompt).input_ids] * batch)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return batch * (out.shape[1] - ids.shape[1])

    for number in range(len(loaded)):
        generate(number)
    made, number, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds or number % len(loaded):
        made += generate(number)
        number += 1
    return made / (time.perf_counter() - start)
