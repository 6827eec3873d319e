"""The server that the demo talks to: started as a user would, ended when the demo ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shoal.demo.management import Management

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_START_S_MAX = 60.0
_LOAD_S_MAX = 300.0
_STOP_S_MAX = 45.0
_POLL_S = 0.2
_LISTEN_DEFAULT = "127.0.0.1:8000"


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


@contextmanager
def served(shelf: Path, log: Path) -> Iterator[Management]:
    """Run ``shoal serve`` on ``shelf`` until the block ends; its output goes to ``log``."""
    settings = tomllib.loads(shelf.read_text("utf-8")).get("server", {})
    management = Management(f"http://{settings.get('listen', _LISTEN_DEFAULT)}")
    if management.is_healthy():
        raise DemoError(f"another server answers at {management.address} already; stop it first")
    # The workers run on the interpreter that has the extra `serve`: this one.
    environment = {**os.environ, "SHOAL_PYTHON": sys.executable}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "serve", str(shelf)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _until(management.is_healthy, process, log, _START_S_MAX, "did not answer")
        yield management
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(management: Management, said: Callable[[str], None]) -> dict[str, Any]:
    """Wait until every model can be asked; return the state then."""
    deadline = time.monotonic() + _LOAD_S_MAX
    last = ""
    while time.monotonic() < deadline:
        state = management.state()
        models = state["models"]
        for model in models:
            if model["status"] == "failed":
                raise DemoError(f"{model['name']} cannot be served: {model['error']} (its output: {model['log']})")
        text = ", ".join(f"{model['name']} {model['progress'] or model['status']}" for model in models)
        if text != last:
            said(text)
            last = text
        if all(model["capabilities"] for model in models):
            return state
        time.sleep(_POLL_S)
    raise DemoError(f"the models were not ready within {_LOAD_S_MAX:.0f} s: {last}")


def _until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, wait_s_max: float, problem: str
) -> None:
    deadline = time.monotonic() + wait_s_max
    while not ready():
        if process.poll() is not None:
            raise DemoError(f"shoal serve ended with status {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise DemoError(f"shoal serve {problem} within {wait_s_max:.0f} s:\n{tail(log)}")
        time.sleep(_POLL_S)


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a file."""
    text = log.read_text("utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text)
