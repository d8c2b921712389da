"""How many tokens to draft in a round. Plain Python; knows counts and seconds, and no arrays.

`Auto` maximises expected tokens over expected time, both measured while it runs, and width 0 is one of its choices:
drafting that does not pay stops, and is probed again at growing distances.
"""

from __future__ import annotations

from typing import Protocol

from mlx_mtp.rows import RequestError

MAX_WIDTH = 15  # the widest round; the cache's rings leave room for it


class Depth(Protocol):
    """Chooses the width of every round and is told what came of it."""

    def choose(self, rows: int) -> int:
        """Width of the next round over `rows` rows, 0 .. MAX_WIDTH."""
        ...

    def record(self, width: int, kept: list[int], seconds: float | None) -> None:
        """A round of `width` drafted tokens a row: row i kept `kept[i]` columns, of width + 1.

        seconds: what the round took, or None where the time says nothing (a prompt chunk ran beside it, or the
        width had just changed).
        """
        ...


class Constant:
    """Always the same width."""

    def __init__(self, width: int) -> None:
        self._width = width

    def choose(self, rows: int) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None) -> None:
        pass


class Heuristic:
    """Two wider when every draft of a round was kept, one narrower otherwise, at least 1.

    As `num_assistant_tokens_schedule="heuristic"` in transformers 5.14 `generation/candidate_generator.py`; with
    several rows their mean decides.
    """

    def __init__(self, width: int = 4, most: int = MAX_WIDTH) -> None:
        self._width, self._most = width, most

    def choose(self, rows: int) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None) -> None:
        if width and kept:
            full = sum(k == width + 1 for k in kept) * 2 >= len(kept)
            self._width = min(self._most, self._width + 2) if full else max(1, self._width - 1)


def depth_of(width: int | str) -> Depth:
    """An integer from 0 to MAX_WIDTH, "heuristic" or "auto". Raises RequestError."""
    if width == "heuristic":
        return Heuristic()
    if width == "auto":
        return Auto()
    if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= MAX_WIDTH:
        raise RequestError(f"width is {width!r}; expected 0 to {MAX_WIDTH}, 'auto' or 'heuristic'")
    return Constant(width)
