"""What computing a prompt takes, and how much of what is cached is found again: the two that price cached prefixes.

Apart because engines say what steps took and what requests found, the memory says what that makes a MiB of KV worth,
and neither is to know how a figure is made steady.
"""

from __future__ import annotations

from collections import deque

MIB = 1 << 20
_PREFILL_TOKENS = 32  # a step of so many tokens, and of so many for each request, says what computing prompts takes
_PREFILL_PART = 8
_STEPS = 16  # that count; older ones are forgotten
_USE_S = 1.0  # requests that come so soon after the first one are one use, as the policy counts at most one a second
_SHARE_UNSEEN = 0.5  # before anybody has looked: what somebody began, they go on with or not
_NEWEST = 1 / 8  # what the newest use counts for


class PromptCost:
    """What computing a token of a prompt adds to a step: half of the tokens of the last steps added no more.

    So a step that waited for something else, as the first one does for its kernels, does not count by what it waited,
    and one of few tokens, whose time is mostly not theirs, counts little. What a step takes that begins a request and
    computes next to nothing for it is taken off, as half of the last such steps took at most: a prompt of which all is
    found has such a step too, so finding it saves that much less. Before there was one, nothing is taken off.

    Attributes
    ----------
    us_per_token
        Microseconds; None before a step was seen that computed a prompt. For any thread.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS)
        self._others: deque[float] = deque(maxlen=_STEPS)
        self._anyhow_s = 0.0
        self.us_per_token: float | None = None

    def saw(self, tokens: int, seconds: float, requests: int) -> bool:
        """Learn what a step took that computed so many tokens for so many requests; from one thread.

        Returns
        -------
        bool
            Whether it says what prompts take. A step of a few tokens for each request does not, and one that gives each
            request one token is no prompt's at all.
        """
        tells = tokens >= max(_PREFILL_TOKENS, _PREFILL_PART * requests)
        if tells:
            self._steps.append((seconds, tokens))
        elif tokens > requests:
            self._others.append(seconds)
            self._anyhow_s = sorted(self._others)[(len(self._others) - 1) // 2]
        else:
            return False
        self._settle()
        return tells

    def _settle(self) -> None:
        left = sum(count for _, count in self._steps) / 2
        added = (((seconds - self._anyhow_s) * 1e6 / tokens, tokens) for seconds, tokens in self._steps)
        for us_per_token, count in sorted(added):
            left -= count
            if left <= 0:
                self.us_per_token = max(us_per_token, 0.0)
                break


class FoundShare:
    """What part of what is cached one use finds again: the price of a prefix counts for that part of it only.

    Weights are needed by every use, and wholly; of the prefixes of many conversations the ones that go on are needed,
    and the others would not be missed. A use is what comes within a second: conversations that go on at once find
    their parts for one and the same use. The mean is over uses, whatever was cached at each, and the newest counts for
    an eighth, so that it tells of the last dozen or two; before the first use that had anything to find it is a half.
    """

    def __init__(self) -> None:
        self._mean = _SHARE_UNSEEN  # of the uses before the last
        self._last: float | None = None
        self._cached = 0
        self._found = 0
        self._since = 0.0

    def looked(self, cached: int, found: int, now: float) -> None:
        """Learn what a request has found; from one thread.

        Parameters
        ----------
        cached
            How many blocks nobody had when it came, and could have been found.
        found
            How many of them it found. What others had at that moment would not have gone, so it does not count.
        now
            Seconds, of a clock that goes forward.
        """
        if self._last is None or now - self._since >= _USE_S:
            if not cached:
                return  # there was nothing to find
            self._mean, self._since, self._cached, self._found = self.share, now, cached, 0
        self._found += found
        self._last = min(self._found / self._cached, 1.0)

    @property
    def share(self) -> float:
        """From 0 to 1. For any thread."""
        last = self._last
        return self._mean if last is None else self._mean + (last - self._mean) * _NEWEST


def rounded(us: float) -> int:
    """Round to two digits, so that not every step is news to the server; to 1 at least, as 0 says that nobody knows."""
    return max(1, round(float(f"{us:.2g}")))
