"""vLLM 0.26 on Shoal against vLLM alone: the same tokens, and what sleep, wake and idle memory cost.

Run by `tests/gpu/run.sh vllm`; needs vLLM 0.26 importable. Each engine has a process of its own
(`tests/gpu/vllm_process.py`), one after the other. Tokens are compared with `VLLM_BATCH_INVARIANT=1` and the
normalisation of `tests/gpu/invariant.py` on both sides, for a model of 8 layers of the 8B shape with random weights
from one file; sleep, wake and throughput are measured for 32 layers with vLLM's dummy weights, without either.
`SHOAL_VLLM_CASES` names the cases to run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from benches.results import Row, of_samples, save_gpu
from tests.gpu import invariant

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES = {
    "stock eager": 100, "shoal eager": 130, "stock graphs": 170, "shoal graphs": 170, "stock large": 170,
    "shoal large": 170, "shoal eager mp": 110, "stock eager v1": 100, "shoal eager v1": 110,
}  # fmt: skip
SMALL_LAYERS, LARGE_LAYERS = 8, 32
PEER = "vLLM 0.26.0, sleep level 1"


def make_models(folder: Path) -> None:
    """Write both configurations, and weights for the small one: random, each time the same."""
    for name, layers in (("small", SMALL_LAYERS), ("large", LARGE_LAYERS)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    code = f"""
import torch
from safetensors.torch import save_file
made = torch.Generator("cuda").manual_seed(0)
def weight(*shape):
    return (torch.randn(*shape, generator=made, device="cuda") * 0.02).to(torch.bfloat16).cpu()
