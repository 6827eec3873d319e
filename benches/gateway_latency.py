"""What the server adds to a request: the same worker asked directly on its socket and through the server.

The requests are the cheapest real ones (one embedding-sized completion token), so the difference is the gateway's. Both
ways run in turn in the same minute, on one kept connection each.
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
from tests.support.server import serve  # noqa: E402

from benches.results import Row, of_samples, percentile, save  # noqa: E402

BODY = {"model": "model", "prompt": "a", "max_tokens": 1, "temperature": 0}


def timed(client: httpx.Client, url: str) -> float:
    """One request, in seconds."""
    start = time.perf_counter()
    client.post(url, json=BODY).raise_for_status()
    return time.perf_counter() - start


def main() -> None:
    """Measure and write `gateway_latency.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=400)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        path = models.make_llama(home / "model", seed=0, layers=1, hidden=64)
        table: dict[str, object] = {"name": "model", "source": str(path), "dtype": "float32", "context": 512}
        with serve(home, models=[table], device_budget="256MiB") as server:
            server.wait_for("model", "asleep")
            socket = next(server.runtime_dir.glob("worker-*.sock"))
            with (
                httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=60) as direct,
                httpx.Client(timeout=60) as through,
            ):
                near, far = [], []
                for turn in range(options.requests + 20):
                    pair = timed(direct, "http://worker/v1/completions"), timed(through, f"{server.url}/v1/completions")
                    if turn >= 20:
                        near.append(pair[0])
                        far.append(pair[1])
    added = [b - a for a, b in zip(near, far, strict=True)]
    rows: list[Row] = [of_samples("worker's socket", "request", near, "s", "lower")]
    whole = of_samples("through the server", "request", far, "s", "lower")
    whole.ceiling = rows[0].value
    p50 = of_samples("added by the server", "p50", added, "s", "lower")
    p50.target = 0.0003
    p50.met = p50.value <= p50.target
    p99_value = percentile(far, 0.99) - percentile(near, 0.99)
    p99 = Row(
        "added by the server", "p99", p99_value, "s", "lower", target=0.001, met=p99_value <= 0.001, samples=len(far)
    )
    save("gateway_latency", [*rows, whole, p50, p99])


if __name__ == "__main__":
    main()
