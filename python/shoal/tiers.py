"""Tiers below the device: KV that is not needed now goes down a level and comes back by name, verified.

A :class:`HostTier` keeps blocks in memory, a :class:`DiskTier` in directories, one on each disk, a :class:`RemoteTier`
where other machines find them too; a :class:`TierStack` is several of them as one.
:meth:`shoal.KvCache.attach_store` connects a cache to any of these by a :class:`KvTier`. Whatever a tier fails at, the
worst is that blocks are computed again: no call here raises because of a disk that fails, hangs, or gives damage;
figures say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal import _native
from shoal.kv_cache.cache import _salt
from shoal.memory.manager import MemoryManager
from shoal.memory.sizes import Size, parse_size

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from shoal.kv_cache import KvCache

__all__ = ["DiskTier", "HostTier", "KvTier", "Loading", "Prefetch", "RemoteTier", "TierStack"]


class HostTier:
    """Blocks in this process's memory, which go with it.

    Memory is taken as it is needed. What is never found again makes room first (S3-FIFO). Memory errs too, so what is
    given was verified by its checksum.

    Parameters
    ----------
    max_bytes
        The most memory of blocks, with what each takes beside its bytes (4 to 8 KiB).
    memory
        The manager of the caches that it serves: then its memory is page-locked, and blocks are copied between there
        and the device at the speed of the link, with no copy in between. It comes beside the manager's ``host_budget``,
        in pieces of 2 MiB and more, each for blocks of one length; a tier of less than 8 MiB has ordinary memory all
        the same.

    Raises
    ------
    ValueError
        If the size cannot be read.
    TypeError
        If `memory` is no manager.
    ForkError
        If the manager is of another process.
    """

    __slots__ = ("_native",)

    def __init__(self, max_bytes: Size, *, memory: MemoryManager | None = None) -> None:
        if not isinstance(memory, MemoryManager | None):
            raise TypeError(f"memory is the MemoryManager of the caches or None, not {memory!r}")
        self._native = _native.HostTier(parse_size(max_bytes), None if memory is None else memory._native)

    def __repr__(self) -> str:
        return f"HostTier({self.usage()['bytes_max']})"

    def usage(self) -> dict[str, int]:
        """Give what it has and did.

        Returns
        -------
        dict
            ``blocks`` and ``bytes`` in it, ``bytes_max``; counts of blocks: ``hits``, ``absent`` (asked for and not
            there), ``written``, ``evicted`` (they made room), ``corrupt`` (damaged, and dropped).

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.usage()


