"""The worker's KV below the device, in memory, on disk and on a remote: what was computed outlives its place there.

Apart, because serving must not wait for a disk: directories are opened in the background, also while the lock of a
worker that was killed is still there, and until then, or where it cannot be, everything goes on without. What is on
disk outlives the worker and the server too.

Bytes are found again only under the same facts: what the model is (its configuration and weights), and what computes it
(device, versions, data type), since the numbers of another are not the same to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from shoal import DiskTier, Error, HostTier, RemoteTier, TierError, TierStack

from .errors import described
from .stamps import unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from shoal import KvCache, KvTier, Loading, MemoryManager, Prefetch

    from .loading import ModelFiles
    from .spec import DiskShare, RemoteShare

logger = logging.getLogger(__name__)

_LOCK_WAIT_S = (
    15.0  # how long a directory of another process is tried often: it may be that of a worker that was killed
)
_LOCK_RETRY_S = 0.25
_RETRY_S = 30.0
_TIMES = ("load_us", "lookup_us", "read_us", "copy_us", "verify_us")  # of loads from all tiers
_SAMPLE_BYTES = 4096
_FLUSH_S = 1.0
_CLOSE_S = 2.0


class KvBelow:
    """A KV cache's connection to the tiers below the device: memory and a remote at once, disks when they are open.

    What is sealed goes to all, so what host memory has to forget is on disk, and what dies with the worker is only in
    memory. On the way up the fastest that has a block gives it, and what a slow one gave stays in the faster ones too.

    Parameters
    ----------
    cache
        The cache.
    host_bytes
        How much memory may keep KV; 0 for none.
    disks
        Where on disk.
    facts
        Gives what the bytes depend on; called in the background.
    wait_s
        How long a load may take.
    chooses
        Whether what is computed faster than loaded is left to be computed.
    idle_s
        How long a conversation stays on the device unused once it is kept below; None for as long as there is room.
    memory
        Whose page-locked memory `host_bytes` are; none for ordinary memory.
    key_file
        The key that what is on disk is encrypted with; None where it is not.
    remote
        What several servers keep KV in together; None for nothing.
    """

    def __init__(
        self,
        cache: KvCache,
        host_bytes: int,
        disks: Sequence[DiskShare],
        facts: Callable[[], Mapping[str, str]],
        wait_s: float = 1.0,
        *,
        chooses: bool = False,
        idle_s: float | None = None,
        memory: MemoryManager | None = None,
        key_file: str | None = None,
        remote: RemoteShare | None = None,
    ) -> None:
        self._chooses, self._idle_s, self._key_file = chooses, idle_s, key_file
        self._share, self._remote = remote, None  # type: RemoteShare | None, RemoteTier | None
        self._cache, self._disks, self._facts, self._wait_s = cache, disks, facts, wait_s
        self._host = HostTier(host_bytes, memory=memory) if host_bytes else None
        self._disk: DiskTier | None = None
        self._stack: TierStack | None = None  # of one tier too: who wants the same block shares its transfer
        self._tier: KvTier | None = None
        # Of the time when the disks were being opened: of all together, and by tier.
        self._before: tuple[Counter[str], dict[str, Counter[str]]] = (Counter(), {})
        self._lock = threading.Lock()  # for what is counted, while the tier is exchanged
        self._reason: str | None = "its directories are being opened" if disks else None
        self._host_reason: str | None = "its names are being made"
        self._remote_reason: str | None = self._host_reason
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._open, name="kv-tiers", daemon=True)
        self._thread.start()

    def may_load(self, tokens: Sequence[int], held: int, salt: str) -> bool:
        """Whether there may be something to load after the first `held` blocks of a sequence."""
        tier = self._tier
        return tier is not None and tier.may_load(tokens, held, salt=salt)

    def begin_load(self, tokens: Sequence[int], held: int, salt: str) -> Loading | None:
        """Begin to bring back the blocks that follow the first `held` ones, as far as they come in time."""
        tier = self._tier
        return None if tier is None else tier.begin_load(tokens, held, salt=salt)

    def prefetch(self, tokens: Sequence[int], salt: str) -> Prefetch | None:
        """Begin to bring what only slow tiers have of a sequence to the fastest, and to ask a remote what it has."""
        tier, is_worth = self._tier, self._remote is not None or (self._host is not None and self._disk is not None)
        return tier.prefetch(tokens, salt=salt) if tier is not None and is_worth else None

    def save(self, tokens: Sequence[int], first: int, salt: str) -> None:
        """Queue the full blocks of a sequence from `first` on to be saved."""
        tier = self._tier
        if tier is not None:
            tier.save(tokens, first=first, salt=salt)

    def computed(self, tokens: int, seconds: float) -> None:
        """Say how long a step took that computed so many tokens of prompts."""
        tier = self._tier
        if tier is not None:
            tier.computed(tokens, seconds)

    def load_us_per_mib(self) -> float | None:
        """Give what a MiB takes to come up, in microseconds, from the fastest tier of those that were read."""
        tier = self._tier
        return None if tier is None else tier.load_us_per_mib()

    def discard_queued(self) -> None:
        """Let nothing be saved that waits for it."""
        tier = self._tier
        if tier is not None:
            tier.discard_queued()

    def figures(self) -> list[dict[str, Any]]:
        """Give what each tier did and how it is, the fastest first, as the server is told."""
        with self._lock:
            tier, stack, disk, remote = self._tier, self._stack, self._disk, self._remote
            whole = Counter({} if tier is None else tier.usage())
            by_tier = {} if stack is None else {told["name"]: Counter(_as_told(told)) for told in stack.counts()}
            whole_before, before = self._before
        told: list[dict[str, Any]] = []
        host, on_disk = by_tier.get("host", Counter()), by_tier.get("disk", Counter())
        all_looked_up = whole["looked_up"] + whole_before["looked_up"]
        if self._host is not None:
            usage = self._host.usage()
            of_host: dict[str, Any] = {**_sum(host, before.get("host", Counter()))}
            of_host["prefetched"] = whole["prefetched"] + whole_before["prefetched"]
            of_host["looked_up"] = all_looked_up
            of_host |= {name: usage[name] for name in ("bytes", "bytes_max", "evicted", "corrupt")}
            told.append({"tier": "host", "reason": self._host_reason, **of_host})
        if self._disks:
            of_disk: dict[str, Any] = dict(on_disk)
            if on_disk:
                of_disk["corrupt"] = whole["corrupt"]
                # What the host had was not looked for here. It may have given more than was used in the end.
                of_disk["looked_up"] = max(0, whole["looked_up"] - host["loaded"])
            else:
                of_disk["looked_up"] = 0  # it is not open yet
            places = [] if disk is None else disk.places()
            room = {name: sum(place[name] for place in places) for name in ("bytes", "bytes_max")}
            told.append({"tier": "disk", "reason": self._reason, **of_disk, **room, "places": places})
        if self._share is not None:
            asked = Counter() if remote is None else Counter(remote.usage())
            own = _sum(by_tier.get("remote", Counter()), before.get("remote", Counter()))
            others = host["loaded"] + before.get("host", Counter())["loaded"] + on_disk["loaded"]
            of_remote: dict[str, Any] = {**own, "corrupt": asked["corrupt"]}
            of_remote["looked_up"] = max(0, all_looked_up - others)
            aside = None if remote is None else remote.aside()
            told.append({"tier": "remote", "reason": self._remote_reason or aside, **of_remote})
        if told:
            # Of all tiers together; what is late or failed is so because of the slowest, mostly.
            there = [one for one in told if one["tier"] in by_tier]
            if there:
                there[-1] |= {name: whole[name] + whole_before[name] for name in ("late", "failed", *_TIMES)}
                # What one alone did not take is among what the cache did not save.
                others = there[-1]["unsaved"] if len(there) > 1 else 0
                there[-1]["unsaved"] = others + whole["unsaved"] + whole_before["unsaved"]
            for name in ("recomputed", "demoted"):
                told[0][name] = whole[name] + whole_before[name]
            told[0]["choice"] = None if tier is None else tier.choice()
        return told

    def close(self) -> None:
        """Write out what waits, within a few seconds, and give the directories up."""
        with self._lock:
            self._stop.set()
        self._thread.join(timeout=_CLOSE_S)
        with self._lock:
            tier, disk, self._tier, self._disk = self._tier, self._disk, None, None
        outlives = disk is not None or self._remote is not None
        if tier is not None and outlives and not tier.flush(_FLUSH_S):
            logger.info("some KV was not saved in time")
        del tier
        if disk is not None:
            disk.close(_CLOSE_S)

    def _open(self) -> None:
        try:
            facts = self._facts()
            self._open_remote()
            if first := [tier for tier in (self._host, self._remote) if tier is not None]:
                self._connect(facts, TierStack(first))
        except Exception as error:  # whatever it is, this thread is not there to tell it again
            self._host_reason = self._reason = self._remote_reason = described(error)
            logger.warning("no KV is kept below the device: %s", described(error), exc_info=True)
            return
        self._host_reason = None
        if self._remote is not None:
            self._remote_reason = None
        if self._host is not None:
            logger.info("KV in host memory: up to %d bytes", self._host.usage()["bytes_max"])
        if not self._disks or (disk := self._opened()) is None:
            return
        with self._lock:
            is_over = self._stop.is_set()
            self._disk = None if is_over else disk
        if is_over:
            # They opened too late for `close` to see them.
            disk.close(_CLOSE_S)
            return
        try:
            stack = [tier for tier in (self._host, disk, self._remote) if tier is not None]
            self._connect(facts, TierStack(stack))
        except Exception as error:
            self._reason = described(error)
            logger.warning("no KV is kept on disk: %s", self._reason, exc_info=True)
            with self._lock:
                self._disk = None
            disk.close(_CLOSE_S)  # nothing will be saved there: others may have it
            return
        self._reason = None
        for place in disk.places():
            logger.info("KV on disk: %(path)s is %(state)s, %(blocks)d blocks in it, by %(means)s", place)

    def _open_remote(self) -> None:
        """Take the remote, if there is one to take; nothing is asked of it yet."""
        if self._share is None:
            return
        address, key_file, login_file = self._share.address, self._share.key_file, self._share.login_file
        try:
            self._remote = RemoteTier(address, key_file=key_file, login_file=login_file)
        except (Error, OSError, ValueError) as error:
            self._remote_reason = described(error)
            logger.warning("no KV is kept on the remote: %s", self._remote_reason)
            return
        logger.info("KV on a remote: %s", address)

    def _connect(self, facts: Mapping[str, str], stack: TierStack) -> None:
        """Save to and load from `stack` from now on."""
        tier = self._cache.attach_store(stack, facts, load_s=self._wait_s, chooses=self._chooses, idle_s=self._idle_s)
        if self._tier is not None:
            self._tier.flush(_FLUSH_S)
            tier.learn_from(self._tier)
        with self._lock:
            if self._stop.is_set():
                return
            before, stack_before = self._tier, self._stack
            self._tier, self._stack = tier, stack
            if before is not None and stack_before is not None:
                by_tier = {told["name"]: Counter(_as_told(told)) for told in stack_before.counts()}
                self._before = (Counter(before.usage()), by_tier)

    def _opened(self) -> DiskTier | None:
        """Open the directories, also while a killed worker has the lock; None where they are to be left alone."""
        begun = time.monotonic()
        while not self._stop.is_set():
            try:
                disks = [(share.path, share.bytes, share.write_bytes_per_hour) for share in self._disks]
                return DiskTier(disks, key_file=self._key_file)
            except TierError as error:
                if self._reason != str(error):
                    logger.warning("no KV is kept on disk: %s", error)
                self._reason = str(error)
                if error.kind != "in_use":
                    return None
                is_early = time.monotonic() - begun < _LOCK_WAIT_S
                self._stop.wait(_LOCK_RETRY_S if is_early else _RETRY_S)
            except (Error, OSError) as error:
                logger.warning("no KV is kept on disk: %s", described(error))
                self._reason = described(error)
                return None
        return None


def _sum(counts: Counter[str], others: Counter[str]) -> Counter[str]:
    """Add up; what is nothing is there too."""
    result = Counter(counts)
    result.update(others)
    return result


def _as_told(counts: Mapping[str, int]) -> dict[str, int]:
    """Give one tier's counts in a stack as the server is told them; blocks of a cache are of one length."""
    saved = counts["written"] - counts["promoted"]
    return {
        "saved": saved,
        "saved_bytes": counts["written_bytes"] * saved // max(1, counts["written"]),
        "unsaved": counts["refused"] + counts["declined"],
        "loaded": counts["hits"],
        "loaded_bytes": counts["hit_bytes"],
        "promoted": counts["promoted"],
    }


