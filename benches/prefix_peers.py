"""What finding and keeping prefixes costs in vLLM's block pool, and in the one that kvcached puts into its place.

A peer of `kv_blocks.py`, which starts this program for each. vLLM has to be importable; kvcached's pool is a subclass
of vLLM's, over kvcached's own manager as `kvcached_peer.py` has built it, with driver calls that do nothing. Blocks are
of 16 tokens, hashed as vLLM does by default (SHA-256 over the parent's hash and the tokens), and the calls are those of
its scheduler: look up, take, give back. Nothing is shared with an engine, a request or a GPU.

``python -m benches.prefix_peers vllm|kvcached BLOCKS SECONDS [--kvcached FOLDER]`` prints seconds by case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS, BLOCK_TOKENS = 4096, 16
COUNT = TOKENS // BLOCK_TOKENS
# 4 heads of 128 in bfloat16, one layer, as in `kv_blocks.py`.
TOKEN_BYTES = 1024
ROUNDS = 200


def vllm_pool(blocks: int) -> Any:
    """Make vLLM's pool; one block more, because the first is never given out."""
    module: Any = importlib.import_module("vllm.v1.core.block_pool")
    return module.BlockPool(blocks + 1, True, BLOCK_TOKENS)


def kvcached_pool(blocks: int, folder: Path) -> Any:
    """Make kvcached's pool for vLLM, over its manager without a driver; it may keep as much as there is."""
    os.environ.setdefault("KVCACHED_MAX_RESERVED_PAGES", "128")
    os.environ.setdefault("KVCACHED_LOG_LEVEL", "ERROR")
    os.environ["KVCACHED_IPC_NAME"] = f"shoal_peer_{os.getpid()}"
    sys.path.insert(0, str(folder))
    vmm_ops: Any = importlib.import_module("kvcached.vmm_ops")
    vmm_ops.init_kvcached("cpu", 0, True)
    vmm_ops.create_kv_tensors(2 * (blocks + 64) * BLOCK_TOKENS * TOKEN_BYTES, 2, "cpu", 1)
    interfaces: Any = importlib.import_module("kvcached.integration.vllm.interfaces")
    interfaces._kvcached_initialized = True
    interfaces.should_use_worker_ipc = lambda: False  # no engine: scheduler and worker are this process
    patches: Any = importlib.import_module("kvcached.integration.vllm.patches")
    module: Any = importlib.import_module("vllm.v1.core.block_pool")
    if not patches.ElasticBlockPoolPatch().apply(module):
        raise SystemExit("kvcached knows no pool for this version of vLLM")
    pool = module.ElasticBlockPool(blocks + 1, BLOCK_TOKENS, TOKEN_BYTES, 1, True, max_cached_blocks=-1)
    pool.kv_cache_manager._wait_post_init()
    return pool


def seconds_of(act: Callable[[int], None], seconds: float) -> float:
    """Time one call: the best of some rounds' means."""
    start = time.perf_counter()
    act(1)
    n = max(1, int(seconds / ROUNDS / (time.perf_counter() - start)))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        act(n)
        best = min(best, (time.perf_counter() - start) / n)
    return best


class Calls:
    """The scheduler's calls on a pool."""

    def __init__(self, pool: Any) -> None:
        import torch

        utils: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")
        managers: Any = importlib.import_module("vllm.v1.core.single_type_kv_cache_manager")
        interface: Any = importlib.import_module("vllm.v1.kv_cache_interface")
        self._sha256 = importlib.import_module("vllm.utils.hashing").sha256
        utils.init_none_hash(self._sha256)
        self._hash = utils.hash_block_tokens
        self._manager = managers.FullAttentionManager
        self._spec = interface.FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=4, head_size=128, dtype=torch.bfloat16
        )
        self.pool = pool

    def hashes(self, tokens: list[int]) -> list[Any]:
        """Hash all blocks of a sequence."""
        parent, found = None, []
        for at in range(0, len(tokens), BLOCK_TOKENS):
            parent = self._hash(self._sha256, parent, tokens[at : at + BLOCK_TOKENS])
            found.append(parent)
        return found

    def match(self, hashes: list[Any]) -> None:
        """Find a prefix, own its blocks and give them back."""
        (blocks,), tokens = self._manager.find_longest_cache_hit(
            hashes, TOKENS, [0], self.pool, self._spec, False, BLOCK_TOKENS
        )
        if tokens != TOKENS:
            raise SystemExit(f"{tokens} tokens were found, not {TOKENS}")
        self.pool.touch(blocks)
        self.pool.free_blocks(reversed(blocks))

    def keep(self, blocks: list[Any], hashes: list[Any]) -> None:
        """Let blocks be found, and give them back."""
        request = SimpleNamespace(block_hashes=hashes)
        self.pool.cache_full_blocks(
            request,
            blocks,
            num_cached_blocks=0,
            num_full_blocks=COUNT,
            block_size=BLOCK_TOKENS,
            kv_cache_group_id=0,
        )
        self.pool.free_blocks(reversed(blocks))


def measure(calls: Calls, blocks: int, seconds: float) -> dict[str, float]:
    """Measure finding 4096 tokens, and keeping as many new ones with everything cached; with hashing and without."""
    tokens = list(range(TOKENS))
    calls.keep(calls.pool.get_new_blocks(COUNT), calls.hashes(tokens))
    known = calls.hashes(tokens)

    def match(n: int) -> None:
        for _ in range(n):
            calls.match(calls.hashes(tokens))

    def match_known(n: int) -> None:
        for _ in range(n):
            calls.match(known)

    figures = {"match": seconds_of(match, seconds), "match by keys": seconds_of(match_known, seconds)}
    sequence, evicting, hashing, whole = 0, 0.0, 0.0, 0.0

    def commit(n: int) -> None:
        nonlocal sequence, evicting, hashing, whole
        for _ in range(n):
            sequence += 1
            content = [token + TOKENS * sequence for token in tokens]
            start = time.perf_counter()
            own = calls.pool.get_new_blocks(COUNT)
            taken = time.perf_counter()
            hashes = calls.hashes(content)
            hashed = time.perf_counter()
            calls.keep(own, hashes)
            over = time.perf_counter()
            evicting += taken - start
            hashing += hashed - taken
            whole += over - start

    commit(blocks // COUNT + 1)
    samples: dict[str, list[float]] = {"commit": [], "alloc": [], "commit by keys": []}
    for _ in range(ROUNDS):
        evicting = hashing = whole = 0.0
        commit(10)
        for name, taken in (("commit", whole), ("alloc", evicting), ("commit by keys", whole - hashing)):
            samples[name].append(taken / 10)
    return figures | {name: min(taken) for name, taken in samples.items()}


def main() -> None:
    """Measure one of them and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=("vllm", "kvcached"))
    parser.add_argument("blocks", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--kvcached", type=Path, help="a folder that kvcached_peer.py has built")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        pool = vllm_pool(options.blocks) if options.which == "vllm" else kvcached_pool(options.blocks, options.kvcached)
        version = importlib.import_module("vllm").__version__
        figures = measure(Calls(pool), options.blocks, options.seconds)
    print(json.dumps({"version": version, "figures": figures}))


if __name__ == "__main__":
    main()
