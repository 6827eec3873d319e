"""A model hub on 127.0.0.1: the few answers a client of it relies on, and the ways they go wrong.

It redirects downloads to a second port as the real one redirects to its storage, serves ranges, can cut a connection in
the middle of a body, and writes down every request with its headers.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "c0ffee" + "0" * 34


def safetensors(values: int) -> bytes:
    """Return a true safetensors file with one float32 tensor of ``values`` elements."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(i % 251 for i in range(4 * values))


@dataclass
class Hub:
    """What the imitation holds and how it behaves; tests change it freely."""

    files: dict[str, bytes]
    endpoint: str = ""
    storage: str = ""
    token: str | None = None
    gated: bool = False
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes of the body to send before hanging up, one entry used per download of weights."""
    busy: int = 0
    """How many requests to refuse with 503 first."""
    lie: dict[str, bytes] = field(default_factory=dict)
    """Bytes to send in place of a file's own, while the listing keeps the true hash."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, body in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(body)}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "pointerSize": 130}
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            siblings.append(entry)
        return {"id": "org/model", "sha": COMMIT, "siblings": siblings}

    def downloads(self, name: str) -> list[dict[str, str]]:
        return [headers for where, path, headers in self.requests if where == "storage" and path.endswith("/" + name)]


def _handler(hub: Hub, where: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((where, path, dict(self.headers)))
            if hub.busy > 0:
                hub.busy -= 1
                return self.answer(503)
            if where == "storage":
                return self.storage(path)
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, X_Error_Code="RepoNotFound")
            if hub.gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                if repo != "org/model":
                    return self.answer(404, X_Error_Code="RepoNotFound")
                if revision not in ("main", COMMIT, "refs/pr/1"):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                return self.answer(200, json.dumps(hub.listing()).encode(), Content_Type="application/json")
            prefix = f"/org/model/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in hub.files:
                return self.answer(302, Location=f"{hub.storage}/blobs/{path.removeprefix(prefix)}")
            return self.answer(404, X_Error_Code="EntryNotFound")

        def storage(self, path: str) -> None:
            name = path.removeprefix("/blobs/")
            body = hub.lie.get(name, hub.files[name])
            start, status, headers = 0, 200, {}
            asked = self.headers.get("Range")
            if asked and hub.ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    return self.answer(416)
                status, headers = 206, {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            if name.endswith(".safetensors") and hub.cut_after:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start : start + hub.cut_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                return None
            return self.answer(status, body[start:], **headers)

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on two ports of this machine until the block ends."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, where)) for where in ("hub", "storage")]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(5)
