"""How many tokens to draft in a round. Plain Python; knows counts and seconds, and no arrays.

`Auto` maximises expected tokens over expected time, both measured while it runs, and width 0 is one of its choices:
drafting that does not pay stops, and is probed again at growing distances.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Protocol

from mlx_mtp.rows import BOUND, NOTHING, RequestError

MAX_WIDTH = 15  # the widest round; the cache's rings leave room for it


class Depth(Protocol):
    """Chooses the width of every round and is told what came of it.

    drafts: whether it may choose a width above 0 at all. If so, tokens that a constraint forces are drafted whatever
    it chooses; rounds of nothing else are not told to `record`.
    """

    @property
    def drafts(self) -> bool: ...

    def choose(self, outlook: Sequence[int]) -> int:
        """Width of the next round, 0 .. MAX_WIDTH, over rows of which this is the newest known outlook."""
        ...

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        """A round of `width` drafted tokens a row: row i kept `kept[i]` columns, of width + 1.

        seconds: what the round took, or None where the time says nothing (a prompt chunk ran beside it, or the
        engine had been idle). outlook: what `choose` was given for this round.
        """
        ...


class Constant:
    """Always the same width."""

    def __init__(self, width: int) -> None:
        self._width, self.drafts = width, width > 0

    def choose(self, outlook: Sequence[int]) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        pass


class Heuristic:
    """Two wider when every draft of a round was kept, one narrower otherwise, at least 1.

    As `num_assistant_tokens_schedule="heuristic"` in transformers 5.14 `generation/candidate_generator.py`; with
    several rows their mean decides.
    """

    drafts = True

    def __init__(self, width: int = 4, most: int = MAX_WIDTH) -> None:
        self._width, self._most = width, most

    def choose(self, outlook: Sequence[int]) -> int:
        return self._width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        if width and kept:
            full = sum(k == width + 1 for k in kept) * 2 >= len(kept)
            self._width = min(self._most, self._width + 2) if full else max(1, self._width - 1)


class Acceptance:
    """How many drafts are kept, by position, at two speeds: counts that fade with every round, over a slow mean that
    remembers. Pooled over rows."""

    FADE = 0.96  # per round: about 25 rounds count
    SLOW = 1 / 64  # weight of a round in the slow mean
    PRIOR, PRIOR_WEIGHT = 0.7, 2.0  # of a draft being kept, before there is evidence; and of the slow mean
    HOPELESS = 0.02  # the same of rows whose drafter has nothing: not worth a try

    def __init__(self, most: int, outlook: int) -> None:
        """most: positions that are kept apart."""
        self._prior = self.HOPELESS if outlook % BOUND == NOTHING else self.PRIOR
        self._hits, self._tries = [0.0] * most, [0.0] * most
        self._slow, self._rounds = [self._prior] * most, [0] * most
        self._expected: list[float] = []  # tokens by width; none: to be reckoned anew

    def record(self, width: int, kept: Sequence[int]) -> None:
        """A round in which these rows kept so many columns of width + 1."""
        self._expected = []
        self._hits = [x * self.FADE for x in self._hits]
        self._tries = [x * self.FADE for x in self._tries]
        for i in range(min(width, len(self._hits))):
            judged = [columns - 1 > i for columns in kept if columns > i]  # all drafts before i were kept
            if judged:
                share = sum(judged) / len(judged)
                weight = len(judged) / len(kept)
                self._hits[i] += share * weight
                self._tries[i] += weight
                self._rounds[i] += 1
                rate = max(self.SLOW, 1 / (self._rounds[i] + 2)) * weight
                self._slow[i] += rate * (share - self._slow[i])

    def expected_tokens(self, width: int) -> float:
        """Tokens a row gains from a round of this width."""
        if not self._expected:
            self._expected = self._expect()
        return self._expected[min(width, len(self._hits))]

    def _expect(self) -> list[float]:
        """`expected_tokens` of all widths."""
        totals, alive, last, level = [1.0], 1.0, self._prior, 1.0
        for i in range(len(self._hits)):
            # Positions rise and fall together: what the slow mean says is scaled by how the position before fares.
            prior = min(0.97, self._slow[i] * level) if self._rounds[i] else last
            last = (self._hits[i] + self.PRIOR_WEIGHT * prior) / (self._tries[i] + self.PRIOR_WEIGHT)
            level = last / max(self._slow[i], 0.02) if self._rounds[i] else level
            alive *= last
            totals.append(totals[-1] + alive)
        return totals


class Auto:
    """The width with the most expected tokens per expected second, from what this machine and text have shown.

    Acceptance is estimated for every outlook by itself: a row whose drafter has found its text elsewhere is another
    case than one where it guesses. What is known of a row when a width is chosen is one round old, and what comes of
    it is put down to that knowledge, so that the delay is part of the estimate.
    The time of a round is the median of the last ones of its shape (rows, width), times the pace at which rounds of all
    shapes run now: machines get hot and contexts long, and a shape that was timed before would seem fast. It never
    falls with the width, so a shape not yet seen takes at least what the next narrower one takes; where that would be
    fast enough to win, the shape is tried. Steps in the cost, as kernels have them, are found this way. While it
    drafts, rounds of width 0 are run now and then, for all is judged by them. A round during which one of another width
    was built does not count: where the host is the slower one it takes as long as that building.
    Where width 0 is best, a narrow round is tried at growing distances, unless no drafter has anything. A ledger holds
    what drafting has gained and lost against width 0; while it shows a loss of more than LOSS, nothing is drafted, and
    no shape is tried that could make it as much.
    """

    GAIN = 1.03  # a new width must look this much better
    SAMPLES, FIRST = 2, 2  # timed rounds before a shape is judged; the first width: what is wasted if nothing is kept
    LOSS, ALLOWANCE = 0.015, 4  # share of the time, on top of so many rounds of width 0
    MEMORY = 0.999  # per round: about a thousand rounds stand in the ledger
    TIMES = 9  # of a shape, whose median counts
    PACE = 0.5  # weight of a round in how fast the machine is now
    PAUSE = 6  # rounds between two shapes that are tried for their time
    FIRST_PROBE, LAST_PROBE, PROBE_WIDTH, PROBE_ROUNDS = 24, 768, 1, 2
    FIRST_CHECK, LAST_CHECK, CHECK_ROUNDS = 8, 128, 2  # rounds with drafts before some without
    SURPRISE = 0.15  # share by which those may be off before the next ones come soon
    drafts = True

    def __init__(self, most: int = 8) -> None:
        """most: the widest round it considers."""
        self._most = most
        self._kept: dict[int, Acceptance] = {}  # by outlook
        self._times: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=self.TIMES))
        self._medians: dict[tuple[int, int], float] = {}  # of the shapes that have been timed
        self._speeds: dict[int, list[float]] = {}  # what `seconds` says at pace 1, by rows
        self._seen: set[tuple[int, int]] = set()
        self._recheck, self._unseen = self.FIRST_CHECK, 0
        self._pace = 1.0  # by how much rounds take longer now than at first; `_times` are over it
        self._width = min(self.FIRST, most)
        self._gained = self._spent = 0.0  # the ledger, in seconds
        self._quiet = 0  # rounds since a shape was tried for its time
        self._trial: tuple[int, int] | None = None
        self._wait, self._since, self._probing = self.FIRST_PROBE, 0, 0
        self._chosen = 0  # for the round that comes

    @property
    def settled(self) -> int:
        """The width it takes to be the best; a round of another one is there to find something out."""
        return self._width

    def choose(self, outlook: Sequence[int]) -> int:
        self._chosen = self._choose(outlook)
        return self._chosen

    def _choose(self, outlook: Sequence[int]) -> int:
        rows = len(outlook)
        hopeful = any(o % BOUND != NOTHING for o in outlook)
        if not self._timed(rows, 0) or self._left(rows) < 0:
            return 0
        first = min(self.FIRST, self._most)
        if hopeful and self.expected_tokens(outlook, first) > self.GAIN and not self._drafted(rows):
            return first
        if hopeful and self._trial and self._trial[0] == rows and not self._timed(*self._trial):
            return self._trial[1]
        self._quiet += 1
        before, self._width = self._width, self._best(outlook)
        if self._width != before:
            self._recheck, self._unseen = self.FIRST_CHECK, 0
        if self._width:
            self._wait = self.FIRST_PROBE
            if self._overdue():
                return 0
        trial = self._worth_trying(outlook)
        if trial is not None and self._quiet > self.PAUSE:
            self._trial, self._quiet = (rows, trial), 0
            return trial
        return self._width or (self._probe() if hopeful else 0)

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        by_outlook: defaultdict[int, list[int]] = defaultdict(list)
        for columns, o in zip(kept, outlook, strict=True):
            by_outlook[o].append(columns)
        for o, columns in by_outlook.items():
            self._acceptance(o).record(width, columns)
        shape = len(kept), width
        if shape not in self._seen:
            self._seen.add(shape)  # the first round of a shape also pays for building its kernels
        elif seconds is not None:
            self._time(*shape, sum(kept) / len(kept), seconds)

    def _time(self, rows: int, width: int, tokens: float, seconds: float) -> None:
        """A round brought so many tokens a row, and took so long."""
        times = self._times[rows, width]
        if self._timed(rows, 0):
            rounds = 1 if times else 2  # the shape's first one is reckoned with now
            gained = tokens * self.seconds(rows, 0) - seconds if width else 0.0
            self._gained = self.MEMORY * self._gained + rounds * gained
            self._spent = self.MEMORY * self._spent + rounds * seconds
        if width != self._chosen:
            return
        if self._timed(rows, width):
            slower = seconds / self.seconds(rows, width)
            if not width and self._width and abs(slower - 1) > self.SURPRISE:
                self._recheck = self.FIRST_CHECK  # all is judged by a wrong measure, so soon again
            known = len(times) / self.TIMES  # what surprises of a shape that is hardly known says little of the machine
            self._pace *= 1 + self.PACE * known * (min(max(slower, 0.5), 2.0) - 1)
        times.append(seconds / self._pace)
        if len(times) >= self.SAMPLES:
            self._medians[rows, width] = statistics.median(times)
            self._speeds.pop(rows, None)

    def expected_tokens(self, outlook: Sequence[int], width: int) -> float:
        """Tokens a row gains from a round of this width, mean over rows."""
        counts = Counter(outlook)
        return sum(n * self._acceptance(o).expected_tokens(width) for o, n in counts.items()) / len(outlook)

    def seconds(self, rows: int, width: int) -> float:
        """Time of a round: measured, or at least that of the next narrower shape that was; no more than that of a
        wider one, for one of the two was measured while the machine was slow."""
        if rows not in self._speeds:
            known = [self._medians.get((rows, w)) for w in range(self._most + 1)]
            least, narrower = math.inf, 0.0
            floors = [least := min(least, known[w] or least) for w in range(self._most, -1, -1)][::-1]
            self._speeds[rows] = [
                narrower := narrower if one is None else floor for one, floor in zip(known, floors, strict=True)
            ]
        return self._speeds[rows][width] * self._pace

    def _acceptance(self, outlook: int) -> Acceptance:
        if outlook not in self._kept:
            self._kept[outlook] = Acceptance(self._most, outlook)
        return self._kept[outlook]

    def _timed(self, rows: int, width: int) -> bool:
        return (rows, width) in self._medians

    def _drafted(self, rows: int) -> bool:
        """Whether any round with drafts has been timed for so many rows."""
        return any(self._timed(rows, width) for width in range(1, self._most + 1))

    def _rate(self, outlook: Sequence[int], width: int) -> float:
        return self.expected_tokens(outlook, width) / self.seconds(len(outlook), width)

    def _best(self, outlook: Sequence[int]) -> int:
        """The best of the widths whose time is known; the present one unless another is clearly better."""
        rates = {w: self._rate(outlook, w) for w in range(self._most + 1) if self._timed(len(outlook), w)}
        best = max(rates, key=lambda w: rates[w])
        stay = self._width in rates and rates[best] < self.GAIN * rates[self._width]
        return self._width if stay else best

    def _worth_trying(self, outlook: Sequence[int]) -> int | None:
        """An untimed width that would win if it took no longer than the next narrower timed one; of those about as good
        the narrowest, which costs least if it does not win."""
        rows = len(outlook)
        unknown = [w for w in range(1, self._most + 1) if not self._timed(rows, w)]
        if not unknown or not self._drafted(rows):
            return None
        unknown = [w for w in unknown if self._affordable(rows, w)]
        rates = {w: self._rate(outlook, w) for w in unknown}
        wanted = max(self.GAIN * self._rate(outlook, self._width), max(rates.values(), default=0.0) / self.GAIN)
        return next((w for w, rate in rates.items() if rate >= wanted), None)

    def _left(self, rows: int) -> float:
        """Seconds that may still be lost."""
        return self._gained + self.LOSS * self._spent + self.ALLOWANCE * self.seconds(rows, 0)

    def _affordable(self, rows: int, width: int) -> bool:
        """Whether the loss would be borne if timing a width brought nothing and the cost went on as it has so far."""
        widest = max(w for w in range(self._most + 1) if self._timed(rows, w))
        slope = (self.seconds(rows, widest) - self.seconds(rows, 0)) / max(widest, 1)
        return (self.SAMPLES + 1) * slope * width <= self._left(rows)

    def _overdue(self) -> bool:
        """Whether it is long since rounds of width 0 were seen, by which all the others are judged."""
        self._unseen += 1
        if self._unseen >= self._recheck + self.CHECK_ROUNDS:
            self._unseen, self._recheck = 0, min(self.LAST_CHECK, 2 * self._recheck)
        return self._unseen >= self._recheck

    def _probe(self) -> int:
        """Width of a round while drafting does not pay: 0, except for a narrow look at growing distances."""
        self._since += 1
        if self._since >= self._wait:
            self._since, self._wait, self._probing = (
                0,
                min(self.LAST_PROBE, 2 * self._wait),
                self.PROBE_ROUNDS,
            )
        if not self._probing:
            return 0
        self._probing -= 1
        return min(self.PROBE_WIDTH, self._most)


class Apart:
    """A policy for rounds with a constrained row and one for all others: their rounds take longer by what the host
    does for the constraint, and keep more."""

    drafts = True

    def __init__(self, free: Depth, bound: Depth) -> None:
        self._free, self._bound = free, bound

    def choose(self, outlook: Sequence[int]) -> int:
        return self._of(outlook).choose(outlook)

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        self._of(outlook).record(width, kept, seconds, outlook)

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
