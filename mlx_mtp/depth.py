"""How many tokens to draft in a round. Plain Python; knows counts and seconds, and no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mlx_mtp.auto import Auto
from mlx_mtp.rows import BOUND, RequestError

MAX_WIDTH = 15  # the widest round; the cache's rings leave room for it


class Depth(Protocol):
    """Chooses the width of every round and is told what came of it.

    drafts: whether it may choose a width above 0 at all. If so, tokens that a constraint forces are drafted whatever
    it chooses; rounds of nothing else are not told to `record`.
    resting: whether no draft is to be asked for within `auto.AWAKE` rounds of the last one chosen, unless rows change
    or what is known of them.
    """

    drafts: bool
    resting: bool

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        """Width of the next round, 0 .. MAX_WIDTH, over rows of which this is the newest known outlook.

        owed: columns that the drafter would have to compute first, in all, because it was not asked lately.
        """
        ...

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        """A round of `width` drafted tokens a row: row i kept `kept[i]` columns, of width + 1.

        seconds: what the round took, or None where the time says nothing (a prompt chunk ran beside it, or the
        engine had been idle). outlook, owed: what `choose` was given for this round.
        """
        ...


class Constant:
    """Always the same width."""

    def __init__(self, width: int) -> None:
        self._width, self.drafts, self.resting = width, width > 0, not width

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        pass


class Heuristic:
    """Two wider when every draft of a round was kept, one narrower otherwise, at least 1.

    As `num_assistant_tokens_schedule="heuristic"` in transformers 5.14 `generation/candidate_generator.py`; with
    several rows their mean decides.
    """

    drafts, resting = True, False

    def __init__(self, width: int = 4, most: int = MAX_WIDTH) -> None:
        self._width, self._most = width, most

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        if width and kept:
            full = sum(k == width + 1 for k in kept) * 2 >= len(kept)
            self._width = min(self._most, self._width + 2) if full else max(1, self._width - 1)


class Apart:
    """A policy for rounds with a constrained row and one for all others: their rounds take longer by what the host
    does for the constraint, and keep more."""

    drafts, resting = True, False

    def __init__(self, free: Auto, bound: Auto) -> None:
        self._free, self._bound = free, bound

    @property
    def both(self) -> tuple[Auto, Auto]:
        return self._free, self._bound

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        policy = self._of(outlook)
        width, self.resting = policy.choose(outlook, owed), policy.resting
        return width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        self._of(outlook).record(width, kept, seconds, outlook, owed)

    def state(self) -> dict[str, Any]:
        """What both have learnt, as plain values of JSON."""
        return {"free": self._free.state(), "bound": self._bound.state()}

    @classmethod
    def restored(cls, state: Any) -> Apart:
        """Both, going on with what others have learnt. Raises as `Auto.restored`."""
        return cls(Auto.restored(state["free"]), Auto.restored(state["bound"]))

    def _of(self, outlook: Sequence[int]) -> Depth:
        return self._bound if any(o >= BOUND for o in outlook) else self._free


def depth_of(width: int | str) -> Depth:
    """An integer from 0 to MAX_WIDTH, "heuristic" or "auto". Raises RequestError."""
    if width == "heuristic":
        return Heuristic()
    if width == "auto":
        return Apart(Auto(), Auto())
    if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= MAX_WIDTH:
        raise RequestError(f"width is {width!r}; expected 0 to {MAX_WIDTH}, 'auto' or 'heuristic'")
    return Constant(width)
