"""vLLM on Shoal: elastic KV memory, and sleep and wake at the link's speed, through vLLM's own seams.

``SHOAL=1 vllm serve ...`` uses it wherever the package is installed; without ``SHOAL=1`` the plugin does nothing. An
engine of your own names the worker: ``LLM(..., worker_cls="shoal.vllm.Worker")``. vLLM is imported by nothing here
until vLLM itself asks for the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.vllm.control import resume, resume_async, suspend, suspend_async
from shoal.vllm.versions import TESTED, VersionError, check_version

if TYPE_CHECKING:
    from shoal.vllm.worker import Worker

__all__ = [
    "TESTED",
    "VersionError",
    "Worker",
    "check_version",
    "resume",
    "resume_async",
    "suspend",
    "suspend_async",
]


def __getattr__(name: str) -> Any:
    if name == "Worker":
        check_version()
        from shoal.vllm.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
