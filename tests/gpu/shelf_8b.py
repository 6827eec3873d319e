"""Three models of 8B's layers behind one server: first tokens by how much is resident, switches, all busy at once.

Run by `tests/gpu/run.sh shelf_8b`. The models are three names for one file of random weights (32 layers of 8B shape,
a vocabulary of 257, bfloat16), so that a small disk suffices; nothing of them is shared while they are served. First
with room for all (there one of them waits for whole wakes, as the peer of one that computes as the bytes arrive),
then with half of the memory that they need ($SHOAL_SHELF_SHARES). There one runs at a time, so the ceiling of its
tokens is what one model alone gives in its turns, with the link's time for a whole model between two. Every answer to
one prompt has to be the same text; none is found in the prefix cache, with which bfloat16 rounds otherwise.
$SHOAL_SHELF_DEVICE=sim makes a small dry run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

from benches.client import stream
from benches.results import Row, of_samples, save_gpu
from benches.shelf_all_active import NAMES, drive, moved, one_at_a_time, rows_of, tokens_per_s, turn_s
from tests.gpu.shelf import smi
from tests.support.models import byte_tokenizer
from tests.support.server import Server, serve

DEVICE = os.environ.get("SHOAL_SHELF_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
LAYERS = int(os.environ.get("SHOAL_LAYERS", "32"))
SHAPE = (
    {"hidden_size": 4096, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
     "intermediate_size": 14336}
    if ON_GPU else
    {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 512}
)  # fmt: skip
CONTEXT = 4096
PROMPTS = (16, 2048) if ON_GPU else (16, 64)
KEPT = (1.0, 0.5, 0.0)
REPEATS = 4
# Rounds of models that take turns, and after how many of them the policy knows that they do.
ROUNDS = 10
ROUNDS_UNKNOWN = 5
SECONDS = float(os.environ.get("SHOAL_SHELF_S", "12"))
CLIENTS = 4
SHARES = [float(share) for share in os.environ.get("SHOAL_SHELF_SHARES", "1,0.5").split(",")]
KV_ROOM = (1 << 30) if ON_GPU else (8 << 20)
# What a worker takes beside weights and KV, where no run before has told it.
OVERHEAD = 0 if not ON_GPU else 840 << 20
START_S = 150
# Symbols of the tokenizer that are printable ASCII; its end mark stands before them, all others after.
PRINTABLE = 94
# What DESIGN allows beside the longer of moving and computing: a share of the shorter.
SLACK = 0.15
WHOLE = "after the whole wake"


def make(path: Path) -> int:
    """Save the model; gives its bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE, vocab_size=257, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.set_default_device(DEVICE if ON_GPU else "cpu")
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    torch.set_default_device("cpu")
    with torch.no_grad():
        # Nothing but printable ASCII is ever the likeliest: no answer ends early, and each token is text at once.
        model.lm_head.weight[0] = 0
        model.lm_head.weight[PRINTABLE + 1 :] = 0
    model.save_pretrained(path, max_shard_size="100GB")
    byte_tokenizer().save_pretrained(path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    del model
    return size


def link_bytes_per_s() -> float:
    """Measure the way up from page-locked memory; the context that this takes ends with its process."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=ON_GPU)
    device = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE if ON_GPU else "cpu")
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        device.copy_(host, non_blocking=True)
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return (1 << 30) / min(times)


def in_child(what: str, path: Path) -> float:
    """Run `make` or the link in a process of its own, so that none of its device memory stays."""
    import subprocess

    code = f"from tests.gpu import shelf_8b as s; from pathlib import Path; print(s.{what})"
    ran = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    return float(ran.stdout.split()[-1])


def prompt_of(tokens: int) -> str:
    """So many symbols, each one token."""
    return ("def work(items):\n    return sorted(items)\n" * 100)[:tokens]


class Asked:
    """First tokens, whose texts have to agree."""

    def __init__(self, server: Server, texts: dict[int, str]) -> None:
        self.server, self.texts, self.wrong = server, texts, 0

    def first_token(self, model: str, tokens: int) -> float:
        url, salt = f"{self.server.url}/v1/completions", uuid.uuid4().hex
        answer = stream(self.server.http, url, model, prompt_of(tokens), 4, salt=salt)
        if answer.status != 200 or not answer.first_s:
            msg = f"{model}: {answer}\n{self.server.logs()}"
            raise RuntimeError(msg)
        self.wrong += self.texts.setdefault(tokens, answer.text) != answer.text
        return answer.first_s

    def resident(self, model: str) -> int:
        return int(self.server.model(model)["bytes"]["weights_device"])


def ready(server: Server) -> None:
    for name in NAMES:
        server.wait_for(name, "asleep", "awake", "partly_resident", timeout_s=START_S)


def by_residency(asked: Asked, weights: int, link: float) -> list[Row]:
    """First tokens computed as the bytes arrive, beside those of a model that waits for the whole wake."""
    rows = residency_of(asked, NAMES[0], "", weights, link)
    peers = residency_of(asked, NAMES[1], f", {WHOLE}", weights, link)
    for row, peer in zip(rows, peers, strict=True):
        if row.ceiling is not None:
            row.peer, row.peer_value = WHOLE, peer.value
            peer.target = peer.met = None
    return rows + [peer for peer in peers if peer.ceiling is not None]


def residency_of(asked: Asked, name: str, how: str, weights: int, link: float) -> list[Row]:
    """First tokens of one model of which all, half or nothing is on the device."""
    rows: list[Row] = []
    for tokens in PROMPTS:
        awake = 0.0
        for kept in KEPT:
            times, missing = [], 0
            for _ in range(REPEATS):
                asked.first_token(name, tokens)
                if kept < 1:
                    asked.server.order(name, "sleep", keep=kept).raise_for_status()
                missing = weights - asked.resident(name)
                times.append(asked.first_token(name, tokens))
            case = f"{tokens} tokens, {round(100 * (1 - missing / weights))} % resident{how}"
            row = of_samples(case, "first token", times, "s", "lower")
            if kept == 1:
                awake = row.value
            else:
                moving = missing / link
                row.ceiling = max(moving, awake)
                row.target = row.ceiling + SLACK * min(moving, awake)
                row.met = row.value <= row.target
            rows.append(row)
    return rows


def switches(asked: Asked) -> list[Row]:
    """First tokens of models that take turns where not all fit."""
    times: list[float] = []
    shares = []
    for turn in range(ROUNDS * len(NAMES)):
        name = NAMES[turn % len(NAMES)]
        shares.append(asked.resident(name))
        time.sleep(0.3)
        times.append(asked.first_token(name, PROMPTS[0]))
    known = ROUNDS_UNKNOWN * len(NAMES)
    rows = []
    parts = {"": slice(known, None), ", its round not known yet": slice(len(NAMES), known)}
    for when, part in parts.items():
        case = f"half of the memory{when}"
        rows.append(of_samples(f"{case}: a model that others must yield to", "first token", times[part], "s", "lower"))
        found = statistics.mean(shares[part]) / 2**30
        rows.append(Row(f"{case}: resident of it when it is asked, mean", "size", found, "GiB", "higher"))
    return rows


def main() -> int:
    """Measure; the exit status says whether all texts agreed."""
    rows: list[Row] = []
    texts: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="shelf-8b-") as directory:
        home = Path(directory)
        weights = int(in_child("make(Path(__import__('sys').argv[1]))", home / "weights"))
        link = in_child("link_bytes_per_s()", home)
        print(f"weights {weights / 2**30:.2f} GiB, link {link / 1e9:.1f} GB/s", flush=True)
        rows.append(Row("the link, host to device", "rate", link / 1e9, "GB/s", "higher"))
        tables: list[dict[str, object]] = [
            {"name": name, "source": str(home / "weights"), "context": CONTEXT} for name in NAMES
        ]
        overhead = 0 if SHARES[0] == 1 else len(NAMES) * OVERHEAD
        alone = 0.0
        for share in SHARES:
            case = f"{share:.0%} of what three of {weights / 2**30:.0f} GiB need"
            place = home / f"at-{share:.0%}".replace("%", "")
            place.mkdir()
            need = len(NAMES) * (weights + KV_ROOM)
            budget: dict[str, object] = {}
            if share < 1:
                budget = {"device_budget": overhead + int(share * need)}
            elif not ON_GPU:
                budget = {"device_budget": 2 * need}
            begun = time.monotonic()
            served = tables
            if share == 1:  # where all fit nobody wakes but by the order of `by_residency`
                whole = {"env": {"SHOAL_WAIT_FOR_WHOLE_WAKES": "1"}}
                served = [table | whole if table["name"] == NAMES[1] else table for table in tables]
            with serve(place, models=served, device=DEVICE, **budget) as server:
                ready(server)
                print(f"ready after {time.monotonic() - begun:.1f} s", flush=True)
                print(server.logs(lines=12), flush=True)
                rows.append(Row(case, "three workers ready", time.monotonic() - begun, "s", "lower"))
                asked = Asked(server, texts)
                for name in NAMES:
                    asked.first_token(name, PROMPTS[0])
                rows += by_residency(asked, weights, link) if share == 1 else switches(asked)
                before = moved(server)
                if not alone:
                    alone = tokens_per_s(drive(server, SECONDS / 2, CLIENTS, NAMES[:1]))
                    rows.append(Row("one model alone", "tokens a second", alone, "tokens/s", "higher"))
                    before = moved(server)
                run = drive(server, SECONDS, CLIENTS)
                fresh = rows_of(case, run, link)
                for row in fresh:
                    if row.metric == "tokens a second" and alone and share < 2 / len(NAMES):
                        row.ceiling = one_at_a_time(alone, turn_s(server), weights / link)
                rows += fresh
                overhead = sum(int(model["lease"]["overhead"]) for model in server.state()["models"])
                print(case, "moved, wakes, evictions", before, moved(server), flush=True)
                wrong = asked.wrong
                rows.append(Row(case, "texts that were not the first one", wrong, "answers", "lower", target=0))
                rows[-1].met = wrong == 0
            if ON_GPU:
                shutil.copy(place / "serve.log", Path(os.environ["SHOAL_RESULT"]).parent / f"{place.name}.log")
                # What is cut off by a limit of time has at least this.
                save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
    if not ON_GPU:
        print("\n".join(row.line() for row in rows))
    else:
        print("device memory in use afterwards", smi("memory.used"), "MiB")
    return 0 if all(row.met is not False for row in rows if row.unit == "answers") else 1


if __name__ == "__main__":
    sys.exit(main())
