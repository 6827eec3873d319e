"""A cache of KV blocks, over all of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.errors import RegionError
from shoal.kv_cache.groups import KvGroup, KvGroupSpec
from shoal.memory.region import Region
from shoal.memory.sizes import Size, parse_size
from shoal.wake import TIMEOUT_S, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from _typeshed import ReadableBuffer, WriteableBuffer

    from shoal import _native
    from shoal.tiers import DiskTier, HostTier, KvTier, RemoteTier, TierStack
    from shoal.torch.kv import Tensor

__all__ = ["KvCache", "Sealed"]

_ALL = (1 << 63) - 1


def _salt(salt: str | bytes) -> str | bytes:
    """Give each text bytes of its own, also where it is no valid Unicode, as :func:`os.fsdecode` makes (I12)."""
    return salt.encode("utf-8", "surrogatepass") if isinstance(salt, str) else salt


class _Addresses(Region):
    """The region of a cache: which of it has memory is the cache's business (I2)."""

    __slots__ = ()

    def commit(self, offset: int, nbytes: int) -> None:
        """Refuse.

        Raises
        ------
        RegionError
            Always.
        """
        raise self._refused("commit", offset, nbytes)

    def decommit(self, offset: int, nbytes: int) -> None:
        """Refuse: blocks with owners may lie there.

        Raises
        ------
        RegionError
            Always.
        """
        raise self._refused("decommit", offset, nbytes)

    def _refused(self, doing: str, offset: int, nbytes: int) -> RegionError:
        what = f'region "{self.name}": cannot {doing} {nbytes} bytes from {offset}'
        return RegionError(
            f"{what}: a KV cache lies in it; take and free blocks, or trim() the cache", kind="state", region=self.name
        )


class Sealed(NamedTuple):
    """What :meth:`KvCache.seal` did.

    Attributes
    ----------
    blocks : int
        Full blocks of the sequence that can be found now, from its start, or from the block after ``after``: up to the
        first that a group lacks which needs it.
    duplicates : list of tuple of int
        Blocks whose content was there already, as (group, place in the sequence, block given, block that is found). Use
        the one that is found and free your own, or keep both.
    """

    blocks: int
    duplicates: list[tuple[int, int, int, int]]


