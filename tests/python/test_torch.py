"""Modules whose weights lie in a region: same output, before and after any number of sleeps."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from helpers import PAGE

import shoal
from shoal import testing

torch = pytest.importorskip("torch")
torch.set_num_threads(2)
shoal_torch = pytest.importorskip("shoal.torch")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Tied(torch.nn.Module):
    """A language model in small: an embedding tied to the head, a norm, a table that is not persistent."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(256, 1000, bias=False)
        self.second = torch.nn.Linear(256, 256)
        self.first = torch.nn.Linear(256, 256)
        self.norm = torch.nn.BatchNorm1d(256)
        self.embed = torch.nn.Embedding(1000, 256)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.second(torch.relu(self.first(self.embed(ids))))))


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(3)
    return Tied().eval()


IDS = torch.arange(64)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file without the package of that name."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, blobs, end = {}, [], 0
    for name, value in tensors.items():
        blob = bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + len(blob)]}
        blobs.append(blob)
        end += len(blob)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8))


def test_a_placed_module_sleeps_and_wakes_with_identical_output(
    mem: shoal.MemoryManager, module: torch.nn.Module
) -> None:
    with torch.no_grad():
        want = module(IDS)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        parameters = dict(module.named_parameters())
        placement = shoal_torch.place(module, mem)
        assert mem.device_memory()["used_by_this_process"] == 0, "placing took device memory"
        pointers = {name: value.data_ptr() for name, value in module.named_parameters()}
        for keep in (0.0, 0.5, 0.0):
            with mem.guard():
                assert torch.equal(module(IDS), want)
                assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
            assert {name: value.data_ptr() for name, value in module.named_parameters()} == pointers
            placement.region.sleep(keep=keep)
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in module.named_parameters()), "other Parameter objects"
    for name, pointer in pointers.items():
        assert pointer == placement.region.address + placement[name].offset


def test_order_tied_weights_and_buffers(mem: shoal.MemoryManager, module: torch.nn.Module) -> None:
    placement = shoal_torch.place(module, mem)
    names = [placed.name for placed in placement]
    assert {names[0], *placement["embed.weight"].aliases} >= {"embed.weight"}
    assert placement["embed.weight"] is placement["lm_head.weight"]
    assert placement["embed.weight"].offset == 0
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= set(names)
    assert placement.left_out == ("table",)
    assert module.table[3] == 3.0
    assert module.lm_head.weight is module.embed.weight
    ends = 0
    for placed in placement:
        assert placed.offset % 64 == 0
        assert placed.offset % 256 == 0 or placed.nbytes < 64 << 10
        assert placed.offset >= ends
        ends = placed.offset + placed.nbytes
    assert ends <= placement.region.bytes
    assert placement.nbytes == sum(placed.nbytes for placed in placement)
    assert len(placement) == len(names)


def test_the_order_of_a_first_forward(mem: shoal.MemoryManager, module: torch.nn.Module) -> None:
    placement = shoal_torch.place(module, mem, example=lambda part: part(IDS))
    offsets = [placement[name].offset for name in ("embed.weight", "first.weight", "second.weight", "norm.weight")]
    assert offsets == sorted(offsets)
    registered = shoal_torch.place(Tied().eval(), mem, "registered")
    assert registered["second.weight"].offset < registered["first.weight"].offset


