"""Several vLLM engines behind one server in less memory than they need, with OpenAI's own client in bursts.

Run by `tests/gpu/run.sh vllm_shelf`; needs vLLM 0.26, openai and httpx importable. Three models of 8 layers of the 8B
shape and one of the 1B shape, with random weights of their own and a tokenizer of 257 symbols, under one budget: every
request is answered with all its tokens, an engine starts while others serve, one wakes while another sleeps, what was
computed before a sleep is a prefix hit after it, an idle one gives up what costs less to bring back, one is killed in a
wake. Times of first tokens and of switches are measured on the way. `SHOAL_SHELF_DEVICE=sim` makes a small dry run with
a vLLM that computes without a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu import invariant
from tests.gpu.logs import KeptLogs
from tests.gpu.shelf import HEADROOM, ON_GPU, Report, Watch, used_bytes
from tests.support.models import byte_tokenizer
from tests.support.server import Server, serve

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("SHOAL_SHELF_DEVICE", "cuda:0")
BIG = {"hidden_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
       "intermediate_size": 14336}  # fmt: skip
SMALL = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 8192}  # fmt: skip
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128}  # fmt: skip
NAMES = ["ash", "birch", "cedar", "moss"] if ON_GPU else ["ash", "birch"]
CONTEXT = 4096 if ON_GPU else 512
BUDGET = float(os.environ.get("SHOAL_SHELF_GIB", "14")) if ON_GPU else 96 / 1024
BURST = int(os.environ.get("SHOAL_SHELF_REQUESTS", "160" if ON_GPU else "40"))
CLIENTS = 24 if ON_GPU else 8
LENGTHS = (16, 512, 2048) if ON_GPU else (16, 256)
REPEATS = 4
FILLS_MAX, FOUND = 200, 6
START_S = float(os.environ.get("SHOAL_START_S", "260"))
"""Until all engines are up; the rest of the part takes about three minutes."""
PRINTABLE = 94
ARGS = ["--max-num-seqs", "32", "--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details"]
EXTRA = os.environ.get("SHOAL_VLLM_ARGS", "--enforce-eager").split()


def make(folder: Path) -> None:
    """Write the models: their weights are random, each with a seed of its own, and say nothing but printable ASCII."""
    code = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
shape, path, seed, device = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
made = torch.Generator(device).manual_seed(seed)
def weight(*size):
    return (torch.randn(*size, generator=made, device=device) * 0.02).to(torch.bfloat16).cpu()
hidden, inner, heads, kv = (shape[name] for name in
                            ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
narrow = hidden // heads * kv
head = weight(257, hidden)
head[0] = 0
head[%d:] = 0
found = {"model.embed_tokens.weight": weight(257, hidden), "lm_head.weight": head,
         "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
for layer in range(shape["num_hidden_layers"]):
    for name, size in {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
                       "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
                       "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                       "mlp.down_proj": (hidden, inner)}.items():
        found[f"model.layers.{layer}.{name}.weight"] = weight(*size)
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
path.mkdir()
save_file(found, path / "model.safetensors", metadata={"format": "pt"})
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "head_dim": hidden // heads,
          "vocab_size": 257, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
          "dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": None,
          "eos_token_id": 0}
(path / "config.json").write_text(json.dumps(config))
""" % (PRINTABLE + 1)  # noqa: UP031 - the code has braces
    for seed, name in enumerate(NAMES):
        shape = (SMALL if name == "moss" else BIG) if ON_GPU else TINY
        command = [
            sys.executable,
            "-c",
            code,
            json.dumps(shape),
            str(folder / name),
            str(seed),
            DEVICE if ON_GPU else "cpu",
        ]
        subprocess.run(command, check=True, timeout=120)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        tokenizer.save_pretrained(folder / name)


def tables(folder: Path) -> list[dict[str, object]]:
    return [
        {"name": name, "source": str(folder / name), "engine": "vllm", "context": CONTEXT, "args": [*ARGS, *EXTRA]}
        for name in NAMES
    ]


def text_of(length: int, seed: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choice("abcdefghij klmnop") for _ in range(length))


