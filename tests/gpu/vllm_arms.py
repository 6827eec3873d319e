"""Ways to serve several vLLM models on one GPU, each behind OpenAI's routes: Shoal, and what people use instead.

Peers are found by the environment and never part of this repository: `$SHOAL_KVCACHED_SITE` a folder from which
kvcached can be imported as it is installed (with its `.pth`), `$SHOAL_LLAMA_SWAP` a folder with the programs
`llama-swap` and `vllm-wrapper`. One that cannot be run raises :class:`NotRunError`, which says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from tests.gpu.logs import KeptLogs
from tests.support.server import environment, free_port, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.support.server import Server

GIB = 1 << 30
DEVICE = os.environ.get("SHOAL_SHELF_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
CAUSE = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .+$", re.MULTILINE)
START_S = 240.0
STOP_S = 40.0
STOCK = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


class NotRunError(Exception):
    """A way of serving that is not to be had here."""


@dataclass(frozen=True)
class Shelf:
    """What is served, and in how much memory.

    Parameters
    ----------
    home
        A folder for logs and sockets.
    models
        Folders by name.
    weights
        Bytes of one model's weights.
    budget
        Device bytes for all of it, contexts included.
    beside
        Device bytes that one engine takes beside weights and KV.
    context
        Tokens of a request at most.
    total
        Device bytes of the whole GPU.
    args
        For vLLM, the same in every arm.
    """

    home: Path
    models: dict[str, Path]
    weights: int
    budget: int
    beside: int
    context: int
    total: int
    args: tuple[str, ...] = ()

    def room(self, parts: int) -> int:
        """Give bytes of KV of an engine that has one of so many equal parts of the budget."""
        return self.budget // parts - self.weights - self.beside


@dataclass
class Arm:
    """Models that answer.

    Attributes
    ----------
    urls : dict of str to str
        Where each model answers OpenAI's routes.
    server : Server or None
        Shoal's, for what only it can say.
    """

    urls: dict[str, str]
    server: Server | None = None
    ready_s: float = field(default=0.0)


@contextlib.contextmanager
def shoal(shelf: Shelf, policy: str = "value", share: float = 1.0) -> Iterator[Arm]:
    """`shoal serve` with `engine = "vllm"`.

    Parameters
    ----------
    shelf
        What.
    policy
        Shoal's.
    share
        Of the budget.
    """
    home = shelf.home / f"shoal-{policy}-{share:g}"
    home.mkdir()
    tables: list[dict[str, object]] = [
        {"name": name, "source": str(path), "engine": "vllm", "context": shelf.context, "args": list(shelf.args)}
        for name, path in shelf.models.items()
    ]
    host = "96GiB" if ON_GPU else "512MiB"
    begun = time.monotonic()
    logs = KeptLogs(lambda: [home / "serve.log", *home.glob("state/**/*.log")], f"vllm_arm_shoal-{policy}-{share:g}")
    served = serve(
        home, models=tables, device=DEVICE, device_budget=int(shelf.budget * share), host_budget=host, policy=policy
    )
    with logs, served as server:
        try:
            for name in shelf.models:
                found = server.wait_for(name, "awake", "asleep", "partly_resident", "failed", timeout_s=START_S)
                if found["status"] == "failed":
                    raise NotRunError(str(found["error"]))
            yield Arm(dict.fromkeys(shelf.models, server.url), server, time.monotonic() - begun)
        except (NotRunError, TimeoutError, AssertionError, RuntimeError):
            print(logs.tails(), flush=True)
            raise


def use_policy(arm: Arm, policy: str) -> None:
    """Tell the server of an arm to use another policy, as a user does: a changed file, and `shoal reload`.

    Parameters
    ----------
    arm
        One of :func:`shoal`.
    policy
        Shoal's.

    Raises
    ------
    NotRunError
        It did not take it.
    """
    server = arm.server
    if server is None:
        raise NotRunError("only Shoal's own server has a policy")
    lines = [
        f"policy = {json.dumps(policy)}" if line.startswith("policy = ") else line
        for line in server.config.read_text().splitlines()
    ]
    server.config.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "shoal", "reload"]
    told = subprocess.run(
        command, env=environment(server.home), capture_output=True, text=True, timeout=60, check=False
    )
    if told.returncode:
        raise NotRunError(f"the policy was not taken: {told.stdout} {told.stderr}")


@contextlib.contextmanager
def static(shelf: Shelf) -> Iterator[Arm]:
    """Plain vLLM, each engine with an equal part of the memory for ever."""
    room = shelf.room(len(shelf.models))
    if room <= 0:
        raise NotRunError(f"an equal part of the budget is {-room} bytes short of the weights alone")
    with _engines(shelf, "static", room, {}, []) as urls:
        yield urls


@contextlib.contextmanager
def kvcached(shelf: Shelf) -> Iterator[Arm]:
    """Plain vLLM with kvcached: KV of all engines shares what weights leave. Memory beyond the budget is taken away."""
    site = os.environ.get("SHOAL_KVCACHED_SITE")
    if not site:
        raise NotRunError("SHOAL_KVCACHED_SITE names no folder with kvcached")
    hook = shelf.home / "kvcached-hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({site!r})\n")
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH", "")])),
        "ENABLE_KVCACHED": "true", "KVCACHED_AUTOPATCH": "1",
        # It leaves a share of the whole GPU free, 5 % if nobody says otherwise: 4 of the 80 GiB of which all but the
        # budget is taken away here, more than all KV has. So it is told a hundredth of the budget.
        "KVCACHED_GPU_UTILIZATION": f"{1 - 0.01 * shelf.budget / shelf.total:.4f}",
        "KVCACHED_PAGE_PREALLOC_ENABLED": "true",
        # It knows vLLM's V1 runner alone (at e8e6406): under the other one all of KV would be taken at the start.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }  # fmt: skip
    with _ballast(shelf), _engines(shelf, "kvcached", shelf.room(1), environment, []) as arm:
        yield arm


@contextlib.contextmanager
def llama_swap(shelf: Shelf) -> Iterator[Arm]:
    """llama-swap with its vllm-wrapper: one engine has all the memory, the others sleep at vLLM's level 1."""
    programs = Path(os.environ.get("SHOAL_LLAMA_SWAP", "/none"))
    if not (programs / "llama-swap").exists():
        raise NotRunError("SHOAL_LLAMA_SWAP names no folder with llama-swap and vllm-wrapper")
    # Sleeping engines keep their contexts; the one that is awake has the rest.
    room = shelf.room(1) - (len(shelf.models) - 1) * shelf.beside
    url, home = f"http://127.0.0.1:{free_port()}", shelf.home / "llama-swap"
    home.mkdir()
    config: dict[str, object] = {"healthCheckTimeout": int(START_S), "unloadTimeout": 60, "models": {}}
    ports = {name: free_port() for name in shelf.models}
    for name, path in shelf.models.items():
        upstream = f"http://127.0.0.1:{ports[name]}"
        engine = [*STOCK, *_args(shelf, name, path, ports[name], room), "--enable-sleep-mode"]
        wrapper = str(programs / "vllm-wrapper")
        serve_ = [wrapper, "serve", "--vllm-url", upstream, "--listen", "127.0.0.1:${PORT}", "--wait-timeout", "240s"]
        config["models"][name] = {  # type: ignore[index]
            "cmd": " ".join([*serve_, "--", *engine]),
            "cmdStop": f"{wrapper} sleep --vllm-url {upstream} --stop-pid ${{PID}}",
            # By default it answers 429 to an eleventh request at once; here all arms queue.
            "concurrencyLimit": 1024,
        }
    # JSON is YAML.
    (home / "config.yaml").write_text(json.dumps(config))
    command = [
        str(programs / "llama-swap"), "-config", str(home / "config.yaml"), "-listen", url.removeprefix("http://"),
    ]  # fmt: skip
    begun = time.monotonic()
    with _process(command, home / "llama-swap.log", {"VLLM_SERVER_DEV_MODE": "1"}) as process:
        try:
            _until_healthy(url, process, home / "llama-swap.log", path="/health")
            for name in shelf.models:
                body = {"model": name, "prompt": "x", "max_tokens": 1}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=START_S)
                if answer.status_code != httpx.codes.OK:
                    raise NotRunError(f"llama-swap: {answer.status_code} {answer.text[:400]}")
            yield Arm(dict.fromkeys(shelf.models, url), None, time.monotonic() - begun)
        finally:
            _keep_logs("llama-swap", [home / "llama-swap.log"])
            # The wrapper leaves vLLM running on purpose.
            _end_engines(ports.values())


