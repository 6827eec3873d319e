"""The traffic of a soak: clients that ask, listen, go away and come again, each with dice of its own.

Replayed with the same seed each client asks the same questions in the same order. When each is asked depends on how
fast the answers come, so what stands beside what is only alike.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from benches.client import lines

from tests.soak.answers import EMBED, OK, Answer, Case, Right, Verdict, choose, judge, texts_of, vectors_of

if TYPE_CHECKING:
    from tests.soak.disturbances import Disturbances

ANSWER_S_MAX = 240.0
"""Longer than the server lets a request wait, and the longest answer on a busy machine."""


@dataclass
class Manner:
    """How a client listens."""

    stream: bool = False
    leave_pieces: int | None = None
    """Goes away after so many pieces of a stream."""
    leave_s: float | None = None
    """Goes away when nothing came for so long."""
    slow_s: float = 0.0
    """Waits so long between two pieces."""


def manner(dice: random.Random, case: Case) -> Manner:
    """Most clients listen to the end."""
    stream = case.can_stream and dice.random() < 0.6
    drawn = dice.random()
    if drawn < 0.08 and stream:
        return Manner(stream, leave_pieces=dice.randint(0, 6))
    if drawn < 0.12 and not case.refusal:
        return Manner(stream, leave_s=dice.uniform(0.01, 1.5))
    if drawn < 0.16 and stream:
        return Manner(stream, slow_s=0.05)
    return Manner(stream)


def ask(client: httpx.Client, url: str, case: Case, how: Manner) -> Answer:
    """Ask one thing and note all that was heard."""
    answer = Answer(time.monotonic(), stream=how.stream)
    timeout = httpx.Timeout(ANSWER_S_MAX, read=how.leave_s or ANSWER_S_MAX)
    try:
        with client.stream("POST", url + case.path, json=case.asked(stream=how.stream), timeout=timeout) as response:
            answer.status = response.status_code
            answer.retry_after = response.headers.get("retry-after")
            kind = response.headers.get("content-type", "")
            if answer.status == OK and kind.startswith("text/event-stream"):
                _listen(response, answer, how)
            else:
                _take(json.loads(response.read()), case, answer)
    except httpx.ReadTimeout:
        answer.left, answer.silent = how.leave_s is not None, how.leave_s is None
    except (httpx.TransportError, json.JSONDecodeError) as error:
        answer.torn = repr(error)
    answer.ended = time.monotonic()
    return answer


def _take(body: dict[str, Any], case: Case, answer: Answer) -> None:
    if answer.status != OK:
        answer.error = body.get("error") or {}
    elif case.path == EMBED:
        answer.vectors, answer.is_whole = vectors_of(body), True
    else:
        answer.texts, answer.is_whole = texts_of(body), True


def _listen(response: httpx.Response, answer: Answer, how: Manner) -> None:
    pieces = 0
    for line in lines(response):
        if time.monotonic() - answer.began > ANSWER_S_MAX:
            answer.silent = True
            return
        if not line.startswith("data: "):
            continue  # A comment, or the space between two events.
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            answer.is_whole = True
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = event["error"]
            continue
        for choice in event["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            answer.texts[choice["index"]] = answer.texts.get(choice["index"], "") + (text or "")
        pieces += 1
        if how.leave_pieces is not None and pieces > how.leave_pieces:
            answer.left = True
            return
        if how.slow_s:
            time.sleep(how.slow_s)


@dataclass
class Tally:
    """What came of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    owed: int = 0
    """To how many a right answer was to be had."""
    of_model: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    longest_s: float = 0.0
    longest: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, case: Case, how: Manner, answer: Answer, verdict: Verdict) -> None:
        """Count one."""
        with self.lock:
            self.outcomes[verdict.outcome] += 1
            self.owed += verdict.is_owed
            if verdict.outcome == "right":
                self.of_model[case.model] += 1
                if answer.seconds > self.longest_s:
                    self.longest_s, self.longest = answer.seconds, case.name
            if verdict.fault:
                self.fault(f"{case.name}: {verdict.fault}", answer=vars(answer) | {"manner": vars(how)})

    def too_few(self, share_min: float) -> str | None:
        """Say how many were answered, where that is a smaller share of those that were owed a right answer."""
        right = self.outcomes["right"]
        return f"only {right} of {self.owed} were answered" if right < share_min * self.owed else None

    def fault(self, what: str, **more: Any) -> None:
        """Note something that may not be; printed at once, since who watches wants to know."""
        print(f"FAULT {what}", flush=True)
        self.faults.append({"what": what, "at": time.strftime("%H:%M:%S"), **more})


class Traffic:
    """Clients in threads of their own, which can be made to pause."""

    def __init__(
        self, url: str, seed: int, rights: dict[Case, Right | None], during: Disturbances, tally: Tally, *, clients: int
    ) -> None:
        self.tally = tally
        self._url, self._rights, self._during = url, rights, during
        self._end = threading.Event()
        self._go = threading.Event()
        self._idle = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} client {number}"),), daemon=True)
            for number in range(clients)
        ]

    def start(self) -> None:
        """Begin."""
        self._go.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Let what runs come to its end, and ask nothing more."""
        self._go.clear()
        deadline = time.monotonic() + ANSWER_S_MAX + 30
        for _ in self._threads:
            if not self._idle.acquire(timeout=max(0.1, deadline - time.monotonic())):
                self.tally.fault("a client never came to its end")

    def resume(self) -> None:
        """Go on."""
        self._go.set()

    def stop(self) -> None:
        """End for good; clients finish what they ask."""
        self._end.set()
        self._go.set()
        for thread in self._threads:
            thread.join(ANSWER_S_MAX + 30)
            if thread.is_alive():
                self.tally.fault("a client never came to its end")

    def herd(self, case: Case, count: int) -> None:
        """Ask the same thing many times at once, and wait for all answers."""
        threads = [
            threading.Thread(target=self._one, args=(case, Manner(stream=case.can_stream and number % 2 == 0)))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S_MAX + 30)

    def _one(self, case: Case, how: Manner) -> None:
        with httpx.Client() as client:
            self.settle(case, how, ask(client, self._url, case, how))

    def settle(self, case: Case, how: Manner, answer: Answer) -> None:
        """Judge and count."""
        self.tally.add(case, how, answer, judge(case, self._rights.get(case), answer, self._during))

    def _run(self, dice: random.Random) -> None:
        cases = list(self._rights)
        client = httpx.Client()
        while not self._end.is_set():
            if not self._go.is_set():
                self._idle.release()
                self._go.wait()
                continue
            case = choose(dice, cases)
            how = manner(dice, case)
            if dice.random() < 0.3:  # others keep their connection
                client.close()
                client = httpx.Client()
            answer = ask(client, self._url, case, how)
            while answer.torn and "refused" in answer.torn and not self._end.is_set():
                # Nobody is there. It is asked again, so that what is asked does not depend on how long that lasts.
                self.settle(case, how, answer)
                time.sleep(0.5)
                answer = ask(client, self._url, case, how)
            self.settle(case, how, answer)
            self._end.wait(dice.choice([0, 0, 0.1, 0.5, 2]))
        client.close()
