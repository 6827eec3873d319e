def select_common_block_size(kv_manager_block_size, backends):
    return min(kv_manager_block_size, *(backend.block_tokens for backend in backends))
