"""What an engine leases to start, and what vLLM is told of it; the arguments that the server sets."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DeadlineError, LeaseError, RegionError
from shoal.vllm import serve
from shoal.vllm.shelf import Shelf
from shoal.vllm.start import DRIVER_BYTES, GRAPHS_BYTES, StartNeeds
from shoal.worker.spec import WorkerSpec

GIB, MIB = 1 << 30, 1 << 20


def config(path: Path | str, **changed: Any) -> Any:
    text = types.SimpleNamespace(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128_256, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    named = {"dtype": types.SimpleNamespace(itemsize=2), "enforce_eager": False, "hf_text_config": text, **changed}
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(model=path, **named),
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=256),
        cache_config=types.SimpleNamespace(block_size=16, kv_cache_memory_bytes=None, gpu_memory_utilization=0.92),
    )


def test_weights_are_counted_by_their_files_and_by_the_shape_where_there_are_none(tmp_path: Path) -> None:
    by_shape = StartNeeds.of(config(tmp_path), 100)
    assert 15 * GIB < by_shape.weights < 17 * GIB, "an 8B model in two bytes, and its graphs"
    (tmp_path / "a.safetensors").write_bytes(bytes(3 * MIB))
    (tmp_path / "b.safetensors").write_bytes(bytes(MIB))
    (tmp_path / "old.bin").write_bytes(bytes(64 * MIB))
    needs = StartNeeds.of(config(tmp_path), 100)
    assert 4 * MIB + GRAPHS_BYTES <= needs.weights <= 8 * MIB + GRAPHS_BYTES
    eager = StartNeeds.of(config(tmp_path, enforce_eager=True), 100)
    assert needs.weights - eager.weights == GRAPHS_BYTES
    blocks = 100 * 2 * 8 * 128 * 2 * 32 * 16
    assert needs.kv == 5 * 64 * MIB, "keys and values of a block of 16 tokens in 32 layers, by pages of all layers"
    assert 3 * 64 * MIB < blocks < 4 * 64 * MIB, "and one for vLLM's null block"
    assert needs.driver == DRIVER_BYTES
    assert StartNeeds.of(config(tmp_path), 100, on_gpu=False).overhead == 0


@given(room=st.integers(20, 80), total=st.integers(40, 141), part=st.floats(0.01, 1))
def test_neither_of_vllms_checks_can_fire(room: int, total: int, part: float) -> None:
    needs = StartNeeds(weights=15 * GIB, kv=GIB, driver=GIB, activations=2 * GIB)
    told = config("/none").cache_config
    free = int(total * GIB * part)
    needs.tell(told, room * GIB, total * GIB, free)
    assert 0 < told.gpu_memory_utilization <= 1
    assert total * GIB * told.gpu_memory_utilization <= max(free, total * GIB * 1e-4)
    # Given in bytes, the profiling does not look at what is free.
    assert needs.kv <= told.kv_cache_memory_bytes <= room * GIB - needs.weights - needs.overhead
    assert told.kv_cache_memory_bytes % (2 * MIB) == 0


def test_a_model_that_cannot_have_what_its_start_needs_says_so_with_figures() -> None:
    needs = StartNeeds(weights=15 * GIB, kv=GIB, driver=GIB, activations=2 * GIB)
    with pytest.raises(RegionError, match=rf"needs {19 * GIB} bytes to start .* can have {18 * GIB}") as caught:
        needs.cache(18 * GIB)
    assert caught.value.kind == "unsupported"


def test_what_the_server_says_of_a_model_is_said_in_vllms_words() -> None:
    spec = WorkerSpec("/m", dtype="bfloat16", context=4096, prefix_caching=False, device="cuda:1")
    said = serve.settings("ash", spec, "/m", "/run/worker-0.sock")
    pairs = dict(zip(said[::2], said[1::2], strict=False))
    assert pairs["--model"] == "/m"
    assert pairs["--served-model-name"] == "ash"
    assert pairs["--uds"] == "/run/worker-0.sock"
    assert (pairs["--max-model-len"], pairs["--dtype"]) == ("4096", "bfloat16")
    assert said[-1] == "--no-enable-prefix-caching"
    assert pairs["--middleware"] == "shoal.vllm.salt.CacheSalt"
    plain = serve.settings("ash", WorkerSpec("/m"), "/m", "/s")
    assert not {"--max-model-len", "--dtype", "--no-enable-prefix-caching"} & set(plain)


@pytest.mark.parametrize(
    ("visible", "device", "wanted"),
    [(None, "cuda:1", "1"), ("4,7", "cuda:1", "7"), ("GPU-a", "cuda:0", "GPU-a"), ("3", "sim", "3")],
)
def test_vllm_sees_the_servers_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, wanted: str
) -> None:
    import os

    # Remembered before it is changed, so that nothing of it stays.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    serve.choose_device(WorkerSpec("/m", device=device))
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == wanted


@pytest.mark.parametrize("refusal", [LeaseError("no", kind="denied"), DeadlineError("no", kind="lease_deadline")])
def test_what_a_start_had_not_foreseen_is_waited_for_with_empty_hands_whoever_ends_the_first_wait(
    refusal: Exception, tmp_path: Path
) -> None:
    """The server's no and the end of this side's own patience come within a millisecond of one another."""
    done: list[Any] = []

    class Memory:
        """An engine's, of which it is noted what is asked."""

        @property
        def mem(self) -> Memory:
            return self

        def lease_ahead(self, kind: str, nbytes: int, *, timeout_s: float, reason: str) -> None:
            done.append((kind, nbytes))
            if len(done) == 1:
                raise refusal

        def step_back(self) -> bool:
            done.append("back")
            return True

        def give_up_leases(self) -> None:
            done.append("given up")

        def wake(self) -> None:
            done.append("wake")

    needs = StartNeeds(weights=8 * MIB, kv=8 * MIB, driver=0, activations=0)
    shelf = Shelf(types.SimpleNamespace(path=str(tmp_path / "control.sock")), 1)  # type: ignore[arg-type]
    shelf.lease_kv(Memory(), needs, 12 * MIB)  # type: ignore[arg-type]
    assert done == [("kv", 4 * MIB), "back", "given up", ("weights", 8 * MIB), ("kv", 12 * MIB), "wake"]


def test_an_engine_hears_of_its_servers_end_whatever_becomes_of_the_lease_for_its_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leased: list[int] = []
    ended: list[int] = []

    class Memory:
        def __init__(self) -> None:
            self.mem = self

        def set_overhead(self, nbytes: int) -> None:
            leased.append(nbytes)
            raise LeaseError("the manager is closed")

    def wait_shutdown(_timeout_s: float) -> dict[str, str] | None:
        return {"reason": "the test ends it"} if leased else None

    client = types.SimpleNamespace(path=str(tmp_path / "control.sock"), connected=True, wait_shutdown=wait_shutdown)
    shelf = Shelf(client, 7)  # type: ignore[arg-type]
    shelf.memory, shelf._fixed = Memory(), 5 * MIB  # type: ignore[assignment]
    monkeypatch.setattr("shoal.vllm.shelf.os.kill", lambda process, _signal: ended.append(process))
    shelf._watch()
    assert (leased, ended) == ([5 * MIB], [7])
