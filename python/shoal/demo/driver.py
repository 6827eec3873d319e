"""The main job: rounds of work for three models that cannot all be on the device at once, and a verdict.

The verdict is what makes it more than a show: each model must have given up memory and come back, and the same greedy
question must have had the same answer every time, whatever was moved in between.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal.demo.jobs import CHAT_REFERENCE, CODE_REFERENCE, PASSAGES, QUESTIONS, STORY, Jobs, Outcome, cosine, search
from shoal.demo.management import EventLog, Management
from shoal.demo.report import Screen, summary, yielded_and_returned
from shoal.demo.server import DemoError, served, wait_until_ready

_ROUNDS_MIN = 3
_ROUNDS_MAX = 6
_CHAT_TOKENS = 24
_CODE_TOKENS = 48
_SAME_COSINE = 0.9999


def run(shelf: Path) -> int:
    """Serve ``shelf``, work with it, tell what happened; the exit status is 0 if all was as it must be."""
    screen = Screen()
    log = _log_file()
    screen.title(f"Starting `shoal serve {shelf}` (its output: {log})")
    try:
        with served(shelf, log) as management:
            return _work(management, screen)
    except DemoError as error:
        print(f"\nThe demo stopped: {error}", flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", flush=True)
        return 130


def _work(management: Management, screen: Screen) -> int:
    from openai import OpenAIError

    wait_until_ready(management, lambda text: screen.line("shoal", text))
    screen.line("shoal", f"watch it at {management.address}/")
    log = EventLog(management, screen.event)
    jobs = Jobs(management.address)
    job = Session(jobs, screen)
    try:
        for number in range(1, _ROUNDS_MAX + 1):
            screen.title(f"Round {number}: one after the other")
            job.in_turn()
            screen.title(f"Round {number}: all at once")
            job.at_once()
            state = management.state()
            log.settle(state["last_event_id"])
            waiting = [model["name"] for model in state["models"] if not yielded_and_returned(log.all(), model["name"])]
            if number >= _ROUNDS_MIN and not waiting:
                break
    except (OpenAIError, OSError) as error:
        raise DemoError(f"a request failed: {type(error).__name__}: {error}") from error
    finally:
        log.close()
        jobs.close()
    screen.title("What happened")
    print(summary(state, log.all(), job.outcomes))
    job.problems += [f"{name} was never made to yield and brought back" for name in waiting]
    return _verdict(management, job)


def _verdict(management: Management, job: Session) -> int:
    print()
    for problem in dict.fromkeys(job.problems):
        print(f"WRONG: {problem}")
    if not job.problems:
        print("Every model made room for the others and came back, and every repeated question had the same answer.")
    print(f"The page was at {management.address}/ ; `make serve` keeps the server up.")
    return 1 if job.problems else 0


class Session:
    """The work of all rounds, with what came of it."""

    def __init__(self, jobs: Jobs, screen: Screen) -> None:
        self.jobs = jobs
        self.screen = screen
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []
        self._texts: dict[str, str] = {}
        self._vectors: list[list[float]] | None = None

    def in_turn(self) -> None:
        """Do the three jobs one after the other, then a long question that needs KV."""
        self.chat()
        self.code()
        self.code()
        self.documents()
        self.story()

    def at_once(self) -> None:
        """Do the three jobs at the same time."""
        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(work) for work in (self.chat, self.documents, self.code)]:
                future.result()

    def chat(self) -> None:
        """Ask for the capital of France."""
        outcome = self._note(self.jobs.chat(CHAT_REFERENCE, _CHAT_TOKENS))
        self._same("chat", outcome.text)
        self._expect("Paris" in outcome.text, f"chat does not know the capital of France: {outcome.text!r}")

    def story(self) -> None:
        """Ask about a text that fills a good part of the context."""
        outcome = self._note(self.jobs.chat(STORY * 7, _CHAT_TOKENS))
        self._same("story", outcome.text)

    def code(self) -> None:
        """Let the toy go on with a line of Python."""
        outcome = self._note(self.jobs.code(CODE_REFERENCE, _CODE_TOKENS))
        self._same("code", outcome.text)
        self._expect(bool(outcome.text.strip()), "code has nothing to say")

    def documents(self) -> None:
        """Turn passages into vectors and find the ones that answer three questions."""
        outcome, vectors = self.jobs.embed(PASSAGES)
        self._note(outcome)
        if self._vectors is None:
            self._vectors = vectors
        same = min(cosine(new, old) for new, old in zip(vectors, self._vectors, strict=True))
        self._expect(same >= _SAME_COSINE, f"documents gave another vector than before (cosine {same:.6f})")
        asked, questions = self.jobs.embed([text for text, _ in QUESTIONS])
        self._note(asked)
        for (text, right), vector in zip(QUESTIONS, questions, strict=True):
            found = search(vectors, vector)
            self._expect(found == right, f"documents found {PASSAGES[found]!r} for {text!r}")

    def _note(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        self.screen.outcome(outcome)
        return outcome

    def _same(self, what: str, text: str) -> None:
        before = self._texts.setdefault(what, text)
        self._expect(text == before, f"{what}: the same question had two answers: {before!r} and {text!r}")

    def _expect(self, good: bool, problem: str) -> None:
        if not good:
            self.problems.append(problem)


def _log_file() -> Path:
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    directory = (base if base.is_absolute() else Path.home() / ".local" / "state") / "shoal"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "demo-serve.log"
