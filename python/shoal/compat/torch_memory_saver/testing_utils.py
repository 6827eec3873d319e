"""What tests written for torch_memory_saver import from it."""

from __future__ import annotations

import torch

from shoal.compat.torch_memory_saver.utils import is_xpu

__all__ = ["empty_cache", "get_and_print_gpu_memory", "get_device", "is_xpu"]


def get_device() -> str:
    """Give the name of torch's device type."""
    return "cuda"


def empty_cache() -> None:
    """Let torch give back what it caches outside regions."""
    torch.cuda.empty_cache()


def get_and_print_gpu_memory(message: str, gpu_id: int = 0) -> int:
    """Give, and print, how much of a GPU's memory is taken by everybody together.

    Parameters
    ----------
    message
        Printed with it.
    gpu_id
        Which GPU.

    Returns
    -------
    int
        Bytes.
    """
    free, total = torch.cuda.mem_get_info(gpu_id)
    print(  # noqa: T201  (it says so)
        f"GPU {gpu_id} memory: {(total - free) / 1024**3:.2f} GB ({message})"
    )
    return int(total - free)
