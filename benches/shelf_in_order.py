"""First token of a model that sleeps: computing once all bytes are there, and computing as they arrive.

Simulated device whose link is as slow as is said (the stream sleeps, the copies are memcpy), so that copying and
computing take times that can be compared; what is measured is the overlap, not a GPU. The ceiling is the longer of
the two, each measured alone in the same run: a wake without a request, and the same prompt while the model is awake.
The peer waits for the whole wake, as the worker does where SHOAL_WAIT_FOR_WHOLE_WAKES is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from tests.support import models  # noqa: E402
from tests.support.server import Server, serve  # noqa: E402

from benches.client import Timed, stream  # noqa: E402
from benches.results import Row, of_samples, save  # noqa: E402

ARMS = {"after the whole wake": "1", "in order": "0"}
SENTENCE = "def main(argv):\n    return len(argv)\n"


def ask(client: httpx.Client, server: Server, prompt: str) -> Timed:
    """Ask for one token; nothing of the prompt is cached."""
    answer = stream(client, f"{server.url}/v1/completions", "model", prompt, 1, salt=uuid.uuid4().hex)
    if answer.status != httpx.codes.OK:
        raise RuntimeError(answer.text)
    return answer


def measure(server: Server, prompt: str, repeats: int) -> dict[str, list[float]]:
    """Time a wake alone, the prompt alone, and both."""
    times: dict[str, list[float]] = {"wake": [], "awake": [], "asleep": []}
    server.wait_for("model", "asleep", "awake")
    with httpx.Client(timeout=180) as client:
        ask(client, server, prompt)
        for _ in range(repeats):
            server.order("model", "sleep").raise_for_status()
            start = time.perf_counter()
            server.order("model", "wake").raise_for_status()
            times["wake"].append(time.perf_counter() - start)
            times["awake"].append(ask(client, server, prompt).first_s)
            server.order("model", "sleep").raise_for_status()
            times["asleep"].append(ask(client, server, prompt).first_s)
    return times


def main() -> None:
    """Run both arms and write `shelf_in_order.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--hidden", type=int, default=768)
    arguments.add_argument("--tokens", type=int, default=400, help="of the prompt, about")
    arguments.add_argument("--link", type=int, default=600, help="MiB a second of the simulated link")
    options = arguments.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        path = models.make_llama(home / "model", seed=0, layers=options.layers, hidden=options.hidden)
        weights = (path / "model.safetensors").stat().st_size
        prompt = (SENTENCE * options.tokens)[: options.tokens]
        table: dict[str, object] = {"name": "model", "source": str(path), "dtype": "float32", "context": 512}
        os.environ["SHOAL_SIM_LINK_MIB_PER_S"] = str(options.link)
        what = f"{weights >> 20} MiB at {options.link} MiB/s, prompt of {len(prompt)} characters"
        peer: Row | None = None
        for arm, whole in ARMS.items():
            os.environ["SHOAL_WAIT_FOR_WHOLE_WAKES"] = whole
            directory = home / arm.replace(" ", "-")
            directory.mkdir()
            with serve(directory, models=[table], device_budget="2GiB", host_budget="4GiB") as server:
                times = measure(server, prompt, options.repeats)
            copy = of_samples(f"{arm}: {what}", "wake alone", times["wake"], "s", "lower")
            compute = of_samples(f"{arm}: {what}", "awake, first token", times["awake"], "s", "lower")
            first = of_samples(f"{arm}: {what}", "asleep, first token", times["asleep"], "s", "lower")
            first.ceiling = max(copy.value, compute.value)
            rows += [copy, compute, first]
            if peer is None:
                peer = first
                continue
            first.peer, first.peer_value = "after the whole wake", peer.value
            over = first.value / first.ceiling
            rows.append(Row(f"{arm}: {what}", "first token over the ceiling", over, "ratio", "lower", ceiling=1.0))
    save("shelf_in_order", rows)


if __name__ == "__main__":
    main()
