"""The width that pays, from what this machine and text have shown. Plain Python; knows counts and seconds, no arrays.

`Auto` maximises expected tokens over expected time, both measured while it runs, and width 0 is one of its choices:
drafting that does not pay stops, and is probed again at growing distances.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_mtp.acceptance import AT_ONCE, Acceptances
from mlx_mtp.round_times import PROVEN, SAMPLES, RoundTimes, within
from mlx_mtp.rows import DRAWN, NOTHING

AWAKE = 16  # rounds before a look at drafts that a drafter is to know of; others it need not be shown


class Recorded(NamedTuple):
    """What `record` is told of a round, and the width that was chosen last by then."""

    width: int
    kept: list[int]
    seconds: float | None
    outlook: Sequence[int]
    owed: int
    chosen: int


class Rest(NamedTuple):
    """What is known while width 0 is best, until more is learnt.

    distance: rounds between looks, at least; 0 for none.
    bears: of what drafts make up for, in rounds of width 0: so much may be lost beside what a look loses.
    lasting: whether width 0 stays the best when what was kept lately has faded.
    """

    distance: int
    bears: float
    lasting: bool


class Auto:
    """The width with the most expected tokens per expected second, from what this machine and text have shown.

    Acceptance is estimated for every outlook by itself: a row whose drafter has found its text elsewhere is another
    case than one where it guesses. What is known of a row when a width is chosen is one round old, and what comes of
    it is put down to that knowledge, so that the delay is part of the estimate.
    The very first rounds draft, narrowly and while that promises anything, for a drafter that reads what it has missed
    owes nothing yet. Rounds of width 0 follow, by which they are timed. Where costs were `timed` before, it drafts if
    that promises to pay, and narrowly, too, until a draft has been judged.
    Times are those of `RoundTimes`. They never fall with the width, so a shape not yet seen takes at least what the
    next narrower one takes; where that would be fast enough to win, the shape is tried. Steps in the cost, as kernels
    have them, are found this way; of several shapes that is tried first which is the best if there is no step, though
    none much wider than all that are known. It is tried right behind rounds of width 0: what is inferred from a width
    that was timed in a bad moment is wrong, and seems to be right. A round during which one of another width was built
    does not count, except to show that no draft could pay: where the host is the slower one it takes as long as that
    building.
    Rounds that must make up for many without drafts say what that costs (a draft model reads all it has missed), and
    nothing about their width. Drafting is taken up again where the budget bears that: at a text's beginning, mostly.
    A width is worth its drafts only if it is clearly better than width 0. While it drafts, rounds of width 0 are run
    now and then, for all is judged by them: as often as a small share of the time allows, which is the more often the
    less drafting seems to gain. Where width 0 is best, a narrow round is tried at growing distances, unless no drafter
    has anything. A width is timed only while it promises clearly more than a token a round: no draft is free. Where no
    known width would pay if all of its drafts were kept, no other is tried, and the distance is the greatest at once,
    or as long as LOSS takes to bring in what the look loses. The very first rounds are doubted, where nothing has to
    be made up, though later of a drafter that ever must; of others a cost little too high for good drafts.
    What drafting loses against width 0 it takes from a budget, counted in rounds of width 0; with what a plain round
    takes longer because one with drafts is built beside it. Its gains and LOSS of all time go in, up to BUDGET tokens,
    which is the fewer rounds the more rows there are. While nothing is left nothing is drafted, and no shape is tried
    that could take more than there is; of what was lost beyond, DEBT at most is counted.
    All of this goes on in the next process, where `state` is kept and `restored`; only kernels are built anew there.
    What was restored is checked by first rounds of width 0, and forgotten if those with drafts behind take much longer.
    """

    GAIN, WORTH = 1.03, 1.01  # a new width must look so much better than the present one, the present than width 0
    NARROW = 1  # width of first rounds and of looks
    OPENING = 2  # first rounds that draft
    PROMISE = 1.25  # tokens of a round, for which its width is timed
    HARDLY = 1.1, 1.15  # tokens of a narrow round of one row and of several, up to which hardly any draft is kept
    # Share of the present rate, for which a width is tried: costs may bend, but not everywhere, and less between widths
    # that are known.
    HOPE, BETWEEN = 0.75, 0.9
    LOSS = 0.006  # share of the time
    # Tokens of all rows: what they may lose at once, for one text's gain does not pay for another's loss; and what of a
    # greater loss counts, as of a round that hung.
    BUDGET, DEBT = 20, 6
    FULL = 0.95  # share of the budget that is all of it
    MEMORY = 0.999  # per round: after a thousand a loss is forgotten
    MISSES = 16  # after which a width is taken to be none that the drafter can draft
    FURTHER = 2  # times the widest that is timed, and one more, is as wide as a shape may be that is tried next
    PAUSE = 6  # rounds between two shapes that are tried for their time
    FIRST_PROBE, LAST_PROBE, PROBE_ROUNDS = 48, 768, 2
    WRONG = 1.25  # as much too high may a cost be that was found in bad moments
    DOUBT = 192  # rounds, for which that is believed, and the very first ones of a drafter that must catch up
    FIRST_CHECK, LAST_CHECK, CHECK_ROUNDS = 5, 256, 3  # rounds with drafts before some without
    CHECK_SHARE = 0.005  # of the time that those may cost
    OWED, OWED_SHARE = 16, 0.05  # columns a row that are not made up in passing; share of a round that is not noise
    OWED_COST = 1 / 8  # of a column, in rounds of width 0, before it is known
    drafts = True

    def __init__(self, most: int = 8) -> None:
        """most: the widest round it considers."""
        self._most = most
        self._acceptance = Acceptances(most)
        self._times = RoundTimes(most)
        self._seen: set[tuple[int, int]] = set()
        self._recheck, self._unseen = self.FIRST_CHECK, 0
        self._width = 0  # the best, as far as is known
        self._left = self.BUDGET / 2  # rounds of width 0 that may still be lost
        self._opened: Counter[int] = Counter()  # first rounds with drafts, by rows
        self._checked: Counter[int] = Counter()  # first rounds without, for costs that were restored, by rows
        self._missed: Counter[tuple[int, int]] = Counter()  # rounds of another width while an unknown one was chosen
        self._quiet = 0  # rounds since a shape was tried for its time
        self._trial: tuple[int, int] | None = None
        self._wait, self._since, self._probing = self.FIRST_PROBE, 0, 0
        self._chosen, self.resting = 0, False  # for the round that comes
        self._rests: dict[tuple[int, ...], Rest] = {}  # by sorted outlooks where width 0 is best
        self._rested = 0  # rounds that this has stood
        self._heard: list[Recorded] = []  # rounds that nothing has been made of yet
        self._made_up: deque[tuple[int, float]] = deque(maxlen=5)  # columns that were owed, and the rounds they took
        self._column = self.OWED_COST  # what one takes
        self._owing = False  # whether the drafter must ever catch up

    @property
    def settled(self) -> int:
        """The width it takes to be the best; a round of another one is there to find something out."""
        return self._width

    def state(self) -> dict[str, Any]:
        """What it has learnt, as plain values of JSON."""
        self._learn()
        return {
            "times": self._times.state(),
            "kept": self._acceptance.state(),
            "width": self._width,
            "left": max(self._left, -self.DEBT),
            "wait": self._wait,
            "since": self._since,
            "recheck": self._recheck,
            "opened": sorted(self._opened.items()),
            "column": self._column,
            "owing": self._owing,
        }

    @classmethod
    def restored(cls, state: Any) -> Auto:
        """One that goes on with what another has learnt, perhaps in another process, though it looks again sooner where
        drafts have not paid: texts may be others now. Raises as `within`, LookupError too."""
        auto = cls()
        auto._times.restore(state["times"])
        auto._acceptance.restore(state["kept"])
        auto._width = int(within(state["width"], 0, auto._most))
        auto._left = within(state["left"], -cls.DEBT, cls.BUDGET)
        auto._wait = min(int(within(state["wait"], cls.FIRST_PROBE, cls.LAST_PROBE)), cls.DOUBT)
        auto._since = int(within(state["since"], 0, sys.maxsize))
        auto._recheck = int(within(state["recheck"], cls.FIRST_CHECK, cls.LAST_CHECK))
        auto._opened = Counter({int(rows): int(within(n, 0, cls.OPENING)) for rows, n in state["opened"]})
        auto._column, auto._owing = within(state["column"], 0.0, sys.maxsize), bool(state["owing"])
        return auto

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        self._owing = self._owing or owed > 0
        missed = owed > 2 * self.CHECK_ROUNDS * len(outlook)  # more than by two looks at width 0
        late = owed * self._column if missed else 0.0
        bears, self.resting = self._bearable(len(outlook)), False
        if late <= bears:
            self._chosen = self._choose(tuple(sorted(outlook)), owed, late)
        else:
            self._chosen, self._since, self._trial = 0, self._since + 1, None
            self.resting = bears + 2 * AT_ONCE * self.LOSS < late  # so much may be brought in meanwhile
        return self._chosen

    def _choose(self, outlook: tuple[int, ...], owed: int, late: float) -> int:
        if outlook in self._rests:
            self._quiet += 1
            return self._probe(outlook, late)
        self._learn()
        rows, known = len(outlook), self._times.known(len(outlook))
        hopeful = any(o % DRAWN != NOTHING for o in outlook)
        costs, tokens = self._times.costs(rows), self._acceptance.tokens(outlook)
        if 0 not in known:
            return self._opening(rows, tokens) if hopeful else 0
        drafted, pays = len(known) > 1, self.can_pay(rows)
        meeting = self._meeting(rows, known, costs, tokens) if hopeful and (drafted or pays) else None
        if meeting is not None and self._missed[rows, meeting] < self.MISSES:
            return 0 if self._times.plain_s(rows) is None else meeting  # where nothing ran it could be compared with
        self._quiet += 1
        rates = [t / c for t, c in zip(tokens, costs, strict=True)]  # over that of width 0
        before, self._width = self._width, self._best(known, rates)
        if self._width != before:  # rounds of width 0 just before it are a look
            self._recheck, self._unseen = self.FIRST_CHECK, 0 if self._chosen else -1
        if self._width:
            self._wait = self.FIRST_PROBE
            if self._times.believed(rows, self._width) and self._checked[rows] < self.CHECK_ROUNDS:
                self._checked[rows] += 1
                self._unseen = 0
                return 0
            if self._overdue(rows, tokens, rates):
                return 0
        judged = self._acceptance.judged(outlook)
        if drafted and pays and judged and self._quiet > self.PAUSE:
            trial = self._worth_trying(rows, known, costs, tokens, rates)
            if trial is not None and self._width and self._unseen:  # rounds to compare it with come first
                self._unseen = self._recheck
                return 0
            if trial is not None:
                self._trial, self._quiet = (rows, trial), 0
                return trial
        if self._width:
            return self._width if judged else self.NARROW
        self._rests[outlook] = self._rest(outlook, owed, tokens, pays) if hopeful else Rest(0, 0.0, False)
        return self._probe(outlook, late)

    def _opening(self, rows: int, tokens: list[float]) -> int:
        """Width of one of the first rounds with so many rows, before the time of width 0 is known."""
        if self._opened[rows] == self.OPENING or tokens[self.NARROW] <= self.PROMISE or not self.can_pay(rows):
            return 0
        self._opened[rows] += 1
        self._quiet = self.PAUSE
        return self.NARROW

    def can_pay(self, rows: int, wrong: float = 1.0) -> bool:
        """Whether drafts would pay if all of them were kept, and cost so much less than is known; while none have been
        timed with so many rows, whether they would with the next fewer."""
        timed = self._timed(rows)
        costs, widths = self._times.costs(timed), self._times.known(timed) - {0}
        return not widths or any((1 + w) * wrong / costs[w] > self.WORTH for w in widths)

    def _timed(self, rows: int) -> int:
        """So many rows, or the next fewer with which rounds with drafts have been timed; as many if there are none."""
        return next((r for r in range(rows, 0, -1) if len(self._times.known(r)) > 1), rows)

    def _meeting(self, rows: int, known: frozenset[int], costs: list[float], tokens: list[float]) -> int | None:
        """The width that is being timed for the first time, if one is and may still pay: the first of all, or one that
        is on trial."""
        width = self.NARROW if len(known) == 1 else 0
        if not width and self._trial and self._trial[0] == rows and self._trial[1] not in known:
            width = self._trial[1]
        return width if tokens[width] > max(self.PROMISE, self.WORTH * costs[width]) else None

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        self._rested += 1
        self._heard.append(Recorded(width, kept, seconds, outlook, owed, self._chosen))
        if width or self._rested >= AT_ONCE:
            self._rests, self._rested = {}, 0
            self._learn()

    def knows(self, rows: int) -> bool:
        """Whether it knows what rounds of so many rows cost, with drafts and without."""
        return {0, self.NARROW} <= self._times.known(rows)

    def timed(self, rows: int, width: int, seconds: float | None) -> None:
        """A round of a text that nobody has asked for, of which only the time counts, if even that does."""
        self._seen.add((rows, width))
        if seconds is not None:
            self._times.learn(rows, width, seconds)

    def _learn(self) -> None:
        """From the rounds that nothing has been made of yet."""
        for heard in self._heard:
            self._acceptance.record(heard.width, heard.kept, heard.outlook)
            rows, width = len(heard.kept), heard.width
            owed = heard.owed if width and heard.owed > self.OWED * rows else 0
            if (rows, width) not in self._seen:
                self._seen.add((rows, width))  # the first round of a shape also pays for building its kernels
                self._left -= owed * self._column
            elif heard.seconds is not None:
                self._time(heard, heard.seconds, owed)
        self._heard = []

    def _time(self, heard: Recorded, seconds: float, owed: int) -> None:
        """A round took so long; columns that it has made up for, if many."""
        rows, width, chosen = len(heard.kept), heard.width, heard.chosen
        plain_s, known = self._times.plain_s(rows), self._times.known(rows)
        if plain_s is None and {0, width} <= known:  # the first round with so many rows again
            plain_s = seconds / self._times.costs(rows)[width]
        took = None if plain_s is None else seconds / plain_s
        if took is not None:
            rounds = 1 if self._times.begun(rows, width) else 2  # the shape's first one is reckoned with now
            builds = chosen > 0 and chosen in known  # one with drafts beside it, whose own time lacks that
            gained = sum(heard.kept) / rows - took if width or builds else 0.0
            left = self.MEMORY * self._bearable(rows) + rounds * (gained + self.LOSS * took)
            self._left = max(min(left, self.BUDGET / rows), -self.DEBT / rows)
        if owed:
            if took is not None:  # a width that is not known takes at most a plain round a token
                usual = self._times.costs(rows)[width] if width in known else 1 + width
                self._make_up(owed, max(0.0, took - usual))
            if width not in known or took is None or owed * self._column > self.OWED_SHARE * took:
                return
        # The last round with drafts may seem too short, where the host is the slower one: good enough for a trial that
        # was broken off, rather than to try it again, and where drafts could not pay even so.
        if width == chosen or (not chosen and (width not in known or not self.can_pay(rows))):
            self._times.learn(rows, width, seconds, heard.owed > 0)
        elif chosen not in known:
            self._missed[rows, chosen] += 1

    def _make_up(self, owed: int, took: float) -> None:
        """A round with drafts took so much longer than its width does, after so many columns without."""
        self._made_up.append((owed, took))
        columns, rounds = (sum(parts) for parts in zip(*self._made_up, strict=True))
        self._column = rounds / columns

    def _best(self, known: frozenset[int], rates: list[float]) -> int:
        """The best of the widths whose cost is known; the present one unless another is clearly better, or it is hardly
        better than none."""
        width = max(known, key=lambda w: rates[w])
        if self._width in known and rates[width] < self.GAIN * rates[self._width]:
            width = self._width
        return width if rates[width] > self.WORTH else 0

    def _worth_trying(
        self, rows: int, known: frozenset[int], costs: list[float], tokens: list[float], rates: list[float]
    ) -> int | None:
        """An untimed width that would win if it took no longer than the next narrower timed one: the best of those if
        the cost went on as it has so far, unless that one would be hopeless then."""
        wanted = self.GAIN * rates[self._width]
        if max(rates) < wanted:
            return None
        nearest = range(1, min(self._most, self.FURTHER * max(known) + 1) + 1)
        widths = [w for w in nearest if w not in known and tokens[w] > self.PROMISE]
        widths = [w for w in widths if self._missed[rows, w] < self.MISSES]
        unknown = [w for w in widths if rates[w] >= wanted and self._affordable(rows, w, max(known), costs, tokens)]
        likely = {}
        for width in unknown:
            timed = max(w for w in known if w < width) or max(known)
            likely[width] = tokens[width] / _went_on(costs, timed, width)
        best = max(likely, key=lambda w: likely[w], default=0)
        hope = self.HOPE if best > max(known) else self.BETWEEN
        return best if best and likely[best] > hope * rates[self._width] else None

    def _bearable(self, rows: int) -> float:
        """Rounds of width 0 that may be lost with so many rows. What a new policy begins with is one row's."""
        return min(self._left, self.BUDGET / rows)

    def _affordable(self, rows: int, width: int, widest: int, costs: list[float], tokens: list[float]) -> bool:
        """Whether the loss would be borne if timing a width brought no more than the widest that is known, and the cost
        went on as so far; or the budget is full. The first round tells no time, and one more is chosen in vain."""
        loses = (SAMPLES + 2) * (_went_on(costs, widest, width) - tokens[min(width, widest)])
        return min(loses, self.FULL * self.BUDGET / rows) <= self._bearable(rows)

    def _overdue(self, rows: int, tokens: list[float], rates: list[float]) -> bool:
        """Whether it is long since rounds of width 0 were seen, by which all the others are judged, or the last round
        contradicts what was kept of its cost."""
        compared = self._times.comparisons(rows, self._width)
        wait = self._recheck if compared else SAMPLES
        self._unseen = max(self._unseen + 1, wait if self._times.contrary else 0)
        if self._unseen >= wait + self.CHECK_ROUNDS:
            dear = self.CHECK_ROUNDS * (rates[self._width] - 1)  # tokens that a look costs
            longest = int(dear / (self.CHECK_SHARE * tokens[self._width]))
            most = min(max(longest, self.FIRST_CHECK), self.LAST_CHECK) if compared >= PROVEN else self.FIRST_CHECK
            self._unseen, self._recheck = 0, min(2 * self._recheck, most)
        return self._unseen >= wait

    def _probe(self, outlook: tuple[int, ...], late: float) -> int:
        """Width of a round while drafting does not pay: 0, except for a narrow look at growing distances."""
        rest = self._rests[outlook]
        if not rest.distance:
            return 0
        self._since += 1
        due = max(self._wait, rest.distance)
        if self._since >= due and late <= rest.bears:
            self._since, self._wait = 0, min(self.LAST_PROBE, 2 * self._wait)
            self._probing = self._look(outlook)
        if not self._probing:
            self.resting = rest.lasting and self._since + AWAKE < due
            return 0
        self._probing -= 1
        return self.NARROW

    def _rest(self, outlook: tuple[int, ...], owed: int, tokens: list[float], pays: bool) -> Rest:
        """When to look again, where width 0 is best and some drafter may have something. pays: as `can_pay` says."""
        rows, known = len(outlook), self._times.known(len(outlook))
        proven = len(known) == 1 or any(self._times.comparisons(rows, w) for w in known if w)
        loses = self._look(outlook) * max(0.0, self._times.costs(self._timed(rows))[self.NARROW] - tokens[self.NARROW])
        if pays:
            distance = self.FIRST_PROBE
        elif proven or owed:  # not before LOSS has brought in what the look loses
            doubted = not self._owing and tokens[self.NARROW] > self.PROMISE and self.can_pay(rows, self.WRONG)
            distance = max(self.DOUBT if doubted else self.LAST_PROBE, int(loses / self.LOSS))
        else:
            distance = self.DOUBT if self._owing else self.FIRST_PROBE
        bears = self._bearable(rows) - loses if self.NARROW in known else 0.0  # what is not known may lose more
        return Rest(distance, max(0.0, bears), not pays or self._stays(outlook, known))

    def _stays(self, outlook: tuple[int, ...], known: frozenset[int]) -> bool:
        """Whether width 0 is the best still, and no other is tried, when what was kept lately has faded."""
        rows, tokens = len(outlook), self._acceptance.tokens(outlook, lasting=True)
        costs = self._times.costs(rows)
        if len(known) == 1:
            return self._meeting(rows, known, costs, tokens) is None
        rates = [t / c for t, c in zip(tokens, costs, strict=True)]
        return not self._best(known, rates) and self._worth_trying(rows, known, costs, tokens, rates) is None

    def _look(self, outlook: tuple[int, ...]) -> int:
        """Rounds of a narrow look: one where hardly any draft is ever kept, or where it is only asked how long a round
        takes; and one more where the first of all would not tell that."""
        rows, width = len(outlook), self.NARROW
        if width not in self._times.known(rows):
            return self.PROBE_ROUNDS
        unseen = (rows, width) not in self._seen
        if not self.can_pay(rows):
            return 1 + unseen
        return 1 if self._acceptance.tokens(outlook)[width] <= self.HARDLY[rows > 1] else self.PROBE_ROUNDS + unseen


def _went_on(costs: list[float], timed: int, width: int) -> float:
    """Cost of a width if it rose with the width as it does up to a timed one."""
    return 1 + (costs[timed] - 1) / timed * width
