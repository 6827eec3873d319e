"""The worker's tiers below the device, where something goes wrong in the thread that opens them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import shoal
import shoal.testing
from shoal.worker import tiers
from shoal.worker.spec import DiskShare

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pytest

FACTS = {"model": "a"}


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

    def slow(*arguments: Any) -> shoal.DiskTier:
        opening.set()
        assert may_open.wait(60)
        return shoal.DiskTier(*arguments)

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
