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
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from tests.support import models  # noqa: E402
from tests.support.server import Server, serve  # noqa: E402

from benches.client import Timed, stream  # noqa: E402
from benches.results import Row, of_samples, save  # noqa: E402

PEER = "after the whole wake"
ARMS = {PEER: "1", "in order": "0"}
SENTENCE = "def main(argv):\n    return len(argv)\n"


def ask(client: httpx.Client, server: Server, prompt: str) -> Timed:
    """Ask for one token; nothing of the prompt is cached."""
    answer = stream(client, f"{server.url}/v1/completions", "model", prompt, 1, salt=uuid.uuid4().hex)
    if answer.status != httpx.codes.OK:
        raise RuntimeError(answer.text)
    return answer


class Arm:
    """One server, and the times of its model: a wake alone, the prompt alone, and both."""

    def __init__(self, server: Server, prompt: str) -> None:
        self._server, self._prompt = server, prompt
        self._client = httpx.Client(timeout=180)
        self.times: dict[str, list[float]] = {"wake": [], "awake": [], "asleep": []}
        server.wait_for("model", "asleep", "awake")
        ask(self._client, server, prompt)
        self._sleep()

    def _sleep(self) -> None:
        self._server.order("model", "sleep").raise_for_status()

    def measure(self) -> None:
        """Take each time once, and leave the model asleep."""
        start = time.perf_counter()
        self._server.order("model", "wake").raise_for_status()
        self.times["wake"].append(time.perf_counter() - start)
        self.times["awake"].append(ask(self._client, self._server, self._prompt).first_s)
        self._sleep()
        self.times["asleep"].append(ask(self._client, self._server, self._prompt).first_s)
        self._sleep()


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
        with ExitStack() as servers:
            arms: dict[str, Arm] = {}
            for arm, whole in ARMS.items():
                os.environ["SHOAL_WAIT_FOR_WHOLE_WAKES"] = whole
                directory = home / arm.replace(" ", "-")
                directory.mkdir()
                served = serve(directory, models=[table], device_budget="2GiB", host_budget="4GiB")
                arms[arm] = Arm(servers.enter_context(served), prompt)
            # In turn, so that what else the machine does meets both.
            for _ in range(options.repeats):
                for arm in arms.values():
                    arm.measure()
        both = [arm.times for arm in arms.values()]
        copy = of_samples(what, "a wake alone", [t for times in both for t in times["wake"]], "s", "lower")
        compute = of_samples(what, "awake, first token", [t for times in both for t in times["awake"]], "s", "lower")
        rows += [copy, compute]
        for arm in arms:
            first = of_samples(what, f"asleep, {arm}, first token", arms[arm].times["asleep"], "s", "lower")
            first.ceiling = max(copy.value, compute.value)
            if arm != PEER:
                first.peer, first.peer_value = PEER, rows[-1].value
            rows.append(first)
    save("shelf_in_order", rows)


if __name__ == "__main__":
    main()
