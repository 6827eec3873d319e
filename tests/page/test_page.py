"""What the page does with what the server says: its own script, run without a browser."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.page.browser import Browser, Request

MIB = 1 << 20
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
LATENCY = {"count": 1, "last_ms": 1.0, "p50_ms": 12.0, "p99_ms": 20.0}
STATE = {"since_at_ms": 1_700_000_097_000, "reason": "it was told to sleep", "asleep_in": "host"}
MADE_BY_THE_PAGE = {"article", "button", "dd", "div", "dl", "dt", "h3", "i", "li", "p", "span", "time", "ul"}


def model(name: str, status: str = "awake", **more: Any) -> dict[str, Any]:
    """One model of `/api/v1/state`, with 64 MiB of weights."""
    there = {"awake": 64, "partly_resident": 32}.get(status, 0) * MIB
    return {
        "name": name,
        "source": f"/models/{name}",
        "engine": "transformers",
        "status": status,
        "progress": None,
        "error": None,
        "bytes": {
            "weights_device": there,
            "weights_total": 64 * MIB,
            "kv_device": 8 * MIB if there else 0,
            "kv_live": 2 * MIB if there else 0,
            "overhead_device": 0,
            "host": 64 * MIB,
            "source_only": 0,
        },
        "lease": {
            "weights": there,
            "kv": 8 * MIB if there else 0,
            "overhead": 0,
            "total": there,
            "reclaiming": 0,
            "host": 0,
        },
        "pinned": False,
        "keys": [],
        "is_elastic": True,
        "counts": {
            "requests_active": 0,
            "requests_parked": 0,
            "requests_total": 3,
            "tokens_out": 1234,
            "wakes": 2,
            "evictions": 1,
        },
        "first_byte_awake": LATENCY,
        "first_byte_asleep": {"count": 0, "last_ms": None, "p50_ms": None, "p99_ms": None},
        **more,
    }


def state(*models: dict[str, Any], started: int = 1_700_000_000_000, at: int = 1_700_000_100_000) -> dict[str, Any]:
    """`/api/v1/state` of a simulated device of 128 MiB."""
    leased = sum(one["lease"]["total"] for one in models)
    return {
        "version": 1,
        "at_ms": at,
        "started_at_ms": started,
        "last_event_id": 0,
        "device": {
            "name": "sim",
            "simulated": True,
            "budget": 128 * MIB,
            "headroom": 0,
            "leased": leased,
            "returning": 0,
            "free": 128 * MIB - leased,
        },
        "tiers": [
            {"tier": "device", "budget": 128 * MIB, "used": sum(one["bytes"]["weights_device"] for one in models)},
            {"tier": "host", "budget": 256 * MIB, "used": 64 * MIB * len(models)},
            {"tier": "disk", "budget": None, "used": 0},
            {"tier": "source", "budget": None, "used": 0},
        ],
        "waiting": [],
        "models": list(models),
    }


def event(number: int, kind: str, about: str | None = "oak", **more: Any) -> str:
    """One event as the feed has it."""
    data = {"id": number, "version": 1, "at_ms": 1_700_000_000_000 + number, "model": about, "kind": kind, **more}
    return f"id: {number}\ndata: {json.dumps(data)}\n\n"


def opened(
    *models: dict[str, Any],
    started: int = 1_700_000_000_000,
    device: dict[str, Any] | None = None,
    weights_store: dict[str, Any] | None = None,
) -> tuple[Browser, Request]:
    """A page that has its first state and a live feed."""
    browser = Browser()
    first = state(*models, started=started)
    first["device"] |= device or {}
    first["weights_store"] = weights_store
    browser.answer(browser.request("/api/v1/state"), first)
    feed = browser.request("/api/v1/events")
    browser.answer(feed)
    browser.push(feed, ": events of a shoal server\n\n")
    return browser, feed


def catch_up(browser: Browser, *models: dict[str, Any]) -> None:
    """Answer the state that the page asks for after events."""
    browser.advance(200)
    browser.answer(browser.request("/api/v1/state"), state(*models))


def log_lines(browser: Browser) -> list[str]:
    """What the log says, newest first, without the clock."""
    return [
        " ".join(node.text for node in line.find(tag="span") if {"who", "what"} & set(node.classes))
        for line in browser.see("log").find(tag="li")
    ]


def test_before_the_first_answer_nothing_is_claimed() -> None:
    browser = Browser()
    assert browser.see("main").hidden
    assert browser.see("link-text").text == "connecting"
    assert [(request.method, request.path) for request in browser.requests()] == [("GET", "/api/v1/state")]


def test_kv_in_tiers_below_the_device_is_shown_with_its_model() -> None:
    host = {"tier": "host", "reason": None, "bytes": 12 * MIB, "bytes_max": 32 * MIB, "loaded": 40, "looked_up": 52}
    disk = {"tier": "disk", "reason": "it is taken", "bytes": 0, "bytes_max": 0, "loaded": 0, "looked_up": 0}
    browser, _ = opened(model("oak", tiers=[host, disk]), model("elm"))
    card = browser.see("models").text
    assert "KV on host: 12 MiB of 32 MiB, 40 of 52 blocks looked for came back" in card
    assert "KV on disk: 0 B, 0 of 0 blocks looked for came back: not in use, it is taken" in card
    track = browser.see("tiers").find(with_class="track")[1]
    assert track.attributes["aria-label"] == "Host: oak 76 MiB, elm 64 MiB"


def test_weights_at_rest_are_shown_once_beside_what_models_have_on_disk() -> None:
    def told(state: str, reason: str | None = None) -> dict[str, Any]:
        return {"state": state, "reason": reason}

    disk = {"tier": "disk", "reason": None, "bytes": 8 * MIB, "bytes_max": 32 * MIB, "loaded": 0, "looked_up": 0}
    browser, _ = opened(
        model("oak", tiers=[disk], weights_at_rest=told("read")),
        model("elm", weights_at_rest=told("unused", "it is <b>full")),
        model("fir"),
        weights_store={"path": "/mnt/weights", "models": 2, "bytes": 48 * MIB},
    )
    cards = {card.find(tag="h3")[0].text: card.text for card in browser.see("models").find(tag="article")}
    assert "came back \u2013 weights at rest: read" in cards["oak"]
    assert "weights at rest: unused, it is <b>full" in cards["elm"]
    assert "at rest" not in cards["fir"]
    track = browser.see("tiers").find(with_class="track")[2]
    assert track.attributes["aria-label"] == "Disk: oak 8 MiB, weights at rest 48 MiB"


def test_a_state_shows_tiers_and_models() -> None:
    browser, feed = opened(
        model("oak"),
        model("elm", "partly_resident"),
        model("fir", "asleep", pinned=True, is_elastic=False, state=STATE),
    )
    assert feed.path == "/api/v1/events?since=0"
    assert browser.see("link-text").text == "live"
    assert not browser.see("main").hidden
    assert not browser.see("simulated").hidden, "a simulated device is called one"
    assert browser.see("facts").text == "sim: 96 MiB of 128 MiB leased, 32 MiB free"

    rows = browser.see("tiers").find(with_class="tier")
    assert [row.find(with_class="figures")[0].text for row in rows] == [
        "96 MiB of 128 MiB",
        "192 MiB of 256 MiB",
        "0 B, not in use",
        "0 B only in files",
    ]
    tracks = [row.find(with_class="track")[0] for row in rows]
    # Both models hold 8 MiB of KV besides, so the bar is as wide as what is held.
    assert [box.title for box in tracks[0].find(with_class="held")] == [
        "oak: 72 MiB of a lease of 64 MiB",
        "elm: 40 MiB of a lease of 32 MiB",
    ]
    assert tracks[0].find(with_class="held")[0].style["width"] == "56.25%"
    assert tracks[0].attributes["aria-label"].startswith("Device: oak 72 MiB of 64 MiB leased, elm")
    assert len(tracks[1].find(with_class="held")) == 3

    cards = {card.find(tag="h3")[0].text: card for card in browser.see("models").find(tag="article")}
    assert list(cards) == ["oak", "elm", "fir"]
    badges = {name: [b.text for b in card.find(with_class="badge") if not b.hidden] for name, card in cards.items()}
    assert badges == {"oak": ["awake"], "elm": ["50% resident"], "fir": ["asleep", "pinned", "not elastic"]}
    figures = [node.text for node in cards["elm"].find(tag="dd")]
    # The engine has no locales: a browser writes 1,234.
    assert figures[:-1] == ["32 of 64 MiB", "2 of 8 MiB", "64 MiB", "3", "\u2013", "1234", "12 ms", "\u2013", "2 / 1"]
    assert figures[-1] == "\u2013", "a server that does not say since when"
    assert cards["fir"].find(tag="dd")[-1].text == "3 s (all in host memory)"
    assert cards["fir"].find(with_class="badge")[0].title == "it was told to sleep"


def test_what_no_model_has_is_shown_beside_what_models_have() -> None:
    driver = {
        "lost": None,
        "others": 24 * MIB,
        "drift": 2 * MIB,
        "processes": [{"pid": 7, "name": "py<i>thon", "bytes": 24 * MIB}, {"pid": 8, "name": None, "bytes": None}],
    }
    browser, _ = opened(model("oak"), device={"taken": 24 * MIB, "returning": 8 * MIB, "driver": driver})
    track = browser.see("tiers").find(with_class="track")[0]
    assert [box.title for box in track.find(with_class="others")] == ["others: 24 MiB", "returning: 8 MiB"]
    assert track.attributes["aria-label"].endswith("others 24 MiB, returning 8 MiB")
    expected = (
        "Others have 24 MiB of the device, 24 MiB come off the budget (py<i>thon 7: 24 MiB, process 8); "
        "models have 2 MiB beyond their leases"
    )
    assert browser.see("others").text == expected
    lost, _ = opened(model("oak"), device={"driver": driver | {"lost": "it hangs"}})
    assert lost.see("others").text == "The driver is not heard, the ledger alone counts: it hangs"
    older, _ = opened(model("oak"))
    assert older.see("others").text == ""
    assert not older.see("tiers").find(with_class="others")


def test_decisions_are_told_with_their_reasons_newest_first() -> None:
    browser, feed = opened(model("oak"))
    browser.push(
        feed,
        event(1, "server_started", None, device="sim", budget=128 * MIB)
        + event(2, "evict_started", bytes=8 * MIB, reason="elm wants 8 MiB and oak is idle", decision=1)
        + event(3, "lease_granted", lease="kv", bytes=MIB, leased=MIB, reason="free", waited_ms=0, decision=2)
        + event(4, "wake_done", bytes=64 * MIB, duration_ms=1500, parked=1),
    )
    assert log_lines(browser) == [
        "oak awake: 64 MiB in 1.5 s, 1 request waited",
        "oak gives up 8 MiB \u2013 elm wants 8 MiB and oak is idle",
        "server server started on sim with 128 MiB to share",
    ]
    browser.check("all", on=True)
    assert len(log_lines(browser)) == 4, "what is quiet is there for those who ask"
    browser.push(feed, event(5, "pinned", pinned=True) + event(6, "pinned", pinned=True))
    assert log_lines(browser)[0] == "oak pinned2 times"


def test_an_end_that_was_asked_for_is_no_trouble() -> None:
    browser, feed = opened(model("oak"))
    ended = {"status": "exited with status 0", "returned": MIB}
    browser.push(
        feed, event(1, "worker_exited", pid=7, **ended) + event(2, "worker_exited", pid=8, asked=True, **ended)
    )
    assert [len(line.find(with_class="bad")) for line in browser.see("log").find(tag="li")] == [0, 1]


def test_a_model_says_why_it_is_as_it_is_for_as_long_as_one_wants_to_know() -> None:
    browser, feed = opened(model("oak", "asleep"), model("elm"))
    browser.click("Why is oak as it is")
    asked = browser.request("/api/v1/models/oak/why")
    assert (asked.method, asked.path) == ("GET", "/api/v1/models/oak/why?last=0")
    browser.answer(asked, {"now": ["oak is asleep.", "It waits for <b>elm</b>."]})
    oak = browser.see("models").find(tag="article")[0]
    shown = oak.find(with_class="reasons")[0]
    assert [line.text for line in shown.find(tag="li")] == ["oak is asleep.", "It waits for <b>elm</b>."]
    assert "hidden" not in shown.classes

    browser.push(feed, event(1, "wake_done", bytes=64 * MIB, duration_ms=3, parked=1))
    catch_up(browser, model("oak"), model("elm"))
    browser.answer(browser.request("/api/v1/models/oak/why"), {"now": ["oak is awake."]})
    assert browser.see("models").find(with_class="reasons")[0].text == "oak is awake."
    browser.click("Why is oak as it is")
    assert "hidden" in browser.see("models").find(with_class="reasons")[0].classes
    browser.push(feed, event(2, "pinned", pinned=True))
    catch_up(browser, model("oak"), model("elm"))
    assert not [request for request in browser.requests() if "/why" in request.path and not request.answered]


def test_an_event_in_two_pieces_is_one_event() -> None:
    browser, feed = opened(model("oak"))
    text = event(1, "pinned", pinned=True)
    browser.push(feed, text[:20])
    assert log_lines(browser) == []
    browser.push(feed, text[20:])
    assert log_lines(browser) == ["oak pinned"]


def test_what_models_say_is_text_never_markup() -> None:
    hostile = model(HOSTILE, "failed", source=HOSTILE, error=HOSTILE, progress=HOSTILE)
    browser, feed = opened(hostile)
    browser.push(feed, event(1, "model_failed", HOSTILE, code=HOSTILE, reason=HOSTILE))
    browser.push(feed, event(2, HOSTILE, HOSTILE, reason=HOSTILE))
    browser.click(f"Try again to start {HOSTILE}")
    (order,) = [request for request in browser.requests() if request.method == "POST"]
    browser.answer(order, {"error": {"message": HOSTILE}}, status=409)
    for part in ("tiers", "legend", "models", "log", "said", "facts"):
        seen = browser.see(part)
        made = list(seen.all())[1:]
        assert {node.tag for node in made} <= MADE_BY_THE_PAGE, part
        for node in made:
            assert not {name for name in node.attributes if name.startswith("on") or name in {"src", "href"}}
    assert browser.see("models").text.count(HOSTILE) == 5, "name, source, progress, error, and the answer"
    assert log_lines(browser)[0].startswith(HOSTILE)


@pytest.mark.parametrize(
    ("status", "pinned", "label", "verb", "body"),
    [
        ("asleep", False, "Wake oak/1", "wake", {}),
        ("awake", False, "Sleep oak/1", "sleep", {}),
        ("awake", False, "Pin oak/1", "pin", {"pinned": True}),
        ("awake", True, "Unpin oak/1", "pin", {"pinned": False}),
        ("failed", False, "Try again to start oak/1", "wake", {}),
    ],
)
def test_buttons_order_with_json(status: str, pinned: bool, label: str, verb: str, body: dict[str, Any]) -> None:
    browser, _ = opened(model("oak/1", status, pinned=pinned))
    browser.click(label)
    order = browser.request(f"/api/v1/models/oak%2F1/{verb}")
    assert order.method == "POST"
    assert order.headers == {"Content-Type": "application/json"}
    assert json.loads(order.body or "") == body
    browser.click(label)
    assert len([request for request in browser.requests() if request.method == "POST"]) == 1, "one order at a time"
    browser.answer(order, {"summary": "done in 3 ms"})
    (note,) = browser.see("models").find(with_class="note")
    assert (note.text, note.hidden) == ("done in 3 ms", False)
    assert browser.see("said").text == "oak/1: done in 3 ms"
    browser.advance(11_000)
    assert browser.see("models").find(with_class="note")[0].hidden


@pytest.mark.parametrize(("status", "label"), [("awake", "Wake oak"), ("asleep", "Sleep oak"), ("stopped", "Pin oak")])
def test_buttons_without_a_use_do_nothing(status: str, label: str) -> None:
    browser, _ = opened(model("oak", status))
    browser.click(label)
    assert not [request for request in browser.requests() if request.method == "POST"]


def test_a_refused_order_says_why() -> None:
    browser, _ = opened(model("oak"))
    browser.click("Sleep oak")
    browser.answer(browser.request("/api/v1/models/oak/sleep"), {"error": {"message": "oak is pinned"}}, status=409)
    (note,) = browser.see("models").find(with_class="note")
    assert note.text == "oak is pinned"
    assert "bad" in note.classes


def test_after_a_break_the_feed_goes_on_where_it_was() -> None:
    browser, feed = opened(model("oak"))
    browser.push(feed, event(1, "pinned", pinned=True) + event(7, "pinned", pinned=False))
    catch_up(browser, model("oak"))
    browser.close(feed)
    assert browser.see("link-text").text == "not connected"
    assert "old" in browser.see("lost").text
    assert not browser.see("main").hidden, "what was known stays to be seen"
    browser.advance(500)
    browser.fail(browser.request("/api/v1/state"))
    browser.advance(499)
    assert not browser.requests(), "the pause grows"
    browser.advance(400)
    browser.answer(browser.request("/api/v1/state"), state(model("oak")))
    again = browser.request("/api/v1/events")
    assert again.path == "/api/v1/events?since=7"
    browser.answer(again)
    # The newest is sent again, and between it and the next some are gone.
    missed = f"event: missed\ndata: {json.dumps({'oldest_kept': 20})}\n\n"
    browser.push(again, event(7, "pinned", pinned=False) + missed + event(20, "pinned", pinned=True))
    assert browser.see("link-text").text == "live"
    assert browser.see("lost").hidden
    assert log_lines(browser) == [
        "oak pinned",
        "server events before number 20 are no longer kept",
        "oak no longer pinned",
        "oak pinned",
    ]


def test_another_server_begins_anew() -> None:
    browser, feed = opened(model("oak"), model("elm"))
    browser.push(feed, event(900, "pinned", pinned=True))
    catch_up(browser, model("oak"), model("elm"))
    browser.close(feed)
    browser.advance(500)
    browser.answer(browser.request("/api/v1/state"), state(model("oak"), started=1_800_000_000_000))
    assert browser.request("/api/v1/events").path == "/api/v1/events?since=0"
    assert log_lines(browser) == []
    assert [card.find(tag="h3")[0].text for card in browser.see("models").find(tag="article")] == ["oak"]


@pytest.mark.parametrize("heard", [True, False])
def test_a_state_asked_of_the_server_before_is_not_taken_for_the_next_one_s(heard: bool) -> None:
    browser, feed = opened(model("oak"))
    browser.push(feed, event(900, "pinned", pinned=True))
    browser.advance(200)
    before = browser.request("/api/v1/state")
    browser.close(feed)
    browser.advance(500)
    assert [request.id for request in browser.requests()] == [before.id]
    if heard:
        browser.answer(before, state(model("oak")))
    else:  # a server that is killed may leave a question without an answer for ever
        browser.advance(10_000)
    asked = [request for request in browser.requests() if request.path == "/api/v1/state" and request.id != before.id]
    browser.answer(asked[0], state(model("oak"), started=1_800_000_000_000))
    assert browser.request("/api/v1/events").path == "/api/v1/events?since=0"


def test_a_silent_feed_is_given_up() -> None:
    browser, _ = opened(model("oak"))
    browser.advance(39_000)
    assert browser.see("link-text").text == "live"
    browser.advance(1_000)
    assert browser.see("link-text").text == "not connected"


def test_an_event_brings_a_new_state_and_many_bring_one() -> None:
    browser, feed = opened(model("oak", "waking"))
    browser.push(
        feed, "".join(event(number, "lease_returned", lease="kv", bytes=1, leased=1) for number in range(1, 9))
    )
    assert not browser.requests()
    browser.advance(200)
    assert [request.path for request in browser.requests()] == ["/api/v1/state"]
    browser.answer(browser.request("/api/v1/state"), state(model("oak")))
    assert [badge.text for badge in browser.see("models").find(with_class="good")] == ["awake"]


def test_a_locked_server_is_asked_with_the_key_it_wants() -> None:
    browser = Browser()
    browser.answer(browser.request("/api/v1/state"), {"error": {}}, status=401)
    assert browser.see("link-text").text == "locked"
    assert not browser.see("ask").hidden
    browser.submit("ask", "key", " wrong ")
    request = browser.request("/api/v1/state")
    assert request.headers == {"Authorization": "Bearer wrong"}
    browser.answer(request, {"error": {}}, status=401)
    assert browser.see("ask-text").text == "That key is not known here."
    browser.submit("ask", "key", "right")
    browser.answer(browser.request("/api/v1/state"), state(model("oak", "asleep")))
    browser.answer(browser.request("/api/v1/events"))
    assert browser.see("ask").hidden
    browser.click("Wake oak")
    assert browser.request("/api/v1/models/oak/wake").headers == {
        "Authorization": "Bearer right",
        "Content-Type": "application/json",
    }
