"""The page in a JavaScript engine: its own script and markup, a small DOM, a clock and a network that tests hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import quickjs

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "crates/shoal-server/src/page/index.html"
VOID = {"meta", "link", "input", "br", "img", "hr"}
JOBS_MAX = 100_000


class Tree(HTMLParser):
    """The page's markup as nested dictionaries, and the text of its script."""

    def __init__(self) -> None:
        super().__init__()
        self.root: dict[str, Any] = {"tag": "document", "attributes": {}, "children": []}
        self.script = ""
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attributes": {name: value or "" for name, value in attrs}, "children": []}
        self._open[-1]["children"].append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open[-1]["tag"] == "script":
            self.script += data
        elif data.strip() and self._open[-1]["tag"] != "style":
            self._open[-1]["children"].append(re.sub(r"\s+", " ", data))


@dataclass
class Node:
    """One element, as the page left it."""

    tag: str
    classes: list[str]
    attributes: dict[str, str]
    title: str
    style: dict[str, str]
    children: list[Node | str] = field(repr=False)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Node:
        """Read what `host.dump` gave."""
        children = [child if isinstance(child, str) else cls.of(child) for child in data["children"]]
        return cls(data["tag"], data["class"].split(), data["attributes"], data["title"], data["style"], children)

    def all(self) -> Iterator[Node]:
        """This element and all below it."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.all()

    def find(self, *, tag: str | None = None, with_class: str | None = None) -> list[Node]:
        """All elements below with this tag and class."""
        return [
            node
            for node in self.all()
            if (tag is None or node.tag == tag) and (with_class is None or with_class in node.classes)
        ]

    @property
    def text(self) -> str:
        """All text, as `textContent`."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def hidden(self) -> bool:
        """Whether the page hides it."""
        return "hidden" in self.classes


@dataclass
class Request:
    """One `fetch` that nobody has answered yet."""

    id: int
    path: str
    method: str
    headers: dict[str, str]
    body: str | None
    answered: bool


class Browser:
    """The page as loaded, and the hands and eyes of its user."""

    def __init__(self) -> None:
        tree = Tree()
        tree.feed(PAGE.read_text("utf-8"))
        self._engine = quickjs.Context()
        self._engine.eval((HERE / "dom.js").read_text("utf-8"))
        self._call("load", json.dumps(tree.root))
        self._engine.eval(tree.script)
        self._settle()

    def _call(self, name: str, *arguments: object) -> Any:
        result = self._engine.eval(f"host.{name}({', '.join(json.dumps(argument) for argument in arguments)})")
        self._settle()
        return result

    def _settle(self) -> None:
        for _ in range(JOBS_MAX):
            if not self._engine.execute_pending_job():
                return
        msg = "the page's promises never come to rest"
        raise TimeoutError(msg)

    def advance(self, ms: float) -> None:
        """Let time go by; the timers that are due run in their order."""
        until = self._call("now") + ms
        while self._call("tick", until):
            pass

    def requests(self) -> list[Request]:
        """What the page has asked and not been told."""
        return [Request(**request) for request in json.loads(self._call("requests"))]

    def request(self, path: str) -> Request:
        """The one open request for that path (without its query)."""
        (found,) = [request for request in self.requests() if request.path.partition("?")[0] == path]
        return found

    def answer(self, request: Request, body: object = None, status: int = 200) -> None:
        """Answer with JSON, or with the head of a feed where `body` is None."""
        self._call("answer", request.id, status, json.dumps(body))

    def fail(self, request: Request) -> None:
        """The server cannot be reached."""
        self._call("fail", request.id)

    def push(self, feed: Request, text: str) -> None:
        """More of a feed."""
        self._call("push", feed.id, text)

    def close(self, feed: Request) -> None:
        """The server ends a feed."""
        self._call("end", feed.id, "closed")

    def click(self, label: str) -> None:
        """Press the button of that name (as a screen reader has it)."""
        self._call("click", label)

    def check(self, box: str, on: bool) -> None:
        """Set a check box."""
        self._call("check", box, on)

    def submit(self, form: str, box: str, value: str) -> None:
        """Fill one field in and send the form."""
        self._call("submit", form, box, value)

    def see(self, element: str) -> Node:
        """The element of that id."""
        data = json.loads(self._call("dump", element))
        assert data is not None, f"the page has no {element}"
        return Node.of(data)
