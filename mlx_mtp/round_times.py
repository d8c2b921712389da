"""What rounds with drafts cost beside rounds without. Plain numbers; knows no row and no text.

The machine's speed changes all the time: a chip gets hot, another program wakes up, a context grows. Rounds of every
width then take longer, often from one round to the next and by half or more. So nothing is remembered in seconds. A
round is compared with rounds of another width just before and just after it; where those two disagree, the machine
changed meanwhile and the round says nothing. The cost of a width is the median of its last comparisons.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

SAMPLES = 2  # rounds of another width before its cost is known
NEAR = 3  # rounds on each side with which a round is compared; and of width 0 before its time is known
STEADY = 0.35  # share by which those two sides may differ
KEPT = 9  # comparisons of a width, whose median counts
PROVEN = 3  # comparisons after which a cost is believed
CONTRARY = 0.4  # by which the logarithm of a cost may differ from what was kept of it
FORGOTTEN = 8  # processes that have not timed a width, after which it is not known
LEVEL = 10.0  # logarithm of a cost that nothing has


def within(value: Any, least: float, most: float) -> float:
    """A number that was kept. Raises ValueError, TypeError or OverflowError unless it is one between two others."""
    number = float(value)
    if not least <= number <= most:
        raise ValueError(f"{number} was kept; expected {least} to {most}")
    return number


class Took(NamedTuple):
    """A round's width and the logarithm of its seconds; late: it also made up for rounds without drafts."""

    width: int
    log_s: float
    late: bool


