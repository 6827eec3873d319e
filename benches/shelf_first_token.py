"""Time to the first token of a model that is awake, asleep in host memory, only in its file, and not started.

Simulated device: the copies are memcpy, so the figures show what Shoal adds, not what a GPU would take. The ceiling
of a wake is a plain memcpy of the same bytes in the same run; the peer of `awake` is plain transformers in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from tests.support import models  # noqa: E402
from tests.support.server import Server, serve  # noqa: E402

from benches.ceilings import memcpy_s, plain_first_token_s  # noqa: E402
from benches.client import stream  # noqa: E402
from benches.results import Row, of_samples, save  # noqa: E402

PROMPT = "def main(argv):\n    "


def first_token_s(server: Server, name: str, repeats: int, *, sleep: bool) -> list[float]:
    """Ask for one token again and again, putting the model to sleep before each where told."""
    times = []
    with httpx.Client(timeout=120) as client:
        stream(client, f"{server.url}/v1/completions", name, PROMPT, 1)
        for _ in range(repeats):
            if sleep:
                server.order(name, "sleep").raise_for_status()
            answer = stream(client, f"{server.url}/v1/completions", name, PROMPT, 1)
            if answer.status != httpx.codes.OK:
                raise RuntimeError(answer.text)
            times.append(answer.first_s)
    return times


def main() -> None:
    """Run all cases and write `shelf_first_token.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--hidden", type=int, default=768)
    options = arguments.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        path = models.make_llama(home / "model", seed=0, layers=options.layers, hidden=options.hidden)
        weights = (path / "model.safetensors").stat().st_size
        table: dict[str, object] = {"name": "model", "source": str(path), "dtype": "float32", "context": 512}
        copy = of_samples(f"memcpy of {weights >> 20} MiB", "time", memcpy_s(weights), "s", "lower")
        alone = plain_first_token_s(path, PROMPT, options.repeats)
        plain = of_samples("plain transformers, loaded", "first token", alone, "s", "lower")
        rows += [copy, plain]
        for case, host in (("asleep in host memory", "4GiB"), ("asleep, only in its file", "2MiB")):
            start = time.perf_counter()
            (home / host).mkdir()
            with serve(home / host, models=[table], device_budget="2GiB", host_budget=host) as server:
                with httpx.Client(timeout=120) as client:
                    server.wait_for("model", "starting", "loading", "asleep", "awake")
                    cold = stream(client, f"{server.url}/v1/completions", "model", PROMPT, 1)
                cold_s = time.perf_counter() - start
                if cold.status != httpx.codes.OK:
                    raise RuntimeError(cold.text)
                if host == "4GiB":
                    rows.append(Row("not started (server, worker, loading)", "first token", cold_s, "s", "lower"))
                    awake = of_samples(
                        "awake",
                        "first token",
                        first_token_s(server, "model", options.repeats, sleep=False),
                        "s",
                        "lower",
                    )
                    awake.peer, awake.peer_value = "plain transformers", plain.value
                    rows.append(awake)
                woken = of_samples(
                    case, "first token", first_token_s(server, "model", options.repeats, sleep=True), "s", "lower"
                )
                woken.ceiling = copy.value + awake.value
                rows.append(woken)
    save("shelf_first_token", rows)


if __name__ == "__main__":
    main()
