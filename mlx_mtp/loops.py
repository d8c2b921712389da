"""Stops output that repeats itself without end. Works on token ids.

Some models fall into endless repetition, mostly with tools and long contexts, and go on until the token limit. Output
repeats with period p if each token equals the token p positions earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_mtp.rows import RequestError


@dataclass(frozen=True)
class LoopLimits:
    """When repetition counts as endless. A table of zeros or a ruler of dashes must not.

    period_tok: the longest period that is detected, in tokens.
    repeats: how many times in a row the period must occur.
    least_tok: how many tokens the repetition must cover.
    """

    period_tok: int = 256
    repeats: int = 8
    least_tok: int = 768

    def __post_init__(self) -> None:
        """Raises RequestError if a limit is too small."""
        for name, least in (("period_tok", 1), ("repeats", 2), ("least_tok", 2)):
            if vars(self)[name] < least:
                raise RequestError(f"{name} of the repetition guard is {vars(self)[name]}; expected at least {least}")


class LoopGuard:
    """Detects endless repetition in one sequence. A token costs one comparison for each period up to `period_tok`.

    period_tok: the period that was found, or None.
    """

    def __init__(self, limits: LoopLimits) -> None:
        size = limits.period_tok
        self._recent = np.full(size, -1, np.int64)  # a ring of the latest tokens
        self._newest = 0  # index of the newest token in the ring
        self._matches = np.zeros(size, np.int64)  # for each period: how many tokens in a row have matched
        periods = np.arange(1, size + 1)
        self._needed = np.maximum(periods * (limits.repeats - 1), limits.least_tok - periods)
        self.period_tok: int | None = None

    def push(self, tokens: Sequence[int]) -> bool:
        """Add tokens. Returns whether the output repeats endlessly."""
        size = len(self._recent)
        for token in tokens:
            newest_first = np.concatenate([self._recent[self._newest :: -1], self._recent[: self._newest : -1]])
            self._matches = (self._matches + 1) * (newest_first == token)
            self._newest = (self._newest + 1) % size
            self._recent[self._newest] = token
            if self.period_tok is None and (found := np.flatnonzero(self._matches >= self._needed)).size:
                self.period_tok = int(found[0]) + 1
        return self.period_tok is not None
