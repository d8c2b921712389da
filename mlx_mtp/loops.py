"""Notices a text that repeats itself without end. Knows token ids only.

Some models fall into a loop, with tools and long contexts above all, and go on until a limit ends the request. A loop
is seen here as the same tokens again and again: every one equal to the one a period before, for long enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_mtp.rows import RequestError


@dataclass(frozen=True)
class LoopLimits:
    """period_tok: the longest piece whose repetition is noticed. repeats: how often it must come in a row, and
    least_tok: how many tokens that must be at least; a table of zeros or a ruler of dashes is no loop."""

    period_tok: int = 256
    repeats: int = 8
    least_tok: int = 768

    def __post_init__(self) -> None:
        for name, least in (("period_tok", 1), ("repeats", 2), ("least_tok", 2)):
            if vars(self)[name] < least:
                raise RequestError(f"{name} of the loop guard is {vars(self)[name]}; expected at least {least}")


class LoopGuard:
    """Watches one text. It costs the comparison of one token with the last `period_tok`, whatever the text's length."""

    def __init__(self, limits: LoopLimits) -> None:
        size = limits.period_tok
        self._limits = limits
        self._last = np.full(size, -1, np.int64)  # the token i + 1 back; a ring, `_at` is the newest
        self._at = 0
        self._run = np.zeros(size, np.int64)  # by period: tokens in a row that equal the one a period before
        periods = np.arange(1, size + 1)
        self._enough = np.maximum(periods * (limits.repeats - 1), limits.least_tok - periods)
        self.period_tok: int | None = None  # of the loop that was found

    def push(self, tokens: Sequence[int]) -> bool:
        """Add tokens; returns whether the text has run into a loop."""
        size = len(self._last)
        for token in tokens:
            before = np.concatenate([self._last[self._at :: -1], self._last[: self._at : -1]])
            self._run = (self._run + 1) * (before == token)
            self._at = (self._at + 1) % size
            self._last[self._at] = token
            if self.period_tok is None and (found := np.flatnonzero(self._run >= self._enough)).size:
                self.period_tok = int(found[0]) + 1
        return self.period_tok is not None
