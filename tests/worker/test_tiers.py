"""The worker's tiers below the device, where something goes wrong in the thread that opens them."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import shoal
import shoal.testing
from shoal.worker import loading, stamps, tiers
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.spec import DiskShare, RemoteShare, WorkerSpec
from shoal.worker.stamps import Stamp

from .conftest import llama
from .test_engine_causal import GREEDY, alone

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

FACTS = {"model": "a"}
WEIGHED = ("config.json", "model.safetensors")


def until(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def cache_of(mem: shoal.MemoryManager) -> shoal.KvCache:
    return mem.kv_cache(layers=2, kv_heads=4, head_dim=512, dtype="float16", max_bytes="8MiB")


def shares(where: Path) -> list[DiskShare]:
    return [DiskShare(str(where), 64 << 20, None)]


def is_free(where: Path) -> bool:
    """Whether a directory can be had."""
    try:
        shoal.DiskTier([(where, "64MiB")]).close(60)
    except shoal.TierError as error:
        assert error.kind == "in_use"
        return False
    return True


def mem() -> AbstractContextManager[shoal.MemoryManager]:
    return shoal.testing.simulated_memory("64MiB", host_budget="64MiB")


def brought(below: tiers.KvBelow, tokens: list[int]) -> list[int]:
    """What comes of a sequence."""
    loading = below.begin_load(tokens, 0, "")
    if loading is None:
        return []
    assert loading.wait(60)
    ids = loading.take()
    assert ids is not None
    return ids


def reasons(below: tiers.KvBelow) -> list[Any]:
    return [told["reason"] for told in below.figures()]


def test_whatever_is_raised_is_told(tmp_path: Path) -> None:
    def facts() -> dict[str, str]:
        raise RuntimeError("a config like no other")

    with mem() as memory:
        below = tiers.KvBelow(cache_of(memory), 8 << 20, shares(tmp_path / "kv"), facts)
        until("it is told", lambda: all("a config like no other" in str(reason) for reason in reasons(below)))
        assert len(reasons(below)) == 2
        below.close()


def test_directories_that_open_too_late_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, may_open = threading.Event(), threading.Event()

    def slow(*arguments: Any, **words: Any) -> shoal.DiskTier:
        opening.set()
        assert may_open.wait(60)
        return shoal.DiskTier(*arguments, **words)

    monkeypatch.setattr(tiers, "DiskTier", slow)
    monkeypatch.setattr(tiers, "_CLOSE_S", 0.1)
    with mem() as memory:
        below = tiers.KvBelow(cache_of(memory), 8 << 20, shares(tmp_path / "kv"), lambda: FACTS)
        assert opening.wait(60)
        below.close()
        may_open.set()
        below._thread.join(60)
        assert not below._thread.is_alive()
        until("the directory is free", lambda: is_free(tmp_path / "kv"))
        assert below._tier is None


def test_a_directory_that_is_of_no_use_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mem() as memory:
        kv = cache_of(memory)

        def refused(*_arguments: Any, **_words: Any) -> Any:
            raise ValueError("no thread for it")

        monkeypatch.setattr(type(kv), "attach_store", refused)
        below = tiers.KvBelow(kv, 0, shares(tmp_path / "kv"), lambda: FACTS)
        until("it is told", lambda: "no thread for it" in str(reasons(below)))
        until("the directory is free", lambda: is_free(tmp_path / "kv"))
        below.close()


def test_what_was_learned_stays_known_as_a_disk_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_open = threading.Event()

    def slow(*arguments: Any, **words: Any) -> shoal.DiskTier:
        assert may_open.wait(60)
        return shoal.DiskTier(*arguments, **words)

    monkeypatch.setattr(tiers, "DiskTier", slow)
    tokens = list(range(160))
    with mem() as memory:
        kv = cache_of(memory)
        below = tiers.KvBelow(kv, 32 << 20, shares(tmp_path / "kv"), lambda: FACTS, 60.0, chooses=True)
        until("host memory is in use", lambda: reasons(below)[0] is None)
        ids = kv.groups[0].alloc(10)
        assert ids is not None
        kv.seal(tokens, ids)
        below.save(tokens, 0, "")
        assert below._tier is not None
        assert below._tier.flush(60)
        kv.groups[0].free(ids)
        kv.forget_all()
        assert below.load_us_per_mib() is None
        ids = brought(below, tokens)
        assert len(ids) == 10, "nobody knows yet what computing takes"
        assert (below.load_us_per_mib() or 0) > 0
        kv.groups[0].free(ids)
        kv.forget_all()
        below.computed(160, 1e-9)
        for _ in range(16):
            below.computed(160, 1e-9)
        before = below._tier
        may_open.set()
        until("the disk is in use", lambda: reasons(below) == [None, None])
        assert below._tier is not before
        assert (below.load_us_per_mib() or 0) > 0, "the other one's load"
        # An engine that takes no time is faster by too little for so few blocks; that it was measured is said.
        ids = brought(below, tokens)
        assert "nobody knows" not in str(below.figures()[0]["choice"])
        assert "tokens are computed" in str(below.figures()[0]["choice"])
        kv.groups[0].free(ids)
        below.close()


def test_what_a_worker_computed_another_one_finds_on_the_remote(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("07" * 32)
    key.chmod(0o600)
    share, tokens = RemoteShare(str(tmp_path / "remote"), str(key)), list(range(160))
    for number, (host, disks) in enumerate(((0, []), (32 << 20, shares(tmp_path / "kv")))):
        with mem() as memory:
            kv = cache_of(memory)
            below = tiers.KvBelow(kv, host, disks, lambda: FACTS, 60.0, remote=share)
            until("all are in use", lambda below=below: not any(reasons(below)))
            ids = brought(below, tokens)
            assert len(ids) == (0 if number == 0 else 10)
            if number == 0:
                ids = kv.groups[0].alloc(10)
                kv.seal(tokens, ids)
                below.save(tokens, 0, "")
                assert below._tier is not None
                assert below._tier.flush(60)
            told = {figures["tier"]: figures for figures in below.figures()}
            if number == 0:
                assert list(told) == ["remote"]
                assert (told["remote"]["saved"], told["remote"]["looked_up"]) == (10, 10)
            else:
                assert list(told) == ["host", "disk", "remote"]
                assert (told["remote"]["loaded"], told["remote"]["looked_up"]) == (10, 10)
                assert told["host"]["looked_up"] == 10
                assert (told["remote"]["saved"], told["remote"]["late"], told["host"]["loaded"]) == (0, 0, 0)
            kv.groups[0].free(ids)
            below.close()


def test_a_lone_disk_tells_what_it_did(tmp_path: Path) -> None:
    tokens = list(range(320))
    with mem() as memory:
        kv = cache_of(memory)
        below = tiers.KvBelow(kv, 0, shares(tmp_path / "kv"), lambda: FACTS, 60.0)
        until("the disk is in use", lambda: reasons(below) == [None])
        ids = kv.groups[0].alloc(20)
        assert ids is not None
        kv.seal(tokens, ids)
        below.save(tokens, 0, "")
        assert below._tier is not None
        assert below._tier.flush(60)
        kv.groups[0].free(ids)
        kv.forget_all()
        ids = brought(below, tokens)
        assert len(ids) == 20
        kv.groups[0].free(ids)
        (told,) = below.figures()
        assert (told["tier"], told["saved"], told["unsaved"], told["late"]) == ("disk", 20, 0, 0)
        assert (told["loaded"], told["looked_up"], told["failed"]) == (20, 20, 0)
        assert told["load_us"] > 0
        assert below.prefetch(tokens, "") is None, "nothing is faster than the disk"
        below.close()


def test_a_remote_that_cannot_be_had_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    with mem() as memory:
        share = RemoteShare("/nowhere", str(tmp_path / "none"))
        below = tiers.KvBelow(cache_of(memory), 8 << 20, [], lambda: FACTS, remote=share)
        until("host memory is in use", lambda: reasons(below)[0] is None)
        assert "no key in" in str(reasons(below)[1])
        host, remote = below.figures()
        assert {"late", "failed", *tiers._TIMES} <= host.keys(), "what is not there hides what is"
        assert "late" not in remote
        below.close()


def stamps_of(where: Path) -> dict[Path, Stamp]:
    return {path: Stamp.of(path.stat()) for path in where.iterdir()}


def replaced(path: Path) -> None:
    """Another file of as many bytes and the same time takes the name."""
    other, stat = path.with_suffix(".new"), path.stat()
    other.write_bytes(b"x" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def written(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def appended(path: Path) -> None:
    stat = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("by_content", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [replaced, written, appended])
def test_files_that_are_not_those_that_were_loaded_give_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str, by_content: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(64 << 10))
    place = SimpleNamespace(path=weights, dtype="F32", shape=(1,), offset=8, bytes=60_000)
    files: Any = SimpleNamespace(path=tmp_path, tensors={"a": place}, stamps=stamps_of(tmp_path))

    def named() -> dict[str, str]:
        return tiers.facts_of(files, "sim", "float32", by_content=by_content)

    before = named()
    # While it is read: between the look before it and the one after it.
    at, checked, is_changed = tmp_path / name, stamps._check, []

    def check(path: Path, file: Any, known: Any) -> None:
        checked(path, file, known)
        if path == at and not is_changed:
            is_changed.append(path)
            change(path)

    monkeypatch.setattr(stamps, "_check", check)
    with pytest.raises(stamps.FilesChangedError) as raised:
        named()
    assert raised.value.path == at
    assert is_changed == [at]
    monkeypatch.undo()
    # After the model was loaded, before it is named.
    with pytest.raises(stamps.FilesChangedError):
        named()
    # Loaded from those that are there now.
    files.stamps = stamps_of(tmp_path)
    assert named() != before


def test_a_model_has_the_stamps_of_its_files(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = loading.inspect(tmp_path)
    assert files.stamps == {path: Stamp.of(path.stat()) for path in map(tmp_path.joinpath, WEIGHED)}
    named = tiers.facts_of(files, "sim", "float32", by_content=True)
    replaced(tmp_path / "model.safetensors")
    with pytest.raises(stamps.FilesChangedError, match="restart the model"):
        tiers.facts_of(files, "sim", "float32", by_content=True)
    assert named["weights"]


def test_facts_by_content_do_not_depend_on_when_files_were_written(tmp_path: Path) -> None:
    told = []
    for name in ("one", "other", "changed"):
        where = tmp_path / name
        where.mkdir()
        (where / "config.json").write_text("{}")
        content = bytearray(64 << 10)
        # Beyond what is looked at of a tensor where times count.
        content[50_000] = name == "changed"
        (where / "model.safetensors").write_bytes(content)
        os.utime(where / "model.safetensors", ns=(len(told), len(told)))
        place = SimpleNamespace(path=where / "model.safetensors", dtype="F32", shape=(1,), offset=8, bytes=60_000)
        files: Any = SimpleNamespace(path=where, tensors={"a": place}, stamps=stamps_of(where))
        told.append([tiers.facts_of(files, "sim", "float32", by_content=by_content) for by_content in (False, True)])
    one, other, changed = told
    assert one[0] != other[0], "times count"
    assert one[1] == other[1]
    assert one[1] != changed[1]


SHAPE = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 512, "max_position_embeddings": 1024}
"""Much KV for little to compute: 128 KiB a token."""
ANSWER = 6


def test_what_is_computed_faster_is_computed_and_else_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiers are what they are; how fast the engine is, is made up. The answer is the same either way."""
    model, prompt = llama(5, **SHAPE), [7 * at % 251 + 1 for at in range(960)]
    expected, whole = alone(model, prompt, ANSWER), 944
    step_s, told = [1e6], []

    def computed(self: tiers.KvBelow, tokens: int, seconds: float) -> None:
        assert seconds > 0
        told.append(tokens)
        assert self._tier is not None
        self._tier.computed(tokens, step_s[0])

    monkeypatch.setattr(tiers.KvBelow, "computed", computed)
    with shoal.testing.simulated_memory("256MiB", host_budget="64MiB") as mem:
        spec = WorkerSpec(source="x", threads=1, kv_max_bytes=160 << 20, batch_tokens_max=128)
        memory = DeviceMemory(mem)
        memory.place(model)
        layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
        engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 1024, spec))
        memory.keep_below(192 << 20, [], lambda: FACTS, 60.0, chooses=True)
        until("the tier is open", lambda: memory.tiers()[0]["reason"] is None)
        engine.start()
        kv = memory._kv
        assert kv is not None
        assert kv.below is not None

        async def ask() -> int:
            generation = engine.submit(prompt, GREEDY, ANSWER)
            assert [token async for tokens in generation for token in tokens] == expected
            return generation.cached_tokens

        async def again() -> int:
            kv.forget_all()
            return await ask()

        async def run() -> None:
            # The first step brings the weights: what it took says nothing of computing.
            first = engine.submit(prompt[:200], GREEDY, 1)
            assert len([token async for tokens in first for token in tokens]) == 1
            assert told == []
            kv.forget_all()
            assert await ask() == 0
            assert told == [512, 448], "steps that compute a prompt, and no others"
            assert kv.below._tier.flush(60)
            # An engine that takes days.
            for _ in range(5):
                assert await again() == whole
            (figures,) = memory.tiers()
            assert (figures["loaded"], figures["recomputed"]) == (5 * whole // 16, 0)
            assert "are loaded in" in figures["choice"]
            # One that takes no time at all.
            step_s[0] = 1e-9
            for _ in range(16):
                kv.below._tier.computed(512, step_s[0])
            assert await again() == 0
            (figures,) = memory.tiers()
            assert (figures["loaded"], figures["recomputed"]) == (5 * whole // 16, whole // 16)
            assert "961 tokens are computed" in figures["choice"] or "960 tokens are computed" in figures["choice"]

        try:
            asyncio.run(run())
        finally:
            engine.stop()
            memory.close()


def test_what_is_idle_leaves_the_device() -> None:
    model, prompt = llama(5), [7 * at % 251 + 1 for at in range(100)]
    expected = alone(model, prompt, ANSWER)
    with shoal.testing.simulated_memory("64MiB", host_budget="64MiB") as mem:
        spec = WorkerSpec(source="x", threads=1, kv_max_bytes=8 << 20)
        memory = DeviceMemory(mem)
        memory.place(model)
        layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
        engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))
        memory.keep_below(16 << 20, [], lambda: FACTS, 60.0, idle_s=0.05)
        until("the tier is open", lambda: memory.tiers()[0]["reason"] is None)
        engine.start()

        async def ask() -> list[int]:
            return [token async for tokens in engine.submit(prompt, GREEDY, ANSWER) for token in tokens]

        try:
            assert asyncio.run(ask()) == expected
            until("it is gone", lambda: memory.tiers()[0]["demoted"] >= 6)
            until("nothing of the cache is left", lambda: engine.kv_bytes() == (0, 0))
            assert asyncio.run(ask()) == expected
            assert memory.tiers()[0]["loaded"] == 6
        finally:
            engine.stop()
            memory.close()