class TierStack:
    """Several tiers as one, looked through from the fastest to the slowest.

    What is saved goes to all of them that want it, so what the fast ones forget is in the slow ones; what a slow one
    gives goes into the faster ones. Several requests for one block on its way share one transfer. A tier that fails
    costs only what it alone had.

    Parameters
    ----------
    tiers
        The fastest first; at most 64.
    copy_bytes_max
        The most bytes of copies on their way to several tiers.

    Raises
    ------
    ValueError
        If there are more tiers than that, or a size cannot be read.
    OSError
        If no thread could be started.
    """

    __slots__ = ("_native", "_tiers")

    def __init__(self, tiers: Sequence[HostTier | DiskTier | RemoteTier], *, copy_bytes_max: Size = "64MiB") -> None:
        self._tiers = tuple(tiers)
        self._native = _native.TierStack([tier._native.store() for tier in tiers], parse_size(copy_bytes_max))

    def __repr__(self) -> str:
        return f"TierStack({', '.join(map(repr, self._tiers))})"

    def counts(self) -> list[dict[str, Any]]:
        """Give what each tier did, the fastest first.

        Returns
        -------
        list of dict
            ``name``; in blocks ``hits`` (served, once for each transfer), ``missed`` (it said it had them), ``written``
            and of those ``promoted`` (a slower tier had served them), ``refused`` and ``declined`` (offered, and not
            wanted); ``hit_bytes`` and ``written_bytes``.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.counts()


class DiskTier:
    """Blocks on disks, which outlive the process.

    Each directory is made with mode 0700, and had by one process at a time. A disk that fails is set aside with its
    reason and tried again later.

    Parameters
    ----------
    disks
        For each disk the path of a directory of the tier's own, the most bytes in it, and, where there is a limit, the
        most bytes written to it in an hour, so that it lasts.
    segment_bytes
        Length of a segment of a directory that is made now: room is made by segments. By default a sixteenth of the
        smallest disk's bytes, from 4 to 256 MiB.
    uses_min
        From which sighting on a block is worth a write; 1 keeps all.
    engine
        ``"auto"`` is io_uring where the kernel allows it, else threads; ``"threads"``.
    key_file
        A file with the key that blocks are encrypted with (AES-256-GCM): 32 bytes or 64 hexadecimal digits. Directories
        that are made with a key are had with it alone.

    Raises
    ------
    TierError
        If a directory has to be left alone: its ``kind`` is ``"in_use"`` by another tier, ``"other_version"``,
        ``"foreign"`` (it holds something else), ``"damaged"``, ``"encrypted"`` where no key is named,
        ``"not_encrypted"`` where one is, or ``"other_key"``; or if options are wrong: ``"options"``, ``"too_small"``,
        ``"key_file"`` where there is no key in it. Nothing is changed then.
    ValueError
        If `engine` is neither of the two.
    """

    __slots__ = ("_native",)

    def __init__(
        self,
        disks: Sequence[tuple[str | os.PathLike[str], Size] | tuple[str | os.PathLike[str], Size, Size | None]],
        *,
        segment_bytes: Size | None = None,
        uses_min: int = 1,
        engine: str = "auto",
        key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._native = _native.DiskTier(
            [_disk(*disk) for disk in disks],
            None if segment_bytes is None else parse_size(segment_bytes),
            uses_min,
            engine,
            key_file,
        )

    def __repr__(self) -> str:
        return f"DiskTier({', '.join(place['path'] for place in self.places())})"

    def places(self) -> list[dict[str, Any]]:
        """Give each directory's figures.

        Returns
        -------
        list of dict
            ``path``; ``state`` (``"opening"``, ``"ready"``, ``"aside"``, ``"closed"``) and the ``reason`` why it is set
            aside; ``means`` (``"io_uring"``, ``"threads"``); ``blocks`` and ``bytes`` in it, ``bytes_max``; counts of
            ``corrupt`` blocks, ``failed`` requests and ``asides``.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        places: list[dict[str, Any]] = self._native.places()
        return places

    def close(self, timeout_s: float = 5.0) -> bool:
        """Take no more requests, write out what waits and give the directories up.

        Parameters
        ----------
        timeout_s
            How long to wait, in seconds. The GIL is let go meanwhile.

        Returns
        -------
        bool
            Whether all was written in time. What was not is lost, as in a crash.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.close(timeout_s)


class RemoteTier:
    """Blocks on an object store, a Redis or a shared directory, where several machines find them.

    A remote is not believed: what it gives was verified by a code that only holders of the key can make. While it fails
    it is set aside, which costs misses and no waiting. Nothing is asked of it when this is made.

    Parameters
    ----------
    address
        ``s3://HOST:PORT/BUCKET[/PREFIX][?region=REGION]``, ``redis://HOST:PORT[/DATABASE]``, or an absolute directory
        that is mounted here. Plain TCP: TLS is a proxy's.
    key_file
        A file with the key that its objects are believed by, the same on all machines: 32 bytes or 64 hexadecimal
        digits.
    login_file
        A file whose first line is ``ACCESS-KEY:SECRET-KEY`` of the object store, or ``USER:PASSWORD`` of the Redis,
        where the user may be empty.
    uses_min
        From which sighting on a block is worth a write; 1 keeps all.

    Raises
    ------
    ValueError
        If the address cannot be read, or a file holds no key, or no login.
    OSError
        If no thread could be started.
    """

    __slots__ = ("_address", "_native")

    def __init__(
        self,
        address: str,
        *,
        key_file: str | os.PathLike[str],
        login_file: str | os.PathLike[str] | None = None,
        uses_min: int = 1,
    ) -> None:
        self._address = address
        self._native = _native.RemoteTier(address, key_file, login_file, uses_min)

    def __repr__(self) -> str:
        return f"RemoteTier({self._address!r})"

    def aside(self) -> str | None:
        """Say why it is set aside.

        Returns
        -------
        str or None
            None where it is asked as usual.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.aside()

    def usage(self) -> dict[str, int]:
        """Give what it did.

        Returns
        -------
        dict
            Counts of blocks: ``hits``, ``absent`` (asked for and not there), ``written``, ``corrupt`` (not believed);
            of tries: ``failed``, ``retries``; ``refused`` (too many waited), ``probes`` (names that were looked for
            with nobody waiting), ``asides``; ``bytes_read`` and ``bytes_written``.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.usage()


class Loading:
    """Blocks on their way to the device, made by :meth:`KvTier.begin_load`. Gone, it owns nothing."""

    __slots__ = ("_native",)

    def __init__(self, native: _native.Loading) -> None:
        self._native = native

    @property
    def done(self) -> bool:
        """Whether :meth:`take` gives what has come."""
        return self._native.is_done()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done.

        Parameters
        ----------
        timeout_s
            How long at most.

        Returns
        -------
        bool
            Whether it is.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        ValueError
            If the seconds are negative or no number.
        """
        return self._native.wait(timeout_s)

    def take(self) -> list[int] | None:
        """Take what has come.

        Returns
        -------
        list of int or None
            As many blocks in a row as came in time, after those that the caller has: its own from now on, and sealed.
            None while it is under way; nothing after the first time, or after `cancel`.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.take()

    def cancel(self) -> None:
        """Go no further; what has come by then is given back, and stays cached.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.cancel()