class Clients:
    """OpenAI's own client, and what it saw."""

    def __init__(self, server: Server) -> None:
        import openai

        self.openai = openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=180, max_retries=0)

    def complete(self, model: str, prompt: str, tokens: int) -> tuple[str, int, float]:
        """Give the text, how many tokens of the prompt were found, and how long it took."""
        begun = time.monotonic()
        made = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        assert made.usage is not None
        assert made.usage.completion_tokens == tokens, made
        details = made.usage.prompt_tokens_details
        return made.choices[0].text, (details.cached_tokens if details else 0) or 0, time.monotonic() - begun

    def first_token(self, model: str, prompt: str) -> float:
        begun = time.monotonic()
        stream = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=2, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        taken = None
        for _ in stream:
            taken = taken or time.monotonic() - begun
        assert taken is not None
        return taken


def fall_asleep(server: Server, model: str) -> dict[str, Any]:
    assert server.order(model, "sleep").status_code == 200
    deadline = time.monotonic() + 20
    while (asleep := server.wait_for(model, "asleep", timeout_s=30))["lease"]["kv"]:
        assert time.monotonic() < deadline, asleep
        time.sleep(0.02)
    assert asleep["lease"]["weights"] == 0, asleep
    return asleep


def engine_of(leader: int) -> int:
    """Give the process that holds the memory."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    said = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return next(pid for pid, line in said.items() if "EngineCore" in line or "spawn_main" in line)


def run(report: Report, folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    before = used_bytes()
    budget = int(BUDGET * GIB)
    begun = time.monotonic()
    host = {"host_budget": "48GiB"} if ON_GPU else {"host_budget": "128MiB"}
    logs = KeptLogs(lambda: [home / "serve.log", *home.glob("state/**/*.log")], "vllm_shelf")
    served = serve(home, models=tables(folder), device=DEVICE, device_budget=budget, quantum="500ms", **host)
    with logs, served as server:
        try:
            cases(report, server, Clients(server), begun=begun, before=before, budget=budget)
        finally:
            # What was found stays if the end takes too long.
            report.save()
            if out := os.environ.get("SHOAL_RESULT"):
                (Path(out).parent / "vllm_shelf_state.json").write_text(json.dumps(server.state(), indent=1))
            if report.failed:
                print(logs.tails(), flush=True)
    if ON_GPU:
        deadline = time.monotonic() + 15
        while used_bytes() > before + (64 << 20) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = used_bytes() - before
        report.check("nothing is left on the GPU", lambda: holds(left <= 64 << 20, left))


def holds(condition: bool, what: object) -> None:
    assert condition, what


def cases(report: Report, server: Server, clients: Clients, *, begun: float, before: int, budget: int) -> None:
    up: dict[str, float] = {}

    def starts() -> None:
        """The first two are asked while the others start."""
        stop = threading.Event()
        served: list[float] = []

        def keep_asking(name: str) -> None:
            number = 0
            while not stop.is_set():
                served.append(clients.complete(name, text_of(200, number % 7), 16)[2])
                number += 1

        with ThreadPoolExecutor(4) as others:
            # Whatever fails here, nobody goes on asking: the end of this block waits for them.
            with contextlib.ExitStack() as ends:
                ends.callback(stop.set)
                asking: dict[str, Any] = {}
                while len(up) < len(NAMES):
                    late = {one["name"]: (one["status"], one["lease"]) for one in server.state()["models"]}
                    assert time.monotonic() - begun < START_S, late
                    for model in server.state()["models"]:
                        name = model["name"]
                        assert model["status"] != "failed", model["error"]
                        if name not in up and model["capabilities"]:
                            up[name] = time.monotonic() - begun
                            print(f"{name} is up after {up[name]:.1f} s", model["lease"], flush=True)
                            if len(asking) < 2:
                                asking[name] = others.submit(keep_asking, name)
                    time.sleep(0.2)
            for one in asking.values():
                one.result(180)
        assert [model["starts"] for model in server.state()["models"]] == [1] * len(NAMES), server.state()
        print(len(served), "requests were answered while engines started")
        assert len(NAMES) < 3 or len(served) >= 10, served

    report.check("engines start beside engines that serve", starts)
    if report.failed:
        return
    report.figure("an engine starts", "ready", list(up.values()), "s")
    for model in server.state()["models"]:
        print(model["name"], model["lease"], model["bytes"], flush=True)
    if ON_GPU:
        overheads = [model["lease"]["overhead"] / GIB for model in server.state()["models"]]
        report.figure("lease for what an engine takes beside weights and KV", "size", overheads, "GiB")

    known: dict[str, tuple[str, int]] = {}
    prompt = text_of(LENGTHS[-1] - 40, 99)

    def prefixes() -> None:
        """The same request, found in the cache: before a sleep, after it, and after others had the memory."""
        for name in NAMES:
            clients.complete(name, prompt, 24)
            known[name] = clients.complete(name, prompt, 24)[:2]
            assert known[name][1] >= len(prompt) // 16 * 16 - 16, known[name]
            fall_asleep(server, name)
            again = clients.complete(name, prompt, 24)[:2]
            assert again == known[name], (name, again, known[name])

    report.check("what was computed before a sleep is found after it, and answers the same", prefixes)

    def same(name: str, answer: tuple[str, int, float]) -> None:
        """What was found in the cache answers as before; what was computed anew may be rounded otherwise."""
        if answer[0] != known[name][0]:
            print(f"{name} answers otherwise, with {answer[1]} tokens found:", known[name], answer, flush=True)
            assert answer[1] == 0, (name, answer, known[name])

    def bursts() -> None:
        chance = random.Random(1)
        beginnings = [text_of(chance.randrange(64, LENGTHS[-1] // 2), number) for number in range(6)]
        asked = [
            (
                chance.choice(NAMES),
                chance.choice(beginnings) + text_of(chance.randrange(8, 200), number),
                chance.randrange(8, 64),
            )
            for number in range(BURST)
        ]
        began = time.monotonic()
        with Watch(server) as watch, ThreadPoolExecutor(CLIENTS) as threads:
            took = [one[2] for one in threads.map(lambda one: clients.complete(*one), asked)]
        seconds = time.monotonic() - began
        report.figure("overlapping bursts: a request", "time", took, "s")
        report.figure("overlapping bursts: a request, p99", "time", [sorted(took)[int(len(took) * 0.99)]], "s")
        tokens = sum(one[2] for one in asked) / seconds
        print(f"{len(asked)} requests in {seconds:.1f} s, {tokens:.0f} tokens/s")
        watch.check(budget)
        if ON_GPU:
            beyond = max(0, watch.used - before - budget)
            report.figure("overlapping bursts", "device memory beyond the budget", [beyond], "bytes", HEADROOM)
            assert beyond <= HEADROOM, beyond
        counts = [model["counts"] for model in server.state()["models"]]
        print("evictions", [one["evictions"] for one in counts], "wakes", [one["wakes"] for one in counts])
        assert sum(one["evictions"] for one in counts) >= 2, counts
        assert sum(model["starts"] for model in server.state()["models"]) == len(NAMES), "an engine ended"

    report.check("overlapping bursts: every request is answered, within the budget", bursts)

    def crossing() -> None:
        """One wakes while the other goes to sleep."""
        first, second = NAMES[:2]
        for _ in range(3):
            clients.complete(first, "x", 2)
            fall_asleep(server, second)
            with ThreadPoolExecutor(2) as threads:
                sleeping = threads.submit(fall_asleep, server, first)
                woken = threads.submit(clients.complete, second, prompt, 24)
                sleeping.result(60)
                same(second, woken.result(60))
            first, second = second, first

    report.check("one wakes while another goes to sleep", crossing)

    def first_tokens() -> None:
        name, seed = NAMES[0], 1000
        for length in LENGTHS:
            awake, asleep = [], []
            for _ in range(REPEATS):
                clients.complete(name, "x", 2)
                awake.append(1e3 * clients.first_token(name, text_of(length, seed)))
                fall_asleep(server, name)
                asleep.append(1e3 * clients.first_token(name, text_of(length, seed + 1)))
                seed += 2
            report.figure(f"first token, prompt of {length}, awake", "time", awake, "ms")
            report.figure(f"first token, prompt of {length}, asleep", "time", asleep, "ms")

    report.check("first tokens", first_tokens)

    def switches() -> None:
        """From one model to another that sleeps, in room for one: until its first token."""
        for name in NAMES[2:]:
            fall_asleep(server, name)
        times = []
        for turn in range(2 * REPEATS):
            name, other = NAMES[turn % 2], NAMES[(turn + 1) % 2]
            clients.complete(other, text_of(100, turn), 8)
            if server.model(name)["status"] != "asleep":
                fall_asleep(server, name)
            times.append(1e3 * clients.first_token(name, text_of(100, 50 + turn)))
        report.figure("switch to a sleeping model, prompt of 100", "first token", times[1:], "ms")

    report.check("switches", switches)

    def prices() -> None:
        """An idle engine gives up weights or prefixes, whichever cost less to bring back; what it keeps is found."""
        name, other = NAMES[:2]
        fall_asleep(server, other)
        asked: list[str] = []
        computed = []
        # Until the other's weights do not fit beside it any more.
        weights = server.model(other)["capabilities"]["weights_bytes"]
        while server.device()["free"] > weights // 2:
            assert len(asked) < FILLS_MAX, server.state()
            asked.append(text_of(LENGTHS[-1] - 40, 5000 + len(asked)))
            computed.append(1e3 * clients.first_token(name, asked[-1]))
        time.sleep(1)  # whoever may go on at once is not idle
        since = server.state()["last_event_id"]
        clients.first_token(other, "x")
        held = server.model(name)["bytes"]
        orders = [one for one in server.told("evict_started") if one["id"] > since and one["model"] == name]
        print(f"{name} after {other} came:", held, *(one["text"] for one in orders), sep="\n", flush=True)
        assert orders, held
        report.figure("a prompt that is computed", "first token", computed, "ms")
        if not any("go last" in one["text"] for one in orders):
            assert any("KV for prompts that may come again, worth least" in one["text"] for one in orders), orders
            assert held["weights_device"] == weights, (held, orders)
            return
        assert held["weights_device"] < weights, (held, orders)
        found = []
        for prompt in asked[-FOUND:]:
            begun = time.monotonic()
            _, cached, _ = clients.complete(name, prompt, 1)
            found.append(1e3 * (time.monotonic() - begun))
            assert cached >= len(prompt) // 16 * 16 - 16, (cached, server.told("evict_started")[-8:])
        report.figure("the same after another model took weights of this one", "first token", found, "ms")

    report.check("an idle engine gives up what costs less to bring back", prices)

    def killed() -> None:
        name, other = NAMES[0], NAMES[1]
        clients.complete(other, "x", 2)
        calm = [clients.complete(other, "steady", 32)[2] for _ in range(8)]
        fall_asleep(server, name)
        leader = server.workers()[name]
        held = server.model(other)["lease"]["weights"]
        with ThreadPoolExecutor(2) as threads:
            waking = threads.submit(server.http.post, "/v1/completions",
                                    json={"model": name, "prompt": "woken", "max_tokens": 4})  # fmt: skip
            beside = threads.submit(lambda: [clients.complete(other, "steady", 32)[2] for _ in range(8)])
            time.sleep(0.01)
            os.kill(engine_of(leader), signal.SIGKILL)
            said = waking.result(180)
            disturbed = beside.result(60)
        print("the request that woke it:", said.status_code, said.text[:200])
        assert said.status_code in (200, 500, 502, 503), said.text
        assert server.model(other)["lease"]["weights"] == held
        report.figure("a request to another model, while one is killed and starts again", "time",
                      [1e3 * one for one in disturbed], "ms", 1e3 * 2 * statistics.median(calm))  # fmt: skip
        deadline = time.monotonic() + 150
        while server.workers().get(name) in (leader, None) and time.monotonic() < deadline:
            time.sleep(0.2)
        same(name, clients.complete(name, prompt, 24))

    report.check("one is killed in a wake, comes back, and the others go on", killed)

    def all_asleep() -> None:
        for name in NAMES:
            fall_asleep(server, name)
        if ON_GPU:
            time.sleep(1.5)
            report.figure("an engine asleep after work", "device memory", [(used_bytes() - before) / len(NAMES) / GIB],
                          "GiB", 0.8)  # fmt: skip

    report.check("all asleep", all_asleep)


def main() -> int:
    report = Report()
    with tempfile.TemporaryDirectory(prefix="vllm-shelf-") as directory:
        folder = Path(directory)
        environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_BATCH_INVARIANT": "1" if ON_GPU else "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            # Engines are started elsewhere, and find what takes part in the tests by this alone.
            "PYTHONPATH": os.pathsep.join(
                filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(folder / "invariant")])
            ),
        }  # fmt: skip
        invariant.found_by_vllm(folder / "invariant")
        os.environ.update(environment)
        # What was compiled for one part serves the next, where whoever runs them keeps it.
        for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(name, str(folder / name.lower()))
        begun = time.monotonic()
        make(folder)
        print(f"models made in {time.monotonic() - begun:.1f} s", flush=True)
        run(report, folder)
    report.save()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
