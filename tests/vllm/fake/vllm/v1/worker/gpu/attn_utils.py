import torch


def _allocate_kv_cache(kv_cache_config, shared_layers, device):
    return {
        name: torch.zeros(tensor.size, dtype=torch.int8)
        for tensor in kv_cache_config.kv_cache_tensors
        for name in tensor.shared_by
    }
