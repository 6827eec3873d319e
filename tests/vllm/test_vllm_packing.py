"""When all layers of a KV block lie side by side, and that vLLM's own decision stays where it says so."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.vllm import packing
from shoal.vllm.cache import Plan


@dataclass(frozen=True)
class FullAttentionSpec:
    """What of vLLM's is looked at."""

    block_size: int = 16
    storage_block_size: int = 16
    head_size: int = 128
    head_size_v: int = 128
    kv_quant_mode: int = 0
    page_size_padded: int | None = None
    indexes_kv_by_block_stride: bool = True
    page_size_bytes: int = 64 << 10


class SlidingWindowSpec(FullAttentionSpec):
    pass


def backend(name: str) -> Any:
    return SimpleNamespace(get_name=lambda: name)


FLASH = backend("FLASH_ATTN")


def whole(block: int, backends: list[Any]) -> int:
    assert backends, "asked without any"
    return block


def config(**given: Any) -> Any:
    return SimpleNamespace(**{"kv_transfer_config": None, "speculative_config": None} | given)


def groups(*specs: Any) -> list[Any]:
    return [SimpleNamespace(kv_cache_spec=spec, layer_names=[f"layer {at}"]) for at, spec in enumerate(specs)]


def test_layers_that_are_all_alike_lie_side_by_side() -> None:
    assert packing.why_not(config(), groups(FullAttentionSpec()), [FLASH], whole) is None


@pytest.mark.parametrize(
    ("given", "specs", "backends", "said"),
    [
        ({"kv_transfer_config": object()}, [FullAttentionSpec()], [FLASH], "KV connector"),
        ({"speculative_config": object()}, [FullAttentionSpec()], [FLASH], "draft model"),
        ({}, [FullAttentionSpec(), FullAttentionSpec()], [FLASH], "of 2 kinds"),
        ({}, [SlidingWindowSpec()], [FLASH], "SlidingWindowSpec"),
        ({}, [FullAttentionSpec(kv_quant_mode=1)], [FLASH], "quantised"),
        ({}, [FullAttentionSpec(page_size_padded=1 << 20)], [FLASH], "padded"),
        ({}, [FullAttentionSpec(storage_block_size=4)], [FLASH], "compressed"),
        ({}, [FullAttentionSpec(page_size_bytes=257 << 20)], [FLASH], "more than 256 MiB"),
        ({}, [FullAttentionSpec(head_size_v=64)], [FLASH], "different lengths"),
        ({}, [FullAttentionSpec(indexes_kv_by_block_stride=False)], [FLASH], "distance between blocks"),
        ({}, [FullAttentionSpec()], [FLASH, backend("TRITON_ATTN")], "attention of TRITON_ATTN"),
        ({}, [FullAttentionSpec()], [], "attention of no name"),
    ],
)
def test_others_do_not_and_it_is_said_why(given: dict[str, Any], specs: list[Any], backends: Any, said: str) -> None:
    reason = packing.why_not(config(**given), groups(*specs), backends, whole)
    assert reason is not None
    assert said in reason


def test_a_block_that_attention_cuts_into_smaller_ones_does_not() -> None:
    reason = packing.why_not(config(), groups(FullAttentionSpec(block_size=128, storage_block_size=128)), [FLASH],
                             lambda block, _: min(block, 64))  # fmt: skip
    assert reason is not None
    assert "blocks of 128 tokens" in reason


def test_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packing.LAYOUT_VARIABLE, "layer")
    reason = packing.why_not(config(), groups(FullAttentionSpec()), [FLASH], whole)
    assert reason is not None
    assert packing.LAYOUT_VARIABLE in reason
    monkeypatch.setenv(packing.LAYOUT_VARIABLE, "block")
    assert packing.why_not(config(), groups(FullAttentionSpec()), [FLASH], whole) is None


def test_a_word_that_the_environment_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packing.LAYOUT_VARIABLE, "layers")
    with pytest.raises(ValueError, match="'block' or 'layer', not 'layers'"):
        packing.why_not(config(), groups(FullAttentionSpec()), [FLASH], whole)


@pytest.mark.parametrize("theirs", [True, False])
def test_vllms_own_decision_stays_and_is_replaced_once(theirs: bool) -> None:
    utils = SimpleNamespace(_use_packed_kv_cache_config=lambda *_: theirs)
    asked = []

    def backends_of(_: Any, names: list[str]) -> list[Any]:
        asked.append(names)
        return [FLASH]

    packing.pack(utils, backends_of, whole)
    ours = utils._use_packed_kv_cache_config
    packing.pack(utils, backends_of, whole)
    assert utils._use_packed_kv_cache_config is ours
    assert utils._use_packed_kv_cache_config(config(), groups(SlidingWindowSpec())) is theirs
    assert utils._use_packed_kv_cache_config(config(), groups(FullAttentionSpec())) is True
    assert asked == ([] if theirs else [["layer 0"], ["layer 0"]])


def test_such_a_plan_is_one_plane_whose_blocks_have_all_layers() -> None:
    tensors = [
        SimpleNamespace(size=100 * 3 * 4096, shared_by=[f"layer {at}"], offset=at * 4096, block_stride=3 * 4096)
        for at in range(3)
    ]
    plan = Plan.of(SimpleNamespace(num_blocks=100, kv_cache_tensors=tensors))
    assert (plan.blocks, plan.block_bytes, plan.planes) == (100, 3 * 4096, (("layer 0", "layer 1", "layer 2"),))