ARMS: dict[str, Callable[[Shelf], contextlib.AbstractContextManager[Arm]]] = {
    "shoal": shoal,
    "lru": lambda shelf: shoal(shelf, "lru"),
    "static": static,
    "kvcached": kvcached,
    "llama-swap": llama_swap,
}


def _args(shelf: Shelf, name: str, path: Path, port: int, room: int) -> list[str]:
    """Give vLLM's arguments for one engine on its own. With KV in bytes it does not look at what others take."""
    return [
        "--model", str(path), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(shelf.context), "--kv-cache-memory-bytes", str(room),
        "--gpu-memory-utilization", f"{(shelf.weights + shelf.beside) / shelf.total:.4f}", *shelf.args,
    ]  # fmt: skip


@contextlib.contextmanager
def _engines(shelf: Shelf, arm: str, room: int, environment: dict[str, str], args: list[str]) -> Iterator[Arm]:
    urls: dict[str, str] = {}
    logs: list[Path] = []
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _keep_logs(arm, logs))
        running = []
        for name, path in shelf.models.items():
            port, log = free_port(), shelf.home / f"{arm}-{name}.log"
            logs.append(log)
            process = stack.enter_context(
                _process([*STOCK, *_args(shelf, name, path, port, room), *args], log, environment)
            )
            urls[name] = f"http://127.0.0.1:{port}"
            running.append((urls[name], process, log))
        for one in running:
            _until_healthy(*one)
        yield Arm(urls, None, time.monotonic() - begun)


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, all of which ends with it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**own, **environment}, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, path: str = "/health") -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + path, timeout=5).status_code == httpx.codes.OK:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")
            # The engine says why in a process of its own, and the one in front of it only that the engine has ended.
            causes = [line for line in CAUSE.findall(said) if "See root cause" not in line]
            raise NotRunError(
                f"{log.stem} did not come up (exit {process.poll()}): {causes[-1] if causes else said[-1500:]}"
            )
        time.sleep(0.25)


