"""What lies below vLLM's page-locked staging memory: its settings, its facts, and rows that go down and come back.

Apart from :mod:`shoal.vllm.offloading`, which vLLM's own classes meet, because nothing here needs vLLM. A row is a
chunk of KV of all layers, as vLLM's offloading lays it out in host memory; its name is vLLM's own, a hash of all tokens
before.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.blocks import BlockStore
from shoal.memory.sizes import parse_size
from shoal.tiers import DiskTier, HostTier, TierStack

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Rows", "TierSettings", "model_facts"]

STAGING_BYTES = 1 << 30
"""vLLM's own page-locked memory, where none is named."""

AGAIN_S = 30.0
"""How long a row that could not be read counts as one that is not there: else a disk that fails is asked for ever."""

FAILED_MAX = 1 << 16

OPEN_S = 10.0
"""How long a start waits for directories to be read through; what they have is found later, where that is too short."""

_UP = -1

_WEIGHTS = (".json", ".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class TierSettings:
    """What a user sets in ``kv_connector_extra_config``, or in an entry of its ``secondary_tiers``.

    Parameters
    ----------
    host_bytes
        Memory of the host tier; none, if it is 0.
    disks
        For each disk the path, its bytes, and bytes written in an hour at most.
    segment_bytes, uses_min, threads, deadline_s, key_file
        As for :class:`shoal.DiskTier` and :class:`shoal.blocks.BlockStore`.
    """

    host_bytes: int = 0
    disks: tuple[tuple[str, int, int | None], ...] = ()
    segment_bytes: int | None = None
    uses_min: int = 1
    threads: int = 4
    deadline_s: float = 30.0
    key_file: str | None = None

    KEYS = ("host", "disks", "segment_bytes", "uses_min", "threads", "deadline_s", "key_file")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TierSettings:
        """Read what the user gave.

        Parameters
        ----------
        given
            ``host``, ``disks`` and so on; other keys are not looked at.

        Returns
        -------
        TierSettings
            All of it.

        Raises
        ------
        ValueError
            Something cannot be used; the message says what would be right. Or there is neither a host tier nor a disk.
        """
        try:
            host = parse_size(given.get("host") or 0)
            disks = tuple(_disk(one) for one in given.get("disks") or ())
            segment, key = given.get("segment_bytes"), given.get("key_file")
            settings = cls(
                host, disks, None if segment is None else parse_size(segment), int(given.get("uses_min", 1)),
                int(given.get("threads", 4)), float(given.get("deadline_s", 30.0)), None if key is None else str(key),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"the tier's settings cannot be used: {error}") from error
        if not settings.host_bytes and not settings.disks:
            raise ValueError(
                'the tier has no place: give "host": "8GiB", or "disks": [{"path": "/var/cache/kv", '
                '"bytes": "200GiB"}], or both'
            )
        return settings

    def open(self, replica: int = 0) -> list[HostTier | DiskTier]:
        """Open the tiers.

        Parameters
        ----------
        replica
            Which of several engines of one model this is: each has a directory of its own within the disks' ones.

        Returns
        -------
        list of HostTier or DiskTier
            The faster first.

        Raises
        ------
        TierError
            A directory cannot be used; its ``kind`` says why.
        """
        tiers: list[HostTier | DiskTier] = []
        if self.host_bytes:
            tiers.append(HostTier(self.host_bytes))
        if self.disks:
            places = [
                (Path(path) / f"replica-{replica}" if replica else Path(path), size, hourly)
                for path, size, hourly in self.disks
            ]
            disk = DiskTier(places, segment_bytes=self.segment_bytes, uses_min=self.uses_min, key_file=self.key_file)
            tiers.append(disk)
        return tiers


class Rows:
    """Rows of a staging memory, and the tiers they go to. Every call comes back at once, but :meth:`drain` and `close`.

    Parameters
    ----------
    settings
        Where they go.
    view
        The staging memory: as many rows as its first dimension has, of the same number of bytes. Contiguous.
    facts
        What a row's bytes depend on beside its name.
    replica
        As for :meth:`TierSettings.open`.

    Raises
    ------
    TierError
        A directory cannot be used.
    ValueError
        A row is longer than the tiers take, or `view` has not two dimensions.
    """

    def __init__(self, settings: TierSettings, view: memoryview, facts: Mapping[str, str], *, replica: int = 0) -> None:
        if view.ndim != 2 or not view.c_contiguous:
            raise ValueError("the staging memory must be contiguous rows")
        self.row_bytes = view.nbytes // max(view.shape[0], 1) if view.shape is not None else 0
        self._memory = view.cast("B")
        facts = {**facts, "row": str(self.row_bytes)}
        self._tiers = settings.open(replica)
        _await_open(self._tiers)
        # Rows come up through all tiers, where requests for one that is on its way share the transfer. They go down to
        # each by itself: a disk takes its time, and no more than half of the staging memory may wait for it.
        self._up = BlockStore(TierStack(self._tiers), facts, threads=settings.threads, deadline_s=settings.deadline_s)
        self._down = [
            BlockStore(
                tier, facts, threads=2, deadline_s=settings.deadline_s,
                waiting_bytes_max=view.nbytes // 2 if isinstance(tier, DiskTier) else view.nbytes,
            )
            for tier in self._tiers
        ]  # fmt: skip
        # By the store and its number of a job.
        self._parts: dict[tuple[int, int], _Job] = {}
        self._failed: dict[bytes, float] = {}

    def has(self, name: bytes) -> bool:
        """Say whether a row is there, as far as the tiers know without reading.

        Parameters
        ----------
        name
            vLLM's.

        Returns
        -------
        bool
            Also false for a while after it could not be read.
        """
        failed = self._failed.get(name)
        if failed is not None:
            if time.monotonic() - failed < AGAIN_S:
                return False
            del self._failed[name]
        return self._up.contains([name])[0]

    def save(self, number: int, names: Iterable[bytes], rows: Iterable[int]) -> None:
        """Begin to keep rows.

        Parameters
        ----------
        number
            The caller's, of this job.
        names, rows
            What they are called, and which they are.
        """
        job = _Job(number, list(names), len(self._down))
        views = self._views(rows)
        for place, blocks in enumerate(self._down):
            self._parts[place, blocks.put(job.names, views)] = job

    def load(self, number: int, names: Iterable[bytes], rows: Iterable[int]) -> None:
        """Begin to read rows.

        Parameters
        ----------
        number
            The caller's, of this job.
        names, rows
            What they are called, and where they go.
        """
        job = _Job(number, list(names), 1)
        self._parts[_UP, self._up.get(job.names, self._views(rows))] = job

    def finished(self) -> list[tuple[int, bool]]:
        """Take what has ended.

        Returns
        -------
        list of tuple
            The caller's number of each job, and whether all its rows were read, or were offered to all tiers.
        """
        ended = []
        for place, blocks in ((_UP, self._up), *enumerate(self._down)):
            for end in blocks.finished():
                job = self._parts.pop((place, end.job))
                job.parts -= 1
                job.is_whole = job.is_whole and all(end.ok)
                for name, is_there in zip(job.names, end.ok, strict=True):
                    if place == _UP and not is_there:
                        self._forget(name)
                    elif place != _UP and is_there and self._failed:
                        self._failed.pop(name, None)
                if job.parts == 0:
                    ended.append((job.number, job.is_whole))
        return ended

    def drain(self) -> None:
        """Wait until nothing touches the staging memory. Each job has its deadline, so this ends."""
        for blocks in (self._up, *self._down):
            while not blocks.drain(60.0):
                pass

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until what was kept is past every cache of the system.

        Parameters
        ----------
        timeout_s
            How long at most, in seconds.

        Returns
        -------
        bool
            Whether it is.
        """
        return self._down[-1].drain(timeout_s) and self._down[-1].flush(timeout_s)

    def usage(self) -> dict[str, int]:
        """Give what was done, in rows.

        Returns
        -------
        dict
            ``read``, ``missed`` (asked for, and gone, damaged or late); ``host_written``, ``disk_written``;
            ``declined`` (not worth a write), ``failed``, and of those ``refused`` (too much waited for a disk).
        """
        up, down = self._up.usage(), [blocks.usage() for blocks in self._down]
        found = {name: up[name] for name in ("read", "missed")}
        for tier, counts in zip(self._tiers, down, strict=True):
            found["disk_written" if isinstance(tier, DiskTier) else "host_written"] = counts["written"]
        return found | {name: sum(one[name] for one in down) for name in ("declined", "failed", "refused")}

    def close(self) -> None:
        """Write out what waits, and give the staging memory and the directories up."""
        stores = [self._up, *self._down]
        for blocks in stores:
            blocks.drain(10.0)
        closed = [blocks.close(30.0) for blocks in stores]
        if not all(closed):
            # A thread still reads or writes there: what it touches stays until the process ends.
            return
        self._memory.release()
        for tier in self._tiers:
            if isinstance(tier, DiskTier):
                tier.close(10.0)

    # Helpers.

    def _views(self, rows: Iterable[int]) -> list[memoryview]:
        length = self.row_bytes
        return [self._memory[int(row) * length : (int(row) + 1) * length] for row in rows]

    def _forget(self, name: bytes) -> None:
        now = time.monotonic()
        if len(self._failed) >= FAILED_MAX:
            self._failed = {name: when for name, when in self._failed.items() if now - when < AGAIN_S}
        if len(self._failed) < FAILED_MAX:
            self._failed[name] = now


@dataclass
class _Job:
    """A job of the caller's, which is one at each of several stores."""

    number: int
    names: list[bytes]
    parts: int
    is_whole: bool = True


def _await_open(tiers: Iterable[HostTier | DiskTier]) -> None:
    until = time.monotonic() + OPEN_S
    for tier in tiers:
        while isinstance(tier, DiskTier) and any(place["state"] == "opening" for place in tier.places()):
            if time.monotonic() > until:
                return
            time.sleep(0.005)


def model_facts(model: str, revision: str | None = None) -> dict[str, str]:
    """Say which weights a model's name stands for now: those that lie there later under the same name may be others.

    Parameters
    ----------
    model
        A directory, a file, or a name on a hub.
    revision
        Of the hub's.

    Returns
    -------
    dict
        ``model`` and ``revision``; ``weights``: lengths and times of the files, or the commit of the hub's.
    """
    path = Path(model).expanduser()
    facts = {"model": model, "revision": revision or ""}
    if path.is_file():
        facts["weights"] = _stamp([path])
    elif path.is_dir():
        facts["model"] = str(path.resolve())
        facts["weights"] = _stamp(one for one in path.iterdir() if one.suffix in _WEIGHTS)
    else:
        facts["weights"] = _commit(model, revision)
    return facts


def _stamp(paths: Iterable[Path]) -> str:
    found = []
    for path in sorted(paths):
        # A link to nothing is no weights.
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return ";".join(found)


def _commit(model: str, revision: str | None) -> str:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:  # noqa: BLE001 - no such package, or a name that it does not take
        return ""
    # .../snapshots/COMMIT/config.json
    return Path(found).parent.name if isinstance(found, str) else ""


def _disk(given: Any) -> tuple[str, int, int | None]:
    if isinstance(given, dict):
        unknown = set(given) - {"path", "bytes", "write_bytes_per_hour"}
        if unknown or not {"path", "bytes"} <= set(given):
            raise ValueError(
                'a disk is {"path": ..., "bytes": ..., "write_bytes_per_hour": ...}, the last one optional; '
                f"not {given}"
            )
        given = (given["path"], given["bytes"], given.get("write_bytes_per_hour"))
    if isinstance(given, str) or not 2 <= len(given) <= 3:
        raise ValueError(f'a disk is {{"path": ..., "bytes": ...}}, not {given!r}')
    path, size, *hourly = given
    limit = hourly[0] if hourly else None
    return str(path), parse_size(size), None if limit is None else parse_size(limit)
