"""Attached modules: calls wake the region, layers wait for their bytes, the first forward is learned."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest

import shoal
from shoal import testing

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
st = pytest.importorskip("shoal.torch")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WIDTH = 512
"""A layer's matrix is 1 MiB."""


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(WIDTH, WIDTH)
        self.b = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Reaches for the second part's weights without calling it, as some of torch's own layers do.
        return torch.nn.functional.linear(torch.relu(self.a(x)), self.b.weight, self.b.bias) + x


class Model(torch.nn.Module):
    """Layers that are registered in the reverse order of their use, tied ends, a table that is not persistent."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, 600, bias=False)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(count))
        self.embed = torch.nn.Embedding(600, WIDTH)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))
        self.fail = False

    def forward(self, ids: torch.Tensor, *, again: bool = False) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for layer in reversed(self.layers):
            x = layer(x)
            if self.fail:
                raise KeyboardInterrupt
        return self(ids) if again else self.head(x)


IDS = torch.arange(32)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(5)
    return Model().eval()


def placed(model: torch.nn.Module, mem: shoal.MemoryManager, **options: Any) -> tuple[shoal.Region, st.Attachment]:
    region = st.place(model, mem).region
    options.setdefault("whole_bytes", 0)
    return region, st.attach(model, region, **options)


def is_free(region: shoal.Region) -> bool:
    """Whether nobody holds a guard of it."""
    try:
        region.sleep(timeout_s=10)
    except shoal.DeadlineError:
        return False
    return region.usage()["device"] == 0


def test_a_call_wakes_the_region_and_is_right_every_time(mem: shoal.MemoryManager, model: Model) -> None:
    with torch.no_grad():
        want = model(IDS)
        region, attached = placed(model, mem)
        assert region.usage()["device"] == 0
        for turn in range(6):
            assert torch.equal(model(IDS), want), turn
            assert is_free(region)
            if turn % 2:
                region.wake(wait=False)
        region.sleep(keep=0.5)
        assert torch.equal(model(IDS), want)
        region.wake()
        assert torch.equal(model(IDS), want), "all is there"
    assert attached.order[0] == "embed.weight" or attached.order[0] == "head.weight"


def test_the_first_forward_is_learned(mem: shoal.MemoryManager, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[tuple[int, int]]] = []
    set_order = shoal.Region.set_order

    def noted(self: shoal.Region, ranges: Any) -> None:
        orders.append(list(ranges))
        set_order(self, orders[-1])

    monkeypatch.setattr(shoal.Region, "set_order", noted)
    region, attached = placed(model, mem)
    assert attached.order == ()
    assert set(attached.blocks) == {"", "embed", "head", *(f"layers.{i}" for i in range(6))}
    with torch.no_grad():
        for _ in range(3):
            model(IDS)
            region.sleep()
    assert len(orders) == 2, "once for what is registered, once for what is used"
    used = [name.removesuffix(".bias").removesuffix(".weight") for name in attached.order]
    used = [name for at, name in enumerate(used) if name not in used[:at]]
    assert used[0] in {"embed", "head"}
    assert used[1] == "scale"
    assert used[2:] == [f"layers.{i}.{part}" for i in range(5, -1, -1) for part in "ab"]
    values = dict(model.named_parameters(remove_duplicate=False))
    assert orders[1] == [(values[name].data_ptr() - region.address, values[name].nbytes) for name in attached.order]


@pytest.mark.parametrize("parts", [True, False])
def test_a_forward_beside_a_wake_waits_for_each_layer(
    mem: shoal.MemoryManager, model: Model, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    from shoal.wake import Transfer

    with torch.no_grad():
        want = model(IDS)
        region, _ = placed(model, mem, parts=parts)
        assert torch.equal(model(IDS), want)
        waited: list[tuple[int, int]] = []
        wait_stream = Transfer.wait_stream

        def wait(self: Transfer, offset: int, nbytes: int, stream: int = 0, *, timeout_s: float = 60) -> None:
            waited.append((offset, offset + nbytes))
            wait_stream(self, offset, nbytes, stream, timeout_s=timeout_s)

        monkeypatch.setattr(Transfer, "wait_stream", wait)
        besides = 0
        for _ in range(20):
            waited.clear()
            region.sleep()
            assert torch.equal(model(IDS), want)
            if waited:
                besides += 1
                for name, value in (*model.named_parameters(), *model.named_buffers()):
                    at = value.data_ptr() - region.address
                    if name != "table":
                        assert any(first <= at and at + value.nbytes <= end for first, end in waited), name
        assert besides


def hooked(model: torch.nn.Module) -> int:
    """How many parts have another forward than their class's."""
    return sum("forward" in part.__dict__ for part in model.modules())


