"""Prompts that share their beginnings, with sliding windows and without, on a GPU whose memory is short and taken away.

What `tests/worker/test_prefixes.py` and `test_compaction.py` show on the simulated device, with real kernels and
copies: each answer is, token by token, what plain `generate()` gives there, while the cache grows and shrinks, its
limit moves, all of its memory goes to the host, what is only cached is evicted, and blocks are moved together between
steps. Run by `tests/gpu/run.sh python`; needs transformers.
"""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shoal import MemoryManager

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MIB = 1 << 20
TOKENS, ROUNDS, AT_ONCE, CALM_ROUNDS = 20, 8, 8, 4
SIZES = {
    "vocab_size": 257, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0,
}  # fmt: skip
MIXED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2}
# All layers see everything; every second layer looks back 20 tokens; all of them look back 40.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {}),
    "Gemma3": ("Gemma3Text", MIXED),
    "Qwen2": ("Qwen2", MIXED | {"use_sliding_window": True}),
    "Mistral": ("Mistral", {"sliding_window": 40}),
}
STEMS = [[random.Random(seed).randrange(1, 257) for _ in range(length)] for seed, length in enumerate((120, 70, 33))]
PROMPTS = [
    [*stem[:keep], *(random.Random(100 * at + keep).randrange(1, 257) for _ in range(end))]
    for at, stem in enumerate(STEMS)
    for keep, end in ((len(stem), 1), (len(stem), 9), (len(stem) // 2, 20), (32, 0))
]


def model_of(family: str) -> Any:
    config, options = FAMILIES[family]
    torch.manual_seed(6)
    made = getattr(transformers, f"{config}Config")(**(SIZES | options))
    return getattr(transformers, f"{family}ForCausalLM")(made).eval()


def plain(family: str, device: str) -> list[list[int]]:
    """What `generate()` gives for each prompt, with all of the model there and no cache of ours."""
    model = model_of(family).to(device)
    model.set_attn_implementation("sdpa")
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def disturb(mem: MemoryManager, cache: Any, stop: threading.Event) -> set[int]:
    """Take memory from a cache at random until told to stop; give how many bytes were mapped in between."""
    draw, mapped = random.Random(1), set()
    acts = (
        lambda: mem.reclaim(2 * MIB),
        lambda: mem.reclaim(1 << 40),
        lambda: cache.set_limit(draw.choice((4, 6, 8, 32)) * MIB),
        lambda: cache.trim(cached=True),
    )
    while not stop.wait(0.01):
        draw.choice(acts)()
        mapped.add(cache.usage()["mapped"])
    cache.set_limit(32 * MIB)
    return mapped


def check(family: str, mem_of: Any, device: str, wanted: list[list[int]], is_moving: bool) -> int:
    """Ask for all of it, several at a time, with memory going and coming; give how many blocks were moved."""
    from shoal.worker.device import DeviceMemory
    from shoal.worker.engine_causal import CausalEngine
    from shoal.worker.kv import KvLayout
    from shoal.worker.limits import CausalLimits
    from shoal.worker.sampling import Sampling
    from shoal.worker.spec import WorkerSpec

    model = model_of(family)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    mem = mem_of(-(-weights // (2 * MIB)) * 2 * MIB + 10 * MIB)
    memory = DeviceMemory(mem)
    spec = WorkerSpec(
        source="x", threads=1, kv_max_bytes=32 * MIB, batch_tokens_max=48, stall_timeout_s=60.0, block_tokens=16
    )
    memory.place(model)
    layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
    engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))
    kv = memory._kv
    assert kv is not None
    cache, compact, moved = kv.cache, kv.compact, 0

    def counting() -> dict[int, int]:
        nonlocal moved
        moves = compact()
        moved += len(moves)
        return moves

    kv.compact = counting  # type: ignore[method-assign]
    engine.start()

    async def ask(index: int, length: int = TOKENS) -> int:
        generation = engine.submit(PROMPTS[index], Sampling(temperature=0.0), length)
        answer = [token async for tokens in generation for token in tokens]
        said = f"{family}, prompt {index}, {generation.cached_tokens} tokens of it were cached"
        assert answer == wanted[index][:length], said
        return generation.cached_tokens

    async def nobody_owns() -> None:
        deadline = time.monotonic() + 60
        while engine.kv_bytes()[1]:
            assert time.monotonic() < deadline, "blocks stay owned"
            await asyncio.sleep(0.02)

    async def run() -> None:
        draw, cached = random.Random(2), 0
        for _ in range(CALM_ROUNDS if is_moving else 0):
            # Some end early and leave holes between the others.
            asked = [ask(draw.randrange(len(PROMPTS)), draw.choice((2, TOKENS))) for _ in range(2 * AT_ONCE)]
            await asyncio.wait_for(asyncio.gather(*asked), 120)
        stop = threading.Event()
        with ThreadPoolExecutor(1, "disturbs") as beside:
            disturbing = beside.submit(disturb, mem, cache, stop)
            try:
                for _ in range(ROUNDS):
                    asked = [ask(draw.randrange(len(PROMPTS))) for _ in range(AT_ONCE)]
                    cached += sum(await asyncio.wait_for(asyncio.gather(*asked), 120))
            finally:
                stop.set()
        assert len(disturbing.result()) > 1, "it neither grew nor shrank"
        # One after another with nobody there: what the first has left the second finds, to the block.
        await nobody_owns()
        cache.forget_all()
        told = [await ask(index) for index in (1, 0, 1)]
        assert told[0] == 0
        assert min(told[1:]) >= 112, f"{told} of {len(STEMS[0])} tokens that were there before were found"
        # Evicted is evicted: nothing of it is found, and the answers are the same.
        await nobody_owns()
        mem.reclaim(1 << 40)
        assert [await ask(index) for index in (4, 0)] == [0, 0]
        assert cached > 0, "nothing was found while memory came and went"

    try:
        asyncio.run(run())
    finally:
        engine.stop()
    stats = cache.prefix_stats()
    assert min(stats["stored"], stats["removed"]) > 0, stats
    cache.check()
    assert mem.usage()["evicted"] > 0
    return moved


@pytest.mark.parametrize("is_moving", [False, True], ids=["", "moving"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_share_are_answered_as_generate_does(
    family: str, is_moving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shoal
    from shoal.worker import device, engine_causal

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(engine_causal, "_GUARD_S", 1.0)
    if is_moving:
        # Whatever lies between blocks is worth moving them, before each step.
        monkeypatch.setattr(engine_causal, "_COMPACT_S", 0.0)
        monkeypatch.setattr(device, "_SCATTERED_BYTES_MIN", 1)
        monkeypatch.setattr(device, "_SCATTERED_PART", 1 << 30)
    manager = functools.partial(shoal.MemoryManager, "cuda:0", host_budget="1GiB")
    wanted = plain(family, "cuda:0")
    moved = check(family, lambda nbytes: manager(device_budget=nbytes), "cuda:0", wanted, is_moving)
    assert moved > 0 or not is_moving
    torch.cuda.synchronize()
