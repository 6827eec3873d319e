"""Shoal's tiers for LMCache, as the native connector of its ``native_plugin`` L2 adapter.

LMCache 0.5.6 in its multi-process mode takes any object with six methods, here :class:`ShoalConnector`::

    {"type": "native_plugin", "module_path": "shoal.lmcache", "class_name": "ShoalConnector",
     "adapter_params": {"host": "16GiB", "disks": [{"path": "/var/cache/shoal/lmcache", "bytes": "200GiB"}]}}

It needs neither LMCache nor vLLM to be imported. LMCache names an object by model, rank, group, the hash of its tokens
and its salt, so that is the whole name; of weights that changed under one model's name LMCache knows nothing: other
``facts`` (a revision, say) keep them apart.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from shoal.blocks import BlockStore
from shoal.tiers import DiskTier, TierStack
from shoal.vllm.tiers import TierSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ShoalConnector"]


class ShoalConnector:
    """What LMCache asks for objects.

    Parameters
    ----------
    facts
        What objects depend on beside their names, such as the model's revision.
    settings
        ``host``, ``disks`` and so on, as :class:`shoal.vllm.tiers.TierSettings` has them.

    Raises
    ------
    TierError
        A directory cannot be used; its ``kind`` says why.
    ValueError
        A setting cannot be used.
    """

    def __init__(self, facts: Mapping[str, str] | None = None, **settings: Any) -> None:
        unknown = sorted(set(settings) - set(TierSettings.KEYS))
        if unknown:
            known = ", ".join(("facts", *TierSettings.KEYS))
            raise ValueError(f"adapter_params of Shoal are {known}; not {', '.join(unknown)}")
        given = TierSettings.of(settings)
        self._tiers = given.open()
        # LMCache has what it keeps in memory of its own: it goes to the slowest tier, and comes up through the others.
        self._blocks = BlockStore(
            TierStack(self._tiers), {"engine": "lmcache", **(facts or {})}, put_to=self._tiers[-1],
            threads=given.threads, deadline_s=given.deadline_s,
        )  # fmt: skip
        # Jobs that keep objects: of these only is told that all was done. Whoever takes what has ended knows them.
        self._keeping: set[int] = set()
        self._lock = threading.Lock()

    def event_fd(self) -> int:
        """Give a descriptor that is readable while something has ended.

        Returns
        -------
        int
            The same each time.
        """
        return self._blocks.fileno()

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Begin to read objects.

        Parameters
        ----------
        keys, memoryviews
            Their names, and memory of their lengths.

        Returns
        -------
        int
            The job's number.
        """
        return self._blocks.get(_names(keys), [_bytes(view) for view in memoryviews])

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Begin to keep objects.

        Parameters
        ----------
        keys, memoryviews
            Their names and bytes.

        Returns
        -------
        int
            The job's number.
        """
        with self._lock:
            job = self._blocks.put(_names(keys), [_bytes(view) for view in memoryviews])
            self._keeping.add(job)
        return job

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Ask which objects are there.

        Parameters
        ----------
        keys
            Their names.

        Returns
        -------
        int
            The job's number.
        """
        return self._blocks.look(_names(keys))

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Begin to forget objects.

        Parameters
        ----------
        keys
            Their names.

        Returns
        -------
        int
            The job's number.
        """
        return self._blocks.remove(_names(keys))

    def drain_completions(self) -> list[tuple[int, bool, str, list[bool] | None]]:
        """Take what has ended.

        Returns
        -------
        list of tuple
            For each job its number, whether it was done, why not, and for each object whether it was read, is there, or
            was forgotten. A read that misses objects was done. One that kept objects was if all of them were.
        """
        told: list[tuple[int, bool, str, list[bool] | None]] = []
        with self._lock:
            ended = self._blocks.finished()
            kept = {end.job for end in ended} & self._keeping
            self._keeping -= kept
        for end in ended:
            if end.job not in kept:
                told.append((end.job, True, "", end.ok))
            else:
                lost = end.ok.count(False)
                why = f"{lost} of {len(end.ok)} objects could not be kept" if lost else ""
                told.append((end.job, not lost, why, None))
        return told

    def close(self) -> None:
        """Write out what waits, and give directories up."""
        self._blocks.drain(10.0)
        if self._blocks.close(30.0):
            for tier in self._tiers:
                if isinstance(tier, DiskTier):
                    tier.close(10.0)

    def usage(self) -> dict[str, int]:
        """Give what was done, in objects.

        Returns
        -------
        dict
            As :meth:`shoal.BlockStore.usage`.
        """
        return self._blocks.usage()


def _names(keys: Sequence[str]) -> list[bytes]:
    return [key.encode("utf-8", "surrogatepass") for key in keys]


def _bytes(view: Any) -> memoryview:
    """Give memory as bytes: ctypes' has a format of its own."""
    return memoryview(view).cast("B")
