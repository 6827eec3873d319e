"""The reporter tells what changes, and no more."""

from __future__ import annotations

import time

from shoal.worker.usage import Counts, Reporter


def test_only_changes_are_told_and_the_last_value_always():
    now, told = [Counts(tokens_out=0)], []

    def wait_for(value: int) -> None:
        end = time.monotonic() + 60
        while not told or told[-1].tokens_out != value:
            assert time.monotonic() < end, f"{value} is not told"
            time.sleep(0.005)
        time.sleep(0.03)  # nothing has changed meanwhile

    reporter = Reporter(lambda: now[0], told.append, interval_s=0.01)
    reporter.start()
    wait_for(0)
    for value in (1, 2):
        now[0] = Counts(tokens_out=value)
        wait_for(value)
    now[0] = Counts(tokens_out=3)
    reporter.stop()
    assert [counts.tokens_out for counts in told] == [0, 1, 2, 3]


def test_who_is_in_a_hurry_is_told_at_once_and_again():
    now, told = [Counts(running=1)], []
    reporter = Reporter(lambda: now[0], told.append, interval_s=600)
    reporter.start()
    for tokens in (1, 2, 3):
        now[0] = Counts(tokens_out=tokens)
        reporter.hurry()
        end = time.monotonic() + 60
        while not told or told[-1] != now[0]:
            assert time.monotonic() < end, f"{now[0]} is not told"
            time.sleep(0.005)
    now[0] = Counts(tokens_out=4)
    reporter.stop()
    assert told[-1].tokens_out == 4, told
