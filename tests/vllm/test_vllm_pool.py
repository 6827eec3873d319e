"""vLLM's own cache manager over our pool: skipped where vLLM cannot be imported."""

from __future__ import annotations

import importlib
import random

import pytest

import shoal
from shoal.vllm.cache import ElasticCache, Plan

try:
    pool = importlib.import_module("shoal.vllm.pool")
except ImportError:
    pytest.skip("vLLM cannot be imported here", allow_module_level=True)

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.request import Request

LAYERS, TOKENS, BLOCKS = 4, 16, 3000
MB = 1_000_000


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_again_is_what_was_written(seed: int) -> None:
    """Random requests with shared beginnings; each full block is marked with its hash and read back at each hit."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(TOKENS, sha256)
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    size = spec.page_size_bytes
    names = [f"layer {number}" for number in range(LAYERS)]
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(size=BLOCKS * size, shared_by=[name]) for name in names],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )
    mem = shoal.MemoryManager("sim", device_budget="512MiB", host_budget="512MiB")
    cache = ElasticCache(mem, Plan.of(config))
    cache.hold(300)
    cache.release()
    pool.install(cache)
    manager = KVCacheManager(
        config, max_model_len=4096, scheduler_block_size=TOKENS, hash_block_size=TOKENS, max_in_flight_tokens=2048,
        enable_caching=True, watermark=0.01,
    )  # fmt: skip
    assert isinstance(manager.block_pool, pool.ElasticBlockPool)
    layers = [tensor.view(BLOCKS, size) for tensor in cache.tensors().values()]
    chance = random.Random(seed)
    beginnings = [[chance.randrange(1000) for _ in range(chance.randrange(16, 600))] for _ in range(12)]
    live: dict[str, Request] = {}
    made = hits = 0

    def mark(request: Request, block: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(request.block_hashes[block][:8]), dtype=torch.int8)

    def ids(request: Request) -> list[int]:
        return manager.get_block_ids(request.request_id)[0]

    def compare(request: Request, tokens: int) -> None:
        with mem.guard():
            for block in range(tokens // TOKENS):
                for layer in layers:
                    assert torch.equal(layer[ids(request)[block], :8], mark(request, block))

    def arrive() -> None:
        nonlocal made, hits
        tokens = chance.choice(beginnings) + [chance.randrange(1000) for _ in range(chance.randrange(1, 500))]
        request = Request(str(made), tokens, SamplingParams(max_tokens=4), None, block_hasher=hasher)
        made += 1
        found, known = manager.get_computed_blocks(request)[:2]
        if manager.allocate_slots(request, len(tokens) - known, known, found, full_sequence_must_fit=True) is None:
            return
        hits += known > 0
        compare(request, known)
        with mem.guard():
            for block in range(len(tokens) // TOKENS):
                for layer in layers:
                    layer[ids(request)[block], :8] = mark(request, block)
        request.num_computed_tokens = len(tokens)
        live[request.request_id] = request

    for _ in range(400):
        what = chance.random()
        if what < 0.45:
            arrive()
        elif what < 0.8 and live:
            request = live.pop(chance.choice(list(live)))
            compare(request, len(request.prompt_token_ids or []))
            manager.free(request)
        elif what < 0.86:
            cache.set_limit(chance.choice([4, 10, 30, 90]) * MB)
        elif what < 0.90:
            cache.shrink(chance.randrange(1, 40) * MB)
        elif what < 0.94:
            cache.kv.region.sleep()
        elif what < 0.95:
            cache.forget()
        queue = manager.block_pool.free_block_queue
        used = {block for request in live.values() for block in ids(request)}
        assert queue.used == len(used) + 1
        assert not used & {block.block_id for block in queue.get_all_free_blocks()}
        assert 0 <= manager.usage <= 1
        cache.kv.check()
    for request in live.values():
        manager.free(request)
    assert manager.reset_prefix_cache()
    assert queue.used == 1
    assert hits
