"""What is asked in a soak, what the right answer is, and whether an answer is right, a clear refusal or a fault.

Apart from the traffic, so that the judge itself is tested (`test_judge.py`). A model is greedy here and in float32, so
an answer is right when it is the one that the model gave while it was awake and alone. Cases in which the two likeliest
tokens once were as good as the same are left out: there the size of a batch may decide.
"""

from __future__ import annotations

import base64
import math
import random
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.demo.jobs import CHAT_REFERENCE, CODE_REFERENCE, PASSAGES, QUESTIONS, STORY
from tests.soak.disturbances import REMOVED

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.soak.disturbances import Disturbances

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MARGIN_MIN = 1e-3
"""Nearer to each other than this (in logarithms of probabilities), a batch may choose between two tokens."""
SAME_COSINE = 0.99999
OK = 200
NO_SUCH_MODEL = (404, "model_not_found")


@dataclass(frozen=True, eq=False)
class Case:
    """One thing that can be asked."""

    name: str
    model: str
    path: str
    body: dict[str, Any]
    refusal: tuple[int, str] | None = None
    """Status and code where it is a request that nobody may answer."""

    @property
    def can_stream(self) -> bool:
        """Embeddings cannot."""
        return self.path != EMBED and self.refusal is None

    def asked(self, *, stream: bool) -> dict[str, Any]:
        """The body as it is sent."""
        body: dict[str, Any] = {"model": self.model, **self.body}
        if self.path != EMBED:
            body.setdefault("temperature", 0)
        return body | {"stream": True} if stream else body


@dataclass
class Answer:
    """What a client heard, and when."""

    began: float
    ended: float = 0.0
    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    vectors: list[list[float]] | None = None
    error: dict[str, Any] | None = None
    retry_after: str | None = None
    stream: bool = False
    is_whole: bool = False
    """It ended as it should: `[DONE]`, or a body of the length that was announced."""
    torn: str | None = None
    """How the connection broke."""
    left: bool = False
    """The client went away by itself."""
    silent: bool = False
    """Nothing came for longer than any answer may take."""

    @property
    def seconds(self) -> float:
        """From the question to the end."""
        return self.ended - self.began


Right = dict[int, str] | list[list[float]]


@dataclass(frozen=True)
class Verdict:
    """What an answer was."""

    outcome: str
    fault: str | None = None
    """Why it may not be so."""
    is_owed: bool = True
    """Whether a right answer was to be had. It was not where the client went away, the server was killed under it, or a
    refusal was the right answer at that moment."""


def cases() -> list[Case]:
    """Everything that is asked for: the shelf's three jobs in many forms, and some requests that are wrong."""
    asked = [
        CHAT_REFERENCE,
        "Name three colours.",
        "What is two plus two?",
        "Who wrote Hamlet? One sentence.",
        "Say hello in French.",
        "List the days of the week.",
        "What do bees make?",
        "Explain what a cache is to a child.",
    ]
    found = [
        Case(f"chat {place}", "chat", CHAT, {"messages": _user(text), "max_tokens": 12 + 4 * place})
        for place, text in enumerate(asked)
    ]
    found += [
        Case(f"chat about {times} stories", "chat", CHAT, {"messages": _user(STORY * times), "max_tokens": 16})
        for times in (2, 4, 6)
    ]
    said = [*_user("Name an animal."), {"role": "assistant", "content": "A cat."}, *_user("Name another one.")]
    found.append(Case("chat that goes on", "chat", CHAT, {"messages": said, "max_tokens": 20}))
    found.append(Case("chat, two choices", "chat", CHAT, {"messages": _user(asked[1]), "max_tokens": 10, "n": 2}))
    found.append(Case("text by chat", "chat", TEXT, {"prompt": "The sea is", "max_tokens": 24}))
    prompts = [
        CODE_REFERENCE,
        "import os\n",
        "for i in range(",
        "class Shelf:\n    ",
        "    return self.",
        "try:\n    x = ",
    ]
    for model in ("code", "extra"):
        found += [
            Case(f"{model} {place}", model, TEXT, {"prompt": text, "max_tokens": 16 + 24 * place})
            for place, text in enumerate(prompts)
        ]
        found.append(Case(f"{model}, long", model, TEXT, {"prompt": "import os\n" * 20, "max_tokens": 200}))
        found.append(Case(f"{model}, two", model, TEXT, {"prompt": "def run(", "max_tokens": 40, "n": 2}))
        found.append(Case(f"{model} that stops", model, TEXT, {"prompt": "def f(", "max_tokens": 80, "stop": ["\n"]}))
    texts = [*PASSAGES, *(text for text, _ in QUESTIONS)]
    found += [Case(f"vector {place}", "documents", EMBED, {"input": text}) for place, text in enumerate(texts)]
    found.append(Case("vectors of all", "documents", EMBED, {"input": texts}))
    found.append(Case("vectors in base64", "documents", EMBED, {"input": texts[:3], "encoding_format": "base64"}))
    return found + bad_cases()


