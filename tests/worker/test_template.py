"""The process that workers are forked from, as the server sees it: orders over a socket, children that wait."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from .broker import FakeBroker

MIB = 1 << 20
ROOM = 512  # as much as a server leaves for what a child shows as its arguments
START = "import sys; from shoal.worker import template; sys.exit(template.main())"


class Server:
    """A server's side of one template."""

    def __init__(self, directory: Path, before: str = "") -> None:
        self.log = directory / "worker.log"
        self.own_log = directory / "template.out"
        ours, theirs = socket.socketpair()
        with self.own_log.open("ab") as log:
            command = ["-c", before + START] if before else ["-m", "shoal.worker.template"]
            self.process = subprocess.Popen(
                [sys.executable, *command, " " * ROOM],
                stdin=theirs,
                stdout=log,
                stderr=log,
                env=os.environ | {"SHOAL_SERVER_PID": str(os.getpid())},
            )
        theirs.close()
        ours.settimeout(120)
        self.socket = ours
        self.lines = ours.makefile("rb")
        self.orders = 0
        self.pipes: list[int] = []

    def hear(self) -> dict:
        line = self.lines.readline()
        assert line, self.own_log.read_text()
        return json.loads(line)

    def line(self, control: Path | str = "/none.sock", **more: object) -> bytes:
        self.orders += 1
        order = {
            "fork": self.orders, "model": "tiny", "args": ["--control", str(control), "--model", "tiny"],
            "env": {"A_WORD": "said"},
        }  # fmt: skip
        return json.dumps(order | more).encode() + b"\n"

    def send(self, line: bytes) -> int:
        """Send an order's first bytes, with its files. Gives the end of the pipe that is the server's."""
        theirs, ours = os.pipe()
        log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        socket.send_fds(self.socket, [line], [log, theirs])
        os.close(log)
        os.close(theirs)
        self.pipes.append(ours)
        return ours

    def fork(self, control: Path | str = "/none.sock") -> tuple[int, int]:
        """Have one forked; gives its process id and the pipe."""
        pipe = self.send(self.line(control))
        said = self.hear()
        assert (said["say"], said["fork"]) == ("forked", self.orders), said
        assert said["start"] == int(stat(said["pid"])[19])
        return said["pid"], pipe

    def drop(self, pipe: int) -> None:
        self.pipes.remove(pipe)
        os.close(pipe)

    def close(self) -> None:
        for pipe in list(self.pipes):
            self.drop(pipe)
        self.lines.close()
        self.socket.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def files(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def signals(pid: int, field: str) -> set[int]:
    mask = int(Path(f"/proc/{pid}/status").read_text().partition(f"{field}:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def alive(pid: int) -> bool:
    with suppress(OSError):
        return stat(pid)[0] != "Z"
    return False


def until(holds, what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    servers = []

    def begin(before: str = "") -> Server:
        servers.append(Server(tmp_path, before))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def server(start):
    one = start()
    said = one.hear()
    assert said["say"] == "ready", said
    assert said["bytes"] > 100 * MIB
    return one


@pytest.fixture
def silent(tmp_path):
    """A control socket at which somebody listens who says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "silent.sock"
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(60)
        yield listener


def text_of(socket_: Path) -> str:
    async def ask():
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket_))) as session:
            body = {"prompt": "def swim(", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
            async with session.post("http://x/v1/completions", json=body) as answer:
                said = await answer.json()
                assert answer.status == 200, said
                return said["choices"][0]["text"]

    return asyncio.run(ask())


def test_a_forked_worker_is_as_one_that_was_started_by_itself(llama_dir, server, tmp_path):
    """Both in turn, over the same broker's script: the same answer, and what a process shows of itself."""
    texts = []
    for is_forked in (True, False):
        directory = tmp_path / str(is_forked)
        directory.mkdir()
        broker = FakeBroker(directory, {"source": str(llama_dir), "dtype": "float32", "threads": 1}, 64 * MIB)
        try:
            if is_forked:
                pid, pipe = server.fork(broker.path)
                until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text() == "shoal:tiny\n", "its name is seen")
                assert (stat(pid)[1], stat(pid)[2]) == (str(server.process.pid), str(pid)), "its parent, its group"
                time.sleep(0.2)
                assert not broker.heard, "nobody let it begin"
                os.write(pipe, b"g")
            else:
                command = [sys.executable, "-m", "shoal.worker", "--control", str(broker.path), "--model", "tiny"]
                with server.log.open("ab") as log:
                    worker = subprocess.Popen(command, stdout=log, stderr=log)
                pid = worker.pid
            broker.wait(lambda b: b.said("ready") or b.said("failed"))
            assert broker.said("ready"), server.log.read_text()
            assert broker.said("hello")[0]["pid"] == pid
            texts.append(text_of(broker.data_socket))
            if is_forked:
                files = {number: str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in (0, 1, 2)}
                assert files == {0: "/dev/null", 1: str(server.log), 2: str(server.log)}
                ends = {entry.readlink() for entry in Path(f"/proc/{server.process.pid}/fd").iterdir()}
                assert Path(f"/proc/self/fd/{pipe}").readlink() not in ends, "the template keeps a child's pipe"
        finally:
            broker.close()
        if is_forked:
            assert server.hear() == {"say": "ended", "pid": pid, "status": 0}
            assert f"forked from process {server.process.pid}, which has imported" in server.log.read_text()
        else:
            assert worker.wait(60) == 0
    assert texts[0] == texts[1]


def test_a_child_has_no_files_but_its_own(server):
    """Neither the server's socket nor what belongs to other children, of which there are some."""
    before = files(server.process.pid)
    pids = [server.fork()[0] for _ in range(3)]
    server.send(server.line()[:10])  # the files of an order that is not whole yet
    for pid in pids:
        until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text() == "shoal:tiny\n", "it is itself")
        until(lambda pid=pid: len(files(pid)) == 4, f"{files(pid)}")
        left = {str(Path(f"/proc/{pid}/fd/{number}").readlink()).partition(":")[0] for number in files(pid)}
        assert left == {"/dev/null", str(server.log), "pipe"}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        assert server.hear()["say"] == "ended"
    until(lambda: len(files(server.process.pid)) == len(before) + 2, "the template keeps what it has no use for")


def test_each_shows_its_own_command_and_has_no_signal_blocked(server):
    template = [sys.executable, "-m", "shoal.worker.template"]
    assert command_of(server.process.pid) == template
    assert {signal.SIGTERM, signal.SIGHUP, signal.SIGINT} <= signals(server.process.pid, "SigIgn")
    assert not signals(server.process.pid, "SigBlk")
    pid, _ = server.fork()
    own = [sys.executable, "-m", "shoal.worker", "--control", "/none.sock", "--model", "tiny"]
    until(lambda: command_of(pid) == own, "it shows what it is")
    until(lambda: not signals(pid, "SigBlk"), "it can be told to end")
    assert not {signal.SIGTERM, signal.SIGHUP, signal.SIGINT} & signals(pid, "SigIgn")
    assert command_of(server.process.pid) == template
    long = server.line(model="m" * 64, args=["--control", "/" + "long/" * 200, "--model", "m" * 64])
    server.send(long)
    pid = server.hear()["pid"]
    until(lambda: len("\0".join(command_of(pid))) > ROOM, "as much as there is room for")
    assert command_of(pid)[:4] == own[:4]


def test_children_do_not_roll_the_same_dice_and_know_their_environment(start):
    """They print it before they wait for their word."""
    server = start(
        "import os, random\n"
        "from shoal.worker import template\n"
        "wait = template._may_go\n"
        "def shown(pipe):\n"
        "    import numpy\n"
        "    print(random.random(), numpy.random.random(), os.environ['A_WORD'], os.getcwd(), flush=True)\n"
        "    return wait(pipe)\n"
        "template._may_go = shown\n"
        "os.environ['A_WORD'] = 'its own'\n"
    )
    assert server.hear()["say"] == "ready"
    for word in ("one", "two"):
        server.send(server.line(env={"A_WORD": word}))
        assert server.hear()["say"] == "forked"
    until(lambda: server.log.read_text().count("\n") == 2, "both say it")
    lines = [line.split(" ") for line in server.log.read_text().splitlines()]
    one, two = sorted(lines, key=lambda line: line[2])
    assert (one[2:], two[2:]) == (["one", str(Path.cwd())], ["two", str(Path.cwd())])
    assert one[0] != two[0]
    assert one[1] != two[1]


def test_one_that_the_server_gave_up_ends_without_a_word(server):
    pid, pipe = server.fork()
    server.drop(pipe)
    assert server.hear() == {"say": "ended", "pid": pid, "status": 0}
    assert server.log.read_text() == ""


def test_a_worker_ends_with_its_server_and_not_with_its_template(server, silent):
    """It has no welcome yet. Stopped, it could see nothing by itself; the kernel sees it."""
    pid, pipe = server.fork(silent.getsockname())
    os.write(pipe, b"g")
    peer, _ = silent.accept()
    with peer:
        # Its group is hung up when its parent goes while it is stopped.
        os.kill(pid, signal.SIGSTOP)
        until(lambda: stat(pid)[0] == "T", "it stops")
        server.process.kill()
        server.process.wait(60)
        time.sleep(0.3)
        assert alive(pid)
        os.kill(pid, signal.SIGSTOP)
        server.drop(pipe)
        until(lambda: not alive(pid), "it outlived its server")


def test_a_template_ends_with_its_server_and_a_worker_that_may_outlive_it_does(server, silent):
    pid, pipe = server.fork(silent.getsockname())
    os.write(pipe, b"g")
    peer, _ = silent.accept()
    with peer:
        welcome = {
            "say": "welcome", "version": 1, "spec": {"source": "/none"}, "device": "sim", "device_bytes": MIB,
            "host_budget": MIB, "data_socket": "/none/data.sock", "server_wait_ms": 60_000,
        }  # fmt: skip
        peer.sendall(json.dumps(welcome).encode() + b"\n")
        # It cannot be loaded, which it says once it has taken the welcome.
        heard = peer.makefile("rb")
        assert any(b'"failed"' in line for line in heard)
        server.close()
        assert server.process.returncode == 0
    until(lambda: not alive(pid), "it was told to end")


def test_signals_reach_workers_and_not_the_template(server):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        server.process.send_signal(number)
        pid, _ = server.fork()
        os.kill(pid, number)
        said = server.hear()
        assert (said["say"], said["pid"]) == ("ended", pid)
        # Python turns SIGINT into an exception, which ends it as well.
        assert os.WIFSIGNALED(said["status"]) or number == signal.SIGINT
        assert said["status"] != 0
    assert server.process.poll() is None


def test_children_are_waited_for_while_an_order_comes_in_pieces(server):
    pid, _ = server.fork()
    line = server.line()
    server.send(line[:10])
    os.kill(pid, signal.SIGKILL)
    assert server.hear() == {"say": "ended", "pid": pid, "status": int(signal.SIGKILL)}
    assert not Path(f"/proc/{pid}").exists(), "nothing is left of it"
    server.socket.sendall(line[10:] + server.line()[:5])
    said = server.hear()
    assert (said["say"], said["fork"]) == ("forked", 2), said


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
            "it has 2 threads (python",
        ),
        (
            "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; import torch; torch.cuda.is_initialized = object\n",
            "it has initialised CUDA",
        ),
    ],
)
def test_one_that_is_not_fit_says_so_before_it_is_asked(start, before, reason):
    server = start(before)
    said = server.hear()
    assert (said["say"], said["lasting"]) == ("failed", True), said
    assert said["reason"].startswith(reason), said
    assert server.process.wait(60) == 1
    assert said["reason"] in server.own_log.read_text()


