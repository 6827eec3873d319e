import contextlib
import math
import time
from pathlib import Path

import torch

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu import attn_utils

LAYERS = 2
NAMES = [f"layer {number}" for number in range(LAYERS)]
BLOCK_TOKENS = 16
BLOCK_BYTES = 32 << 10
"""Of one layer: most of it is never touched."""


class Model(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        read = torch.frombuffer(bytearray((Path(path) / "model.bin").read_bytes()), dtype=torch.int32)
        self.weight = torch.nn.Parameter(read, requires_grad=False)


class Attention:
    """Of a layer, and its backend."""

    block_tokens = BLOCK_TOKENS

    def get_attn_backend(self):
        return Attention

    @staticmethod
    def get_name():
        return "FLASH_ATTN"


class Runner:
    def __init__(self, config):
        self.config = config

    def load_model(self):
        self.model = Model(self.config.model_config.model)
        self.config.compilation_config.static_forward_context.update({name: Attention() for name in NAMES})

    def initialize_kv_cache(self, kv_cache_config):
        found = attn_utils._allocate_kv_cache(kv_cache_config, None, None)
        blocks = kv_cache_config.num_blocks
        self.layers = []
        for tensor in kv_cache_config.kv_cache_tensors:
            whole = found[tensor.shared_by[0]].view(blocks, -1)
            self.layers.append(whole[:, tensor.offset : tensor.offset + BLOCK_BYTES])

    def step(self, scheduled):
        """Write the new tokens of each request to its blocks; then read all of it back and give one more token."""
        tokens = {}
        for request in scheduled:
            for at in range(request.computed, len(request.tokens)):
                block, slot = divmod(at, BLOCK_TOKENS)
                for number, layer in enumerate(self.layers):
                    layer[request.blocks[block], slot] = (request.tokens[at] + number) % 128
            total = 0
            weight = self.model.weight
            for at in range(len(request.tokens)):
                block, slot = divmod(at, BLOCK_TOKENS)
                for number, layer in enumerate(self.layers):
                    total += (int(layer[request.blocks[block], slot]) + number) * int(weight[(at * 7919) % len(weight)])
            # A file that comes to be while it runs makes it say other tokens, as weights do that went wrong.
            total += Path(self.config.rots_with).is_file()
            tokens[request.request_id] = 33 + total % 90
        return tokens


class Worker:
    def __init__(self, vllm_config, local_rank=0, rank=0, distributed_init_method="", is_driver_worker=True):
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.scheduler_config = vllm_config.scheduler_config
        self.local_rank = local_rank

    def _fail(self, where):
        if self.vllm_config.fail_at == where:
            raise RuntimeError(f"told to fail at {where}")

    def _maybe_get_memory_pool_context(self, tag):
        return contextlib.nullcontext()

    def init_device(self):
        self._fail("device")
        # By itself it has no device.
        if type(self) is not Worker:
            # As vLLM's own check: a share of the whole device has to be free.
            figures = self.memory.mem.device_memory()
            wanted = math.ceil(figures["total"] * self.cache_config.gpu_memory_utilization)
            if figures["free"] < wanted:
                raise ValueError(
                    f"Free memory on device ({figures['free']}) on startup is less than desired ({wanted})"
                )
        self.model_runner = Runner(self.vllm_config)

    def load_model(self):
        self._fail("load")
        with self._maybe_get_memory_pool_context(tag="weights"):
            self.model_runner.load_model()

    def get_kv_cache_spec(self):
        return dict.fromkeys(NAMES, FullAttentionSpec(BLOCK_TOKENS, BLOCK_BYTES))

    def determine_available_memory(self):
        time.sleep(self.vllm_config.profile_seconds)
        if self.cache_config.kv_cache_memory_bytes:
            return self.cache_config.kv_cache_memory_bytes
        raise AssertionError("Error in memory profiling")

    def initialize_from_config(self, kv_cache_config):
        with self._maybe_get_memory_pool_context(tag="kv_cache"):
            self.model_runner.initialize_kv_cache(kv_cache_config)

    def compile_or_warm_up_model(self):
        self._fail("warm")
        for layer in self.model_runner.layers:
            layer[1:9] = 1
        return 0.0

    def execute_model(self, scheduler_output):
        config = self.vllm_config
        time.sleep(config.step_seconds + config.token_seconds * scheduler_output.total_num_scheduled_tokens)
        self._step = self.model_runner.step(scheduler_output)

    def sample_tokens(self, grammar_output):
        return self._step

    def execute_dummy_batch(self):
        pass
