"""Weights of an 8B's length at rest: starts and wakes from the store, from files, and against the disk and the link.

Run by `tests/gpu/run.sh tiers_weights`; no engine. What benches/tiers_weights.py says, with the GPU as the device: a
start makes a module and fills its host copies, a wake of a model that is asleep at its source reads the disk and copies
to the GPU. 13 GiB by default ($SHOAL_WEIGHTS_MIB), three rounds ($SHOAL_ROUNDS), of which none begins after five
minutes. It needs twice the weights' bytes on the disk of $SHOAL_DISK, which has to take direct I/O, and four times in
RAM. $SHOAL_TIERS_DEVICE=sim makes a dry run.
"""

from __future__ import annotations

import os
from pathlib import Path

from benches.results import save_gpu
from benches.tiers_weights import Setting, measure

DEVICE = os.environ.get("SHOAL_TIERS_DEVICE", "cuda:0")


def main() -> None:
    """Measure and save."""
    setting = Setting.given(DEVICE, 13 << 10, 3, late_s=300.0)
    save_gpu(Path(os.environ["SHOAL_RESULT"]), measure(setting))


if __name__ == "__main__":
    main()
