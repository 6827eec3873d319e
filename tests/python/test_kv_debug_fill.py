"""What debug mode fills freed blocks with, in every type: NaN where there is one, else a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shoal.kv_cache.groups import ELEMENT_BYTES, dtype_name

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    import shoal

# Integers have no NaN.
NUMBERS = {"int8": -1, "int32": -1, "uint8": 255}
ALL = {name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)}


@pytest.mark.parametrize("name", ELEMENT_BYTES)
def test_a_freed_block_is_nan_or_a_number_that_no_kv_holds(mem: shoal.MemoryManager, name: str) -> None:
    dtype = ALL[name]
    assert dtype.itemsize == ELEMENT_BYTES[name]
    kv = mem.kv_cache(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=dtype, max_bytes="8MiB", debug=True)
    ids = kv.alloc(3)
    tensors = kv.tensors()
    with mem.guard():
        for tensor in tensors:
            for block in ids:
                tensor[block].view(torch.uint8).fill_(1)
    kv.free(ids[1:])  # the first keeps their memory
    with mem.guard():
        for tensor in tensors:
            for block in ids[1:]:
                freed = tensor[block]
                if name in NUMBERS:
                    assert (freed.to(torch.float64) == NUMBERS[name]).all()
                else:
                    assert torch.isnan(freed.to(torch.float64)).all()
            assert (tensor[ids[0]].view(torch.uint8) == 1).all()
    assert kv.strays() == []
    with mem.guard():
        tensors[1][ids[2]].view(torch.uint8).view(-1)[5] = 0x7F  # in each of the types another number than the filling
    (stray,) = kv.strays()
    assert stray[:2] == (0, ids[2])


def test_a_write_to_what_is_only_cached_is_told_to_whoever_finds_it(mem: shoal.MemoryManager) -> None:
    kv = mem.kv_cache(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype="float32", max_bytes="8MiB", debug=True)
    tokens, tensors = list(range(48)), kv.tensors()
    ids = kv.alloc(3)
    with mem.guard():
        for tensor in tensors:
            tensor[ids] = 1.0
    kv.seal(tokens, ids)
    kv.free(ids)
    assert kv.strays() == []
    with mem.guard():
        tensors[1][ids[1]] = 9.0
    count, found = kv.match(tokens)
    assert (count, found) == (48, ids)
    ((group, block, _),) = kv.strays()
    assert (group, block) == (0, ids[1])
    kv.free(found)
    assert kv.strays() == [], "what it holds now is what is watched"


def test_every_other_type_is_refused() -> None:
    others = {str(dtype).removeprefix("torch.") for dtype in ALL.values()} - set(ELEMENT_BYTES)
    assert {"bool", "complex64"} <= others
    for name in others:
        with pytest.raises(ValueError, match="dtype must be one of"):
            dtype_name(name)
    floats = {str(dtype).removeprefix("torch.") for dtype in ALL.values() if dtype.is_floating_point}
    known = floats - others
    assert known == floats & set(ELEMENT_BYTES)
    assert known >= {"float16", "bfloat16", "float32", "float64"}
