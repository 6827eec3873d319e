"""`VLLM_BATCH_INVARIANT=1` made good for engines without graphs: a plugin of vLLM's that the GPU parts put on its path.

vLLM 0.26's kernel for a normalisation with a residual takes blocks of 1,024 threads for fewer than 256 tokens and of
256 for more, also where batches shall not matter (its issue 48271, mended later): the same token is then rounded
otherwise in a long step than in a short one. A prompt of which a part was found is computed in a shorter step. Here the
residual is added by itself, and the kernel that vLLM has for no residual, one program a row, does the rest. Compiled
models call neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["found_by_vllm", "register"]


def register() -> None:
    """Take the place of vLLM's normalisation in this process."""
    from vllm.model_executor.layers import layernorm

    original = layernorm.rms_norm_batch_invariant
    if getattr(original, "_is_pinned", False):
        return

    def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None) -> Any:
        if residual is None:
            return original(x, weight, eps)
        added = x + residual
        return original(added, weight, eps), added

    rms_norm._is_pinned = True  # type: ignore[attr-defined]
    layernorm.rms_norm_batch_invariant = rms_norm


def found_by_vllm(site: Path) -> None:
    """Let vLLM find this where a folder is on the path, in all its processes.

    Parameters
    ----------
    site
        The folder.
    """
    info = site / "shoal_tests-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shoal-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nshoal_tests_invariant = {__name__}:register\n")