hidden, inner, heads, vocabulary = 4096, 14336, 1024, 32000
found = {{"model.embed_tokens.weight": weight(vocabulary, hidden), "lm_head.weight": weight(vocabulary, hidden),
         "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}}
for layer in range({SMALL_LAYERS}):
    for name, shape in {{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (heads, hidden),
                        "self_attn.v_proj": (heads, hidden), "self_attn.o_proj": (hidden, hidden),
                        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                        "mlp.down_proj": (hidden, inner)}}.items():
        found[f"model.layers.{{layer}}.{{name}}.weight"] = weight(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"model.layers.{{layer}}.{{name}}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
save_file(found, "{folder}/small/model.safetensors", metadata={{"format": "pt"}})
import subprocess
print(subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                     capture_output=True, text=True).stdout.split()[0])
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    print("model written;", out.stdout.strip(), "MiB in use while writing it", flush=True)


def context_bytes() -> int:
    """Device memory of a process that has nothing but a CUDA context and torch's first tensor."""
    code = """
import subprocess
def used():
    return int(subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True).stdout.split()[0])
before = used()
import torch
one = torch.zeros(1, device="cuda")
print(used() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return int(out.stdout.split()[-1]) << 20


def entry_points(folder: Path) -> None:
    """Let vLLM find our plugin also where this package lies on the path without being installed."""
    if any(one.name == "shoal" for one in importlib.metadata.entry_points(group="vllm.general_plugins")):
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "site" / "shoal-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shoal\nVersion: 0\n")
    named = project["entry-points"]["vllm.general_plugins"]
    lines = [f"{name} = {target}" for name, target in named.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))


def run_case(case: str, folder: Path, logs: Path) -> dict[str, Any] | None:
    """Run one process; give what it found, or nothing if it failed."""
    name = case.replace(" ", "_")
    out = folder / f"{name}.json"
    is_large = "large" in case
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if "mp" in case else "0",
        "VLLM_BATCH_INVARIANT": "0" if is_large else "1", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{folder / 'site'}",
    }  # fmt: skip
    if not is_large:
        env["PYTHONPATH"] += f":{folder / 'invariant'}"
    if "v1" in case:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if case.startswith("shoal"):
        env["SHOAL"] = "1"
    model = folder / ("large" if is_large else "small")
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.vllm_process", case, str(model), str(out)]
    began = time.perf_counter()
    with (logs / f"vllm_{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=CASES[case], cwd=ROOT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    found = json.loads(out.read_text()) if out.exists() else None
    took = time.perf_counter() - began
    print(f"{case}: exit status {status} after {took:.0f} s", flush=True)
    if status or not found or not found.get("done"):
        print((logs / f"vllm_{name}.log").read_text()[-5000:], flush=True)
    return found


def wait_until_free(seconds: float = 30) -> None:
    """Wait until the memory of the process before is back: vLLM refuses to start beside it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[0]) < 512:
            return
        time.sleep(0.2)


def differing(ours: dict[str, list[list[int]]], right: list[list[int]]) -> tuple[int, int]:
    """Count the requests, over all rounds, and those with other tokens."""
    pairs = [(got, want) for tokens in ours.values() for got, want in zip(tokens, right, strict=True)]
    return len(pairs), sum(got != want for got, want in pairs)


def token_rows(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Compare each of our processes with the stock one that ran the same way, and that one with itself.

    Where stock gives other tokens than itself in another order of arrival, ours may do so no more often.
    """
    rows = []
    for case, ours in found.items():
        if "large" in case:
            continue
        twin = case.replace("shoal", "stock").replace(" mp", "")
        if twin not in found or "first" not in found[twin]["tokens"]:
            continue
        right = found[twin]["tokens"]["first"]
        tokens = {name: got for name, got in ours["tokens"].items() if case != twin or name != "first"}
        requests, wrong = differing(tokens, right)
        again, by_itself = differing(
            {name: got for name, got in found[twin]["tokens"].items() if name != "first"}, right
        )
        what = "other tokens than itself" if case == twin else "other tokens than stock"
        row = Row(
            f"{case}: requests of {requests} in {len(tokens)} rounds with {what}", "count", wrong, "requests", "lower",
            samples=requests,
        )  # fmt: skip
        if case != twin and requests and again:
            row.peer, row.peer_value = "stock with itself, for as many", by_itself * requests / again
            row.target = row.peer_value
            row.met = bool(ours.get("done")) and wrong <= row.target
        rows.append(row)
    return rows


def sleep_rows(found: dict[str, dict[str, Any]], context: int) -> list[Row]:
    """What sleeping and waking take, against stock and against the link."""
    rows = []
    for size, layers in (("large", LARGE_LAYERS), ("graphs", SMALL_LAYERS)):
        ours, stock = found.get(f"shoal {size}"), found.get(f"stock {size}")
        if not ours or not ours.get("sleeps"):
            continue
        theirs = (stock or {}).get("sleeps") or []
        name = f"{layers} layers of the 8B shape, with graphs"
        forgetting = [one for one in ours["sleeps"] if one["kv"] == "forget"]
        keeping = [one for one in ours["sleeps"] if one["kv"] == "keep"]

        def add(row: Row, target: float | None, theirs: list[float]) -> None:
            row.target = target
            if target is not None:
                row.met = row.value <= target if row.better == "lower" else row.value >= target
            if theirs:
                row.peer, row.peer_value = PEER, statistics.median(theirs)
            rows.append(row)

        def times(which: list[dict[str, Any]], what: str) -> list[float]:
            return [one[what] for one in which]

        add(of_samples(f"{name}: sleep, first", "time", times(forgetting[:1], "sleep_s"), "s", "lower"), 0.1,
            times(theirs[:1], "sleep_s"))  # fmt: skip
        if len(forgetting) > 1:
            add(of_samples(f"{name}: sleep, later", "time", times(forgetting[1:], "sleep_s"), "s", "lower"), 0.1,
                times(theirs[1:], "sleep_s"))  # fmt: skip
        if keeping:
            add(of_samples(f"{name}: sleep, KV blocks kept", "time", times(keeping, "sleep_s"), "s", "lower"), None, [])
        rates = [one["awake"]["restored"] / one["wake_s"] / GIB for one in ours["sleeps"]]
        wake = of_samples(f"{name}: wake", "rate", rates, "GiB/s", "higher")
        wake.ceiling = ours["link"]["up"] / GIB if "link" in ours else None
        weights = ours["usage"]["weights"]["total"]
        add(wake, 0.95 * wake.ceiling if wake.ceiling else None, [weights / one["wake_s"] / GIB for one in theirs])
        add(of_samples(f"{name}: wake", "time", times(ours["sleeps"], "wake_s"), "s", "lower"), None,
            times(theirs, "wake_s"))  # fmt: skip
        left = [one["residual"] / GIB for one in ours["sleeps"]]
        row = of_samples(f"{name}: device memory while asleep, context included", "size", left, "GiB", "lower")
        row.ceiling = context / GIB
        add(row, 0.8, [one["residual"] / GIB for one in theirs])
    return rows


def other_rows(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Throughput against stock, and what the KV cache holds."""
    rows = []
    ours, stock = found.get("shoal large"), found.get("stock large")
    if ours and stock:
        for what, better, unit, target in (
            ("tokens_per_s", "higher", "tokens/s", 0.98), ("s_per_token_alone", "lower", "s/token", 1 / 0.98),
        ):  # fmt: skip
            if what in ours and what in stock:
                case = (
                    "32 layers: 32 requests of 256 tokens, 128 each" if better == "higher" else "32 layers: one request"
                )
                row = of_samples(case, what, ours[what], unit, better)
                row.peer, row.peer_value = "vLLM 0.26.0", statistics.median(stock[what])
                row.target = target * row.peer_value
                row.met = row.value >= row.target if better == "higher" else row.value <= row.target
                rows.append(row)
    for case in ("shoal graphs", "shoal eager", "shoal eager mp", "shoal eager v1"):
        kv = (found.get(case) or {}).get("kv")
        if not kv:
            continue
        rows += [
            Row(f"{case}: KV memory, {name}", "size", kv[name] / GIB, "GiB", "lower")
            for name in ("after a burst", "after shrinking", "mapped under a limit", "idle after")
        ]
        rows.append(Row(f"{case}: preemptions under a limit of 0.625 GiB", "count", kv["preemptions"], "", "higher",
                        target=1, met=kv["preemptions"] >= 1))  # fmt: skip
        hits = found[case].get("hits_after_keeping")
        if hits is not None:
            rows.append(Row(f"{case}: tokens found again after a sleep that kept the cache", "count", hits, "tokens",
                            "higher", target=1, met=hits >= 1))  # fmt: skip
    return rows


def main() -> int:
    out = Path(os.environ["SHOAL_RESULT"])
    cases = [case for case in (os.environ.get("SHOAL_VLLM_CASES") or ",".join(CASES)).split(",") if case]
    found: dict[str, dict[str, Any]] = {}
    folder = Path(os.environ.get("SHOAL_VLLM_FOLDER") or tempfile.mkdtemp(prefix="shoal-vllm-"))
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder)
    entry_points(folder)
    invariant.found_by_vllm(folder / "invariant")
    context = context_bytes()
    print("a context and torch take", context >> 20, "MiB", flush=True)
    rows: list[Row] = []
    for case in cases:
        wait_until_free()
        got = run_case(case, folder, out.parent)
        if got is not None:
            found[case] = got
        rows = [*token_rows(found), *sleep_rows(found, context), *other_rows(found)]
        if rows:
            save_gpu(out, rows)
        slim = {case: {key: value for key, value in one.items() if key != "tokens"} for case, one in found.items()}
        for name, one in found.items():
            twin = found.get(name.replace("shoal", "stock").replace(" mp", ""), {}).get("tokens", {}).get("first")
            if twin:
                slim[name]["differing"] = {turn: differing({turn: got}, twin)[1] for turn, got in one["tokens"].items()}
        (out.parent / "vllm_found.json").write_text(json.dumps(slim, indent=1))
        if case == "shoal graphs" and not any(
            one.get("done") for name, one in found.items() if name.startswith("shoal")
        ):
            print("none of ours came to its end; the rest is not run", flush=True)
            break
    return 0 if rows and all(one.get("done") for one in found.values()) and len(found) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
