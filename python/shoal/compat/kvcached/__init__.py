"""kvcached's ``vmm_ops`` and ``KVCacheManager``, on Shoal's memory.

For engines and tools written against kvcached (https://github.com/ovg-project/kvcached): the same names, arguments and
return values, without its compiled extension. Use the modules directly, or put them in the place of kvcached's own::

    import shoal.compat.kvcached
    shoal.compat.kvcached.install()      # before anything imports kvcached

After that ``kvcached.vmm_ops`` and ``kvcached.kv_cache_manager`` are these, while the rest of an installed kvcached
(its integrations with engines, say) is its own. docs/compat.md says what differs on purpose, and which of its tests
pass.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["install", "uninstall"]

_OURS = {
    "kvcached.vmm_ops": "shoal.compat.kvcached.vmm_ops",
    "kvcached.kv_cache_manager": "shoal.compat.kvcached.kv_cache_manager",
}


class _Loader(importlib.abc.Loader):
    """Gives a module that is there already under another name."""

    def __init__(self, ours: str) -> None:
        self._ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002
        return importlib.import_module(self._ours)

    def exec_module(self, module: ModuleType) -> None:
        # Importing it has set its spec to the other name's: it is the same module under both.
        module.__spec__ = importlib.util.find_spec(self._ours)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds our modules in the place of kvcached's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        ours = _OURS.get(fullname)
        return None if ours is None else importlib.util.spec_from_loader(fullname, _Loader(ours))


_finder = _Finder()


def install() -> None:
    """Put these modules in the place of kvcached's, for every import from now on.

    Raises
    ------
    RuntimeError
        If kvcached's own modules were imported already: what took names from them would keep those.
    """
    for name, ours in _OURS.items():
        loaded = sys.modules.get(name)
        if loaded is not None and loaded is not sys.modules.get(ours):
            raise RuntimeError(f"{name} was imported before shoal.compat.kvcached.install(): install first")
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undo :func:`install`. Modules that took names from these keep them."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name, ours in _OURS.items():
        if name in sys.modules and sys.modules[name] is sys.modules.get(ours):
            del sys.modules[name]