def test_progress_and_early_release(mem: shoal.MemoryManager, module: torch.nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    with torch.no_grad():
        want = module(IDS)
        placement = shoal_torch.place(
            module, mem, release_early=True, progress=lambda done, total: seen.append((done, total))
        )
        with mem.guard():
            assert torch.equal(module(IDS), want)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (placement.nbytes, placement.nbytes)


def test_a_failed_placement_leaves_the_module_as_it_was(module: torch.nn.Module) -> None:
    with testing.simulated_memory("16MiB", host_budget=0) as mem, torch.no_grad():
        want = module(IDS)
        with pytest.raises(shoal.OutOfMemoryError):
            shoal_torch.place(module, mem)
        assert torch.equal(module(IDS), want)


def test_strides_and_types_are_kept(mem: shoal.MemoryManager) -> None:
    conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    half = torch.nn.Linear(33, 7).to(torch.bfloat16)
    module = torch.nn.ModuleDict({"conv": conv, "narrow": half})
    want = {name: value.detach().clone() for name, value in module.named_parameters()}
    strides = {name: value.stride() for name, value in module.named_parameters()}
    shoal_torch.place(module, mem)
    with mem.guard():
        for name, value in module.named_parameters():
            assert torch.equal(value, want[name])
            assert value.stride() == strides[name]
            assert value.dtype == want[name].dtype


def test_a_module_without_tensors_is_refused(mem: shoal.MemoryManager) -> None:
    with pytest.raises(ValueError, match="no parameters"):
        shoal_torch.place(torch.nn.ReLU(), mem)
    with pytest.raises(ValueError, match="CPU"):
        shoal_torch.place(torch.nn.Linear(2, 2, device="meta"), mem)


def test_a_tensor_over_a_region(mem: shoal.MemoryManager) -> None:
    region = mem.region("kv", 2 * PAGE, kind="workspace")
    # Two layers' keys, one after another in each token: a view with gaps, made before there is any memory.
    first = shoal_torch.tensor(region, 0, (10, 4), torch.float32, stride=(8, 1))
    second = shoal_torch.tensor(region, 16, (10, 4), torch.float32, stride=(8, 1))
    region.commit(0, PAGE)
    with mem.guard():
        first.fill_(1)
        second.fill_(2)
        both = shoal_torch.tensor(region, 0, (10, 8), torch.float32)
        assert both.data_ptr() == region.address
        assert torch.equal(both, torch.tensor([[1.0] * 4 + [2.0] * 4] * 10))
    assert shoal_torch.tensor(region, 0, (0, 4), torch.float32).shape == (0, 4)
    assert shoal_torch.tensor(region, 4, (), torch.float32).shape == ()
    with pytest.raises(shoal.RegionError):
        shoal_torch.tensor(region, 2 * PAGE - 4, (2,), torch.float32)
    with pytest.raises(ValueError, match="multiple"):
        shoal_torch.tensor(region, 2, (2,), torch.float32)
    with pytest.raises(ValueError, match="describe"):
        shoal_torch.tensor(region, 0, (2, 2), torch.float32, stride=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_are_found_and_used(tmp_path: Path, dtype: torch.dtype) -> None:
    module = small().to(torch.bfloat16).float()
    save(tmp_path / "model.safetensors", {name: value.to(dtype) for name, value in module.state_dict().items()})
    sources = shoal_torch.safetensors_sources(tmp_path, module)
    assert set(sources) == set(module.state_dict())
    want = {name: value.clone() for name, value in module.state_dict().items()}
    with testing.simulated_memory("16MiB", host_budget="1MiB") as mem:
        placement = shoal_torch.place(module, mem, sources=sources)
        assert all(placed.source for placed in placement)
        assert placement.region.usage()["host"] == 0
        for _ in range(2):
            with mem.guard():
                assert all(torch.equal(value, want[name]) for name, value in module.state_dict().items())
            placement.region.sleep()


def test_sources_match_through_prefixes_and_ties(tmp_path: Path, module: torch.nn.Module) -> None:
    stored = {f"model.{name}": value for name, value in module.state_dict().items() if name != "lm_head.weight"}
    save(tmp_path / "model.safetensors", stored)
    sources = shoal_torch.safetensors_sources(tmp_path, module)
    assert set(sources) == set(module.state_dict())
    assert sources["lm_head.weight"] == sources["embed.weight"]


def test_what_differs_from_the_file_has_no_source(tmp_path: Path) -> None:
    module = small()
    stored = {name: value.clone() for name, value in module.state_dict().items()}
    stored["0.weight"][0, 0] += 1
    stored["0.bias"] = stored["0.bias"].to(torch.bfloat16)  # rounded: not these bytes, even widened
    save(tmp_path / "model.safetensors", stored)
    assert set(shoal_torch.safetensors_sources(tmp_path, module)) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("damage", ["truncated", "header", "short", "json", "empty"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save(path, dict(small().state_dict()))
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[:-1],
            "header": struct.pack("<Q", 1 << 60) + data[8:],
            "short": data[:5],
            "json": data[:8] + b"[" * (len(data) - 8),
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        shoal_torch.safetensors_sources(tmp_path, small())