class Prefetch:
    """A sequence on its way to the fastest tier, made by :meth:`KvTier.prefetch`. Gone, it goes no further."""

    __slots__ = ("_native",)

    def __init__(self, native: _native.Prefetch) -> None:
        self._native = native

    def cancel(self) -> None:
        """Go no further; what has begun arrives.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.cancel()


class KvTier:
    """A cache's connection to a tier. Made by :meth:`shoal.KvCache.attach_store`."""

    __slots__ = ("_native",)

    def __init__(
        self,
        cache: KvCache,
        store: DiskTier | HostTier | RemoteTier | TierStack,
        facts: Mapping[str, str],
        *,
        load_s: float,
        put_s: float,
        chooses: bool = False,
        idle_s: float | None = None,
    ) -> None:
        self._native = _native.KvTier(
            cache._native,
            store._native.store(),
            [(str(name), str(value)) for name, value in facts.items()],
            load_s,
            put_s,
            chooses,
            idle_s,
        )

    def load(self, token_ids: Iterable[int], held: Sequence[int], *, salt: str | bytes = "") -> list[int]:
        """Bring back the blocks that follow those of a prefix which the caller owns.

        Call it outside of guards: it takes blocks, for which memory may have to be found.

        Parameters
        ----------
        token_ids
            The sequence from its start.
        held
            Its first blocks: what :meth:`shoal.KvCache.match` gave.
        salt
            The tenant.

        Returns
        -------
        list of int
            As many blocks as the tier had in a row and gave in time. The caller owns them, and they are sealed.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.load(_salt(salt), token_ids, list(held))

    def may_load(self, token_ids: Iterable[int], held: int, *, salt: str | bytes = "") -> bool:
        """Say whether there may be something to load after the first `held` blocks of a sequence.

        Parameters
        ----------
        token_ids
            The sequence from its start.
        held
            How many of its first blocks the caller has.
        salt
            The tenant.

        Returns
        -------
        bool
            Whether the tier has the next block, as far as it knows: of a remote it may have to be asked.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.may_load(_salt(salt), token_ids, held)

    def begin_load(self, token_ids: Iterable[int], held: int, *, salt: str | bytes = "") -> Loading | None:
        """Begin to bring back the blocks that follow those of a prefix which the caller owns; comes back at once.

        As :meth:`load`, but for an engine that goes on with other requests meanwhile: steps may run, and blocks may be
        taken and given back. Record each step before what it uses is freed. One load runs at a time, each with its own
        deadline from when its turn comes; until it is taken, or gone, no block of the cache is moved.

        Parameters
        ----------
        token_ids
            The sequence from its start.
        held
            How many of its first blocks the caller has, by :meth:`shoal.KvCache.match`. Keep them until it is done.
        salt
            The tenant.

        Returns
        -------
        Loading or None
            None where nothing is there, or worth it, or too many wait already.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        native = self._native.begin_load(_salt(salt), token_ids, held)
        return None if native is None else Loading(native)

    def save(self, token_ids: Iterable[int], *, first: int = 0, salt: str | bytes = "") -> None:
        """Queue the full blocks of a sequence to be saved, as far as the tier lacks them. Comes back at once.

        Parameters
        ----------
        token_ids
            The sequence from its start. Its full blocks are sealed, and are found by their content when their turn
            comes: one that was evicted by then is not saved.
        first
            From which block on.
        salt
            The tenant.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.save(_salt(salt), token_ids, first)

    def prefetch(self, token_ids: Iterable[int], *, salt: str | bytes = "") -> Prefetch | None:
        """Begin to bring what only slow tiers have of a sequence to the fastest one, ahead of its :meth:`load`.

        For a request that waits for its turn. Comes back at once; takes no block of the device. A load that comes
        meanwhile waits for the same transfers. It ends when what is returned is cancelled or gone.

        Parameters
        ----------
        token_ids
            The sequence from its start.
        salt
            The tenant.

        Returns
        -------
        Prefetch or None
            None where the sequence has no full block, or too many wait already.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        native = self._native.prefetch(_salt(salt), token_ids)
        return None if native is None else Prefetch(native)

    def computed(self, tokens: int, seconds: float) -> None:
        """Say how long a step of the engine took, so that loading and computing can be compared.

        Parameters
        ----------
        tokens
            How many tokens the step computed. Tell of steps that computed prompts: answers of one token each say
            nothing of what a prompt costs.
        seconds
            What it took.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        ValueError
            If the seconds are negative or no number.
        """
        self._native.computed(tokens, seconds)

    def learn_from(self, other: KvTier) -> None:
        """Know from now on what another connection of the same cache has seen.

        That is of computing, and of tiers of the same names. For a connection that takes the other's place, as a tier
        joins.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.learn_from(other._native)

    def load_us_per_mib(self) -> float | None:
        """Give what bringing one MiB more to the device takes, from the fastest tier of those that were read.

        Returns
        -------
        float or None
            Microseconds, as loads were measured; None before there was one.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.load_us_per_mib()

    def choice(self) -> str | None:
        """Say what was decided last of a sequence that the tier has something of, and why, with its numbers.

        Returns
        -------
        str or None
            None where nothing was decided yet, or the connection does not choose.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.choice()

    def discard_queued(self) -> None:
        """Let nothing be saved that still waits for it: nobody knows any more what blocks hold.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.discard_queued()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until what was queued is saved or given up, and past every cache of the system.

        Parameters
        ----------
        timeout_s
            How long to wait, in seconds. The GIL is let go meanwhile.

        Returns
        -------
        bool
            Whether it was in time, and could be.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.flush(timeout_s)

    def usage(self) -> dict[str, Any]:
        """Give what the tier did for this cache.

        Returns
        -------
        dict
            In blocks: ``saved``, ``unsaved`` (refused, failed, or evicted before their turn came), ``looked_up``, and
            of those ``loaded``, ``late``, ``corrupt``. ``failed``: loads that ended early for another reason. In bytes:
            ``saved_bytes``, ``loaded_bytes``. ``load_us``: microseconds that loads took; of those ``lookup_us`` until
            it was known what is where and blocks were had for it, ``read_us`` waiting for what tiers read, ``copy_us``
            copies to the device (what lies in page-locked memory is verified meanwhile), ``verify_us`` what verifying
            took beyond those. ``prefetched``: blocks that
            came to the fastest tier ahead of a load. ``recomputed``: blocks of those looked for that were there and
            left there, as computing them is faster. ``demoted``: blocks that left the device unused.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        usage: dict[str, Any] = self._native.usage()
        for name in ("tier", "reason", "places", "promoted", "evicted", "bytes", "bytes_max"):
            del usage[name]
        return usage


def _disk(
    path: str | os.PathLike[str], size: Size, write_bytes_per_hour: Size | None = None
) -> tuple[str | os.PathLike[str], int, int | None]:
    return path, parse_size(size), None if write_bytes_per_hour is None else parse_size(write_bytes_per_hour)