def test_layers_are_left_alone_where_only_the_whole_module_is_called(mem: shoal.MemoryManager, model: Model) -> None:
    """Whatever threads do: each call beside a wake waits, and after the last one only the module is hooked."""
    with torch.no_grad():
        want = model(IDS)
    own, own_calls = model.layers[3].forward, []

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        own_calls.append(1)
        return own(x)

    model.layers[3].forward = wrapped  # a part that has a forward of its own gets it back
    region, attached = placed(model, mem, parts=False)
    assert hooked(model) == 2
    ended, wrong = threading.Event(), []

    def call() -> None:
        with torch.no_grad():
            while not ended.is_set():
                if not torch.equal(model(IDS), want):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(40):
        region.sleep()
        if turn % 2:
            region.wake(wait=False)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert own_calls
    assert attached.order, "it was watched all the same"
    assert hooked(model) == 2
    assert model.layers[3].forward is wrapped
    model.fail = True
    region.sleep()
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    assert hooked(model) == 2
    assert is_free(region)
    attached.detach()
    assert hooked(model) == 1


def test_a_call_that_nobody_wants_any_more_ends_while_it_waits(
    machine: testing.SimulatedMachine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_SIM_LINK_MIB_PER_S", "4")  # three seconds for these weights
    is_left = False
    mem = machine.manager(device_budget="64MiB", host_budget="256MiB")
    with torch.no_grad():
        want = model(IDS)
        region, _ = placed(model, mem, is_cancelled=lambda: is_left)
        assert torch.equal(model(IDS), want)
        ends = []
        for _ in range(5):
            region.sleep()
            is_left = True
            try:
                model(IDS)
            except shoal.TransferError as error:
                ends.append(error)
            is_left = False
            assert torch.equal(model(IDS), want), "the wake goes on, and the next call has its bytes"
            if ends:
                break
        assert ends, "each time the bytes were there at once"
        assert ends[0].kind == "cancelled"
        assert is_free(region)


def test_what_no_call_covers_is_found_and_waited_for_first(mem: shoal.MemoryManager) -> None:
    class Sneaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x @ self.layers[3].weight
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(1)
    model, x = Sneaky().eval(), torch.randn(2, WIDTH)
    with torch.no_grad():
        want = model(x)
        region, attached = placed(model, mem)
        for _ in range(5):
            assert torch.equal(model(x), want)
            assert is_free(region)
    assert attached.order[0] == "layers.3.weight"
    entry = attached._state.entry
    at = model.layers[3].weight.data_ptr() - region.address
    assert any(first <= at < end for first, end in entry)


def test_calls_that_fail_or_are_interrupted_leave_the_guard(mem: shoal.MemoryManager, model: Model) -> None:
    with torch.no_grad():
        want = model(IDS)
        region, attached = placed(model, mem)
        model.fail = True
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
            assert is_free(region)
        assert attached.order == (), "half a forward teaches nothing"
        model.fail = False
        with pytest.raises(IndexError):
            model(torch.tensor([601]))
        assert is_free(region)
        assert torch.equal(model(IDS), want)


def test_parts_recursion_and_threads(mem: shoal.MemoryManager, model: Model) -> None:
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        want, part = model(IDS), model.layers[2](x)
        region, _ = placed(model, mem)
        assert torch.equal(model.layers[2](x), part), "a part alone"
        assert is_free(region)
        assert torch.equal(model(IDS, again=True), want)
        assert is_free(region)
        wrong: list[object] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    wrong.extend("other output" for _ in range(8) if not torch.equal(model(IDS), want))
            except Exception as error:  # noqa: BLE001  (it is told below)
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            region.sleep()
        for thread in threads:
            thread.join(60)
        assert not wrong
        with mem.guard():
            assert torch.equal(model(IDS), want)


def test_converting_an_attached_module_is_refused_with_a_reason(mem: shoal.MemoryManager, model: Model) -> None:
    want = model(IDS).detach()
    region, attached = placed(model, mem)
    for convert in (
        model.half, lambda: model.to(torch.float64), lambda: model.layers[0].to("meta"),
        lambda: model.to_empty(device="cpu"),
    ):  # fmt: skip
        with pytest.raises(shoal.RegionError, match="detach it first"):
            convert()
    assert model.to("cpu") is model, "what changes nothing is no conversion"
    assert model.float() is model
    for copied in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(shoal.RegionError, match="copied or pickled"):
            copied()
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
        region.sleep()
        # Past our refusal: a tensor that is swapped by hand is found when its bytes would be waited for.
        with mem.guard():
            own = model.layers[0].a.weight.data
            model.layers[0].a.weight.data = own.clone()
        region.sleep()
        with pytest.raises(shoal.RegionError, match=r"layers\.0\.a\.weight"):
            model(IDS)
        model.layers[0].a.weight.data = own
        assert torch.equal(model(IDS), want)
    attached.detach()
    with mem.guard():
        assert model.half().layers[0].a.weight.dtype == torch.float16


def test_detaching_makes_an_ordinary_module(mem: shoal.MemoryManager, model: Model) -> None:
    plain = Model()
    region, attached = placed(model, mem)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    with pytest.raises(shoal.RegionError, match="attached already"):
        st.attach(model, region)
    with pytest.raises(shoal.RegionError, match="attached already"):
        st.attach(model.layers[0], region)
    attached.detach()
    attached.detach()
    assert "detached" in repr(attached)
    for part in model.modules():
        assert "forward" not in part.__dict__
        assert not {"_apply", "__deepcopy__", "__reduce_ex__"} & set(part.__dict__)
    region.sleep()
    again = st.attach(model, region)
    model(IDS)
    again.detach()


def test_what_cannot_be_attached_is_said(mem: shoal.MemoryManager, model: Model) -> None:
    region = mem.region("empty", "2MiB")
    with pytest.raises(shoal.RegionError, match=r"shoal\.torch\.place"):
        st.attach(model, region)
    model._orig_mod = model.embed
    with pytest.raises(TypeError, match="compiled"):
        st.attach(model, region)


def test_no_room_is_said_and_changes_nothing(model: Model) -> None:
    with testing.simulated_machine("32MiB") as machine:
        mem = machine.manager(device_budget="32MiB", host_budget="64MiB")
        with torch.no_grad():
            want = model(IDS)
            placed(model, mem)
            full = mem.region("full", "28MiB", kind="kv")
            full.commit(0, full.bytes)
            for _ in range(2):
                with pytest.raises((shoal.LeaseError, shoal.OutOfMemoryError)):
                    model(IDS)
            full.decommit(0, full.bytes)
            assert torch.equal(model(IDS), want)


def test_torchs_own_layers(mem: shoal.MemoryManager) -> None:
    torch.manual_seed(2)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 1024, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        want = model(x)
    region, attached = placed(model, mem)
    assert attached.blocks == ("layers.0", "layers.1")
    # Learned with gradients, where each part is called; then the fast path, where none is.
    assert torch.allclose(model(x), want, atol=1e-5)
    with torch.no_grad():
        for _ in range(3):
            region.sleep()
            assert torch.equal(model(x), want)


def test_a_transformers_model_generates_across_sleeps(mem: shoal.MemoryManager) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, vocab_size=500, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    x = torch.arange(16)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want, logits = model.generate(x, **options), model(x).logits.detach()
    region, attached = placed(model, mem)
    blocks = {"model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(6))}
    assert set(attached.blocks) == blocks
    for turn in range(3):
        region.wake(wait=False)
        assert torch.equal(model.generate(x, **options), want)
        region.sleep(keep=turn / 4)
        with torch.no_grad():
            assert torch.equal(model(x).logits, logits)
        region.sleep()
    assert attached.order[0] in {"model.embed_tokens.weight", "lm_head.weight"}
    assert attached.order[-1] == "model.norm.weight"