def bad_cases() -> list[Case]:
    """Requests that are wrong, and what they hear, whatever the state of the shelf."""
    return [
        Case("no such model", "nobody", TEXT, {"prompt": "x"}, refusal=NO_SUCH_MODEL),
        Case("no messages", "chat", CHAT, {"max_tokens": 3}, refusal=(400, "missing_required_parameter")),
        Case(
            "too long", "code", TEXT, {"prompt": "x" * 600, "max_tokens": 4}, refusal=(400, "context_length_exceeded")
        ),
    ]


def choose(dice: random.Random, of: list[Case]) -> Case:
    """Take a case: the models alike often, wrong requests seldom."""
    if dice.random() < 0.02:
        return dice.choice([case for case in of if case.refusal])
    model = dice.choices(["chat", "code", "documents", "extra"], [4, 3, 3, 1])[0]
    return dice.choice([case for case in of if case.model == model and not case.refusal])


def learn(ask: Callable[[Case, dict[str, Any]], dict[str, Any]], case: Case) -> Right | None:
    """Ask twice, with likelihoods and without; None where a batch might decide between two tokens.

    Parameters
    ----------
    ask
        Sends one body for a case and gives what came, parsed.

    Raises
    ------
    ValueError
        The two answers differ although nobody else was there.
    """
    body = case.asked(stream=False)
    if case.path == EMBED:
        return vectors_of(ask(case, body))
    likely = {"logprobs": True, "top_logprobs": 2} if case.path == CHAT else {"logprobs": 2}
    first, second = ask(case, body | likely), ask(case, body)
    right = texts_of(second)
    if texts_of(first) != right:
        msg = f"{case.name}: {texts_of(first)!r}, then {right!r}, with nobody beside"
        raise ValueError(msg)
    return right if min(map(margin, first["choices"])) >= MARGIN_MIN else None


def margin(choice: dict[str, Any]) -> float:
    """The least distance between the likeliest token and the next, anywhere in a choice."""
    told = choice["logprobs"]
    if "content" in told:
        tops = [sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True) for token in told["content"]]
    else:
        tops = [sorted(top.values(), reverse=True) for top in told["top_logprobs"]]
    return min((top[0] - top[1] for top in tops if len(top) > 1), default=math.inf)


def texts_of(answer: dict[str, Any]) -> dict[int, str]:
    """The texts of a whole answer, by choice."""
    return {
        choice["index"]: choice["message"]["content"] if "message" in choice else choice["text"]
        for choice in answer["choices"]
    }


def vectors_of(answer: dict[str, Any]) -> list[list[float]]:
    """The vectors of an answer, in order, in either encoding."""
    found = []
    for entry in sorted(answer["data"], key=lambda entry: entry["index"]):
        vector = entry["embedding"]
        if isinstance(vector, str):
            raw = base64.b64decode(vector)
            vector = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        found.append(vector)
    return found


