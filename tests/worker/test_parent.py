"""A worker must not outlive its server, not even one that has not come as far as a connection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_SERVER = """
import os, subprocess, sys, time
worker = subprocess.Popen(
    [sys.executable, "-m", "shoal.worker", "--control", sys.argv[1], "--model", "tiny"],
    env=os.environ | {"SHOAL_SERVER_PID": str(os.getpid())},
)
print(worker.pid, flush=True)
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_is_still_starting_ends_with_its_server(tmp_path):
    """The control socket is ours, not the server's: it stays open, and nothing but the signal can tell the worker."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(1)
        listener.settimeout(30)
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(tmp_path / "control.sock")], stdout=subprocess.PIPE, text=True
        )
        pid = int(server.stdout.readline())
        peer, _ = listener.accept()  # the worker waits for a welcome now
        try:
            assert _alive(pid)
            server.kill()
            server.wait(60)
            deadline = time.monotonic() + 60
            while _alive(pid):
                assert time.monotonic() < deadline, "the worker lives on"
                time.sleep(0.01)
        finally:
            peer.close()
            server.stdout.close()
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_whose_server_is_gone_already_does_not_begin(tmp_path):
    command = [sys.executable, "-m", "shoal.worker", "--control", str(tmp_path / "none.sock"), "--model", "tiny"]
    env = os.environ | {"SHOAL_SERVER_PID": "999999999"}
    worker = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert worker.returncode == 1
    assert worker.stderr == "shoal.worker: the server that started this worker is gone\n"
