"""The page against a real server: what it shows of real answers, and that its orders are obeyed."""

from __future__ import annotations

from pathlib import Path

import httpx
from tests.page.browser import Browser, Request
from tests.support.server import Server, serve


def pass_on(browser: Browser, server: Server, request: Request) -> httpx.Response:
    """Ask the server what the page asks, as a browser would, and give the page its answer."""
    answer = server.http.request(
        request.method, request.path, headers={**request.headers, "Origin": server.url}, content=request.body
    )
    browser.answer(request, answer.json(), answer.status_code)
    return answer


def feed_until(browser: Browser, server: Server, request: Request, word: str) -> None:
    """Let the feed flow into the page until a word was in it."""
    if not request.answered:
        browser.answer(request)
        request.answered = True
    with server.http.stream("GET", request.path) as feed:
        for text in feed.iter_text():
            browser.push(request, text)
            if word in text:
                return


def test_the_page_understands_the_server(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """State, feed and orders are the real ones; only the browser is small."""
    with serve(tmp_path, models=model_tables[:2], device_budget="64MiB") as server:
        name = str(model_tables[0]["name"])
        for table in model_tables[:2]:
            server.wait_for(str(table["name"]), "asleep")
        browser = Browser()
        pass_on(browser, server, browser.request("/api/v1/state"))
        feed = browser.request("/api/v1/events")
        feed_until(browser, server, feed, "worker_ready")
        assert browser.see("link-text").text == "live"
        assert browser.see("facts").text.startswith("sim: 0 B of 64 MiB leased")
        cards = {card.find(tag="h3")[0].text: card for card in browser.see("models").find(tag="article")}
        assert set(cards) == {str(table["name"]) for table in model_tables[:2]}
        assert cards[name].find(with_class="badge")[0].text == "asleep"
        assert f"{name}worker" in browser.see("log").text

        browser.click(f"Wake {name}")
        assert pass_on(browser, server, browser.request(f"/api/v1/models/{name}/wake")).status_code == httpx.codes.OK
        feed_until(browser, server, feed, "wake_done")
        browser.advance(1000)
        pass_on(browser, server, browser.request("/api/v1/state"))
        (card,) = [card for card in browser.see("models").find(tag="article") if card.find(tag="h3")[0].text == name]
        assert card.find(with_class="badge")[0].text == "awake"
        assert "undefined" not in browser.see("main").text
        assert "NaN" not in browser.see("main").text

        browser.click(f"Pin {name}")
        assert pass_on(browser, server, browser.request(f"/api/v1/models/{name}/pin")).status_code == httpx.codes.OK
        assert server.model(name)["pinned"]
