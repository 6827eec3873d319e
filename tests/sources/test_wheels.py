"""Big wheels: an interrupted download goes on where it stopped, and what comes is what the index named."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.sources import wheels

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
USUAL = dict(os.environ)


def wheel_of(name: str, version: str, ballast: int, requires: str = "") -> tuple[str, bytes, bytes]:
    """A wheel with so much ballast: its file name, its bytes, its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/ballast", os.urandom(ballast))
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name}-{version}-py3-none-any.whl", out.getvalue(), metadata


class Index:
    """A simple index on this machine whose connections can be cut."""

    def __init__(self, ranges: bool = True) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, str] = {}
        self.asked: list[tuple[str, int]] = []  # file and first byte
        self.sent = 0
        self.cut_after: int | None = None  # bytes of one answer, once
        self.slowly = 0.0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self, ranges)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, name: str, version: str, ballast: int, requires: str = "") -> str:
        file, raw, metadata = wheel_of(name, version, ballast, requires)
        self.files[f"/files/{file}"], self.files[f"/files/{file}.metadata"] = raw, metadata
        known = hashlib.sha256(metadata).hexdigest()
        self.pages[f"/simple/{name}/"] = (
            f'<a href="{self.url}/files/{file}#sha256={hashlib.sha256(raw).hexdigest()}" '
            f'data-core-metadata="sha256={known}" data-dist-info-metadata="sha256={known}">{file}</a>'
        )
        return file

    def answer(self, handler: BaseHTTPRequestHandler, ranges: bool) -> None:
        if handler.path in self.pages:
            raw, kind = self.pages[handler.path].encode(), "text/html"
        elif handler.path in self.files:
            raw, kind = self.files[handler.path], "application/octet-stream"
        else:
            return handler.send_error(404)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", "")) if ranges else None
        first = int(match[1]) if match else 0
        end = int(match[2]) + 1 if match and match[2] else len(raw)
        if handler.path.endswith(".whl"):
            self.asked.append((handler.path.rpartition("/")[2], first))
        if first >= len(raw):
            return handler.send_error(416)
        handler.send_response(206 if match else 200)
        if match:
            handler.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(raw)}")
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(end - first))
        handler.end_headers()
        body = raw[first:end]
        if self.cut_after is not None and handler.path.endswith(".whl"):
            body, self.cut_after = body[: self.cut_after], None
        try:
            for at in range(0, len(body), MIB):
                handler.wfile.write(body[at : at + MIB])
                self.sent += len(body[at : at + MIB])
                time.sleep(self.slowly)
        except OSError:
            pass
        handler.close_connection = True
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels.time, "sleep", lambda _s: None)
    for name in ("http_proxy", "HTTP_PROXY", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    opened: list[Index] = []

    def make(ranges: bool = True) -> Index:
        opened.append(Index(ranges))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def listed(index: Index, file: str) -> tuple[str, str]:
    return f"{index.url}/files/{file}", hashlib.sha256(index.files[f"/files/{file}"]).hexdigest()


def test_a_cut_connection_is_gone_on_with(index, tmp_path, capsys):
    server = index()
    file = server.add("torch", "2.11.0", 20 * MIB)
    server.cut_after = 7 * MIB
    assert wheels.fetch_big([listed(server, file)], tmp_path) == [tmp_path / file]
    assert server.asked == [(file, 0), (file, 7 * MIB)]
    assert (tmp_path / file).read_bytes() == server.files[f"/files/{file}"]
    assert list(tmp_path.iterdir()) == [tmp_path / file]
    assert "from 7 MB on" in capsys.readouterr().out
    assert wheels.fetch_big([listed(server, file)], tmp_path) == [tmp_path / file]
    assert len(server.asked) == 2, "what is there is not asked for again"


def test_a_killed_run_is_gone_on_with(index, tmp_path):
    server = index()
    file = server.add("torch", "2.11.0", 24 * MIB)
    server.slowly = 0.02
    url, digest = listed(server, file)
    code = f"from shoal.sources.wheels import *; fetch_big([({url!r}, {digest!r})], Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size > 4 * MIB for part in tmp_path.glob("*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    have = next(tmp_path.glob("*.part")).stat().st_size
    assert 4 * MIB < have < 24 * MIB
    assert wheels.fetch_big([(url, digest)], tmp_path) == [tmp_path / file]
    assert server.asked[-1] == (file, have)


def test_wrong_bytes_are_never_handed_on(index, tmp_path):
    server = index()
    file = server.add("torch", "2.11.0", 17 * MIB)
    url, digest = listed(server, file)
    part = tmp_path / f"{file}.{digest[:16]}.part"
    part.write_bytes(b"x" * 5 * MIB)  # of another time
    assert wheels.fetch_big([(url, digest)], tmp_path) == [tmp_path / file]
    assert [first for _, first in server.asked] == [5 * MIB, 0]
    server.asked.clear()
    assert wheels.fetch_big([(url, "0" * 64)], tmp_path) == []
    assert len(server.asked) == 5
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_be_gone_on_with_is_left_to_pip(index, tmp_path):
    server = index(ranges=False)
    big = server.add("torch", "2.11.0", 17 * MIB)
    assert wheels.fetch_big([listed(server, big)], tmp_path) == []
    server = index()
    small = server.add("small", "1.0", 1000)
    url, digest = listed(server, small)
    assert wheels.fetch_big([(url, digest), (f"{server.url}/files/none.whl", digest)], tmp_path) == []
    assert wheels.fetch_big([("http://127.0.0.1:9/files/none.whl", digest)], tmp_path) == []
    assert wheels.fetch_big([(f"{server.url}/files/%2e%2e%2fevil.whl", digest)], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_setup_takes_torch_from_an_index_and_goes_on_after_an_interruption(index, tmp_path, monkeypatch):
    """`scripts/environment.py` itself, in an environment of its own, with an index that has nothing but this."""
    server = index()
    file = server.add("torch", "2.11.0", 20 * MIB, "Requires-Dist: sympy\n")
    server.add("sympy", "1.0", 100)
    server.add("shoaldevtool", "1.0", 100)
    server.add("maturin", "1.16.0", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("SHOAL_TORCH_INDEX", f"{server.url}/simple/")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    tree = tmp_path / "clone"
    for name in ("scripts/environment.py", "python/shoal/sources/wheels.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    (tree / "requirements").mkdir()
    (tree / "requirements/constraints.txt").write_text("torch==2.11.*\n")
    (tree / "requirements/dev.txt").write_text("shoaldevtool\n")
    venv.create(tree / ".venv", with_pip=True, symlinks=True)
    maturin = tree / ".venv/bin/maturin"  # there is nothing to build here
    maturin.write_text("#!/bin/sh\n")
    maturin.chmod(0o755)
    command = [sys.executable, "-I", str(tree / "scripts/environment.py")]
    python = str(tree / ".venv/bin/python")
    if wheels.pip_is_old(python):  # the index here has no newer one; the usual one may
        upgrade = [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"]
        subprocess.run(upgrade, env=USUAL, timeout=120, check=False, capture_output=True)
    if wheels.pip_is_old(python):
        pytest.skip(
            "this Python's pip cannot say what it would install without downloading it, and no other is to be had"
        )
    server.slowly = 0.05
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cache = tmp_path / "cache/shoal/wheels"
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size > 4 * MIB for part in cache.glob("*.part")):
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    have = next(cache.glob("*.part")).stat().st_size
    server.slowly = 0.0
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    assert (file, have) in server.asked
    assert server.asked.count((file, 0)) == 1, "its first byte came once"
    assert (tree / ".venv/.environment").is_file()
    assert subprocess.run([python, "-c", "import torch, sympy, shoaldevtool"], check=False).returncode == 0