def test_one_that_is_not_fit_any_more_says_so(start):
    server = start(
        "import threading, time\n"
        "from shoal.worker import template\n"
        "say = template.Template.say\n"
        "def then(self, **said):\n"
        "    say(self, **said)\n"
        "    if said['say'] == 'ready':\n"
        "        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "template.Template.say = then\n"
    )
    assert server.hear()["say"] == "ready"
    server.send(server.line())
    reason = "it has 2 threads (shoal-template beside its own)"
    assert server.hear() == {"say": "unfit", "fork": 1, "reason": reason}


def test_packages_that_were_installed_since_are_noticed(start, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    server = start(f"import site; site.getsitepackages = lambda: [{str(packages)!r}]\n")
    assert server.hear()["say"] == "ready"
    server.fork()
    (packages / "another.dist-info").mkdir()
    server.send(server.line())
    said = server.hear()
    assert (said["say"], said["fork"]) == ("unfit", 2), said
    assert "packages were installed or removed" in said["reason"]


def test_an_order_for_which_no_process_can_be_made_is_refused_and_the_next_one_is_not(start):
    server = start(
        "import errno, os\n"
        "fork = os.fork\n"
        "def full():\n"
        "    os.fork = fork\n"
        "    raise BlockingIOError(errno.EAGAIN, 'too many processes')\n"
        "os.fork = full\n"
    )
    assert server.hear()["say"] == "ready"
    server.send(server.line())
    said = server.hear()
    assert (said["say"], said["fork"]) == ("refused", 1), said
    assert "no process can be made" in said["reason"]
    assert "too many processes" in said["reason"]
    pid, pipe = server.fork()
    server.drop(pipe)
    assert server.hear() == {"say": "ended", "pid": pid, "status": 0}


def test_one_that_can_fork_no_more_tells_how_its_children_end(start, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    server = start(f"import site; site.getsitepackages = lambda: [{str(packages)!r}]\n")
    assert server.hear()["say"] == "ready"
    pid, _ = server.fork()
    (packages / "another.dist-info").mkdir()
    server.send(server.line())
    assert server.hear()["say"] == "unfit"
    os.kill(pid, signal.SIGKILL)
    assert server.hear() == {"say": "ended", "pid": pid, "status": int(signal.SIGKILL)}


def test_packages_that_are_installed_while_it_imports_are_noticed(start, tmp_path):
    """What it has imported may be of two states."""
    packages = tmp_path / "packages"
    packages.mkdir()
    server = start(
        f"import pathlib, site; site.getsitepackages = lambda: [{str(packages)!r}]\n"
        "from shoal.worker import template\n"
        f"template.import_all = lambda: pathlib.Path({str(packages / 'another.dist-info')!r}).mkdir()\n"
    )
    said = server.hear()
    assert (said["say"], said["lasting"]) == ("failed", False), said
    assert "packages were installed or removed" in said["reason"]
    assert server.process.wait(60) == 1


def test_what_cannot_be_imported_is_told(start):
    server = start("import sys; sys.modules['aiohttp'] = None\n")
    said = server.hear()
    assert (said["say"], said["lasting"]) == ("failed", False), said
    assert "aiohttp" in said["reason"]
    assert server.process.wait(60) == 1


@pytest.mark.parametrize("line", [b"no JSON\n", b'{"fork": 1}\n', b"[]\n", b"x" * (300 << 10)])
def test_a_server_that_says_what_it_does_not_know_is_left(server, line):
    def say() -> None:
        with suppress(OSError):  # it stops listening in the middle of a long one
            server.send(line[:10])
            server.socket.sendall(line[10:])

    threading.Thread(target=say, daemon=True).start()
    assert server.process.wait(60) in (0, 1)
    with suppress(ConnectionResetError):  # it left without reading all
        assert server.lines.readline() == b"", "nothing was forked"


def test_importing_starts_no_thread_and_asks_no_gpu():
    code = """
import os, sys, threading
import torch
asked = []
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    before = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *a, _n=name, _b=before, **k: (asked.append(_n), _b(*a, **k))[1])
from shoal.worker import template
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            asked.append(os.environ["JE_ARROW_MALLOC_CONF"])
sys.meta_path.insert(0, Seen())
os.environ["OPENBLAS_NUM_THREADS"] = "7"
if len(sys.argv) > 1:
    os.environ["JE_ARROW_MALLOC_CONF"] = sys.argv[1]
template.import_all()
assert os.environ["OPENBLAS_NUM_THREADS"] == "7"
print(asked, threading.active_count(), torch.cuda.is_initialized(), os.environ.get("JE_ARROW_MALLOC_CONF"))
"""

    def said(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        return ran.stdout + ran.stderr

    # What the allocator that Arrow brings is told: transformers imports Arrow where it is installed.
    assert said() == "['background_thread:false'] 1 False None\n"
    assert said("narenas:2") == "['narenas:2,background_thread:false'] 1 False narenas:2\n"
