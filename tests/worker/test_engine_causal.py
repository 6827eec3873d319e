"""The causal engine on ordinary memory: exactness, shortage, preemption, cancellation."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from shoal.worker.engine_causal import CausalEngine
from shoal.worker.errors import ApiError
from shoal.worker.kv import PADDING_BLOCKS, KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.memory import ShortageError
from shoal.worker.sampling import Sampling
from shoal.worker.spec import WorkerSpec

from .conftest import llama
from .plain import PlainMemory

GREEDY = Sampling(temperature=0.0)


def alone(model, prompt, count):
    """What plain transformers generates, with an attention mask of ones."""
    ids = torch.tensor([prompt])
    model.set_attn_implementation("sdpa")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def prompts(seed, count, longest=60):
    rng = random.Random(seed)
    return [[rng.randrange(1, 257) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@contextmanager
def engine_of(model, memory, **options):
    options = {"kv_max_bytes": 1 << 20, "stall_timeout_s": 20.0, "batch_tokens_max": 64} | options
    spec = WorkerSpec(source="x", **options)
    layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
    limits = CausalLimits.of(layout, model.config.max_position_embeddings, spec)
    engine = CausalEngine(model, memory, spec, limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def tokens_of(engine, prompt, count, sampling=GREEDY):
    generation = engine.submit(prompt, sampling, count)
    out = []
    try:
        async for tokens in generation:
            out += tokens
    finally:
        generation.cancel()
    return out


async def settled(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def test_greedy_is_what_generate_gives():
    model, asked = llama(), prompts(0, 6)
    expected = [alone(model, prompt, 20) for prompt in asked]
    with engine_of(model, PlainMemory()) as engine:

        async def run():
            return await asyncio.gather(*(tokens_of(engine, prompt, 20) for prompt in asked))

        assert asyncio.run(run()) == expected


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"num_hidden_layers": 1}])
def test_greedy_is_exact_for_other_shapes(options):
    model, asked = llama(3, **options), prompts(3, 3)
    expected = [alone(model, prompt, 10) for prompt in asked]
    with engine_of(model, PlainMemory()) as engine:

        async def run():
            return await asyncio.gather(*(tokens_of(engine, prompt, 10) for prompt in asked))

        assert asyncio.run(run()) == expected


def test_a_sliding_window_is_exact():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            sliding_window=24,
            initializer_range=0.2,
        )
    ).eval()
    asked = prompts(5, 3, longest=90)
    expected = [alone(model, prompt, 30) for prompt in asked]
    with engine_of(model, PlainMemory(), batch_tokens_max=32) as engine:

        async def run():
            return await asyncio.gather(*(tokens_of(engine, prompt, 30) for prompt in asked))

        assert asyncio.run(run()) == expected


def small(name, **options):
    import transformers

    sizes = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(6)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**(sizes | options))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MIXED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [("Qwen2", {}), ("Qwen3", {}), ("Phi3", {}), ("Gemma3", MIXED), ("Qwen2", MIXED | {"use_sliding_window": True})],
)
@pytest.mark.parametrize("blocks", [1 << 20, 30])
def test_other_families_are_exact(name, options, blocks):
    model = small(name, **options)
    asked = prompts(8, 4, longest=70)
    expected = [alone(model, prompt, 30) for prompt in asked]
    memory = PlainMemory(blocks_max=blocks)
    with engine_of(model, memory, batch_tokens_max=48) as engine:

        async def run():
            return await asyncio.gather(*(tokens_of(engine, prompt, 30) for prompt in asked))

        assert asyncio.run(run()) == expected


@pytest.mark.parametrize(("name", "options"), [("Qwen2", {}), ("Gemma3", MIXED)])
def test_a_step_that_ends_in_its_middle_is_made_good(name, options):
    """As where the rest of a wake does not come: layers have written their KV, and write it again."""
    model = small(name, **options)
    (prompt,) = prompts(10, 1, longest=90)
    assert len(prompt) > 64, "some steps read what steps before have written"
    expected = alone(model, prompt, 12)

    def last_states(cuts: set[int]) -> torch.Tensor:
        calls, states = iter(range(1000)), []

        def enter(*_) -> None:
            if next(calls) in cuts:
                raise ShortageError("the rest of a wake did not come")

        hooks = [
            model.model.layers[3].register_forward_pre_hook(enter),
            model.model.norm.register_forward_hook(lambda _module, _given, gave: states.append(gave[0, -1].clone())),
        ]
        try:
            # Nobody decodes while the prompt is computed, so its steps have four times as many tokens.
            with engine_of(model, PlainMemory(), batch_tokens_max=8) as engine:
                assert asyncio.run(tokens_of(engine, prompt, 12)) == expected
            assert next(calls) > 12 + len(cuts), "each was cut"
        finally:
            for hook in hooks:
                hook.remove()
        return states[-1]

    # Tokens alone would hide it: the last step's states are what it has read.
    torch.testing.assert_close(last_states({1, 4, 9, 15}), last_states(set()), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_cut_where_somebody_decodes_and_else_is_not():
    """Beside the bytes of a wake only one step is computed: what it leaves of a prompt comes after them."""
    model = llama()
    short, long = prompts(12, 1, longest=6)[0], prompts(10, 1, longest=90)[0]
    assert 32 < len(long) <= 4 * 32
    expected = alone(model, long, 4)
    with engine_of(model, PlainMemory(), batch_tokens_max=32) as engine:
        steps, compute, may_go_on = [], engine._compute, threading.Event()
        may_go_on.set()

        def computing() -> None:
            if steps:
                assert may_go_on.wait(60)
            steps.append(engine._processor.inputs_and_outputs.num_q_tokens)
            compute()

        engine._compute = computing

        async def run() -> None:
            assert await tokens_of(engine, long, 4) == expected
            assert max(steps) >= len(long) - 1, "alone it is one step"
            steps.clear()
            may_go_on.clear()
            decoding = engine.submit(short, GREEDY, 200, ignore_eos=True)
            assert await anext(decoding), "it decodes"
            generation = engine.submit(long, GREEDY, 4, salt="another, that finds nothing")
            may_go_on.set()
            assert [token async for tokens in generation for token in tokens] == expected
            decoding.cancel()

        asyncio.run(run())
        assert max(steps) <= 32, "the other one waits for no more than that"


@pytest.mark.parametrize("blocks", [9, 12, 20])
def test_shortage_preempts_and_changes_no_token(blocks):
    model, asked = llama(), prompts(7, 8, longest=40)
    expected = [alone(model, prompt, 40) for prompt in asked]
    memory = PlainMemory(blocks_max=blocks + PADDING_BLOCKS)
    with engine_of(model, memory) as engine:

        async def run():
            return await asyncio.gather(*(tokens_of(engine, prompt, 40) for prompt in asked))

        assert asyncio.run(run()) == expected
        assert memory.space.refusals > 0, "the memory was meant to be short"
        assert memory.space.peak <= blocks + PADDING_BLOCKS


def test_idle_gives_all_kv_back():
    model = llama()
    expected = alone(model, [1, 2, 3], 5)
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        assert memory.space.ids == set(), "starting takes no memory"

        async def run():
            await tokens_of(engine, [1, 2, 3], 5)
            await settled(lambda: not memory.space.ids)
            guards = memory.guards
            await asyncio.sleep(0.5)
            assert memory.guards == guards, "an idle engine enters no guard"
            assert await tokens_of(engine, [1, 2, 3], 5) == expected

        asyncio.run(run())


def test_the_end_of_the_last_request_is_said_at_once():
    with engine_of(llama(), PlainMemory()) as engine:
        said = []
        engine.on_idle = lambda: said.append(engine.counts().is_idle)

        async def run():
            await asyncio.gather(tokens_of(engine, [1, 2, 3], 8), tokens_of(engine, [4, 5], 2))
            assert said == [True], "once, and when nobody is left"
            with pytest.raises(ApiError):
                await tokens_of(engine, [], 2)
            await tokens_of(engine, [6], 2)
            assert said == [True, True]

        asyncio.run(run())


def test_memory_that_comes_late_is_waited_for():
    model = llama()
    expected = alone(model, [5, 6, 7], 8)
    memory = PlainMemory(blocks_max=0)
    with engine_of(model, memory) as engine:

        async def run():
            task = asyncio.create_task(tokens_of(engine, [5, 6, 7], 8))
            await asyncio.sleep(0.3)
            assert not task.done()
            memory.closed, memory.blocks_max = True, 100
            await asyncio.sleep(0.2)
            assert not task.done()
            memory.closed = False
            assert await task == expected

        asyncio.run(run())


def test_memory_that_never_comes_fails_the_request_and_not_the_engine():
    model = llama()
    expected = alone(model, [5, 6, 7], 8)
    memory = PlainMemory(blocks_max=PADDING_BLOCKS)
    with engine_of(model, memory, stall_timeout_s=0.4) as engine:

        async def run():
            with pytest.raises(ApiError, match=r"no device memory became free within 0.4 s") as caught:
                await tokens_of(engine, [5, 6, 7], 8)
            assert (caught.value.status, caught.value.code) == (503, "out_of_memory")
            memory.blocks_max = 100
            assert await tokens_of(engine, [5, 6, 7], 8) == expected

        asyncio.run(run())


def test_a_guard_that_never_comes_fails_a_prepared_batch_and_not_the_next():
    model = llama()
    expected = [alone(model, prompt, 8) for prompt in ([5, 6, 7], [8, 9])]
    memory = PlainMemory()
    memory.closed = True
    with engine_of(model, memory, stall_timeout_s=5) as engine:

        async def run():
            first = asyncio.create_task(tokens_of(engine, [5, 6, 7], 8))
            await settled(lambda: engine._prepared)
            await asyncio.sleep(2)  # so that the other's time is not over with its own
            second = asyncio.create_task(tokens_of(engine, [8, 9], 8))
            with pytest.raises(ApiError, match="no device memory"):
                await first
            memory.closed = False
            assert await second == expected[1]
            assert await tokens_of(engine, [5, 6, 7], 8) == expected[0]
            await settled(lambda: not memory.space.ids)

        asyncio.run(run())


def test_a_step_that_waits_for_its_weights_does_not_say_what_computing_takes():
    memory = PlainMemory()
    memory.beside_wakes = True
    with engine_of(llama(), memory) as engine:

        async def run():
            await tokens_of(engine, [1] * 50, 3)
            assert memory.computed == []
            memory.beside_wakes = False
            await tokens_of(engine, [2] * 50, 3)
            assert memory.computed == [50, 1, 1]
            assert memory.sizes[0] == 50
            assert memory.sizes[-1] == 1

        asyncio.run(run())


def test_cancelling_frees_the_blocks():
    model = llama()
    memory = PlainMemory()
    with engine_of(model, memory) as engine:

        async def run():
            generation = engine.submit([1] * 50, GREEDY, 150)
            await anext(generation)
            assert memory.space.ids
            generation.cancel()
            await settled(lambda: not memory.space.ids)
            assert engine.counts().running == engine.counts().waiting == 0

        asyncio.run(run())


def test_a_cancelled_survivor_of_a_preemption_does_not_block_the_rest():
    """transformers blocks new requests after a preemption until an active one finishes; a cancelled one never does."""
    model, asked = llama(), [[1] * 30, [2] * 30]
    expected = alone(model, asked[1], 60)
    memory = PlainMemory(blocks_max=8 + PADDING_BLOCKS)
    with engine_of(model, memory) as engine:

        async def run():
            first = engine.submit(asked[0], GREEDY, 200)
            second = asyncio.create_task(tokens_of(engine, asked[1], 60))
            await settled(lambda: engine._processor.scheduler.block_new_requests)
            first.cancel()
            assert await asyncio.wait_for(second, 20) == expected

        asyncio.run(run())


def test_a_failing_step_fails_its_requests_and_not_the_engine(monkeypatch):
    model = llama()
    expected = alone(model, [9, 8], 6)
    memory = PlainMemory()
    with engine_of(model, memory) as engine:

        def broken(*_):
            raise RuntimeError("the device fell over")

        async def run():
            with monkeypatch.context() as patch:
                patch.setattr(engine, "_compute", broken)
                with pytest.raises(ApiError, match="the device fell over") as caught:
                    await tokens_of(engine, [9, 8], 6)
                assert caught.value.status == 500
            await settled(lambda: not memory.space.ids)
            assert await tokens_of(engine, [9, 8], 6) == expected

        asyncio.run(run())


def test_too_long_is_refused_with_numbers():
    with engine_of(llama(), PlainMemory()) as engine:

        async def run():
            with pytest.raises(ApiError, match=r"maximum context length is 256 tokens.*300 in the prompt") as caught:
                engine.submit([1] * 300, GREEDY, 1)
            assert caught.value.code == "context_length_exceeded"

        asyncio.run(run())


def test_the_longest_request_fits_into_the_smallest_cache():
    model = llama()
    layout = KvLayout.of(model.config, model.dtype, 16)
    blocks = 6
    with engine_of(model, PlainMemory(), kv_max_bytes=(blocks + PADDING_BLOCKS) * layout.block_bytes) as engine:
        context = engine.limits.context_tokens
        assert context == (blocks - 2) * 16

        async def run():
            assert len(await asyncio.wait_for(tokens_of(engine, [3] * (context - 10), 10), 20)) == 10
            assert len(await asyncio.wait_for(tokens_of(engine, [3], context - 1), 20)) == context - 1

        asyncio.run(run())


def test_one_request_too_many_is_refused():
    with engine_of(llama(), PlainMemory(), requests_max=2) as engine:

        async def run():
            held = [engine.submit([1], GREEDY, 200) for _ in range(2)]
            with pytest.raises(ApiError) as caught:
                engine.submit([1], GREEDY, 5)
            assert caught.value.status == 429
            for generation in held:
                generation.cancel()

        asyncio.run(run())


def test_stopping_fails_what_runs():
    with engine_of(llama(), PlainMemory()) as engine:

        async def run():
            generation = engine.submit([1], GREEDY, 200)
            await anext(generation)
            await asyncio.to_thread(engine.stop)
            with pytest.raises(ApiError, match="shutting down"):
                async for _ in generation:
                    pass

        asyncio.run(run())
