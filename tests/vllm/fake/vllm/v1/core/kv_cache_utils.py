from types import SimpleNamespace


def _use_packed_kv_cache_config(vllm_config, kv_cache_groups):
    return False


def get_kv_cache_config(vllm_config, kv_cache_groups, available_memory):
    """Plan as vLLM does: a tensor for each layer, or views of one that begin one after another in each block."""
    names = kv_cache_groups[0].layer_names
    block = kv_cache_groups[0].kv_cache_spec.page_size_bytes
    blocks = available_memory // (len(names) * block)
    packed = _use_packed_kv_cache_config(vllm_config, kv_cache_groups)
    size = blocks * block * (len(names) if packed else 1)
    tensors = [
        SimpleNamespace(
            size=size,
            shared_by=[name],
            offset=number * block if packed else 0,
            block_stride=len(names) * block if packed else 0,
        )
        for number, name in enumerate(names)
    ]
    return SimpleNamespace(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=kv_cache_groups)
