"""What kvcached's environment variables set, read the same way."""

from __future__ import annotations

import os

__all__ = [
    "CONTIGUOUS_LAYOUT",
    "GPU_UTILIZATION",
    "MAX_RESERVED_PAGES",
    "MIN_RESERVED_PAGES",
    "PAGE_PREALLOC_ENABLED",
    "PAGE_SIZE",
    "SANITY_CHECK",
    "KVCachedConfigError",
    "page_size_of",
]

_PAGE_BYTES = 2 << 20


class KVCachedConfigError(RuntimeError):
    """A setting that cannot work, which the user must change."""


def page_size_of(text: str | None) -> int:
    """Read ``KVCACHED_PAGE_SIZE_MB``.

    Parameters
    ----------
    text
        Its value, or None if it is not set.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If it is no positive multiple of 2.
    """
    if text is None:
        return _PAGE_BYTES
    try:
        megabytes = int(text)
    except ValueError:
        megabytes = 0
    if megabytes <= 0 or megabytes % 2:
        raise ValueError(f"KVCACHED_PAGE_SIZE_MB is {text!r}: it must be a positive multiple of 2")
    return megabytes << 20


def _flag(name: str, default: bool) -> bool:
    text = os.environ.get(name)
    return default if text is None else text.lower() == "true"


PAGE_SIZE = page_size_of(os.environ.get("KVCACHED_PAGE_SIZE_MB"))
CONTIGUOUS_LAYOUT = _flag("KVCACHED_CONTIGUOUS_LAYOUT", default=True)
PAGE_PREALLOC_ENABLED = _flag("KVCACHED_PAGE_PREALLOC_ENABLED", default=True)
SANITY_CHECK = _flag("KVCACHED_SANITY_CHECK", default=False)
MIN_RESERVED_PAGES = int(os.environ.get("KVCACHED_MIN_RESERVED_PAGES", "5"))
MAX_RESERVED_PAGES = int(os.environ.get("KVCACHED_MAX_RESERVED_PAGES", "10"))
GPU_UTILIZATION = float(os.environ.get("KVCACHED_GPU_UTILIZATION", "0.95"))
