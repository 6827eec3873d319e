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
from typing import TYPE_CHECKING

import shoal.torch
from shoal import Error, WeightStore

from .errors import described
from .stamps import FilesChangedError
from .tiers import weights_facts

if TYPE_CHECKING:
    from shoal import StoredWeights
    from shoal.torch import Placement

    from .loading import ModelFiles
    from .spec import WeightShare

logger = logging.getLogger(__name__)

_RETRY_S = 5.0  # after which a fill is tried again while another worker fills
_PATIENCE_S = 4 * 3600.0  # for how long, and where an hour's writes are used up
_CLOSE_S = 2.0


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
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def find(self) -> bool:
        """Look for what is stored, from then on in `stored`; whether there is any that can be had."""
        try:
            share = self._share
            store = WeightStore(share.path, share.bytes, write_bytes_per_hour=share.write_bytes_per_hour)
            self._name = self._named()
            self.stored = store.find(self._name)
            self._store = store
        except Exception as error:  # whatever it is, the model is served without
            logger.warning("no weights are kept at rest: %s", described(error), exc_info=not _is_known(error))
        return self.stored is not None

    def forget(self) -> None:
        """Take what is stored for what is not there."""
        self.stored = None

    def place(self, placement: Placement) -> None:
        """Take what was made of it, to be stored if it is not."""
        self.stored = None
        if placement.from_store:
            logger.info("weights read from %s", self._share.path)
        else:
            self._placement = placement

    def fill(self) -> None:
        """Begin to store the weights, if they are not there."""
        if self._store is not None and self._placement is not None and self._thread is None:
            self._thread = threading.Thread(target=self._fill, name="weights-at-rest", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a fill that is under way; what it wrote counts for nothing."""
        self._stop.set()
        if self._store is not None:
            self._store.stop()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _named(self) -> str:
        facts = weights_facts(self._files, self._dtype)
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()

    def _fill(self) -> None:
        assert self._store is not None
        assert self._placement is not None
        begun = time.monotonic()
        while not self._stop.is_set():
            try:
                if self._named() != self._name:
                    # What was read may be of either.
                    logger.warning("the weights are not stored: the model's files changed while they were read")
                    return
                filled = shoal.torch.store_weights(self._placement, self._store, self._name)
            except Exception as error:  # whatever it is, the model is served without
                is_late = time.monotonic() - begun > _PATIENCE_S
                wait_s = _RETRY_S if getattr(error, "kind", None) == "in_use" else getattr(error, "wait_s", None)
                if wait_s is not None and not is_late:
                    self._stop.wait(max(_RETRY_S, wait_s))
                    continue
                if not self._stop.is_set():
                    logger.warning("the weights are not stored: %s", described(error), exc_info=not _is_known(error))
                return
            logger.info(
                "weights stored in %.1f s: %d bytes written, %d there already, %d models made room",
                time.monotonic() - begun,
                filled["written"],
                filled["shared"],
                len(filled["evicted"]),
            )
            return


def _is_known(error: Exception) -> bool:
    return isinstance(error, Error | OSError | FilesChangedError)
