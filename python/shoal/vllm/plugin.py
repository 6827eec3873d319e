"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``).

Inert unless ``SHOAL=1`` on an NVIDIA GPU. Then :class:`shoal.vllm.worker.Worker` is the worker where none is named.
"""

from __future__ import annotations

import functools
import logging
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

    if current_platform.is_cuda():
        _prefer(type(current_platform))
    else:
        logging.getLogger("vllm.shoal").warning("SHOAL=1 changes nothing here: vLLM does not run on an NVIDIA GPU.")


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
