"""What computing a prompt takes, as it was measured: by that the server's policy prices a cached prefix.

Apart because engines say what steps took and the memory says what that makes a MiB of KV worth, and neither is to know
how a figure is made steady.
"""

from __future__ import annotations

from collections import deque

MIB = 1 << 20
_STEPS = 16  # that count; older ones are forgotten


class PromptCost:
    """What computing a token of a prompt takes: half of the tokens of the last steps took no longer.

    So a step that waited for something else, as the first one does for its kernels, does not count by what it waited,
    and one of few tokens, whose time is mostly not theirs, counts little.

    Attributes
    ----------
    us_per_token
        Microseconds; None before a step was seen. For any thread.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS)
        self.us_per_token: float | None = None

    def saw(self, tokens: int, seconds: float) -> None:
        """Learn what a step took that computed so many tokens of prompts; from one thread."""
        self._steps.append((seconds * 1e6 / tokens, tokens))
        left = sum(count for _, count in self._steps) / 2
        for us_per_token, count in sorted(self._steps):
            left -= count
            if left <= 0:
                self.us_per_token = us_per_token
                break


def rounded(us: float) -> int:
    """Round to two digits, so that not every step is news to the server; to 1 at least, as 0 says that nobody knows."""
    return max(1, round(float(f"{us:.2g}")))
