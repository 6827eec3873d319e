"""torch_memory_saver's interface on regions of Shoal.

What uses torch_memory_saver 0.0.10 runs by changing an import::

    from shoal.compat.torch_memory_saver import torch_memory_saver

or, where the import stands in somebody else's code, by calling :func:`install` before it runs. docs/torch.md says what
is the same and what differs. Nothing of that library's is needed, or used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from shoal.compat.torch_memory_saver import testing_utils, utils
from shoal.compat.torch_memory_saver.saver import TorchMemorySaver
from shoal.compat.torch_memory_saver.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TorchMemorySaver", "configure_subprocess", "install", "testing_utils", "torch_memory_saver", "utils"]

torch_memory_saver = TorchMemorySaver()
"""The one that everybody in the process uses."""


@contextlib.contextmanager
def configure_subprocess() -> Iterator[None]:
    """Do nothing: processes started inside need no preparation, since no library is preloaded."""
    yield


def install() -> None:
    """Let ``import torch_memory_saver`` find this module, in this process, from here on.

    Raises
    ------
    RuntimeError
        If the other library is imported already: what imported it would go on using it.
    """
    ours = sys.modules[__name__]
    for name, module in (("", ours), (".testing_utils", testing_utils), (".utils", utils)):
        full = f"torch_memory_saver{name}"
        if sys.modules.get(full, module) is not module:
            raise RuntimeError(
                f"{full} is imported already; call shoal.compat.torch_memory_saver.install() before that"
            )
        sys.modules[full] = module


if Settings.of(os.environ).init_enable:
    torch_memory_saver.enable_everywhere()
