"""What the server adds to a request: the same worker asked directly on its socket and through the server.

Two runs. The first asks a real worker for the cheapest real answer (one token), both ways in turn in the same minute,
on one kept connection each, so the difference is the gateway's. The second is the crate's own bench (`cargo bench -p
shoal-server --bench gateway`): a client in Rust, a worker that only answers, and 256 streams at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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


def of_streams() -> list[Row]:
    """Run the bench of the crate and give its rows."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        # Absolute: cargo runs a bench in its crate's directory.
        command = ["cargo", "bench", "--locked", "-p", "shoal-server", "--bench", "gateway", "--", "--out", str(out)]
        environment = os.environ | {"CARGO_TERM_QUIET": "true"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        told = json.loads(out.read_text("utf-8"))["rows"]
    names = {"one_request": "worker that only answers, one request", "256_streams": "256 streams, each event"}
    rows = []
    for row in told:
        low, high = row["spread"]
        metric = row["metric"].replace("added_", "added by the server, ")
        rows.append(Row(**row | {"case": names[row["case"]], "metric": metric, "spread": (low, high)}))
    return rows


def of_worker(requests: int) -> list[Row]:
    """Ask a real worker, both ways in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        path = models.make_llama(home / "model", seed=0, layers=1, hidden=64)
        table: dict[str, object] = {"name": "model", "source": str(path), "dtype": "float32", "context": 512}
        with serve(home, models=[table], device_budget="256MiB") as server:
            server.wait_for("model", "asleep")
            socket = next(server.runtime_dir.glob("worker-*.sock"))
            with (
                httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=60) as near_client,
                httpx.Client(timeout=60) as far_client,
            ):
                near, far = [], []
                for turn in range(requests + 20):
                    pair = (
                        timed(near_client, "http://worker/v1/completions"),
                        timed(far_client, f"{server.url}/v1/completions"),
                    )
                    if turn >= 20:
                        near.append(pair[0])
                        far.append(pair[1])
    added = [b - a for a, b in zip(near, far, strict=True)]
    direct = of_samples("one token, worker's socket", "time", near, "s", "lower")
    whole = of_samples("one token, through the server", "time", far, "s", "lower")
    whole.ceiling = direct.value
    p50 = of_samples("one token, added by the server", "p50", added, "s", "lower")
    p50.target = 0.0003
    p50.met = p50.value <= p50.target
    p99_value = percentile(far, 0.99) - percentile(near, 0.99)
    p99 = Row("one token, added by the server", "p99", p99_value, "s", "lower", samples=len(far))
    p99.target, p99.met = 0.001, p99_value <= 0.001
    return [direct, whole, p50, p99]


def main() -> None:
    """Measure and write `gateway_latency.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=1000)
    options = arguments.parse_args()
    # First what cargo may have to build; the two runs then follow one another.
    streams = of_streams()
    save("gateway_latency", [*of_worker(options.requests), *streams])


if __name__ == "__main__":
    main()
