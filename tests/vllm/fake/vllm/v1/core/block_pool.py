from collections import deque


class KVCacheBlock:
    def __init__(self, block_id):
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash = None


class FreeKVCacheBlockQueue:
    def __init__(self, blocks):
        self._blocks = deque(blocks)

    @property
    def num_free_blocks(self):
        return len(self._blocks)

    def popleft(self):
        return self._blocks.popleft()

    def popleft_n(self, number):
        return [self._blocks.popleft() for _ in range(number)]

    def remove(self, block):
        self._blocks.remove(block)

    def append_n(self, blocks):
        self._blocks.extend(blocks)

    def prepend_n(self, blocks):
        self._blocks.extendleft(blocks)


class BlockPool:
    def __init__(self, num_gpu_blocks, enable_caching, hash_block_size):
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.blocks = [KVCacheBlock(number) for number in range(num_gpu_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)
        self.cached = {}
        self.null_block = self.free_block_queue.popleft()

    def get_cached_block(self, block_hash):
        return self.cached.get(block_hash)

    def cache_full_blocks(self, blocks, hashes):
        for block, block_hash in zip(blocks, hashes, strict=False):
            if self.enable_caching and block.block_hash is None and block_hash not in self.cached:
                block.block_hash = block_hash
                self.cached[block_hash] = block

    def get_new_blocks(self, number):
        if number > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {number} free blocks from the pool")
        blocks = self.free_block_queue.popleft_n(number)
        for block in blocks:
            self._maybe_evict_cached_block(block)
            block.ref_cnt += 1
        return blocks

    def _maybe_evict_cached_block(self, block):
        if block.block_hash is None:
            return False
        self.cached.pop(block.block_hash, None)
        block.block_hash = None
        return True

    def touch(self, blocks):
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks):
        ended = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                ended.append(block)
        self.free_block_queue.prepend_n([block for block in ended if block.block_hash is None])
        self.free_block_queue.append_n([block for block in ended if block.block_hash is not None])

    def get_num_free_blocks(self):
        return self.free_block_queue.num_free_blocks

    def reset_prefix_cache(self):
        if self.num_gpu_blocks - self.get_num_free_blocks() != 1:
            return False
        self.cached = {}
        for block in self.blocks:
            block.block_hash = None
        return True
