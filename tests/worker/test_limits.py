"""What can never fit is refused at once, with the numbers; what is not refused does fit."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from shoal.testing import simulated_memory
from shoal.worker import loading
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.errors import ApiError
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits, Room
from shoal.worker.spec import WorkerSpec

from .conftest import byte_tokenizer, llama
from .test_engine_causal import GREEDY, MIXED, small, tokens_of
from .test_main import start  # noqa: F401 - a fixture

MIB = 1 << 20
CONTEXT = 4096
LONG = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 4}


def longest(model, kv_mib, *, block_tokens, named="device_bytes"):
    """Ask for the longest that is allowed, on a device that has `kv_mib` beside the weights; the context it allows."""
    with simulated_memory("64MiB") as probe:
        weights = DeviceMemory(probe).place(model)
    total = weights + kv_mib * MIB
    model = type(model)(model.config).eval()
    spec = WorkerSpec(
        source="x", threads=1, block_tokens=block_tokens, stall_timeout_s=60.0, kv_max_bytes=256 * MIB, **{named: total}
    )
    with simulated_memory(total) as mem:
        memory = DeviceMemory(mem)
        layout = KvLayout.of(model.config, model.dtype, block_tokens)
        limits = CausalLimits.of(layout, CONTEXT, spec, Room.of(spec, memory.place(model)))
        engine = CausalEngine(model, memory, spec, limits)
        engine.start()

        async def run():
            context = engine.limits.context_tokens
            started = time.monotonic()
            with pytest.raises(ApiError) as caught:
                engine.submit([7] * (context - 3), GREEDY, 4)
            assert time.monotonic() - started < 30, "at once, and not when it stalls"
            assert len(await asyncio.wait_for(tokens_of(engine, [7] * (context - 3), 3), 60)) == 3
            return context, str(caught.value)

        try:
            context, message = asyncio.run(run())
        finally:
            engine.stop()
    room = Room.of(spec, weights)
    assert room.kv == kv_mib * MIB
    assert limits.kv_bytes(context) <= room.kv < limits.kv_bytes(context + 1), "not a token less than fits"
    assert f"is {context} tokens here, where device memory sets it (the model's own is {CONTEXT})" in message
    assert f"{context + 1} tokens need {limits.kv_bytes(context + 1)} bytes of KV cache" in message
    assert f"{total} bytes, {room.kv} are left beside {weights} of weights" in message
    return context, message


@pytest.mark.parametrize(("kv_mib", "block_tokens"), [(4, 16), (12, 16), (12, 256)])
def test_the_longest_request_that_is_allowed_fits(kv_mib, block_tokens):
    context, _ = longest(llama(**LONG), kv_mib, block_tokens=block_tokens)
    token_bytes = 2 * 4 * 4 * 64 * 4
    assert context >= (kv_mib - 2) * MIB // token_bytes - 3 * block_tokens, "only the padding's page is lost"


def test_layers_with_a_window_need_less():
    sizes = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 4, "head_dim": 64}
    windowed, _ = longest(small("Gemma3", **(MIXED | sizes)), 8, block_tokens=16)
    full, _ = longest(llama(**LONG), 8, block_tokens=16)
    assert windowed > 1.5 * full


def test_the_message_names_what_sets_the_limit():
    _, message = longest(llama(**LONG), 4, block_tokens=16)
    assert "of the device's budget" in message
    _, message = longest(llama(**LONG), 4, block_tokens=16, named="device_bytes_max")
    assert "of the model's max" in message


def test_memory_that_the_process_takes_meanwhile_counts():
    spec = WorkerSpec(source="x", device="cuda:0", device_bytes=900 * MIB, overhead_bytes=800 * MIB)
    layout = KvLayout.of(llama(**LONG).config, llama().dtype, 16)
    limits = CausalLimits.of(layout, CONTEXT, spec, Room.of(spec, 90 * MIB, 700 * MIB))
    assert limits.room == Room(900 * MIB, "the device's budget", 90 * MIB, 800 * MIB)
    assert limits.with_overhead(790 * MIB) is limits
    later = limits.with_overhead(804 * MIB)
    assert later.context_tokens < limits.context_tokens < CONTEXT
    assert (later.blocks, later.own_tokens) == (limits.blocks, CONTEXT)
    none = limits.with_overhead(880 * MIB)
    assert none.context_tokens == 1
    with pytest.raises(ApiError, match=r"0 are left beside 94371840 of weights and 922746880 of overhead"):
        none.check(1, 1)


def test_without_a_limit_the_models_own_counts():
    spec = WorkerSpec(source="x")
    assert Room.of(spec, MIB) is None
    limits = CausalLimits.of(KvLayout.of(llama(**LONG).config, llama().dtype, 16), CONTEXT, spec)
    assert limits.context_tokens == CONTEXT
    with pytest.raises(ApiError) as caught:
        limits.check(CONTEXT, None, "messages")
    assert str(caught.value).startswith(f"This model's maximum context length is {CONTEXT} tokens. However, you requ")
    assert caught.value.param == "messages"


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("long")
    llama(**LONG).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_worker_refuses_at_once_what_its_server_can_never_give(long_dir, start):  # noqa: F811
    files = loading.inspect(long_dir)
    weights = -(-files.bytes // (2 * MIB)) * 2 * MIB
    worker = start(long_dir, budget=weights + 6 * MIB, kv_max_bytes=64 * MIB)
    context = worker.ready()["context_tokens"]
    assert 400 < context < 760
    started = time.monotonic()
    status, answer = worker.post("completions", {"prompt": "x" * 300, "max_tokens": context - 299})
    assert time.monotonic() - started < 5
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert re.search(rf"is {context} tokens here.*{weights + 6 * MIB} bytes, {6 * MIB} are left", str(answer))
    assert worker.broker.leased == {"weights": 0, "kv": 0, "overhead": 0}, "nothing was woken for it"
    for ask in ({"max_tokens": context - 300}, {}):
        status, answer = worker.post("completions", {"prompt": "x" * 300, "ignore_eos": True, "temperature": 0} | ask)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == context - 300, "without max_tokens it ends where memory does"
