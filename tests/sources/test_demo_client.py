"""The demo's clients against a server of a few lines: what is read from streams, headers and events."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from shoal.demo.jobs import Jobs
from shoal.demo.management import EventLog, Management
from shoal.demo.server import DemoError, served, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("openai")


class Fake(ThreadingHTTPServer):
    daemon_threads = True
    state: dict[str, Any]
    events: list[dict[str, Any]]
    resumed_from: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/api/v1/events":
            after = int(self.headers["Last-Event-ID"])
            self.server.resumed_from.append(str(after))
            # One event a connection, and then it breaks off.
            event = next((event for event in self.server.events if event["id"] > after), None)
            lines = ": hello\n\nevent: missed\ndata: {}\n\n"
            if event:
                lines += f"id: {event['id']}\ndata: {json.dumps(event)}\n\n"
            self.answer(lines.encode(), "text/event-stream")
        else:
            self.answer(json.dumps(self.server.state).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            data = [
                {"object": "embedding", "index": i, "embedding": [float(i), 1.0]} for i in range(len(asked["input"]))
            ]
            usage = {"prompt_tokens": 9, "total_tokens": 9}
            body = {"object": "list", "model": asked["model"], "data": data[::-1], "usage": usage}
            return self.answer(json.dumps(body).encode(), x_shoal_was_asleep="false")
        assert asked["stream"] is True
        assert asked["temperature"] == 0
        chat = self.path == "/v1/chat/completions"
        key = {
            "id": "1",
            "created": 1,
            "model": asked["model"],
            "object": "chat.completion.chunk" if chat else "text_completion",
        }
        lines = ": waiting\n\n"
        for text in ("Pa", "ris"):
            piece = {"delta": {"content": text}} if chat else {"text": text}
            lines += f"data: {json.dumps({**key, 'choices': [{'index': 0, 'finish_reason': None, **piece}]})}\n\n"
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        lines += f"data: {json.dumps({**key, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        headers = {} if chat else {"x_shoal_was_asleep": "false"}
        return self.answer(lines.encode(), "text/event-stream", **headers)


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake(("127.0.0.1", 0), Handler)
    server.state, server.events, server.resumed_from = {}, [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def address(fake: Fake) -> str:
    return f"http://127.0.0.1:{fake.server_address[1]}"


def test_streams_are_read_to_the_end(fake: Fake) -> None:
    jobs = Jobs(address(fake), timeout_s=10)
    chat, code = jobs.chat("Where?", 8), jobs.code("Where?", 8)
    assert (chat.text, chat.tokens) == ("Paris", 2)
    assert (code.text, code.tokens) == ("Paris", 2)
    # Without the header the answer began before the way was known: it had to wait.
    assert chat.was_asleep
    assert not code.was_asleep
    assert 0 < chat.first_s <= chat.total_s
    jobs.close()


def test_vectors_come_in_the_order_of_the_texts(fake: Fake) -> None:
    jobs = Jobs(address(fake), timeout_s=10)
    outcome, vectors = jobs.embed(["a", "b", "c"])
    assert vectors == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    assert (outcome.tokens, outcome.was_asleep) == (9, False)
    jobs.close()


def test_broken_stream_of_events_is_taken_up_where_it_was(fake: Fake) -> None:
    fake.events = [{"id": number, "kind": "pinned", "model": "a"} for number in (1, 2, 3)]
    seen: list[int] = []
    log = EventLog(Management(address(fake)), lambda event: seen.append(event["id"]))
    log.settle(3)
    log.close()
    assert seen == [1, 2, 3]
    assert [event["id"] for event in log.all()] == [1, 2, 3]
    assert fake.resumed_from[:3] == ["0", "1", "2"]


def test_model_that_cannot_be_served_ends_the_wait(fake: Fake) -> None:
    model = {
        "name": "a",
        "status": "starting",
        "progress": "reading",
        "error": None,
        "log": "a.log",
        "capabilities": {"x": 1},
    }
    fake.state = {"models": [model]}
    said: list[str] = []
    assert wait_until_ready(Management(address(fake)), said.append) == fake.state
    assert said == ["a reading"]
    fake.state = {"models": [{**model, "status": "failed", "error": "no such directory"}]}
    with pytest.raises(DemoError, match=r"a cannot be served: no such directory .its output: a\.log."):
        wait_until_ready(Management(address(fake)), said.append)


def test_port_of_another_server_is_not_taken_for_ours(fake: Fake, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf.toml"
    shelf.write_text(f'[server]\nlisten = "127.0.0.1:{fake.server_address[1]}"\n')
    with pytest.raises(DemoError, match="another server answers"), served(shelf, tmp_path / "log"):
        pass