def _end_engines(ports: Iterable[int]) -> None:
    """End the vLLM that listens at each port, with the engine that it started."""
    ends = [f"--port\0{port}\0".encode() for port in ports]
    for order, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        while True:
            found = []
            for line in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    said = line.read_bytes()
                    if b"api_server" in said and b"vllm-wrapper" not in said and any(end in said for end in ends):
                        found.append(int(line.parent.name))
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, order)
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)


@contextlib.contextmanager
def _ballast(shelf: Shelf) -> Iterator[None]:
    """Take what the GPU has beyond the budget, for programs that know no other bound."""
    if not ON_GPU:
        yield
        return
    code = """
import sys, torch
free, total = torch.cuda.mem_get_info()
kept = [torch.empty(max(free - int(sys.argv[1]), 0), dtype=torch.uint8, device="cuda")]
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(shelf.budget)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"held\n":
            raise NotRunError("memory beyond the budget could not be taken away")
        yield
    finally:
        process.kill()
        process.wait()


def _keep_logs(arm: str, logs: list[Path]) -> None:
    """Put what was said beside the result."""
    if out := os.environ.get("SHOAL_RESULT"):
        text = "".join(
            f"=== {log.name}\n{log.read_text(errors='replace')[-100_000:]}\n" for log in logs if log.exists()
        )
        (Path(out).parent / f"vllm_arm_{arm}.log").write_text(text)
