from vllm.v1.core.block_pool import BlockPool


class KVCacheCoordinator:
    def __init__(self, num_gpu_blocks, enable_caching):
        self.block_pool = BlockPool(num_gpu_blocks=num_gpu_blocks, enable_caching=enable_caching, hash_block_size=16)

    def get_num_blocks_to_allocate(self, request, tokens):
        return -(-tokens // 16) - len(request.blocks)
