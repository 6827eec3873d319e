"""`SHOAL=1 vllm serve` itself, as it is typed, against `vllm serve` without it: texts, `/sleep`, `/wake_up`.

Run by `tests/gpu/run.sh vllm_serve`; needs vLLM 0.26 and httpx importable. One model of 16 layers of the 1B shape with
random weights and a tokenizer of 257 symbols, eager, `VLLM_BATCH_INVARIANT=1`. `SHOAL_SHELF_DEVICE=sim` tries all but
Shoal's own start with a vLLM that computes without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from benches.results import Row, save_gpu
from tests.gpu import invariant, vllm_shelf
from tests.gpu.vllm_part import entry_points, wait_until_free
from tests.support.server import free_port

MIB = 1 << 20
MODEL = "moss"
START_S = 150.0
REQUESTS = 24
CLIENTS = 8


class Serve:
    """One `vllm serve`, with Shoal or without."""

    def __init__(self, folder: Path, *, is_shoal: bool) -> None:
        self.name = "SHOAL=1 vllm serve" if is_shoal else "vllm serve"
        self.log = folder / f"serve-{is_shoal}.log"
        port = free_port()
        env = {
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_BATCH_INVARIANT": "1", "VLLM_SERVER_DEV_MODE": "1",
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{folder / 'site'}:{folder / 'invariant'}",
        }  # fmt: skip
        env.setdefault("VLLM_CACHE_ROOT", str(folder / "cache"))
        env.pop("SHOAL", None)
        if is_shoal:
            env["SHOAL"] = "1"
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / MODEL),
            "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--max-model-len",
            str(vllm_shelf.CONTEXT), "--enforce-eager", "--max-num-seqs", "16",
            "--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details",
        ]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def ready(self) -> float:
        """Wait until it answers; give how long that took."""
        begun = time.monotonic()
        while time.monotonic() - begun < START_S and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if self.http.get("/health").status_code == httpx.codes.OK:
                    return time.monotonic() - begun
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not come up:\n{self.log.read_text(errors='replace')[-4000:]}")

    def ask(self, prompt: str) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return dict(answer.json())

    def texts(self, clients_at_once: int = 1) -> tuple[list[str], int]:
        """Ask all prompts; give the texts, and how many tokens of the prompts were found.

        One after the other, what is computed together and what is found does not depend on who came first: vLLM's
        texts do (with eight clients, some of its own differ between two starts).
        """
        prompts = [vllm_shelf.text_of(40 + 11 * number, number) for number in range(REQUESTS)]
        with ThreadPoolExecutor(clients_at_once) as clients:
            answers = list(clients.map(self.ask, prompts))
        found = sum((one["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for one in answers)
        return [one["choices"][0]["text"] for one in answers], found

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(40)
        except subprocess.TimeoutExpired:
            status = -1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return status


def main() -> int:
    out = Path(os.environ["SHOAL_RESULT"])
    folder = Path(tempfile.mkdtemp(prefix="shoal-vllm-serve-"))
    vllm_shelf.NAMES[:] = [MODEL]
    vllm_shelf.make(folder)
    entry_points(folder)
    invariant.found_by_vllm(folder / "invariant")
    texts: dict[str, list[str]] = {}
    rows: list[Row] = []
    for is_shoal in (False, True) if vllm_shelf.ON_GPU else (False,):
        if vllm_shelf.ON_GPU:
            wait_until_free()
        server = Serve(folder, is_shoal=is_shoal)
        try:
            print(server.name, "answers after", round(server.ready(), 1), "s", flush=True)
            first, _ = server.texts()
            again, found = server.texts(CLIENTS)
            texts["shoal" if is_shoal else "stock"] = first
            case = f"{server.name}: texts of {REQUESTS} that differ when {CLIENTS} ask again ({found} tokens found)"
            other = sum(a != b for a, b in zip(first, again, strict=True))
            rows.append(Row(case, "count", other, "", "lower"))
            if is_shoal:
                other = sum(a != b for a, b in zip(first, texts["stock"], strict=True))
                rows.append(Row(f"{server.name}: texts of {REQUESTS} that differ from vllm serve's", "count", other, "",
                                "lower", target=0, met=other == 0))  # fmt: skip
                rows += slept(server, first)
        finally:
            status = server.end()
            print(server.name, "ended with", status, flush=True)
            (out.parent / f"vllm_serve_{'shoal' if is_shoal else 'stock'}.log").write_text(
                server.log.read_text(errors="replace")[-200_000:]
            )
        save_gpu(out, rows)
    return 0 if all(row.met is not False for row in rows) else 1


def slept(server: Serve, first: list[str]) -> list[Row]:
    """Have it sleep and wake by vLLM's own routes."""
    rows = []
    awake = vllm_shelf.used_bytes()
    for turn in range(2):
        begun = time.monotonic()
        server.http.post("/sleep", params={"level": 1}).raise_for_status()
        took = time.monotonic() - begun
        asleep = vllm_shelf.used_bytes()
        begun = time.monotonic()
        server.http.post("/wake_up").raise_for_status()
        woke = time.monotonic() - begun
        texts, _ = server.texts()
        other = sum(a != b for a, b in zip(first, texts, strict=True))
        name = f"{server.name}, /sleep {turn + 1}"
        rows += [
            Row(f"{name}: texts that differ after /wake_up", "count", other, "", "lower", target=0, met=other == 0),
            Row(f"{name}: memory that left the GPU", "size", (awake - asleep) / MIB, "MiB", "higher", target=1024,
                met=awake - asleep >= 1024 * MIB),
            Row(f"{name}: /sleep, answered after", "time", took, "s", "lower"),
            Row(f"{name}: /wake_up, answered after", "time", woke, "s", "lower"),
        ]  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
