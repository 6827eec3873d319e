"""The worker's weights at rest: stored in the background by a model's first start, read by its next ones.

Apart because serving must not depend on it: where the directory cannot be had, or what is there is not whole, the
model's own files are read, and the log says why.

What is stored is found by a name that stands for all that its bytes depend on: which files they are, by their numbers
on the file system, what they say of each tensor, the first kilobytes of each, the files' lengths and times, also those
that no program can set; the data type, and the versions of what loads them. It is made before anything is loaded, and
nothing is stored unless it is the same still afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import shoal.torch
from shoal import Error, WeightStore

from .errors import described
from .stamps import FilesChangedError
from .tiers import weights_facts

if TYPE_CHECKING:
    from shoal import Region, StoredWeights
    from shoal.torch import Placement

    from .loading import ModelFiles
    from .spec import WeightShare

logger = logging.getLogger(__name__)

_FIND_S = 30.0  # for which a start waits for the directory
_RETRY_S = 5.0  # after which a fill is tried again while another worker fills
_PATIENCE_S = 4 * 3600.0  # for how long, and where an hour's writes are used up
_CLOSE_S = 2.0
_LOOK_S = 60.0  # how often it is looked what the directory holds: others fill it too
_LOST = "what was stored was damaged or did not come, so wakes read the model's files; the log says more"


class WeightsAtRest:
    """Where one model's weights are stored.

    Parameters
    ----------
    share
        The directory, which all workers share.
    files
        The model's.
    dtype
        What its weights are served in, in the words of whoever loads them.

    Attributes
    ----------
    stored
        What was found, until it is placed.
    """

    def __init__(self, share: WeightShare, files: ModelFiles, dtype: str) -> None:
        self._share, self._files, self._dtype = share, files, dtype
        self.stored: StoredWeights | None = None
        self._store: WeightStore | None = None
        self._name = ""
        self._placement: Placement | None = None
        self._region: Region | None = None
        # Replaced, never changed: any thread may read it.
        self._told: dict[str, Any] = {"path": share.path, "bytes_max": share.bytes, "state": "waiting", "reason": None}
        self._blind: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def find(self) -> bool:
        """Look for what is stored, from then on in `stored`; whether there is any that can be had, soon."""
        try:
            self._name = self._named()
            self._store, self.stored = self._found()
        except Exception as error:  # whatever it is, the model is served without
            logger.warning("no weights are kept at rest: %s", described(error), exc_info=not _is_known(error))
            self._tell("unused", _why(error))
        return self.stored is not None

    def forget(self, error: Exception) -> None:
        """Take what is stored for what is not there, because of what happened as it was used."""
        self.stored = None
        self._tell("waiting", _why(error))

    def place(self, placement: Placement) -> None:
        """Take what was made of it, to be stored if it is not."""
        self.stored = None
        self._region = placement.region
        if placement.from_store:
            logger.info("weights read from %s", self._share.path)
            self._tell("read")
        else:
            self._placement = placement

    def fill(self) -> None:
        """Begin to store the weights, if they are not there, and to look from time to time what is."""
        if self._store is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weights-at-rest", daemon=True)
            self._thread.start()

    def figures(self) -> dict[str, Any]:
        """Give how it is, as the server is told; from any thread, at once.

        Returns
        -------
        dict
            ``state``: the weights were ``"read"`` there, or ``"stored"`` there since; they are ``"waiting"`` to be, or
            the store is ``"unused"``. ``reason``: why they are neither of the first two, where that is known. Of the
            whole directory: its ``path``, ``bytes_max``, and as far as it was looked at (``looked_at_ms``, since the
            Unix epoch) how many ``models``, their ``bytes`` and what these would be ``unshared``.
        """
        told = self._told
        if told["state"] in ("read", "stored") and self._region is not None and not self._region.reads_stored:
            return {**told, "state": "unused", "reason": _LOST}
        return told

    def close(self) -> None:
        """End a fill that is under way; what it wrote counts for nothing."""
        self._stop.set()
        if self._store is not None:
            self._store.stop()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _found(self) -> tuple[WeightStore, StoredWeights | None]:
        """Open the directory and look there, on a thread: a disk that hangs keeps no model from serving."""
        share, name = self._share, self._name
        ends: SimpleQueue[tuple[WeightStore, StoredWeights | None] | Exception] = SimpleQueue()

        def look() -> None:
            try:
                store = WeightStore(share.path, share.bytes, write_bytes_per_hour=share.write_bytes_per_hour)
                ends.put((store, store.find(name)))
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                ends.put(error)

        threading.Thread(target=look, name="weights-at-rest", daemon=True).start()
        try:
            found = ends.get(timeout=_FIND_S)
        except Empty:
            raise TimeoutError(f"{share.path} does not answer within {_FIND_S:g} s") from None
        if isinstance(found, Exception):
            raise found
        return found

    def _named(self) -> str:
        facts = weights_facts(self._files, self._dtype)
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()

    def _tell(self, state: str, reason: str | None = None) -> None:
        self._told = {**self._told, "state": state, "reason": reason}

    def _look(self) -> None:
        assert self._store is not None
        try:
            self._told = {**self._told, **self._store.usage(), "looked_at_ms": time.time_ns() // 1_000_000}
            self._blind = None
        except Error as error:
            if str(error) != self._blind:
                self._blind = str(error)
                logger.warning("what is at rest cannot be counted: %s", error)

    def _run(self) -> None:
        self._look()
        if self._placement is not None:
            self._fill(self._placement)
            self._placement = None
        while not self._stop.wait(_LOOK_S):
            self._look()

    def _fill(self, placement: Placement) -> None:
        assert self._store is not None
        begun = time.monotonic()
        while not self._stop.is_set():
            try:
                if self._named() != self._name:
                    # What was read may be of either.
                    reason = "the model's files changed while they were read"
                    logger.warning("the weights are not stored: %s", reason)
                    self._tell("unused", reason)
                    return
                filled = shoal.torch.store_weights(placement, self._store, self._name)
            except Exception as error:  # whatever it is, the model is served without
                is_late = time.monotonic() - begun > _PATIENCE_S
                wait_s = _RETRY_S if getattr(error, "kind", None) == "in_use" else getattr(error, "wait_s", None)
                if wait_s is not None and not is_late:
                    self._tell("waiting", _why(error))
                    self._stop.wait(max(_RETRY_S, wait_s))
                    continue
                if not self._stop.is_set():
                    logger.warning("the weights are not stored: %s", described(error), exc_info=not _is_known(error))
                    self._tell("unused", _why(error))
                return
            self._look()
            self._tell("stored")
            logger.info(
                "weights stored in %.1f s: %d bytes written, %d there already, %d models made room",
                time.monotonic() - begun,
                filled["written"],
                filled["shared"],
                len(filled["evicted"]),
            )
            return


def _why(error: Exception) -> str:
    return str(error) if _is_known(error) else described(error)


def _is_known(error: Exception) -> bool:
    return isinstance(error, Error | OSError | FilesChangedError)