def judge(case: Case, right: Right | None, answer: Answer, during: Disturbances) -> Verdict:
    """Say what an answer is, and whether anything excuses it that it is not the right one.

    A refusal needs a status, a type, a code and a sentence. That a worker or a model is not there needs a disturbance
    of that model meanwhile, and a broken connection needs a kill of the server. A part of an answer must be the right
    one's beginning.
    """
    of_model = during.of(case.model, answer.began, answer.ended)
    of_server = during.of("server", answer.began, answer.ended)
    if answer.silent:
        return Verdict("silent", f"no end within {answer.seconds:.0f} s")
    if wrong := _differs(right, answer):
        return Verdict("wrong", wrong)
    if answer.left:
        return Verdict("client left", is_owed=False)
    if answer.torn:
        # A stream says how it ends; a body whose length was announced can only break off.
        if of_server or (of_model and not answer.stream):
            return Verdict("connection broken by a kill", is_owed=False)
        return Verdict("torn", f"the connection broke with nobody killed: {answer.torn}")
    if answer.error is not None:
        is_removed = any(one.what == REMOVED for one in of_model)
        return _judge_refusal(case, answer, is_excused=bool(of_model or of_server), is_removed=is_removed)
    if answer.status != OK or not answer.is_whole:
        return Verdict("cut", f"status {answer.status}, and the end is missing")
    if case.refusal:
        return Verdict("wrong", f"answered, and should have been refused with {case.refusal}")
    return Verdict("right")


def _differs(right: Right | None, answer: Answer) -> str | None:
    if isinstance(right, list) and answer.vectors is not None:
        near = len(right) == len(answer.vectors) and all(
            _cosine(a, b) >= SAME_COSINE for a, b in zip(right, answer.vectors, strict=True)
        )
        return None if near else "other vectors than when it was alone"
    if isinstance(right, dict):
        is_part = answer.left or answer.torn is not None or answer.error is not None or not answer.is_whole
        if not is_part and answer.status == OK and answer.texts != right:
            return f"{answer.texts!r}, and alone it was {right!r}"
        for place, text in answer.texts.items():
            if place not in right or not right[place].startswith(text):
                return f"{text!r} is no beginning of {right.get(place)!r}"
    return None


def _judge_refusal(case: Case, answer: Answer, *, is_excused: bool, is_removed: bool) -> Verdict:
    error = answer.error or {}
    code = str(error.get("code"))
    outcome = f"refused, {answer.status} {code}" if answer.status != OK else f"refused in the stream, {code}"
    if not (error.get("message") and error.get("type") and error.get("code")):
        return Verdict(outcome, f"a refusal that does not say why: {error}")
    if case.refusal:
        is_right = (answer.status, code) == case.refusal
        # Its worker is who finds some faults, and may be away, or waited for in vain.
        away = {"model_not_found", "model_unavailable", "shutting_down", "worker_lost", "model_wait_timeout"}
        is_away = is_excused and code in away
        fault = None if is_right or is_away else f"should have been {case.refusal}: {error}"
        return Verdict(outcome, fault, is_owed=not is_right)
    if is_removed and (answer.status, code) == NO_SUCH_MODEL:
        # Taken off the file by the soak itself: this is the answer.
        return Verdict(outcome, is_owed=False)
    if code == "too_many_waiting":
        said = answer.status != 429 or answer.retry_after
        return Verdict(outcome, None if said else "429 without Retry-After")
    if code == "model_wait_timeout":
        return Verdict(outcome, None if answer.status in {504, OK} else f"with status {answer.status}")
    if answer.status not in {404, 502, 503, OK}:
        return Verdict(outcome, f"a status that nothing explains: {answer.status} {error}")
    return Verdict(outcome, None if is_excused else f"with nothing that disturbed it: {error}")


def _cosine(left: list[float], right: list[float]) -> float:
    if len(left) != len(right):
        return 0.0
    return sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
