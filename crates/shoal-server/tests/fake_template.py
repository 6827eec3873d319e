#!/usr/bin/env python3
"""An interpreter as far as a test of forked workers needs: `-m shoal.worker.template`, and `-m shoal.worker ...`.

As the second it is `fake_worker.py`. As the first it forks such workers, or misbehaves as the file `mode` beside its
runtime directory says: `refuse`, `unfit`, `hang`, `die`, `late`, `lie`, `chat`, `broken`, `gate` (it is ready once a
file of that name is there), `forked-gate` (it says of a child once that is there), `unready` (its children end at
once), `unservable` (they say that the model is missing), `never` (whoever is started says so), `deaf` (with a child,
it waits for none and answers nothing). Once a child is there, `fork-die` kills itself, `fork-hang` says nothing,
`fork-half` half a line, `fork-other` its own number, and `fork-number` that of another order. Beside `mode`,
`templates` has a line for each start of one, `orders` one for each order, `children` one for each child, `begun` one
for each that was let go.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
DIRECTORY = Path(os.environ["SHOAL_RUNTIME_DIR"]).parent


def mode() -> str:
    path = DIRECTORY / "mode"
    return path.read_text().strip() if path.exists() else ""


def note(name: str, what: object) -> None:
    with (DIRECTORY / name).open("a") as file:
        file.write(f"{what}\n")


def noted(name: str) -> list[str]:
    path = DIRECTORY / name
    return path.read_text().split() if path.exists() else []


def serve() -> list[str] | None:
    """Fork whom the server asks for; gives a child's arguments in it."""
    server = socket.socket(fileno=os.dup(0))

    def say(**message: object) -> None:
        server.sendall(json.dumps(message).encode() + b"\n")

    note("templates", os.getpid())
    if mode() == "broken":
        say(say="failed", reason="no module named torch", lasting=False)
        return None
    if mode() == "gate":
        while not (DIRECTORY / "gate").exists():
            time.sleep(0.01)
    say(say="ready", bytes=1 << 20, seconds=0.5)
    children: set[int] = set()
    while True:
        readable = select.select([server], [], [], 0.02)[0]
        for pid in list(children):
            ended, status = (0, 0) if mode() == "deaf" else os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                say(say="ended", pid=pid, status=status)
        if not readable:
            continue
        data, files, _, _ = socket.recv_fds(server, 1 << 20, 4)
        if not data:
            return None
        order = json.loads(data)
        note("orders", order["model"])
        if mode() == "deaf" and children:
            time.sleep(600)
        match mode():
            case "refuse":
                say(say="refused", fork=order["fork"], reason="no process can be made")
                continue
            case "unfit":
                say(say="unfit", fork=order["fork"], reason="it has 2 threads")
                continue
            case "hang":
                time.sleep(600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "lie":
                say(say="forked", fork=order["fork"], pid=os.getppid(), start=1)
                continue
            case "chat":
                say(say="sings", what="a song")
                continue
            case "late":
                time.sleep(7)  # more than an answer may take
        pid = os.fork()
        if pid == 0:
            server.close()
            log, pipe = files
            os.setpgid(0, 0)
            for target in (1, 2):
                os.dup2(log, target)
            os.environ.update(order["env"])
            note("children", os.getpid())
            if os.read(pipe, 1) == b"":
                os._exit(0)
            note("begun", os.getpid())
            if mode() == "unready":
                print("it cannot be forked", flush=True)
                os._exit(7)
            return [*order["args"], *(["--fail", "model_missing"] if mode() == "unservable" else [])]
        for file in files:
            os.close(file)
        children.add(pid)
        if mode().startswith("fork-"):
            while str(pid) not in noted("children"):
                time.sleep(0.001)
        if mode() == "forked-gate":
            while not (DIRECTORY / "gate").exists():
                time.sleep(0.01)
        told, number = pid, order["fork"]
        match mode():
            case "fork-die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fork-hang":
                time.sleep(600)
            case "fork-half":
                server.sendall(b'{"say":"forked","fork":')
                time.sleep(600)
            case "fork-other":
                told = os.getpid()
            case "fork-number":
                number += 1
        start = int(Path(f"/proc/{told}/stat").read_text().rpartition(")")[2].split()[19])
        say(say="forked", fork=number, pid=told, start=start)


def main() -> None:
    module, *args = sys.argv[2:]
    worker = args if module == "shoal.worker" else serve()
    if worker is None:
        return
    sys.path.insert(0, str(HERE))
    sys.argv = ["fake_worker.py", *worker, *(["--fail", "model_missing"] if mode() == "never" else [])]
    import fake_worker

    fake_worker.main()


if __name__ == "__main__":
    main()
