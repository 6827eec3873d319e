"""The reporter tells what changes, and no more."""

from __future__ import annotations

import time

from shoal.worker.usage import Counts, Reporter


def test_only_changes_are_told_and_the_last_value_always():
    now, told = [Counts(tokens_out=0)], []
    reporter = Reporter(lambda: now[0], told.append, interval_s=0.01)
    reporter.start()
    for value in (1, 2):
        time.sleep(0.05)
        now[0] = Counts(tokens_out=value)
    time.sleep(0.05)
    now[0] = Counts(tokens_out=3)
    reporter.stop()
    assert [counts.tokens_out for counts in told] == [0, 1, 2, 3]
