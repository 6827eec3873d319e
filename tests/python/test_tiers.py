"""Tiers below the device in a program: host memory alone, and in front of a disk."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.support.redis import redis

import shoal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 16
FACTS = {"model": "a"}


def cache_of(mem: shoal.MemoryManager) -> shoal.KvCache:
    """Blocks of 256 KiB: 2 layers, 16 tokens."""
    return mem.kv_cache(layers=2, kv_heads=4, head_dim=512, dtype="float16", max_bytes="32MiB")


def compute(kv: shoal.KvCache, tokens: list[int], ids: list[int]) -> None:
    """Fill blocks with what tells them apart, and seal them."""
    for layer in kv.tensors():
        whole = np.asarray(layer)
        for place, block in enumerate(ids):
            whole[block] = tokens[place * BLOCK] + 1
    kv.seal(tokens, ids)


def until(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def converse(kv: shoal.KvCache, below: shoal.KvTier, tokens: list[int]) -> tuple[int, int]:
    """Ask as an engine does; give how many blocks were on the device and how many came from below."""
    found, ids = kv.match(tokens)
    loaded = below.load(tokens, ids)
    blocks = [*ids, *loaded]
    for layer in kv.tensors():
        whole = np.asarray(layer)
        for place, block in enumerate(blocks):
            assert (whole[block] == tokens[place * BLOCK] + 1).all()
    more = kv.groups[0].alloc(len(tokens) // BLOCK - len(blocks))
    assert more is not None
    compute(kv, tokens, [*blocks, *more])
    below.save(tokens, first=len(blocks))
    kv.groups[0].free([*blocks, *more])
    return found // BLOCK, len(loaded)


@pytest.mark.parametrize("is_locked", [False, True])
def test_host_memory_gives_what_the_device_forgot(mem: shoal.MemoryManager, is_locked: bool) -> None:
    kv, host = cache_of(mem), shoal.HostTier("8MiB", memory=mem if is_locked else None)
    below = kv.attach_store(host, FACTS, load_s=60)
    tokens = list(range(10 * BLOCK))
    assert converse(kv, below, tokens) == (0, 0)
    assert below.flush(60)
    assert converse(kv, below, tokens) == (10, 0)
    kv.forget_all()
    assert converse(kv, below, tokens) == (0, 10)
    usage = host.usage()
    assert (usage["written"], usage["hits"], usage["corrupt"], usage["blocks"]) == (10, 10, 0, 10)
    assert 10 * (256 << 10) <= usage["bytes"] <= usage["bytes_max"] == 8 << 20
    told = below.usage()
    assert told["loaded"] == 10
    assert told["copy_us"] > 0
    assert sum(told[name] for name in ("lookup_us", "read_us", "copy_us", "verify_us")) <= told["load_us"]
    assert (told["read_us"] == 0) == is_locked, "from page-locked memory nothing is read to somewhere else first"


def test_what_memory_forgets_is_on_disk_and_comes_up_again(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    kv, host = cache_of(mem), shoal.HostTier("2MiB")
    disk = shoal.DiskTier([(tmp_path / "kv", "64MiB")])
    stack = shoal.TierStack([host, disk])
    below = kv.attach_store(stack, FACTS, load_s=60)
    talks = [[1000 * number + token for token in range(5 * BLOCK)] for number in range(4)]
    for tokens in talks:
        assert converse(kv, below, tokens) == (0, 0)
        assert below.flush(60)
    kv.forget_all()
    for tokens in talks:
        assert converse(kv, below, tokens) == (0, 5)
    of_host, of_disk = stack.counts()
    assert (of_host["name"], of_disk["name"]) == ("host", "disk")
    assert of_disk["written"] == 20
    assert of_host["hits"] + of_disk["hits"] == 20
    assert of_disk["hits"] > 0
    assert host.usage()["evicted"] > 0

    kv.forget_all()
    until("what came from disk is in memory", lambda: stack.counts()[0]["promoted"] == of_disk["hits"])
    before = stack.counts()[0]["hits"]
    assert converse(kv, below, talks[-1]) == (0, 5)
    assert stack.counts()[0]["hits"] > before, "the newest comes from memory"
    assert "HostTier" in repr(stack)
    del below
    assert disk.close(60)


def test_a_disk_with_a_key_is_had_with_that_key_only(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    key, other, none = tmp_path / "key", tmp_path / "other", tmp_path / "none"
    key.write_bytes(bytes(range(32)))
    other.write_text("0f" * 32)
    none.write_text("secret")
    tokens = list(range(5 * BLOCK))
    kv, disk = cache_of(mem), shoal.DiskTier([(tmp_path / "kv", "64MiB")], key_file=key)
    below = kv.attach_store(disk, FACTS, load_s=60)
    assert converse(kv, below, tokens) == (0, 0)
    assert below.flush(60)
    del below
    assert disk.close(60)
    # A block of 256 KiB of one half: as it is, its bytes would come again and again.
    half = np.float16(1).tobytes()
    assert half * 32 not in (tmp_path / "kv" / "log").read_bytes()

    for key_file, kind in (
        (None, "encrypted"),
        (other, "other_key"),
        (none, "key_file"),
        (tmp_path / "gone", "key_file"),
    ):
        with pytest.raises(shoal.TierError) as caught:
            shoal.DiskTier([(tmp_path / "kv", "64MiB")], key_file=key_file)
        assert caught.value.kind == kind, caught.value
    assert shoal.DiskTier([(tmp_path / "plain", "64MiB")]).close(60)
    with pytest.raises(shoal.TierError) as caught:
        shoal.DiskTier([(tmp_path / "plain", "64MiB")], key_file=key)
    assert caught.value.kind == "not_encrypted"

    kv.forget_all()
    again = kv.attach_store(shoal.DiskTier([(tmp_path / "kv", "64MiB")], key_file=key), FACTS, load_s=60)
    assert converse(kv, again, tokens) == (0, 5)


def test_what_only_memory_has_is_written_when_it_is_used_again(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    kv, host = cache_of(mem), shoal.HostTier("8MiB")
    tokens = list(range(6 * BLOCK))
    alone = kv.attach_store(host, FACTS)
    assert converse(kv, alone, tokens) == (0, 0)
    assert alone.flush(60)
    del alone
    disk = shoal.DiskTier([(tmp_path / "kv", "64MiB")])
    stack = shoal.TierStack([host, disk])
    below = kv.attach_store(stack, FACTS, load_s=60)
    assert converse(kv, below, tokens) == (6, 0)
    below.save(tokens)
    assert below.flush(60)
    of_host, of_disk = stack.counts()
    assert (of_host["written"], of_disk["written"]) == (0, 6)
    del below
    assert disk.close(60)


def test_what_only_the_disk_has_comes_up_ahead(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    kv, disk = cache_of(mem), shoal.DiskTier([(tmp_path / "kv", "64MiB")])
    tokens = list(range(8 * BLOCK))
    first = kv.attach_store(disk, FACTS)
    assert converse(kv, first, tokens) == (0, 0)
    assert first.flush(60)
    del first
    kv.forget_all()
    host = shoal.HostTier("8MiB")
    stack = shoal.TierStack([host, disk])
    below = kv.attach_store(stack, FACTS, load_s=60)
    assert below.prefetch(tokens[: BLOCK - 1]) is None
    ahead = below.prefetch(tokens)
    assert ahead is not None
    until("it is in memory", lambda: stack.counts()[0]["promoted"] == 8)
    assert converse(kv, below, tokens) == (0, 8)
    assert stack.counts()[0]["hits"] == 8
    assert stack.counts()[1]["hits"] == 8, "read once"
    ahead.cancel()
    del ahead
    assert disk.close(60)


@pytest.mark.parametrize("kind", ["directory", "redis"])
def test_what_one_machine_computed_another_finds_on_the_remote(
    mem: shoal.MemoryManager, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "key").write_text("07" * 32)
    (tmp_path / "login").write_text(":a secret\n")
    (tmp_path / "key").chmod(0o600)
    with redis() as fake:
        address, login = (str(tmp_path / "kv"), None) if kind == "directory" else (fake.address, tmp_path / "login")

        def remote() -> shoal.RemoteTier:
            return shoal.RemoteTier(address, key_file=tmp_path / "key", login_file=login)

        kv, tokens = cache_of(mem), list(range(20 * BLOCK))
        one = remote()
        below = kv.attach_store(one, FACTS, load_s=60)
        assert converse(kv, below, tokens) == (0, 0)
        assert below.flush(60)
        assert one.usage()["written"] == 20
        del below, one
        kv.forget_all()

        # Another process, as far as the remote can tell: it knows of nothing.
        host, other = shoal.HostTier("8MiB"), remote()
        stack = shoal.TierStack([host, other])
        below = kv.attach_store(stack, FACTS, load_s=60)
        assert converse(kv, below, tokens) == (0, 20)
        assert (other.usage()["hits"], other.aside()) == (20, None)
        until("it stays in memory", lambda: stack.counts()[0]["promoted"] == 20)
        kv.forget_all()
        assert converse(kv, below, tokens) == (0, 20)
        assert other.usage()["hits"] == 20, "memory had it"
        assert repr(other) == f"RemoteTier({address!r})"
        if kind == "redis":
            assert "AUTH" in fake.asked
            assert all(name.startswith(b"shoal/v1/") for name in fake.objects)


def test_a_load_that_is_begun_is_waited_for_taken_or_left(mem: shoal.MemoryManager) -> None:
    kv, tokens = cache_of(mem), list(range(10 * BLOCK))
    below = kv.attach_store(shoal.HostTier("8MiB"), FACTS, load_s=60)
    assert not below.may_load(tokens, 0)
    assert below.begin_load(tokens, 0) is None, "nothing is there"
    assert converse(kv, below, tokens) == (0, 0)
    assert below.flush(60)
    kv.forget_all()
    assert below.may_load(tokens, 0)
    assert not below.may_load(tokens, 10)
    assert not below.may_load(tokens, 0, salt="another's")
    loading = below.begin_load(tokens, 0)
    assert loading is not None
    assert loading.wait(60)
    assert loading.done
    ids = loading.take()
    assert ids is not None
    assert (len(ids), loading.take()) == (10, [])
    for layer in kv.tensors():
        whole = np.asarray(layer)
        assert all((whole[block] == tokens[place * BLOCK] + 1).all() for place, block in enumerate(ids))
    kv.groups[0].free(ids)
    assert kv.match(tokens)[0] == len(tokens), "it was sealed"
    kv.groups[0].free(ids)
    kv.forget_all()
    for leave in (shoal.Loading.cancel, lambda loading: loading.wait(60)):
        left = below.begin_load(tokens, 0)
        assert left is not None
        leave(left)
        del left
        until("nobody owns anything", lambda: kv.usage()["live"] == 0)
        kv.forget_all()
    loading = below.begin_load(tokens, 0)
    assert loading is not None
    with pytest.raises(ValueError, match="timeout_s must be 0 or more seconds, not -1"):
        loading.wait(-1)


def test_a_remote_that_is_away_costs_no_more_than_computing(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("07" * 32)
    with redis() as fake:
        kv, tokens = cache_of(mem), list(range(8 * BLOCK))
        address = fake.address
    (tmp_path / "login").write_text(":a secret")
    remote = shoal.RemoteTier(address, key_file=tmp_path / "key", login_file=tmp_path / "login")
    below = kv.attach_store(remote, FACTS, load_s=1)
    assert converse(kv, below, tokens) == (0, 0)
    until("it is set aside", lambda: remote.aside() is not None)
    kv.forget_all()
    assert converse(kv, below, tokens) == (0, 0)


def test_bad_input_and_forks_are_refused(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 make a stack"):
        shoal.TierStack([shoal.HostTier("1MiB")] * 65)
    with pytest.raises(ValueError, match="parsecs"):
        shoal.HostTier("8 parsecs")
    not_a_manager: Any = "cuda:0"
    with pytest.raises(TypeError, match="MemoryManager of the caches"):
        shoal.HostTier("8MiB", memory=not_a_manager)
    (tmp_path / "key").write_text("07" * 32)
    for address, key, why in (
        ("s3://store:9000/blocks", "key", "an object store has a login"),
        ("ftp://store", "key", "is none of s3://"),
        ("/mnt/kv", "none", "no key in .*none"),
    ):
        with pytest.raises(ValueError, match=why):
            shoal.RemoteTier(address, key_file=tmp_path / key)
    empty: Any = shoal.TierStack([])
    assert empty.counts() == []
    host = shoal.HostTier("1MiB")
    child = os.fork()
    if child == 0:
        try:
            host.usage()
        except shoal.ForkError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