class KvCache:
    """KV blocks with memory behind those that are in use. Made by :meth:`MemoryManager.kv_cache`.

    What is said here of blocks is about the first group; other groups have the same calls (:attr:`groups`).

    Attributes
    ----------
    groups : tuple of KvGroup
        Its groups.
    region : Region
        The addresses it lies in.
    alloc_into : callable
        :attr:`KvGroup.alloc_into` of the first group.
    free_from : callable
        :attr:`KvGroup.free_from` of the first group.
    """

    __slots__ = ("_native", "alloc_into", "free_from", "groups", "region")

    alloc_into: Callable[[WriteableBuffer], int]
    free_from: Callable[[ReadableBuffer], None]

    def __init__(self, manager: _native.MemoryManager, name: str, specs: Sequence[KvGroupSpec], **words: Any) -> None:
        if not specs:
            raise ValueError("a cache needs at least one group")
        self._native = manager.kv_cache({"name": name, "groups": [spec._words() for spec in specs], **words})
        self.region: Region = _Addresses(self._native.region, manager)
        made = zip(self._native.groups(), specs, strict=True)
        self.groups = tuple(KvGroup(group, spec, self.region) for group, spec in made)
        self.alloc_into = self.groups[0].alloc_into
        self.free_from = self.groups[0].free_from

    def __repr__(self) -> str:
        return f"KvCache({', '.join(map(repr, self.groups))})"

    def group(self, name: str) -> KvGroup:
        """Give the group of a name.

        Parameters
        ----------
        name
            The name.

        Returns
        -------
        KvGroup
            The group.

        Raises
        ------
        KeyError
            If there is none.
        """
        for group in self.groups:
            if group.spec.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(group.spec.name for group in self.groups)}")

    def tensors(self) -> list[Tensor]:
        """Make a tensor for each layer of the first group.

        Returns
        -------
        list of torch.Tensor
            As :meth:`KvGroup.tensors`.

        Raises
        ------
        ForkError
            In a process other than the one that made the cache.
        """
        return self.groups[0].tensors()

    def alloc(self, n: int) -> list[int] | None:
        """Take blocks as a list.

        Parameters
        ----------
        n
            How many.

        Returns
        -------
        list of int or None
            As :meth:`KvGroup.alloc`.

        Raises
        ------
        DeviceError, ForkError
            As :meth:`KvGroup.alloc`.
        """
        return self.groups[0].alloc(n)

    def free(self, ids: Iterable[int]) -> None:
        """Take one owner from each block.

        Parameters
        ----------
        ids
            As for :meth:`KvGroup.free`.

        Raises
        ------
        RegionError
            For a block that does not exist or that nobody owns. Nothing has changed then.
        ForkError
            In a process other than the one that made the cache.
        """
        self.groups[0].free(ids)

    def fork(self, ids: Iterable[int]) -> None:
        """Make each block owned once more.

        Parameters
        ----------
        ids
            As for :meth:`KvGroup.fork`.

        Raises
        ------
        RegionError
            For a block that does not exist or that nobody owns. Nothing has changed then.
        ForkError
            In a process other than the one that made the cache.
        """
        self.groups[0].fork(ids)

    def available(self) -> int:
        """Say how many more blocks there could be.

        Returns
        -------
        int
            As :meth:`KvGroup.available`.

        Raises
        ------
        ForkError
            In a process other than the one that made the cache.
        """
        return self.groups[0].available()

    def hint(self, blocks: int) -> None:
        """Say that the next step will take so many blocks.

        Parameters
        ----------
        blocks
            How many.

        Raises
        ------
        ValueError
            If ``blocks`` is negative, or 2^32 or more.
        ForkError
            In a process other than the one that made the cache.
        """
        self.groups[0].hint(blocks)

    def compact(
        self, *, apply: bool = False, moves_max: int | None = None, timeout_s: float = TIMEOUT_S
    ) -> list[tuple[int, int]]:
        """Move blocks out of the emptiest memory.

        Parameters
        ----------
        apply, moves_max, timeout_s
            As for :meth:`KvGroup.compact`.

        Returns
        -------
        list of tuple of int
            As :meth:`KvGroup.compact`.

        Raises
        ------
        DeadlineError, DeviceError, RegionError
            As :meth:`KvGroup.compact`. No block has moved then.
        ForkError
            In a process other than the one that made the cache.
        """
        return self.groups[0].compact(apply=apply, moves_max=moves_max, timeout_s=timeout_s)

    def match(self, token_ids: Iterable[int], *, salt: str | bytes = "") -> tuple[int, list[Any]]:
        """Find the longest prefix whose blocks are sealed, and become one more owner of these blocks.

        Only full blocks count. An engine has to compute at least one token itself, so it gives all but the last. A
        hit is compared token by token, never by hash alone.

        Parameters
        ----------
        token_ids
            Tokens: a list, or a buffer of 32 or 64 bit integers.
        salt
            The tenant: what was sealed for another is not found.

        Returns
        -------
        tuple of (int, list)
            How many tokens were found, and the blocks. With several groups, a list for each: all blocks of the prefix
            where attention is full or latent, the last ones that a window needs, the one at the end of a state. Free
            them like others.

        Raises
        ------
        RegionError
            If the cache was made with ``eviction=None``, or holds only states.
        """
        tokens, groups = self._native.find(_salt(salt), token_ids)
        return tokens, self._of_one(groups)

    def match_keys(self, keys: Iterable[bytes], *, salt: str | bytes = "") -> tuple[int, list[Any]]:
        """Find by keys that the engine made, one a block.

        Parameters
        ----------
        keys
            Each stands for all tokens up to the end of its block; 1 to 64 bytes.
        salt
            As for :meth:`match`.

        Returns
        -------
        tuple of (int, list)
            How many blocks were found, and the blocks.

        Raises
        ------
        RegionError
            If a key is not of 1 to 64 bytes, or the cache was made with ``eviction=None``, or holds only states.
        ForkError
            In a process other than the one that made the cache.
        """
        blocks, groups = self._native.find_keys(_salt(salt), list(keys))
        return blocks, self._of_one(groups)

    def seal(self, token_ids: Iterable[int], ids: Sequence[Any], *, salt: str | bytes = "") -> Sealed:
        """Let the full blocks of a sequence be found from now on, also after they are freed, until they are evicted.

        Seal a block when the step that fills it has been launched, and write to it no more.

        Parameters
        ----------
        token_ids
            The sequence from its start.
        ids
            Its blocks in order; with several groups, a list for each, with -1 where a group has none.
        salt
            The tenant.

        Returns
        -------
        Sealed
            What can be found, and what was there already.

        Raises
        ------
        RegionError
            For a block that does not exist, that nobody owns or that was sealed with other tokens, or if the cache was
            made with ``eviction=None``, or holds only states. Nothing has changed then.
        """
        return Sealed(*self._native.seal(_salt(salt), token_ids, self._of_all(ids)))

    def seal_keys(
        self, keys: Iterable[bytes], ids: Sequence[Any], *, after: bytes | None = None, salt: str | bytes = ""
    ) -> Sealed:
        """Seal by keys that the engine made, one a block.

        Parameters
        ----------
        keys
            As for :meth:`match_keys`.
        ids
            As for :meth:`seal`.
        after
            The key of the block before the first.
        salt
            The tenant.

        Returns
        -------
        Sealed
            As :meth:`seal`.

        Raises
        ------
        RegionError
            For a block that does not exist, that nobody owns or that was sealed as something else, for a key that is
            not of 1 to 64 bytes, or if the cache was made with ``eviction=None``, or holds only states. Nothing has
            changed then. (Where ``after`` cannot be found, nothing is sealed, and that is what is said.)
        ForkError
            In a process other than the one that made the cache.
        """
        return Sealed(*self._native.seal_keys(_salt(salt), after, list(keys), self._of_all(ids)))

    def forget_all(self) -> None:
        """Let nothing of what blocks hold be found any more, as after new weights. Owned blocks stay owned.

        Raises
        ------
        RegionError
            If the cache was made with ``eviction=None``.
        """
        self._native.forget_all()

    def attach_store(
        self,
        store: DiskTier | HostTier | RemoteTier | TierStack,
        facts: Mapping[str, str],
        *,
        load_s: float = 1.0,
        put_s: float = 30.0,
        chooses: bool = False,
        idle_s: float | None = None,
    ) -> KvTier:
        """Connect the cache to a tier that keeps what it forgets.

        Nothing happens by itself: after :meth:`match` ask :meth:`shoal.KvTier.load` for more, and after :meth:`seal`
        say :meth:`shoal.KvTier.save`.

        Parameters
        ----------
        store
            The tier; several caches may have the same.
        facts
            What the bytes of a block depend on beside the tokens, by name: the model and its weights, the data type,
            what computes them. Only bytes of the same facts, in this order, are found; the layout counts by itself.
        load_s
            How long a load may take, in seconds; what has come by then in a row is used.
        put_s
            How long the tier may take to keep a block, in seconds.
        chooses
            Whether a load leaves what is computed faster than loaded, by what loads took and
            :meth:`shoal.KvTier.computed` was told. Else it brings all there is.
        idle_s
            How long a sequence's blocks stay on the device without an owner and unused once the tier has them; None for
            as long as nobody needs the memory.

        Returns
        -------
        KvTier
            The connection, which ends with the object.

        Raises
        ------
        RegionError
            If the cache finds nothing again, has several groups, or was made with ``debug=True``.
        ValueError
            If a time is negative or no number.
        """
        from shoal.tiers import KvTier

        return KvTier(self, store, facts, load_s=load_s, put_s=put_s, chooses=chooses, idle_s=idle_s)

    def events(self, since: int = 0, *, most: int = 4096) -> tuple[list[dict[str, Any]], int, int]:
        """Say what was stored and removed, for a router.

        Parameters
        ----------
        since
            The number to begin with: what the last call gave as the next.
        most
            The most events to give.

        Returns
        -------
        tuple of (list of dict, int, int)
            The events, oldest first; how many before them were lost (not 0: forget everything and read on); and the
            number to ask for next.

        Raises
        ------
        RegionError
            If the cache was made with ``eviction=None``, or holds only states.
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.events(since, most)

    def prefix_stats(self) -> dict[str, int]:
        """Give counts of blocks stored, removed, met again and refused.

        Returns
        -------
        dict
            ``stored``, ``removed``, ``duplicates``, ``collisions``, ``full``.

        Raises
        ------
        RegionError
            If the cache was made with ``eviction=None``, or holds only states.
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.prefix_stats()

    def set_limit(self, limit: Size, *, revision: int | None = None) -> None:
        """Set the most memory that the cache may have, over all groups.

        Memory above it goes as blocks become free, and what is only cached there is evicted; raised again, everything
        is as it was.

        Parameters
        ----------
        limit
            Bytes; at most what the cache was made for.
        revision
            An older one than that in force is refused, and so is another limit under the same one, so that a late word
            undoes no newer one; below 2**64 - 1, so that there always is a newer one. Without it: one newer, always.

        Raises
        ------
        RegionError
            With ``kind`` ``"stale"``, ``"conflict"`` or ``"limit"`` (above what the cache was made for, or that
            revision). Nothing has changed.
        """
        self._native.set_limit(parse_size(limit), revision)

    def next_wanted(self, timeout_s: float) -> tuple[int, int] | None:
        """Wait until a reclaim wants memory in which lies what the engine only remembers.

        For an engine with books of its own, which owns such blocks here. From the first call on, each reclaim asks
        before it takes weights, and waits a moment for :meth:`answer_wanted`.

        Parameters
        ----------
        timeout_s
            How long to wait, in seconds. The GIL is let go meanwhile.

        Returns
        -------
        tuple of int or None
            The question's number and how many bytes are wanted; None if nothing was.

        Raises
        ------
        RegionError
            If the cache is gone.
        """
        return self._native.next_wanted(timeout_s)

    def answer_wanted(self, number: int, freed: int) -> None:
        """Answer a question of :meth:`next_wanted`.

        Parameters
        ----------
        number
            Its number.
        freed
            How many bytes went since.

        Raises
        ------
        RegionError
            If the cache is gone.
        """
        self._native.answer_wanted(number, freed)

    def set_kept(self, nbytes: int) -> None:
        """Say how many bytes the engine only remembers: they count as cached, and not as used.

        Parameters
        ----------
        nbytes
            How many.

        Raises
        ------
        RegionError
            If the cache is gone.
        """
        self._native.set_kept(nbytes)

    def record_step(self, stream: Any = 0) -> None:
        """Say that a step was launched. Do so after each, on each stream that steps run on.

        Memory of free blocks goes only after the newest steps. An engine that never says it has its memory go after
        everything queued on the device, and only while it holds no guard.

        Parameters
        ----------
        stream
            torch's stream, or its handle; the default stream without it.

        Raises
        ------
        DeviceError
            While a graph is captured on the stream.
        """
        self._native.record_step(int(getattr(stream, "cuda_stream", stream)))

    def trim(self, nbytes: Size = _ALL, *, cached: bool = False) -> Report:
        """Give memory back in which no block lies, whatever is expected.

        Parameters
        ----------
        nbytes
            How many bytes; all there are, without it.
        cached
            Whether to evict for it what nobody owns and is only cached.

        Returns
        -------
        Report
            What was freed.

        Raises
        ------
        DeadlineError
            While a step runs.
        """
        return Report._of(self._native.trim(parse_size(nbytes), cached), whole=True)

    def usage(self) -> dict[str, Any]:
        """Give figures.

        Returns
        -------
        dict
            In bytes: ``limit``, ``reservation`` (the most a limit can be), ``mapped``, ``live`` (blocks with an owner),
            ``cached``, ``empty`` (memory in which nothing lies). ``revision`` of the limit. ``block_tokens``: a prefix
            is found in steps of so many tokens; None where nothing is found again. ``groups``: for each ``mapped`` and
            counts of blocks.

        Raises
        ------
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.usage()

    def strays(self) -> list[tuple[int, int, int]]:
        """Give the writes to blocks that nobody owned, in debug mode: those found since it was asked last.

        A block is filled with NaN when it is freed, and looked at when it is allocated again and here. One that is only
        cached then keeps what it holds, and is looked at when it is found, too, and after its eviction. Not watched is
        what was never used, and what is freed inside a guard by an engine that records no steps.

        Returns
        -------
        list of tuple of int
            The group, the block, and the first byte that is not as it was left, from the start of :attr:`region`; of a
            cached block where it begins.

        Raises
        ------
        RegionError
            If the cache was not made with ``debug=True``.
        """
        return self._native.strays()

    def check(self) -> None:
        """Count everything anew, for tests.

        Raises
        ------
        AssertionError
            If figures contradict one another.
        """
        wrong = self._native.check()
        if wrong is not None:
            raise AssertionError(wrong)

    def _of_one(self, groups: list[list[int]]) -> list[Any]:
        return groups[0] if len(self.groups) == 1 else groups

    def _of_all(self, ids: Sequence[Any]) -> list[Any]:
        return [ids] if len(self.groups) == 1 else list(ids)