def facts_of(files: ModelFiles, device: str, dtype: str, *, by_content: bool = False) -> dict[str, str]:
    """Name what a model's KV depends on beside the tokens.

    Parameters
    ----------
    files
        The model's. Of the weights, what the files say of each tensor counts and a few kilobytes of each, with the
        files' lengths and times.
    device, dtype
        What computes it, and in what.
    by_content
        All bytes of the weights count, and no times: then copies of the files on other machines are the same. It reads
        the files through.

    Raises
    ------
    FilesChangedError
        A file is not the one that the model was loaded from any more, or was written to: its name would be another's.
    """
    import torch
    import transformers

    from . import attention, hooks

    at = files.path / "config.json"
    with unchanged(at, files.stamps) as file:
        config = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "config": config,
        "weights": _content(files) if by_content else _weights(files),
        "dtype": dtype,
        "attention": f"{hooks.ATTENTION} {attention.REVISION}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
    }


def weights_facts(files: ModelFiles, dtype: str) -> dict[str, str]:
    """Name what the bytes of a model's weights in memory depend on.

    Unlike the names of KV, these are looked up before the files are read, and found again they stand for them: so the
    files' numbers count and the times of their last change, which unlike those of writing nobody can set back.

    Raises
    ------
    FilesChangedError
        A file is not the one that the model was loaded from any more, or was written to.
    """
    import torch
    import transformers

    from shoal.torch.placement import LAYOUT

    at = files.path / "config.json"
    with unchanged(at, files.stamps) as file:
        config = hashlib.file_digest(file, "sha256").hexdigest()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "layout": LAYOUT}
    changes = [path.stat() for path in sorted({place.path for place in files.tensors.values()})]
    changed = repr([(stat.st_ino, stat.st_ctime_ns) for stat in changes])
    return {"config": config, "weights": _weights(files), "changed": changed, "dtype": dtype, **versions}


def _cpu() -> str:
    """Tell what decides how a processor rounds: its instructions, and how many threads share a sum."""
    import torch

    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"cpu {kind} {torch.get_num_threads()}"


def _weights(files: ModelFiles) -> str:
    digest = hashlib.sha256()
    by_file: dict[Path, list[tuple[str, Any]]] = {}
    for name, place in sorted(files.tensors.items()):
        by_file.setdefault(place.path, []).append((name, place))
    for path, tensors in sorted(by_file.items()):
        with unchanged(path, files.stamps) as file:
            stamp = files.stamps[path]
            digest.update(repr((path.name, stamp.bytes, stamp.mtime_ns)).encode())
            for name, place in tensors:
                digest.update(repr((name, place.dtype, place.shape, place.offset)).encode())
                file.seek(place.offset)
                digest.update(file.read(min(place.bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


def _content(files: ModelFiles) -> str:
    digest = hashlib.sha256()
    for path in sorted({place.path for place in files.tensors.values()}):
        with unchanged(path, files.stamps) as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
