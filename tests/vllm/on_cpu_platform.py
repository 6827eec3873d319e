"""The platform of :mod:`tests.vllm.on_cpu`, apart because vLLM imports it before most of itself."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

__all__ = ["SimulatedPlatform"]


class SimulatedPlatform(Platform):
    """A CPU that is one of nobody's."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    supported_quantization: list[str] = []  # noqa: RUF012 - vLLM's

    @classmethod
    def get_device_name(cls, _device_id: int = 0) -> str:
        return "simulated"

    @classmethod
    def get_device_total_memory(cls, _device_id: int = 0) -> int:
        return 1 << 30

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        vllm_config.cache_config.block_size = vllm_config.cache_config.block_size or 16

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def is_async_output_supported(cls, _enforce_eager: bool | None) -> bool:
        return True

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32, torch.float16]

    @classmethod
    def get_attn_backend_cls(cls, *_: Any, **__: Any) -> str:
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
