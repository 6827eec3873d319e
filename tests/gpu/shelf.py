"""The whole server on a GPU: three models in less memory than they need, answers compared with plain transformers.

Run by `tests/gpu/run.sh shelf`. Writes the figures to $SHOAL_RESULT: first tokens awake and asleep, what a worker takes
beside its regions, and whether each check held.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support import models
from tests.support.server import Server, environment, serve
from tests.support.stranger import Stranger
from tests.support.witness import until

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = os.environ.get("SHOAL_SHELF_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
TORCH_DEVICE = DEVICE if ON_GPU else "cpu"
SIZE = {"hidden": 1024, "layers": 8} if ON_GPU else {"hidden": 256, "layers": 4}
CAUSAL = ["ash", "birch"]
EMBEDDING = "moss"
PROMPTS = ["def main(", "The quick brown fox", "import os\nimport sys\n\n" * 6, "a"]
TOKENS = 24
REPEATS = 8
HEADROOM = 1 << 30


def smi(what: str) -> str:
    """Ask for one property of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()


def used_bytes() -> int:
    return int(smi("memory.used")) << 20 if ON_GPU else 0


class Report:
    """Rows of figures and checks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failed = 0

    def figure(self, case: str, metric: str, values: list[float], unit: str, target: float | None = None) -> None:
        value = statistics.median(values)
        self.rows.append(
            {"case": case, "metric": metric, "value": round(value, 4), "unit": unit, "better": "lower", "ceiling": None,
             "peer": None, "peer_value": None, "target": target, "met": None if target is None else value <= target,
             "samples": len(values), "spread": [round(min(values), 4), round(max(values), 4)]}
        )  # fmt: skip
        print(f"{case:44} {metric:26} {value:12.4g} {unit}", flush=True)

    def check(self, case: str, run: Callable[[], None]) -> None:
        begun = time.monotonic()
        try:
            run()
            passed = 1
        except Exception:  # noqa: BLE001 - one failure shall not hide the next
            traceback.print_exc()
            passed = 0
            self.failed += 1
        print(f"{'passed' if passed else 'FAILED'}: {case} ({time.monotonic() - begun:.1f} s)", flush=True)
        self.rows.append(
            {"case": case, "metric": "passed", "value": passed, "unit": "bool", "better": "higher", "ceiling": None,
             "peer": None, "peer_value": None, "target": 1, "met": passed == 1, "samples": 1,
             "spread": [passed, passed]}
        )  # fmt: skip

    def save(self) -> None:
        from importlib import metadata

        target = os.environ.get("SHOAL_RESULT")
        if target is None:
            return
        record = {
            "device": smi("name") if ON_GPU else "simulated",
            "driver": smi("driver_version") if ON_GPU else None,
            "cuda": None,
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
            "shoal_commit": os.environ.get("SHOAL_COMMIT") or None,
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "rows": self.rows,
        }
        Path(target).write_text(json.dumps(record, indent=1) + "\n")


def first_token_s(server: Server, model: str, prompt: str) -> float:
    """Ask with a stream and time its first token."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": True}
    begun = time.monotonic()
    taken = None
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {") and taken is None:
                taken = time.monotonic() - begun
    assert taken is not None
    return taken


def embed(server: Server, text: str) -> list[float]:
    answer = server.http.post("/v1/embeddings", json={"model": EMBEDDING, "input": text})
    assert answer.status_code == 200, answer.text + server.logs()
    return [float(x) for x in answer.json()["data"][0]["embedding"]]


def fall_asleep(server: Server, model: str) -> None:
    assert server.order(model, "sleep").status_code == 200
    asleep = server.wait_for(model, "asleep", timeout_s=20)
    assert asleep["bytes"]["weights_device"] == 0, asleep


class Watch:
    """Samples leases and the GPU's own figure while it is on."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.leased = self.held = self.used = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)

    def check(self, budget: int) -> None:
        """See that leases kept to what decision 12 allows: overhead that was measured may be in the headroom."""
        device = self.server.state()["device"]
        assert self.leased <= budget + device["headroom"], (self.leased, device)
        assert self.held <= budget, (self.held, device)

    def _run(self) -> None:
        while not self._end.wait(0.02):
            leases = [model["lease"] for model in self.server.state()["models"]]
            self.leased = max(self.leased, sum(lease["total"] for lease in leases))
            self.held = max(self.held, sum(lease["weights"] + lease["kv"] for lease in leases))
            self.used = max(self.used, used_bytes())


def main() -> int:
    """Run everything; the exit status says whether all held."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="shelf-") as directory:
        root = Path(directory)
        paths = {name: models.make_llama(root / name, seed=seed, **SIZE) for seed, name in enumerate(CAUSAL)}
        paths[EMBEDDING] = models.make_bert(root / EMBEDDING, seed=9)
        print("models made", {name: sum(f.stat().st_size for f in path.iterdir()) for name, path in paths.items()})
        greedy = {(n, p): models.plain_greedy(paths[n], p, TOKENS, TORCH_DEVICE) for n in CAUSAL for p in PROMPTS}
        vectors = {prompt: models.plain_embedding(paths[EMBEDDING], prompt, TORCH_DEVICE) for prompt in PROMPTS}
        if ON_GPU:
            import torch

            torch.cuda.empty_cache()
        tables: list[dict[str, object]] = [
            {"name": name, "source": str(path), "dtype": "float32", "context": 256} for name, path in paths.items()
        ]
        needed = roomy(report, root, tables, greedy, vectors)
        if needed is not None:
            tight(report, root, tables, greedy, vectors, needed)
        beside_others(report, root, tables, greedy, vectors)
        if ON_GPU:
            bfloat16(report, root, paths[CAUSAL[0]])
    report.save()
    return 1 if report.failed else 0


def check_answers(server: Server, greedy: dict[tuple[str, str], str], vectors: dict[str, list[float]]) -> None:
    for (name, prompt), text in greedy.items():
        said = server.complete(name, prompt, TOKENS)
        assert said == text, f"{name} {prompt!r}: {said!r}, alone {text!r}"
    for prompt, vector in vectors.items():
        off = max(abs(a - b) for a, b in zip(embed(server, prompt), vector, strict=True))
        assert off < 1e-4, f"an embedding is off by {off}"


def roomy(
    report: Report, root: Path, tables: list[dict[str, object]], greedy: Any, vectors: Any
) -> tuple[int, int] | None:
    """All fit: exact answers, first tokens, what workers take. Gives overheads and weights in bytes."""
    home = root / "roomy"
    home.mkdir()
    budget = {} if ON_GPU else {"device_budget": "512MiB"}
    before = used_bytes()
    begun = time.monotonic()
    with serve(home, models=tables, device=DEVICE, **budget) as server:
        state = server.state()
        print("device", state["device"])
        for table in tables:
            server.wait_for(str(table["name"]), "asleep", "awake", timeout_s=100)
        report.figure("three workers start", "ready", [time.monotonic() - begun], "s")
        if ON_GPU:
            report.figure("a worker that has no weights awake", "device memory", [(used_bytes() - before) / 3], "bytes",
                          0.8 * (1 << 30))  # fmt: skip
            report.figure("a worker that has no weights awake", "its overhead lease",
                          [model["lease"]["overhead"] for model in server.state()["models"]], "bytes")  # fmt: skip
        report.check("answers are those of plain transformers", lambda: check_answers(server, greedy, vectors))

        def seeds() -> None:
            said = [server.complete("ash", "x = ", 16, temperature=0.9, top_p=0.9, seed=seed) for seed in (7, 7, 8)]
            assert said[0] == said[1] != said[2], said

        report.check("sampling follows its seed", seeds)

        def first_tokens() -> None:
            awake, asleep = [], []
            for _ in range(REPEATS):
                first_token_s(server, "ash", PROMPTS[1])
                awake.append(1e3 * first_token_s(server, "ash", PROMPTS[1]))
                fall_asleep(server, "ash")
                asleep.append(1e3 * first_token_s(server, "ash", PROMPTS[1]))
            report.figure("first token, awake", "time", awake, "ms")
            report.figure("first token, asleep in host memory", "time", asleep, "ms", 1000)

        report.check("first tokens", first_tokens)

        def slept() -> None:
            for table in tables:
                fall_asleep(server, str(table["name"]))
            if ON_GPU:
                time.sleep(0.5)
                report.figure("a worker asleep after work", "device memory", [(used_bytes() - before) / 3], "bytes",
                              0.8 * (1 << 30))  # fmt: skip

        report.check("sleep gives the memory back", slept)

        def killed() -> None:
            pid = server.workers()["ash"]
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while server.workers().get("ash") in (pid, None) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert server.complete("ash", PROMPTS[0], TOKENS) == greedy["ash", PROMPTS[0]]

        report.check("a killed worker comes back", killed)
        state = server.state()
        print(server.logs(12))
    if report.failed:
        print(server.logs(60))
    leases = [model["lease"] for model in state["models"]]
    weights = [int(model["capabilities"]["weights_bytes"]) if model.get("capabilities") else
               int(model["bytes"]["weights_total"]) for model in state["models"]]  # fmt: skip
    if ON_GPU:
        deadline = time.monotonic() + 15
        while used_bytes() > before + (64 << 20) and time.monotonic() < deadline:
            time.sleep(0.2)
        report.check("nothing is left on the GPU", lambda: expect(used_bytes() - before, 64 << 20))
    return sum(int(lease["overhead"]) for lease in leases), sum(weights)


def expect(found: int, most: int) -> None:
    assert found <= most, f"{found} bytes, at most {most} are right"


def tight(  # noqa: PLR0917 - what the first half made
    report: Report,
    root: Path,
    tables: list[dict[str, object]],
    greedy: dict[tuple[str, str], str],
    vectors: Any,
    needed: tuple[int, int],
) -> None:
    """Not all fit: models yield to one another, and nothing else changes."""
    overhead, weights = needed
    home = root / "tight"
    home.mkdir()
    # Room for the larger part of the weights and some KV, beside what workers take before they begin.
    budget = overhead + int(weights * 0.6) + ((96 if ON_GPU else 12) << 20)
    before = used_bytes()
    with serve(home, models=tables, device=DEVICE, device_budget=budget) as server:
        for table in tables:
            server.wait_for(str(table["name"]), "asleep", "awake", "partly_resident", timeout_s=100)
        wanted = list(greedy) * 8
        random.Random(7).shuffle(wanted)

        def pressed() -> None:
            with Watch(server) as watch, ThreadPoolExecutor(6) as clients:
                embedded = clients.submit(lambda: [embed(server, prompt) for prompt in [*vectors] * 3])
                answers = list(clients.map(lambda pair: server.complete(pair[0], pair[1], TOKENS), wanted))
                for got, vector in zip(embedded.result(120), [*vectors.values()] * 3, strict=True):
                    assert max(abs(a - b) for a, b in zip(got, vector, strict=True)) < 1e-4
            for pair, answer in zip(wanted, answers, strict=True):
                assert answer == greedy[pair], f"{pair} came out differently under pressure: {answer!r}"
            watch.check(budget)
            if ON_GPU:
                report.figure("under pressure", "device memory beyond the budget",
                              [max(0, watch.used - before - budget)], "bytes", HEADROOM)  # fmt: skip
                expect(watch.used - before, budget + HEADROOM)
            evictions = sum(model["counts"]["evictions"] for model in server.state()["models"])
            assert evictions >= 3, server.state()
            print("evictions", evictions)

        report.check("exact answers under pressure, leases within the budget", pressed)

        def yielding() -> None:
            times = []
            for _ in range(REPEATS):
                times += [1e3 * first_token_s(server, name, PROMPTS[1]) for name in CAUSAL]
            report.figure("first token of a model that another must yield to", "time", times[2:], "ms", 1000)

        report.check("first tokens while models yield", yielding)
        if report.failed:
            print(server.logs(60), json.dumps(server.state(), indent=1)[-6000:])


def beside_others(
    report: Report, root: Path, tables: list[dict[str, object]], greedy: dict[tuple[str, str], str], vectors: Any
) -> None:
    """Somebody else's process takes memory of the device: it comes off the budget, models answer, and it comes back."""
    home = root / "others"
    home.mkdir()
    capacity, unit = 640 << 20, 64 << 20
    settings: dict[str, Any] = {"device_budget": f"{512 << 20}", "headroom": f"{128 << 20}"}
    if ON_GPU:
        settings, unit = {}, 4 << 30
    with serve(home, models=tables, device=DEVICE, **settings) as server:
        for table in tables:
            server.wait_for(str(table["name"]), "asleep", "awake", timeout_s=100)
        check_answers(server, greedy, vectors)
        pids = server.workers()
        time.sleep(4)
        before = server.device()
        driver = before["driver"] or {}
        print("the driver:", json.dumps(driver))
        for model in server.state()["models"]:
            print(model["name"], "lease", json.dumps(model["lease"]), "overhead by its own word",
                  model["bytes"]["overhead_device"])  # fmt: skip
            if model["lease"]["seen"] is not None:
                report.figure(f"{model['name']}: the driver's figure less its lease", "drift",
                              [model["lease"]["drift"]], "bytes")  # fmt: skip
        report.check("the driver is read, and nothing is amiss", lambda: expect_quiet(before))
        report.figure("one reading of the driver", "time", [driver.get("took_us", 0)], "us")
        other = Stranger.on_gpu(DEVICE) if ON_GPU else Stranger.simulated(server.runtime_dir, capacity)
        try:

            def take() -> None:
                begun = time.monotonic()
                other.take(unit)
                until(lambda: server.device()["taken"] >= unit * 9 // 10, 20, "it comes off the budget")
                report.figure("others' memory comes off the budget", "after", [time.monotonic() - begun], "s")
                now = server.device()
                print("with", unit, "taken:", json.dumps(now))
                print(shoal_ps(server))
                # A context of its own, and the libraries that come with it.
                expect(now["taken"], unit + ((1 << 30) if ON_GPU else 0))
                check_answers(server, greedy, vectors)

            report.check("models answer beside another process that takes memory", take)

            def crowd() -> None:
                room = server.device()["driver"]["free"]
                other.take(room - server.device()["headroom"] // 2)
                until(lambda: bool(server.told("evict_started")), 20, "models yield")
                keep = server.device()["headroom"] * 9 // 10
                until(lambda: server.device()["driver"]["free"] >= keep, 20, "the headroom is free again")
                assert server.workers() == pids, "somebody was ended for it"

            report.check("idle models yield so that the headroom stays free", crowd)
        finally:
            other.leave()

        def back() -> None:
            begun = time.monotonic()
            until(lambda: server.device()["taken"] == before["taken"], 30, "the budget grows back")
            report.figure("the budget grows back when others leave", "after", [time.monotonic() - begun], "s")
            check_answers(server, greedy, vectors)
            assert server.workers() == pids

        report.check("the budget grows back when others leave", back)

        def returned() -> None:
            os.kill(pids["ash"], signal.SIGKILL)
            until(lambda: bool(server.told("memory_returned")), 20, "its memory is seen free")
            (event,) = server.told("memory_returned")
            assert event["seen"], event
            report.figure("a killed worker's memory is seen free", "after", [event["after_ms"]], "ms")
            assert server.complete("ash", PROMPTS[0], TOKENS) == greedy["ash", PROMPTS[0]]

        report.check("a killed worker's memory is returning until it is seen free", returned)
        print(*(event["text"] for kind in ("device_taken", "drifted", "overhead_corrected", "memory_returned")
                for event in server.told(kind)), sep="\n")  # fmt: skip
        if report.failed:
            print(server.logs(60), json.dumps(server.state(), indent=1)[-6000:])


def expect_quiet(seen: dict[str, Any]) -> None:
    assert seen["driver"], "the driver was never read"
    assert seen["driver"]["lost"] is None, seen["driver"]
    assert seen["taken"] <= 256 << 20, seen
    assert seen["driver"]["ours"] > 0, "nothing of our workers is seen, nor said by them"


def shoal_ps(server: Server) -> str:
    command = [sys.executable, "-m", "shoal", "ps", "--server", server.url]
    return subprocess.run(command, env=environment(server.home), check=True, capture_output=True, text=True).stdout


def bfloat16(report: Report, root: Path, path: Path) -> None:
    """Without a word about types a causal model runs in bfloat16, and wakes and sleeps to the same answer."""
    home = root / "bf16"
    home.mkdir()
    with serve(home, models=[{"name": "ash", "source": str(path), "context": 256}], device="auto") as server:
        server.wait_for("ash", "asleep", "awake", timeout_s=100)

        def same() -> None:
            said = server.complete("ash", PROMPTS[1], TOKENS)
            model = server.model("ash")
            assert model["capabilities"]["dtype"] == "bfloat16", model
            for _ in range(3):
                fall_asleep(server, "ash")
                assert server.complete("ash", PROMPTS[1], TOKENS) == said

        report.check("bfloat16 by default, the same after each wake", same)


if __name__ == "__main__":
    sys.exit(main())
