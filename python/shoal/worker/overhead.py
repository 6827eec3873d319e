"""What a process takes of a GPU beside its regions: measured, leased before a step that takes more, given back later.

Apart from :mod:`.device`, because it is about figures of torch and of the driver, and of nothing that is in regions.

A lease that only rose to the highest that a prompt once took would keep that from all others for ever, also while the
model sleeps. So it falls to the most of the last half minute; and because a step could find its memory given to others
then, whoever runs one says how large it is: what steps of that size have taken before is leased before it begins.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from shoal import DeadlineError, Error, LeaseError

from .memory import ShortageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shoal import MemoryManager

logger = logging.getLogger(__name__)

_CONTEXT_BYTES = 530 << 20  # an H100's, with our kernels and torch's; where it cannot be measured
_PLAUSIBLE_BYTES_MAX = 1 << 30
_ALONE_S = 20.0  # how long a worker waits for others to have measured
_KEPT_S = 30.0  # how long what was taken stays leased after it was
# Less than this is not given back, nor asked for before a step: the server sees it in the next figures and has its
# headroom for it, and a step that stands still for a few MiB costs its model's turn more than they are worth.
_SLACK_BYTES = 32 << 20
# Steps of a size that are remembered: one whose context was long is no reason to lease as much for every step after it.
_STEPS_KEPT = 64


class Overhead:
    """What a process takes of a GPU beside its regions: context, libraries, torch's own pool.

    torch counts its pool exactly. For the rest there is only the GPU's free memory before and after, and other
    processes move that too; so a difference that is not plausible is not believed, and the declared figure stands.

    Parameters
    ----------
    device
        ``"cuda:N"``.
    directory
        Of the server: its workers measure one after another.
    leased
        Bytes for which `open` takes a lease.
    clock
        Gives seconds.
    """

    def __init__(
        self, device: str, directory: Path, leased: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = torch.device(device)
        self._lock = directory / "overhead.lock"
        self._clock = clock
        self._fixed = 0
        self._peak = 0
        self._figures = threading.Lock()  # for the marks below, each the most since somebody last looked at it
        self._untold = 0
        self._of_step = 0
        self._used_by_step = 0
        self._reserved = 0  # what torch's pool had when somebody last looked, and when the step began
        self._kept = 0
        self._by_size: dict[int, deque[int]] = {}  # steps' tokens in bits: what was taken when they ran lately
        self._now_needed = 0  # by the step that runs
        self._lately: deque[tuple[float, int]] = deque()
        self._leasing = threading.Lock()
        self._leased = leased

    def open(self, make: Callable[[], MemoryManager]) -> MemoryManager:
        """Open the device by `make` and make torch use it; count the context."""
        with _alone(self._lock):
            before = _free_by_nvidia_smi(self._device.index or 0)
            self._mem = make()
            torch.cuda.set_device(self._device)
            torch.cuda.init()
            self._count_since(before, "context", _CONTEXT_BYTES)
        return self._mem

    def warm_up(self, dtype: torch.dtype) -> None:
        """Make the libraries load, on small tensors; count what they keep."""
        # On a thread that ends: torch keeps a cuBLAS handle, some 100 MiB, for each thread that needed one, and gives
        # those of threads that ended to the next. Else this one's would lie idle beside the engine's.
        with _alone(self._lock), ThreadPoolExecutor(max_workers=1, thread_name_prefix="warm-up") as executor:
            executor.submit(self._warm_up, dtype).result()

    def _warm_up(self, dtype: torch.dtype) -> None:
        before = self._free()
        start = time.monotonic()
        with torch.inference_mode():
            for kind in dict.fromkeys((dtype, torch.float32)):
                square = torch.ones((256, 256), dtype=kind, device=self._device)
                torch.nn.functional.linear(square, square, square[0])
                heads = square.view(1, 4, 256, 64)
                mask = torch.ones((256, 256), dtype=torch.bool, device=self._device)
                torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
                torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
                torch.nn.functional.rms_norm(square, (256,))
                torch.nn.functional.silu(square).float().softmax(-1).cumsum(-1).argmax(-1)
            index = torch.arange(8, device=self._device)
            square.index_copy_(0, index, square.index_select(0, index))
            torch.sort(square[0], descending=True)
            torch.topk(square[0], 8)
        torch.cuda.synchronize(self._device)
        del square, heads, mask, index
        self._count_since(before, "libraries", None)
        self.release_cached()
        logger.info("libraries loaded in %.2f s; %d bytes beside the regions", time.monotonic() - start, self.peak())

    def peak(self) -> int:
        """Give the most that there was, in bytes."""
        with self._figures:
            self._look()
            return self._peak

    def _look(self) -> None:
        """Note the most since the last look; inside `_figures`."""
        # As it is: `torch.cuda.max_memory_reserved` sorts all figures for each one, and this is done for each step.
        figures = torch.cuda.memory_stats_as_nested_dict(self._device)
        reserved, used = ((figures[of]["all"] if figures else {}) for of in ("reserved_bytes", "allocated_bytes"))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._reserved = int(reserved.get("current", 0))
        most = int(reserved.get("peak", 0))
        self._of_step = max(self._of_step, most)
        self._used_by_step = max(self._used_by_step, int(used.get("peak", 0)))
        most += self._fixed
        self._peak, self._untold = max(self._peak, most), max(self._untold, most)

    def measured(self) -> int:
        """Give the most since this was last called, in bytes; what has not been taken for a while is given back."""
        with self._figures:
            self._look()
            most, self._untold = self._untold, 0
        self._give_back(most)
        return most

    def _give_back(self, measured: int) -> None:
        now = self._clock()
        if not self._leasing.acquire(blocking=False):
            return  # a step gets its own just now
        try:
            # A step may wait for its bytes longer than what was taken is remembered.
            self._note(max(measured, self._now_needed), now)
            most = max(nbytes for _, nbytes in self._lately)
            if self._leased - most >= _SLACK_BYTES:
                self._mem.set_overhead(most)
                logger.debug("%d bytes beside the regions stay leased, %d go back", most, self._leased - most)
                self._leased = most
        except Error as error:
            # Whoever reports figures has others to report.
            logger.warning("What was taken beside the regions stays leased: %s", error)
        finally:
            self._leasing.release()

    def _note(self, nbytes: int, now: float) -> None:
        """Let nobody give back what was taken, or is about to be; inside `_leasing`.

        What is kept falls from one figure to the next. So it is at most one for each report of that time, and one for
        each size of a step.
        """
        while self._lately and self._lately[0][0] <= now - _KEPT_S:
            self._lately.popleft()
        while self._lately and self._lately[-1][1] <= nbytes:
            self._lately.pop()  # counts for longer and is more
        self._lately.append((now, nbytes))

    def begin_step(self, tokens: int, timeout_s: float) -> None:
        """Lease what steps of so many tokens have taken before, where that is noticeably more than is leased.

        Raises
        ------
        ShortageError
            It cannot be had in time.
        """
        with self._figures:
            self._look()
            self._of_step = self._used_by_step = 0
            self._kept = self._reserved
            size = tokens.bit_length()
            needed = max((max(taken) for bits, taken in self._by_size.items() if bits <= size), default=0)
        with self._leasing:
            self._now_needed = needed
            if needed:
                self._note(needed, self._clock())
            if needed - self._leased < _SLACK_BYTES:
                return
            try:
                self._mem.set_overhead(needed, timeout_s=timeout_s)
            except (LeaseError, DeadlineError) as error:
                self._now_needed = 0
                message = f"a step of {tokens} tokens takes {needed} bytes beside the regions: {error}"
                raise ShortageError(message) from error
            self._leased = needed

    def leave_step(self) -> None:
        """Let go of what `begin_step` leased: the step ended, or did not begin after all."""
        self._now_needed = 0

    def end_step(self, tokens: int) -> None:
        """Remember what was taken since `begin_step`."""
        self.leave_step()
        with self._figures:
            self._look()
            # What steps before left in the pool says nothing of what this one takes: that is what it used, and at most
            # what the pool grew by beside that.
            grown = max(0, self._of_step - self._kept)
            taken = min(self._of_step, self._used_by_step + grown)
            size = tokens.bit_length()
            self._by_size.setdefault(size, deque(maxlen=_STEPS_KEPT)).append(self._fixed + taken)

    def release_cached(self) -> None:
        """Give back what torch keeps of its pool without using it, cuBLAS's workspaces included."""
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def _free(self) -> int:
        return self._mem.device_memory()["free"] + torch.cuda.memory_reserved(self._device)

    def _count_since(self, before: int | None, what: str, otherwise: int | None) -> None:
        """Add what is gone of the free memory, where that can have been us."""
        taken = None if before is None else before - self._free()
        if taken is None or not 0 <= taken <= _PLAUSIBLE_BYTES_MAX or (otherwise and taken < otherwise // 2):
            difference = (
                "no difference could be measured" if taken is None else f"a difference of {taken} bytes is not believed"
            )
            logger.info("%s: %s; %d are counted", what, difference, otherwise or 0)
            taken = otherwise or 0
        self._fixed += taken


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep out the other workers of this server, so that what they take is not counted as ours; not for ever."""
    deadline = time.monotonic() + _ALONE_S
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.info("another worker measures for long; both measure now")
                    break
                time.sleep(0.02)
            else:
                break
        yield


def _free_by_nvidia_smi(ordinal: int) -> int | None:
    """Ask for the free memory of a GPU without making a context on it; None where that cannot be asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = str(ordinal) if visible is None else [*visible.split(","), *[""] * ordinal, ""][ordinal].strip()
    command = ["nvidia-smi", f"--id={which}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        return int(said.stdout.strip()) << 20
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.info("nvidia-smi cannot be asked (%s)", error)
        return None
