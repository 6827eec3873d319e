"""What an engine needs of a GPU to start, and what vLLM is told of it.

vLLM refuses to start unless a share of the whole GPU is free, and measures that share while it profiles, which goes
wrong beside others. Under a server the memory is leased before vLLM looks: both settings follow from the lease, and
vLLM's cache is as long in addresses as the model can ever have memory. Everything here is an estimate, rounded up; what
was not needed goes back once the engine runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RegionError

__all__ = ["StartNeeds"]

MIB = 1 << 20

DRIVER_BYTES = 960 * MIB
"""A context, loaded kernels and instantiated graphs: what was measured of a sleeping engine on an H100, rounded up."""

GRAPHS_BYTES = 512 * MIB
"""What CUDA graphs keep between their replays."""

SPARE_BYTES = 192 * MIB
"""Workspaces of libraries, and small tensors that vLLM keeps beside its weights."""

LOGITS_COPIES = 5
"""Float32 copies of a step's logits: sampling sorts and scales them."""


@dataclass(frozen=True)
class StartNeeds:
    """Bytes of a GPU.

    Parameters
    ----------
    weights
        Weights and graphs.
    kv
        What warming up writes to.
    driver
        Beside torch: context, kernels.
    activations
        The most that a step takes.
    """

    weights: int
    kv: int
    driver: int
    activations: int

    @property
    def overhead(self) -> int:
        """All that does not lie in regions."""
        return self.driver + self.activations

    @property
    def total(self) -> int:
        """All."""
        return self.weights + self.kv + self.overhead

    @classmethod
    def of(cls, config: Any, warm_up_blocks: int, *, on_gpu: bool = True) -> StartNeeds:
        """Estimate from vLLM's configuration.

        Parameters
        ----------
        config
            vLLM's ``VllmConfig``.
        warm_up_blocks
            How many KV blocks warming up may write to.
        on_gpu
            Whether anything is taken beside regions.

        Returns
        -------
        StartNeeds
            Rounded up.
        """
        model = config.model_config
        text = model.hf_text_config
        hidden, inner, layers, vocabulary = (
            int(getattr(text, name, None) or otherwise)
            for name, otherwise in (
                ("hidden_size", 4096), ("intermediate_size", 4 * getattr(text, "hidden_size", 4096)),
                ("num_hidden_layers", 32), ("vocab_size", 128_000),
            )
        )  # fmt: skip
        heads = int(getattr(text, "num_attention_heads", None) or 32)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head = int(getattr(text, "head_dim", None) or hidden // heads)
        item = _item_bytes(model.dtype)
        scheduler = config.scheduler_config
        tokens, requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        activations = tokens * (4 * hidden + 3 * inner) * item + requests * vocabulary * 4 * LOGITS_COPIES
        block = 2 * kv_heads * head * item * layers * (config.cache_config.block_size or 16)
        # Memory comes in pages of every layer at once, and vLLM's null block has its own.
        unit = 2 * MIB * layers
        per_layer = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
        by_shape = (layers * per_layer + 2 * vocabulary * hidden) * item
        weights = _weights_bytes(Path(str(model.model)), item, model) or by_shape
        graphs = GRAPHS_BYTES if on_gpu and not model.enforce_eager else 0
        return cls(
            weights=_pages(weights * 102 // 100 + graphs),
            kv=(-(-block * warm_up_blocks // unit) + 1) * unit,
            driver=DRIVER_BYTES if on_gpu else 0,
            activations=_pages(activations + SPARE_BYTES) if on_gpu else 0,
        )

    def cache(self, room: int) -> int:
        """Give how long the KV cache may become.

        Parameters
        ----------
        room
            Bytes that the model can have in all.

        Returns
        -------
        int
            Bytes.

        Raises
        ------
        RegionError
            No KV cache is left; the message has the figures.
        """
        left = room - self.weights - self.overhead
        if left < self.kv:
            raise RegionError(
                f"it needs {self.total} bytes to start ({self.weights} for weights and graphs, {self.overhead} for a "
                f"step and the driver, {self.kv} for KV), and can have {room}; a smaller --max-num-seqs or "
                "--max-num-batched-tokens needs less",
                kind="unsupported",
            )
        return left // (2 * MIB) * 2 * MIB

    def tell(self, config: Any, room: int, total: int, free: int) -> None:
        """Set what vLLM goes by, so that neither its check at the start nor its profiling looks at what others do.

        Parameters
        ----------
        config
            vLLM's ``CacheConfig``.
        room
            Bytes that the model can have in all.
        total, free
            The GPU's memory, and what of it nobody has now.

        Raises
        ------
        RegionError
            As :meth:`cache`.
        """
        # Given in bytes, it is not derived from what is free, and what others take meanwhile is not looked at.
        config.kv_cache_memory_bytes = self.cache(room)
        share = min(self.weights + self.kv + self.activations, free * 95 // 100) / total
        config.gpu_memory_utilization = max(math.floor(share * 1e4) / 1e4, 1e-4)


def _pages(nbytes: int) -> int:
    return -(-nbytes // (2 * MIB)) * 2 * MIB


def _item_bytes(dtype: Any) -> int:
    return int(getattr(dtype, "itemsize", 2))


def _weights_bytes(path: Path, item: int, model: Any) -> int:
    """Give the length of the files with weights, in the type that they will have; 0 where there are none."""
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return 0
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        length = sum(file.stat().st_size for file in path.glob(pattern))
        if length:
            own = getattr(getattr(model, "hf_config", None), "dtype", None)
            shrinks = _item_bytes(own) > item if own is not None and not isinstance(own, str) else own == "float32"
            return length // 2 if shrinks and item == 2 else length
    return 0
