"""Attached models on a GPU: the usage that the README shows, wakes beside forwards, graphs. Run by `run.sh torch`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import shoal

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from shoal import MemoryManager

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import shoal.torch as st  # noqa: E402

MIB = 1 << 20

USAGE = """
import transformers

def build_and_load():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, vocab_size=32000,
                                      num_attention_heads=16, num_key_value_heads=4)
    with torch.device("cuda:0"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

import shoal, torch
mem = shoal.MemoryManager(device="cuda:0", host_budget="48GiB")
weights = mem.region("weights")
with shoal.torch.use_region(weights):
    model = build_and_load()                 # every CUDA tensor made here lies in the region
x = torch.arange(64, device="cuda:0")[None]
with torch.no_grad():
    want = model(x).logits
weights.freeze()                             # sealed; copied to the host in the background, hash recorded
shoal.torch.attach(model, weights)           # learns the order of use, installs the hooks
weights.sleep()                              # hash checked, VRAM free in milliseconds, addresses stay
assert weights.usage()["device"] == 0
weights.wake(wait=False); model(x)           # layers compute as their bytes arrive

with torch.no_grad():
    for _ in range(10):
        weights.sleep()
        assert weights.usage()["device"] == 0
        weights.wake(wait=False)
        assert torch.equal(model(x).logits, want)
        weights.sleep(keep=0.5)
        assert torch.equal(model(x).logits, want)
print("fine")
"""


def test_the_usage_that_the_docs_show(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    said = run_python(USAGE)
    assert said.returncode == 0, said.stderr[-3000:]
    assert "fine" in said.stdout


def build(mem: MemoryManager, layers: int = 12, width: int = 2048) -> tuple[shoal.Region, Any, torch.Tensor]:
    """A Llama of about 1 GiB in a region of its own."""
    region = mem.region("weights")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, vocab_size=16000,
        num_attention_heads=16, num_key_value_heads=8,
    )  # fmt: skip
    with st.use_region(region), torch.device("cuda:0"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    region.freeze()
    return region, model.requires_grad_(False), torch.arange(128, device="cuda:0")[None]


def test_forwards_beside_wakes_on_streams_of_their_own(mem: MemoryManager) -> None:
    region, model, x = build(mem)
    want = model(x).logits
    attached = st.attach(model, region)
    assert torch.equal(model(x).logits, want), "watched"
    assert attached.order[0] == "model.embed_tokens.weight"
    assert attached.order[-1] == "lm_head.weight"
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong: list[object] = []

    def work(stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.stream(stream):
                for _ in range(6):
                    got = model(x).logits
                    stream.synchronize()
                    if not torch.equal(got, want):
                        wrong.append("other logits")
        except Exception as error:  # noqa: BLE001  (it is told below)
            wrong.append(error)

    for turn in range(8):
        region.sleep(keep=(turn % 3) / 4)
        torch.full((64 * MIB,), 0x7F, dtype=torch.uint8, device="cuda")
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong, wrong
    assert region._native.last_error() is None


def test_a_forward_runs_before_its_last_bytes_are_there(mem: MemoryManager, monkeypatch: pytest.MonkeyPatch) -> None:
    region, model, x = build(mem)
    want = model(x).logits
    st.attach(model, region)
    model(x)
    progress: list[tuple[int, int]] = []

    def note(part: Any, arguments: Any) -> None:
        wake = region.waking
        progress.append(wake.progress() if wake is not None else (1, 1))

    model.model.layers[0].register_forward_pre_hook(note)
    for _ in range(5):
        region.sleep()
        assert torch.equal(model(x).logits, want)
    assert any(done < total for done, total in progress), progress


def test_generating_across_sleeps(mem: MemoryManager) -> None:
    region, model, x = build(mem, layers=4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(x, **options)
    st.attach(model, region)
    for _ in range(3):
        region.sleep()
        assert torch.equal(model.generate(x, **options), want)


def test_a_graph_of_an_attached_model(mem: MemoryManager) -> None:
    region, model, x = build(mem, layers=4)
    st.attach(model, region)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x, use_cache=False)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with st.graph(captured, region):
        out = model(x, use_cache=False).logits
    captured.replay()
    torch.cuda.synchronize()
    want = out.clone()
    region.freeze()
    for _ in range(4):
        region.sleep()
        with region.guard():
            captured.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, want)
            out.zero_()
        assert torch.equal(model(x, use_cache=False).logits, want)


def test_a_sleeping_model_in_a_capture_is_refused_by_name(mem: MemoryManager) -> None:
    region, model, x = build(mem, layers=4)
    want = model(x).logits
    st.attach(model, region)
    model(x)
    region.sleep()
    captured = torch.cuda.CUDAGraph()
    with (
        pytest.raises((shoal.Error, RuntimeError)) as caught,
        torch.cuda.graph(captured, capture_error_mode="thread_local"),
    ):
        model(x, use_cache=False)
    said: BaseException | None = caught.value
    chain = []
    while said is not None:
        chain.append(str(said))
        said = said.__context__
    assert any("wake it first" in one for one in chain), chain
    torch.cuda.synchronize()
    assert torch.equal(model(x).logits, want)


def test_autograd_through_an_attached_model(mem: MemoryManager) -> None:
    region = mem.region("weights")
    torch.manual_seed(3)
    with st.use_region(region):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, device="cuda") for _ in range(8)))
    x = torch.randn(16, 1024, device="cuda")
    model(x).square().sum().backward()
    want = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    region.freeze()
    st.attach(model, region)
    for _ in range(3):
        region.sleep()
        with region.guard(in_order=True):
            model(x).square().sum().backward()
        torch.cuda.synchronize()
        for value, gradient in zip(model.parameters(), want, strict=True):
            assert torch.equal(value.grad, gradient)
        model.zero_grad()
