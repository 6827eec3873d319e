"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``).

Inert unless ``SHOAL=1``. Then it makes :class:`shoal.vllm.worker.Worker` the worker of engines that name none.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from shoal.vllm.versions import check_version

__all__ = ["WORKER", "register"]

WORKER = "shoal.vllm.Worker"


def register() -> None:
    """Make our worker the one that is used where none is named, if ``SHOAL`` is ``1``.

    Raises
    ------
    VersionError
        If it is, and this vLLM was not tested.
    """
    if os.environ.get("SHOAL") != "1":
        return
    check_version()
    from vllm.platforms import current_platform

    _prefer(type(current_platform))


def _prefer(platform: Any) -> None:
    """Let a platform fill in our worker where it would fill in its own."""
    original = platform.check_and_update_config
    if getattr(original, "_is_shoals", False):
        return

    @functools.wraps(original)
    def check_and_update_config(vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKER
        original(vllm_config)

    check_and_update_config._is_shoals = True  # type: ignore[attr-defined]
    platform.check_and_update_config = staticmethod(check_and_update_config)
