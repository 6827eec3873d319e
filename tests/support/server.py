"""A real `shoal serve` in a directory of its own, started and ended as a user would."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator


def free_port() -> int:
    """Give a TCP port of the loopback address that nobody has now.

    Below those that the system gives to outgoing connections, where it leaves any: such a one may be another test's
    before a server has it.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(max(first // 2, 1024), first)
    tries = random.SystemRandom().sample(below, min(len(below), 100))
    for port in [*tries, 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    msg = f"no TCP port of 127.0.0.1 is free: {len(tries)} below {first} and any of the system's own choice were tried"
    raise RuntimeError(msg)


def toml_value(value: object) -> str:
    """Write one value the way TOML has it (strings, numbers and booleans are JSON's)."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


@dataclass
class Server:
    """A running server and the ways to ask it things."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    config: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=120)

    @property
    def url(self) -> str:
        """The address clients use."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def runtime_dir(self) -> Path:
        """Where its sockets are."""
        return self.home / "run" / "shoal"

    def state(self) -> dict[str, Any]:
        """What `/api/v1/state` says now."""
        answer = self.http.get("/api/v1/state")
        answer.raise_for_status()
        return dict(answer.json())

    def model(self, name: str) -> dict[str, Any]:
        """One model's part of the state."""
        return next(model for model in self.state()["models"] if model["name"] == name)

    def device(self) -> dict[str, Any]:
        """The shared device's part of the state."""
        return dict(self.state()["device"])

    def told(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind that are kept, oldest first."""
        events: list[dict[str, Any]] = []
        last = self.state()["last_event_id"]
        with self.http.stream("GET", "/api/v1/events?since=0") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
                    if events[-1]["id"] >= last:
                        break
        return [event for event in events if event["kind"] == kind]

    def wait_for(self, name: str, *statuses: str, timeout_s: float = 120) -> dict[str, Any]:
        """Wait until a model has one of the statuses; raises with the log's tail when it does not come."""
        deadline = time.monotonic() + timeout_s
        while True:
            model = self.model(name)
            if model["status"] in statuses:
                return model
            if time.monotonic() > deadline or self.process.poll() is not None:
                msg = f"{name} is {model['status']}, not {statuses}, after {timeout_s} s\n{self.logs()}"
                raise TimeoutError(msg)
            time.sleep(0.05)

    def order(self, model: str, verb: str, **body: object) -> httpx.Response:
        """Wake, sleep or pin through the API."""
        return self.http.post(f"/api/v1/models/{model}/{verb}", json=body)

    def complete(self, model: str, prompt: str | list[int], tokens: int, **extra: object) -> str:
        """Complete greedily and give the text; raises on any status but 200."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **extra}
        answer = self.http.post("/v1/completions", json=body)
        if answer.status_code != httpx.codes.OK:
            msg = f"{answer.status_code}: {answer.text}\n{self.logs()}"
            raise RuntimeError(msg)
        return str(answer.json()["choices"][0]["text"])

    def workers(self) -> dict[str, int]:
        """Process ids of the workers, by model."""
        return {model["name"]: model["pid"] for model in self.state()["models"] if model.get("pid")}

    def logs(self, lines: int = 40) -> str:
        """The tail of every log there is, for messages of failed tests."""
        texts = []
        for path in sorted([self.home / "serve.log", *self.home.glob("state/**/*.log")]):
            if path.exists():
                tail = path.read_text(errors="replace").splitlines()[-lines:]
                texts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(texts)

    def kill(self) -> None:
        """End it with SIGKILL, as a machine short of memory would."""
        self.process.kill()
        self.process.wait(60)
        self.http.close()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def start_again(self) -> None:
        """Start another one in its place, with what the configuration says by now."""
        assert self.process.poll() is not None, "it runs"
        self.process = start(self.home, self.config)
        wait_until_up(self)

    def stop(self, timeout_s: float = 60) -> int:
        """End it the way Ctrl-C does and give its exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(60)


def environment(home: Path) -> dict[str, str]:
    """The environment of a user who has only `home`."""
    dirs = {"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state", "XDG_CONFIG_HOME": "config"}
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for name, directory in dirs.items():
        (home / directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        env[name] = str(home / directory)
    return env


def write_config(home: Path, server: dict[str, object], models: list[dict[str, object]]) -> Path:
    """Write a `shoal.toml` and give its path."""
    lines = ["[server]", *(f"{key} = {toml_value(value)}" for key, value in server.items())]
    for model in models:
        lines += ["", "[[model]]", *(f"{key} = {toml_value(value)}" for key, value in model.items())]
    path = home / "shoal.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(home: Path, config: Path) -> subprocess.Popen[bytes]:
    with (home / "serve.log").open("ab") as log:
        command = [sys.executable, "-m", "shoal", "serve", str(config)]
        return subprocess.Popen(command, env=environment(home), stdout=log, stderr=subprocess.STDOUT)


@contextmanager
def serve(home: Path, *, models: list[dict[str, object]], **server: object) -> Iterator[Server]:
    """Run `shoal serve` with these settings until the block ends; on the way out nothing of it may be left.

    What tiers have is always loaded unless a test says otherwise: which way is faster depends on what else runs. A
    setting of None is left out.
    """
    port = free_port()
    settings = {"listen": f"127.0.0.1:{port}", "device": "sim", "tier_load": "always", **server}
    config = write_config(home, {key: value for key, value in settings.items() if value is not None}, models)
    running = Server(home, port, start(home, config), config)
    try:
        wait_until_up(running)
        yield running
    finally:
        running.stop()


def wait_until_up(server: Server, timeout_s: float = 120) -> None:
    """Wait until `/healthz` answers; raises with the log when the server ends instead."""
    deadline = time.monotonic() + timeout_s
    while True:
        if server.process.poll() is not None or time.monotonic() > deadline:
            msg = f"the server did not come up (exit {server.process.poll()})\n{server.logs()}"
            raise RuntimeError(msg)
        try:
            if server.http.get("/healthz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
