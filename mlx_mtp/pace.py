"""How long prompt tokens take, learnt from the passes that had some. Plain numbers; knows no row and no array.

A token of a prompt costs its share of the weights' work, the same everywhere, and attention to all positions before
it. So seconds a token are fitted as a line over the positions that a chunk sees; the last few passes count most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

KEEP = 0.8  # of what earlier passes weigh, at every further one
SPREAD_TOK = 128.0  # passes that saw as many positions within this tell no slope


class Pace:
    """Seconds of prompt tokens as a function of their number and of how many positions precede them."""

    def __init__(self) -> None:
        # Weighted sums over passes: 1, seen, seen^2, seconds a token, and its product with seen.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    @property
    def known(self) -> bool:
        return self._sums[0] > 0

    def learn(self, seconds: float, chunks: Iterable[tuple[int, int]]) -> None:
        """A pass over chunks, (start, count) each, took so long."""
        chunks = list(chunks)
        count = sum(c for _, c in chunks)
        seen = sum(c * (start + c) for start, c in chunks) / count
        each = seconds / count
        new = (1.0, seen, seen * seen, each, each * seen)
        self._sums = tuple(KEEP * old + n for old, n in zip(self._sums, new, strict=True))

    def fits(self, seconds: float, start: int) -> int:
        """How many tokens behind `start` others take so long: n with n * (base + slope * (start + n)) = seconds."""
        base, slope = self._line()
        each = base + slope * start
        return int(2 * seconds / (each + math.sqrt(each * each + 4 * slope * seconds)))

    def _line(self) -> tuple[float, float]:
        """Seconds a token where nothing precedes it, and by how much a position more adds to them; neither negative."""
        weight, seen, squares, each, products = self._sums
        mean_seen, mean_each = seen / weight, each / weight
        variance = squares / weight - mean_seen**2
        slope = max(0.0, (products / weight - mean_seen * mean_each) / (variance + SPREAD_TOK**2))
        base = mean_each - slope * mean_seen
        return (base, slope) if base > 0 else (0.0, mean_each / mean_seen)
