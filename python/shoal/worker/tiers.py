"""The worker's KV on disk: what conversations have computed outlives the worker and the server.

Apart, because serving must not wait for a disk: directories are opened in the background, also while the lock of a
worker that was killed is still there, and until then, or where it cannot be, everything goes on without.

Bytes are found again only under the same facts: what the model is (its configuration and weights), and what computes it
(device, versions, data type), since the numbers of another are not the same to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from shoal import DiskTier, Error, TierError

from .errors import described

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from shoal import KvCache, KvTier

    from .loading import ModelFiles
    from .spec import DiskShare

logger = logging.getLogger(__name__)

_LOCK_WAIT_S = (
    15.0  # how long a directory of another process is tried often: it may be that of a worker that was killed
)
_LOCK_RETRY_S = 0.25
_RETRY_S = 30.0
_SAMPLE_BYTES = 4096
_FLUSH_S = 1.0
_CLOSE_S = 2.0


class KvOnDisk:
    """A KV cache's connection to its disks, from the moment on when they are open.

    Parameters
    ----------
    cache
        The cache.
    disks
        Where.
    facts
        Gives what the bytes depend on; called in the background.
    wait_s
        How long a load may take.
    """

    def __init__(
        self, cache: KvCache, disks: Sequence[DiskShare], facts: Callable[[], Mapping[str, str]], wait_s: float = 1.0
    ) -> None:
        self._cache, self._disks, self._facts, self._wait_s = cache, disks, facts, wait_s
        self._disk: DiskTier | None = None
        self._tier: KvTier | None = None
        self._reason: str | None = "its directories are being opened"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._open, name="disk-tier", daemon=True)
        self._thread.start()

    def load(self, tokens: Sequence[int], blocks: Sequence[int], salt: str) -> list[int]:
        """Bring back the blocks that follow `blocks`, as far as they are there and come in time."""
        tier = self._tier
        return [] if tier is None else tier.load(tokens, blocks, salt=salt)

    def save(self, tokens: Sequence[int], first: int, salt: str) -> None:
        """Queue the full blocks of a sequence from `first` on to be saved."""
        tier = self._tier
        if tier is not None:
            tier.save(tokens, first=first, salt=salt)

    def discard_queued(self) -> None:
        """Let nothing be saved that waits for it."""
        tier = self._tier
        if tier is not None:
            tier.discard_queued()

    def figures(self) -> dict[str, Any]:
        """Give what it did and how the disks are, as the server is told."""
        tier, disk = self._tier, self._disk
        used = {} if tier is None else tier.usage()
        return {"tier": "disk", "reason": self._reason, **used, "places": [] if disk is None else disk.places()}

    def close(self) -> None:
        """Write out what waits, within a few seconds, and give the directories up."""
        self._stop.set()
        self._thread.join(timeout=_CLOSE_S)
        tier, disk, self._tier = self._tier, self._disk, None
        if tier is not None and not tier.flush(_FLUSH_S):
            logger.info("some KV was not saved in time")
        del tier
        if disk is not None:
            disk.close(_CLOSE_S)

    def _open(self) -> None:
        begun = time.monotonic()
        while not self._stop.is_set():
            try:
                disk = self._opened()
            except TierError as error:
                if self._reason != str(error):
                    logger.warning("no KV is kept on disk: %s", error)
                self._reason = str(error)
                if error.kind != "in_use":
                    return
                is_early = time.monotonic() - begun < _LOCK_WAIT_S
                self._stop.wait(_LOCK_RETRY_S if is_early else _RETRY_S)
                continue
            except (Error, OSError) as error:
                logger.warning("no KV is kept on disk: %s", described(error))
                self._reason = described(error)
                return
            self._disk = disk
            break
        else:
            return
        try:
            self._tier = self._cache.attach_store(self._disk, self._facts(), load_s=self._wait_s)
        except (Error, OSError) as error:
            self._reason = described(error)
            logger.warning("no KV is kept on disk: %s", self._reason)
            return
        self._reason = None
        for place in self._disk.places():
            logger.info("KV on disk: %(path)s is %(state)s, %(blocks)d blocks in it, by %(means)s", place)

    def _opened(self) -> DiskTier:
        return DiskTier([(share.path, share.bytes, share.write_bytes_per_hour) for share in self._disks])


def facts_of(files: ModelFiles, device: str, dtype: str) -> dict[str, str]:
    """Name what a model's KV depends on beside the tokens.

    Parameters
    ----------
    files
        The model's. Of the weights, what the files say of each tensor counts and a few kilobytes of each, with the
        files' lengths and times.
    device, dtype
        What computes it, and in what.
    """
    import torch
    import transformers

    from . import hooks

    return {
        "config": hashlib.sha256((files.path / "config.json").read_bytes()).hexdigest(),
        "weights": _weights(files),
        "dtype": dtype,
        "attention": hooks.ATTENTION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu {torch.get_num_threads()}",
    }


def _weights(files: ModelFiles) -> str:
    digest = hashlib.sha256()
    by_file: dict[Path, list[tuple[str, Any]]] = {}
    for name, place in sorted(files.tensors.items()):
        by_file.setdefault(place.path, []).append((name, place))
    for path, tensors in sorted(by_file.items()):
        with path.open("rb") as file:
            stat = path.stat()
            digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
            for name, place in tensors:
                digest.update(repr((name, place.dtype, place.shape, place.offset)).encode())
                file.seek(place.offset)
                digest.update(file.read(min(place.bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()
