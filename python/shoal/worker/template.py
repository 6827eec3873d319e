"""A process that has imported all that workers need, and forks one when told to: ``python -m shoal.worker.template``.

To import is nearly all of what a start costs. The server starts this once for each interpreter and environment, tells
it over the socket that is its standard input whom to fork (one JSON object a line, the log and a pipe beside it), and
hears of each child's end. It computes nothing, has one thread and never touches a GPU: a child could use neither the
locks of another thread nor its parent's context. Where that does not hold, it refuses, and the server starts the worker
by itself.

Its children are workers as any others. They end with the server and not with this process: each holds the end of a pipe
that only the server writes to (:class:`shoal.worker.parent.Lifeline`), and does nothing before a byte came out of it.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import random
import select
import signal
import site
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __main__ as worker
from . import parent
from .errors import described

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE_BYTES_MAX = 256 << 10
_SAY_S = 5.0
_LOOK_S = 1.0  # at most so long a child that has ended waits, where the kernel does not tell of it
_GO_S = 60.0
_FILES = 2  # a worker's log and its pipe come with each order
_PR_SET_NAME = 15
_GPUS = ("/dev/nvidia", "/dev/dxg", "/dev/kfd")  # as they are called on Linux, in WSL, and AMD's
_IGNORED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Order:
    """Whom to fork.

    Attributes
    ----------
    number
        The server's, which the answer bears.
    args, env
        What ``python -m shoal.worker`` would be given, and what is set in its environment.
    log, pipe
        Descriptors: where its output goes, and what tells that it may begin and that the server is gone.
    """

    number: int
    model: str
    args: list[str]
    env: dict[str, str]
    log: int
    pipe: int


class Template:
    """The server's orders, and the children.

    Parameters
    ----------
    server
        A connected socket.
    """

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._server.settimeout(_SAY_S)
        self._received = b""
        self._files: list[int] = []
        self._children: dict[int, int | None] = {}  # by process id: a descriptor that is readable once it has ended
        # What is imported from here on may be of either state, if they change.
        self._packages = _packages()

    def say(self, **message: object) -> None:
        """Tell the server something."""
        self._server.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> Order | None:
        """Fork whom the server asks for. Returns twice: in each child its order, here None once the server is gone."""
        while True:
            poll = select.poll()
            poll.register(self._server, select.POLLIN)
            for told in self._children.values():
                if told is not None:
                    poll.register(told, select.POLLIN)
            came = {fd for fd, _ in poll.poll(_LOOK_S * 1000)}
            self._reap()
            if self._server.fileno() in came and not self._receive():
                return None
            while (order := self._next()) is not None:
                if self._fork(order):
                    return order

    def _receive(self) -> bool:
        data, files, _, _ = socket.recv_fds(self._server, 65536, 2 * _FILES, socket.MSG_CMSG_CLOEXEC)
        self._received += data
        self._files += files
        return bool(data) and len(self._received) <= _LINE_BYTES_MAX

    def _next(self) -> Order | None:
        line, end, rest = self._received.partition(b"\n")
        if not end:
            return None
        self._received = rest
        said: dict[str, Any] = json.loads(line)
        log, pipe = self._files[:_FILES]
        del self._files[:_FILES]
        return Order(said["fork"], said["model"], said["args"], said["env"], log, pipe)

    def _fork(self, order: Order) -> bool:
        """Fork one, or say why not. True in the child."""
        if (reason := self.unfit()) is not None:
            self.say(say="unfit", fork=order.number, reason=reason)
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            # What is sent to a child before it has handlers of its own is kept for it.
            signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
            try:
                pid = os.fork()
            except OSError as error:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
                self.say(say="refused", fork=order.number, reason=f"no process can be made ({error})")
            else:
                if pid == 0:
                    return True
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
                self._children[pid] = _pidfd(pid)
                # Nobody else waits for it, so it is there to be read, and its number is its own.
                self.say(say="forked", fork=order.number, pid=pid, start=_start_of(pid))
        os.close(order.log)
        os.close(order.pipe)
        return False

    def unfit(self) -> str | None:
        """Why a child would not be what it is to be, now and later; None where it would."""
        threads = _threads()
        if max(threading.active_count(), len(threads)) != 1:
            names = ", ".join(sorted(threads[1:])) or "of Python's"
            return f"it has {max(threading.active_count(), len(threads))} threads ({names} beside its own)"
        if any(path.startswith(_GPUS) for path in _open_paths()):
            return "it has opened a GPU"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "it has initialised CUDA"
        return self.changed()

    def changed(self) -> str | None:
        """Why what it has imported is not what a worker would import now; None where it is."""
        if self._packages != _packages():
            return "packages were installed or removed since it imported its own"
        return None

    def _reap(self) -> None:
        for pid, told in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[pid]
                if told is not None:
                    os.close(told)
                self.say(say="ended", pid=pid, status=status)

    def become(self, order: Order) -> None:
        """Make of this child what a worker is that was started by itself; it ends here where the server gave it up."""
        self._server.close()
        for fd in [*self._children.values(), *self._files]:
            if fd is not None:
                os.close(fd)
        for number in _IGNORED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
        os.setpgid(0, 0)
        for target in (1, 2):
            os.dup2(order.log, target)
        os.close(order.log)
        os.environ.update(order.env)
        sys.argv = [str(worker.__file__), *order.args]
        _show(f"shoal:{order.model}", [sys.executable, "-m", "shoal.worker", *order.args])
        # Python's own has a new seed by itself, and torch's is that of any process that begins.
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()
        random.seed()
        if not _may_go(order.pipe):
            os._exit(0)


def import_all() -> None:
    """Import what a worker imports until it is ready, but for what depends on its model.

    Raises
    ------
    LoadError
        What the `serve` extra brings is not there.
    """
    # As in a worker that is started by itself: read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _no_threads(), worker.nothing_collected():
        worker.require_extras()
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
        from transformers import PreTrainedTokenizerFast as _  # noqa: F401

        from . import device, hooks, http, loading, overhead, serving, spec, tiers, usage, weights  # noqa: F401


@contextmanager
def _no_threads() -> Iterator[None]:
    """Tell libraries that start threads as they load that they are not to; workers compute nothing with them."""
    # NumPy's, and the allocator of Arrow's, which transformers imports where it is installed.
    told = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    before = {name: os.environ.get(name) for name in told}
    if configured := before["JE_ARROW_MALLOC_CONF"]:
        # What comes last counts.
        told["JE_ARROW_MALLOC_CONF"] = f"{configured},{told['JE_ARROW_MALLOC_CONF']}"
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> int:
    """Serve the server at standard input; in a child, its model. Returns the exit status."""
    if not parent.end_with_parent():
        _complain("the server that started this is gone")
        return 1
    # Its server ends it, and nobody else: what is sent to all of a terminal or a session is not for it.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _show("shoal-template", [sys.executable, "-m", "shoal.worker.template"])
    began = time.monotonic()
    server = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    template = Template(server)
    try:
        import_all()
    except Exception as error:  # noqa: BLE001 - whatever it is, a worker that is started by itself says it better
        _complain(f"{described(error)}")
        template.say(say="failed", reason=described(error), lasting=False)
        return 1
    if (reason := template.unfit()) is not None:
        # The next one would import the same, but for packages that changed meanwhile.
        _complain(reason)
        template.say(say="failed", reason=reason, lasting=template.changed() is None)
        return 1
    template.say(say="ready", bytes=_resident_bytes(), seconds=round(time.monotonic() - began, 3))
    try:
        order = template.serve()
    except OSError as error:
        _complain(f"its server does not listen: {described(error)}")
        return 1
    except (ValueError, KeyError, TypeError) as error:
        _complain(f"its server says what it does not know: {described(error)}")
        return 1
    if order is None:
        return 0
    template.become(order)
    _leave(worker.main(order.args, parent.Lifeline(order.pipe)))
    return 0


def _complain(reason: str) -> None:
    sys.stderr.write(f"shoal.worker.template: {reason}\n")
    sys.stderr.flush()


def _leave(status: int) -> None:
    """End this child in order, but for the interpreter's own end.

    That takes every object apart, and the pages of all that are the template's would be copied for it: 1.5 seconds.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _may_go(pipe: int) -> bool:
    """Whether the server knows of this process and wants it; not where its end of the pipe closed instead."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(_GO_S * 1000)) and os.read(pipe, 1) != b""


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # before Linux 5.3, and in some sandboxes
        return None


def _start_of(pid: int) -> int:
    """When a process began, as the kernel counts it: with its number, it is that process and no other."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _threads() -> list[str]:
    """Name the threads of this process, its own first."""
    found = sorted(Path("/proc/self/task").iterdir(), key=lambda one: (one.name != str(os.getpid()), one.name))
    names = []
    for one in found:
        with suppress(OSError):  # it has ended
            names.append((one / "comm").read_text().strip())
    return names


def _open_paths() -> list[str]:
    paths = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists them
            paths.append(str(entry.readlink()))
    return paths


def _packages() -> dict[str, int]:
    """When anything was last installed or removed, by directory."""
    stamps = {}
    places = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    for place in places:
        with suppress(OSError):
            stamps[place] = Path(place).stat().st_mtime_ns
    return stamps


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(name: str, command: list[str]) -> None:
    """Show who this is where processes are listed: the kernel keeps fifteen bytes of a name.

    It shows the command from where that lay as the process began, so as much fits as the server left room for there.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    at, end = (int(field) for field in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    # Where the kernel shows it whole, it lies there, and is nobody's any more: Python took a copy.
    if 0 < at < end and len(Path("/proc/self/cmdline").read_bytes()) == end - at:
        shown = b"".join(word.encode() + b"\0" for word in command)[: end - at - 1]
        ctypes.memmove(at, shown.ljust(end - at, b"\0"), end - at)


if __name__ == "__main__":
    sys.exit(main())