class RoundTimes:
    """Costs of rounds by (rows, width), in rounds of width 0 with as many rows.

    most: the widest round.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows = 0
        self._last: deque[Took] = deque(maxlen=2 * NEAR + 1)  # rounds of `_rows` rows
        self.contrary = False  # whether the last round took much longer than was kept of its shape
        self._alike = 0  # of the last rounds have the same width
        self._paces: deque[float] = deque(maxlen=NEAR)  # of the last rounds, each less what its width surely costs
        self._plain: float | None = None  # the logarithm of a plain round's seconds now: the median of the paces
        self._first: defaultdict[tuple[int, int], list[float]] = defaultdict(list)  # comparisons with rounds before
        self._paired: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._levels: dict[tuple[int, int], float] = {}  # logarithm of the cost
        self._known: defaultdict[int, frozenset[int]] = defaultdict(frozenset)  # widths, by rows
        self._costs: dict[int, list[float]] = {}  # by rows
        self._ages: Counter[tuple[int, int]] = Counter()  # of what was restored, in processes
        self._timed: set[tuple[int, int]] = set()  # in this one
        self._restored: set[tuple[int, int]] = set()  # known by that alone

    def learn(self, rows: int, width: int, seconds: float, late: bool = False) -> None:
        """A round took so long; the last one told of ran shortly before. late: as in `Took`."""
        if rows != self._rows:
            self._rows = rows
            self._last.clear()
            self._paces.clear()
            self._plain = None
        self._timed.add((rows, width))
        took = math.log(max(seconds, 1e-9))
        if width not in self._known[rows]:
            self._meet(rows, width, took)
        self.contrary = not late and self._against(rows, width, took)
        self._alike = self._alike + 1 if self._last and self._last[-1].width == width else 1
        self._last.append(Took(width, took, late))
        if not width and len(self._last) > 1 and self._last[-2].width:
            self._paces.clear()  # what was inferred gives way to what is seen
        if width in self._known[rows] and (not width or self.comparisons(rows, width) >= PROVEN):
            self._paces.append(took - self._levels[rows, width])
            self._plain = statistics.median(self._paces)
        if (rows, 0) in self._restored and NEAR < len(self._last) <= 2 * NEAR:
            self._confirm(rows)
        if self._alike < len(self._last) > NEAR + 1:
            self._compare(rows)

    def _meet(self, rows: int, width: int, took: float) -> None:
        """One of the first rounds of a width, with nothing but those before it to compare it with."""
        beside = _logs(self._last, 0)[-NEAR:] if width else [took]
        plain = statistics.median(beside) if beside else self._plain
        if plain is None:
            return
        first = self._first[rows, width]
        first.append(took - plain)
        hopeless = width > 1 and first[-1] > math.log(1 + width)
        if hopeless or len(first) >= (SAMPLES if width else NEAR):
            self._known[rows] |= {width}
            if not width:
                self._meet_earlier(rows, took)
        self._settle(rows, width)

    def _meet_earlier(self, rows: int, took: float) -> None:
        """Rounds of other widths that ran shortly before the first ones of width 0, the last of which took so long. One
        of a width is enough to know its cost, and of several the slowest counts."""
        plain = statistics.median([took, *_logs(self._last, 0)])
        for width in {one.width for one in self._last} - {0}:
            earlier = _logs(self._last, width)
            self._first[rows, width] += [max(earlier) - plain] * len(earlier)
            self._known[rows] |= {width}
            self._settle(rows, width)

    def _against(self, rows: int, width: int, took: float) -> bool:
        """Whether a round is much longer than was kept of its shape, next to plain ones before."""
        if not width or (rows, width) not in self._restored:
            return False
        plain = _logs(self._last, 0)[-NEAR:]
        return bool(plain) and took - statistics.median(plain) - self._levels[rows, width] > CONTRARY

    def _forget(self, rows: int) -> None:
        """All costs with so many rows that were restored and not borne out since."""
        for key in {key for key in self._restored if key[0] == rows and key[1]}:
            self._known[rows] -= {key[1]}
            self._first.pop(key)
            self._paired.pop(key)
            self._restored.discard(key)
        self._costs.pop(rows, None)

    def _confirm(self, rows: int) -> None:
        """What was restored, by the very first rounds, if they had drafts and some of width 0 are behind them: a short
        text has no others. As in `_meet_earlier` one of a width is enough."""
        last = list(self._last)
        drafted, plain = last[:-NEAR], _logs(last[-NEAR:], 0)
        if len(plain) < NEAR or not all(one.width for one in drafted):
            return
        for width in {one.width for one in drafted}:
            dearer = max(_logs(drafted, width)) - statistics.median(plain)
            if width not in self._known[rows]:
                self._first[rows, width].append(dearer)
                self._known[rows] |= {width}
            elif (rows, width) in self._restored:
                paired = self._paired[rows, width]
                paired.extend([dearer] if paired else [self._levels[rows, width], dearer])
            self._restored.discard((rows, width))
            self._settle(rows, width)

    def plain_s(self, rows: int) -> float | None:
        """Seconds of a round of width 0 now, from the last rounds; None if none with so many rows ran lately."""
        return None if rows != self._rows or self._plain is None else math.exp(self._plain)

    def _compare(self, rows: int) -> None:
        """The round with NEAR others behind it, with those and as many before it, or all that ran."""
        last, place = list(self._last), len(self._last) - 1 - NEAR
        middle = last[place]
        width = middle.width
        other = next((one.width for one in last[place - 1 :: -1] if one.width != width), None)
        if other is None or other not in self._known[rows]:
            return
        before, after = _logs(last[:place], other), _logs(last[place + 1 :], other)
        if not after:
            return
        sides = statistics.median(before), statistics.median(after)
        if abs(sides[0] - sides[1]) > STEADY:
            return
        dearer = middle.log_s - sum(sides) / 2
        if width:  # what a width costs beside others is put down to itself, but width 0 is what all are compared with
            level = dearer + self._levels[rows, other]
        else:
            width, level = other, -dearer
        key = rows, width
        if key in self._restored and not middle.late:
            self._restored.discard(key)
            if abs(level - self._levels[key]) > CONTRARY:
                self._forget(rows)
                self._paired[key].clear()
        self._paired[key].append(level)
        self._settle(rows, width)

    def _settle(self, rows: int, width: int) -> None:
        paired, first = self._paired[rows, width], self._first.get((rows, width), [])  # which one just forgotten lacks
        self._levels[rows, width] = statistics.median(paired or first)
        self._costs.pop(rows, None)

    def state(self) -> list[tuple[int, int, int, bool, float, list[float]]]:
        """Of every shape that was timed: rows, width, age, whether its cost is known, and the logarithms of the cost by
        its first rounds and by its newest comparisons. The age is that of a process in which as many rows ran without
        that width."""
        ran = {rows for rows, _ in self._timed}
        out = []
        for (rows, width), first in self._first.items():
            key = rows, width
            age = 0 if key in self._timed else self._ages[key] + (rows in ran)
            newest = [*self._paired[key]][-PROVEN:]
            out.append((*key, age, width in self._known[rows], statistics.median(first), newest))
        return out

    def restore(self, state: Any) -> None:
        """Begin with what another one knew. Of as many rows all is believed until a comparison says something quite
        different, and of a width until it is too old: nobody would find out that one which once seemed too dear no
        longer is. Raises as `within`."""
        for rows, width, age, known, first, paired in state:
            key = operator.index(rows), int(within(width, 0, self._most))
            if age >= FORGOTTEN:
                continue
            self._ages[key] = operator.index(age)
            self._first[key] = [within(first, -LEVEL, LEVEL)]
            self._paired[key].extend(within(one, -LEVEL, LEVEL) for one in paired[-PROVEN:])
            if known:
                self._known[rows] |= {width}
                self._restored.add(key)
            self._settle(*key)

    def known(self, rows: int) -> frozenset[int]:
        """The widths that have been timed often enough."""
        return self._known[rows]

    def believed(self, rows: int, width: int) -> bool:
        """Whether the cost of this shape was restored, and none of its rounds has borne it out."""
        return (rows, width) in self._restored

    def begun(self, rows: int, width: int) -> bool:
        """Whether this shape has been timed at all, in this process."""
        return (rows, width) in self._first and (rows, width) in self._timed

    def comparisons(self, rows: int, width: int) -> int:
        """How often this shape has been compared with others, of the last KEPT times."""
        return len(self._paired[rows, width])

    def costs(self, rows: int) -> list[float]:
        """Of a round, by width: 1 for width 0, and never less than a narrower one's. A width that is not known costs
        what the next narrower one does that is."""
        if rows not in self._costs:
            self._costs[rows] = self._monotone(rows)
        return self._costs[rows]

    def _monotone(self, rows: int) -> list[float]:
        """Costs that rise with the width and are nearest to the levels, each of which weighs what it rests on (isotonic
        regression by pooling adjacent violators; Barlow et al. 1972)."""
        pools: list[tuple[int, float, float]] = []  # (narrowest width, level, weight)
        for width in sorted(self._known[rows] - {0}):
            first, level, weight = width, self._levels[rows, width], 1.0 + len(self._paired[rows, width])
            while pools and pools[-1][1] >= level:
                first, other, more = pools.pop()
                level, weight = (other * more + level * weight) / (more + weight), more + weight
            pools.append((first, level, weight))
        costs = [1.0] * (self._most + 1)
        for first, level, _ in pools:
            costs[first:] = [math.exp(max(level, 0.0))] * (self._most + 1 - first)
        return costs


def _logs(rounds: Iterable[Took], width: int) -> list[float]:
    """Of those rounds that have this width."""
    return [one.log_s for one in rounds if one.width == width]
