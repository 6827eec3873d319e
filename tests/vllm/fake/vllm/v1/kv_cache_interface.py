from dataclasses import dataclass


@dataclass(frozen=True)
class FullAttentionSpec:
    block_size: int
    page_size_bytes: int
    head_size: int = 8
    head_size_v: int = 8
    kv_quant_mode: int = 0
    page_size_padded: int | None = None
    indexes_kv_by_block_stride: bool = True

    @property
    def storage_block_size(self):
        return self.block_size
