"""Where a module's tensors lie, and which calls wait for which."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("shoal.torch")
from shoal.torch.layout import Layout, blocks_of, join, plain_tensors  # noqa: E402

pytestmark = [pytest.mark.torch]

KIB = 1 << 10


def region_over(memory: torch.Tensor) -> Any:
    """What a layout asks of a region, over a tensor's memory."""
    return SimpleNamespace(address=memory.data_ptr(), bytes=memory.nbytes)


def test_spans_that_are_near_are_joined() -> None:
    assert join([(0, 10), (20, 30), (5, 12)], 4) == ((0, 12), (20, 30))
    assert join([(20, 30), (0, 10)], 10) == ((0, 30),)
    assert join([]) == ()


def test_what_no_tensor_has_is_a_stray() -> None:
    layout = Layout(_sorted=[(64 * KIB, 128 * KIB), (130 * KIB, 256 * KIB)])
    assert layout.strays([(0, 8)]) == [(0, 8)], "however small, if nothing of the module is in it"
    assert layout.strays([(64 * KIB, 256 * KIB)]) == [], "a gap of two pages of memory is alignment"
    assert layout.strays([(64 * KIB, 300 * KIB)]) == [(256 * KIB, 300 * KIB)]
    assert layout.strays([(0, 64 * KIB), (90 * KIB, 100 * KIB)]) == [(0, 64 * KIB)]
    assert Layout().strays([(3, 9)]) == [(3, 9)]


def test_tensors_are_found_by_address_and_ties_once() -> None:
    memory = torch.zeros(4096)
    model = torch.nn.Module()
    model.register_parameter("a", torch.nn.Parameter(memory[:1024].view(32, 32)))
    model.register_buffer("b", memory[1024:1030], persistent=False)
    model.register_parameter("tied", model.a)
    model.register_buffer("elsewhere", torch.zeros(4))
    model.register_buffer("empty", memory[:0])
    model.register_parameter("none", None)
    model.register_buffer("meta", torch.zeros(4, device="meta"))
    layout = Layout.read(model, region_over(memory))
    assert layout.names == {(0, 4096): "a", (4096, 4120): "b"}
    assert layout.outside == {"elsewhere", "empty", "meta"}
    assert layout.find(4095) == (0, 4096)
    assert layout.find(4100) == (4096, 4120)
    assert layout.find(4120) is None


def test_lists_are_taken_apart_and_layers_are_not() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(8))
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 8))])
            self.scales = torch.nn.ParameterList([torch.zeros(8)])
            self.nothing = torch.nn.ReLU()
            self.table = torch.nn.ModuleDict({"x": torch.nn.LayerNorm(8)})

    model = Outer()
    # One region that has everything: the whole of memory.
    layout = Layout.read(model, SimpleNamespace(address=0, bytes=1 << 63))
    blocks = blocks_of(model, layout, 0)
    names = {part: name for name, part in model.named_modules()}
    assert {names[part] for part in blocks} == {"", "attention", "layers.0", "layers.1.0", "table.x"}
    own = blocks[model]
    for value in (model.token, model.scales[0]):
        assert any(first <= value.data_ptr() and value.data_ptr() + value.nbytes <= end for first, end in own)
    assert list(blocks_of(model, layout, 1 << 63)) == [model], "small enough to be waited for as one"
    covered = join((span for spans in blocks.values() for span in spans), 0)
    for value in model.parameters():
        assert any(first <= value.data_ptr() and value.data_ptr() + value.nbytes <= end for first, end in covered)


def test_a_tensor_that_consists_of_others_is_looked_into() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(torch.zeros(4), torch.ones(4))
    assert [value.data_ptr() for value in plain_tensors(two)] == [two.a.data_ptr(), two.b.data_ptr()]
