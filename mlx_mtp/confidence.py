"""Which drafted columns of a round are worth their experts: how sure the drafter is, calibrated, against their price.

A column of a mixture-of-experts target costs the weights of the experts that no other column has chosen. So every
drafter says of every draft how sure it is, a `bin`; a table says how often drafts of that bin are kept; the product
along a row is the chance that a column counts, and a column below a threshold is dead. It is computed, since shapes
are fixed before drafts exist, but borrows its row's first column's experts and so adds none, and it is never kept.
Dead columns of a row are its last ones, so no live column attends to one. What a constraint forces is always kept, and
comes first in its row, so it always lives.

All of that happens on the device. Verdicts come back with the tokens of the round, and the host learns from them: the
table, what experts cost, and the threshold that would have brought most tokens a second in the last rounds. The first
dead draft is judged for nothing, by the column before it, so a drafter that gets better is seen without exploration.

Exactness. Greedy and seeded rows have the target's own tokens whatever is dead. Rejection sampling is exact if what
decides about column j depends on the tokens drafted before j and not on the one drawn at j: the bin of a row that
rejects is a function of its drafter's distribution, not of the draw; the product runs along the row; and the
threshold is fixed before the round (the best set of columns over the batch would depend on later columns, which
follow the draw). The host counts experts and live columns of whole rounds, with columns behind a rejected draft whose
noise, keyed by position, is drawn from again; so does any policy that measures the time of a round.

Shapes: B rows, K width, N = B * (K + 1) columns of a pass. Knows no drafter and no request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp import kernels
from mlx_mtp.models.config import TextConfig
from mlx_mtp.models.families import Target
from mlx_mtp.rows import Draft

# A bin is a whole step of log-odds, the first and the last open. Rows that draw otherwise have bins of their own.
BINS, LOWEST = 12, -6.0
CERTAIN, COUPLED, REJECTING = 0, BINS, 2 * BINS
# Drafts that were looked up have no probability; theirs are bins of the length of the match, up to MATCHES.
LOOKED_UP, MATCHES = 3 * BINS, 16
# What a constraint forces is kept; a column that is there only because another row's goes on is not.
FORCED, IDLE = LOOKED_UP + MATCHES + 1, LOOKED_UP + MATCHES + 2
COUNT = IDLE + 1


# on the device ----------------------------------------------------------------------------------------------


def bins(values: mx.array, kind: mx.array) -> mx.array:
    """values [..., C] float32 that compete by their softmax, kind [...] of CERTAIN, COUPLED, REJECTING -> [...] int32:
    by the log-odds of the greatest."""
    best = mx.max(values, axis=-1)
    share = mx.minimum(best - mx.logsumexp(values, axis=-1), -1e-6)  # its log-probability
    return bins_of_odds(share - mx.log1p(-mx.exp(share)), kind)


def bins_of_odds(odds: mx.array, kind: mx.array) -> mx.array:
    """Log-odds [...] -> bins [...] int32."""
    step = mx.clip(mx.floor(odds - LOWEST), 0, BINS - 1)
    return step.astype(mx.int32) + kind


def bins_of_match(length: mx.array, width: int) -> mx.array:
    """Matches of length [B] int32 -> bins [B, width]: behind drafts that were kept a match is longer."""
    return LOOKED_UP + mx.minimum(length[:, None] + mx.arange(width), MATCHES)


def lenders(draft: Draft) -> mx.array | None:
    """[N] int32: the column of the pass over [bonus | draft] whose experts each one takes, itself where it lives."""
    if draft.live is None:
        return None
    columns = mx.arange(draft.width + 1)
    first = mx.arange(draft.tokens.shape[0])[:, None] * (draft.width + 1)
    return mx.where(columns <= draft.live[:, None], first + columns, first).flatten()


def pack(draft: Draft, right: mx.array | None) -> list[mx.array]:
    """What the host will learn from, int32, flat; right [B] as in `Verdict`. Nothing where nothing was cut."""
    if draft.live is None or draft.bins is None or right is None:
        return []
    return [mx.concatenate([draft.live, right, draft.bins.flatten()])]


# on the host ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a round brought. live: of every row, its live drafts. right: how many of its first drafts were the
    target's own, live ones and the first dead one. bins: of every row, those of its drafts."""

    live: list[int]
    right: list[int]
    bins: list[list[int]]

    @staticmethod
    def unpack(values: Iterator[int], rows: int, width: int) -> Judged:
        """From what `pack` gave."""
        live, right = list(islice(values, rows)), list(islice(values, rows))
        return Judged(live, right, [list(islice(values, width)) for _ in range(rows)])

    def of(self, rows: list[int]) -> Judged:
        return Judged([self.live[i] for i in rows], [self.right[i] for i in rows], [self.bins[i] for i in rows])


class Calibration:
    """How often drafts of a bin are kept when those before them were: counts that are halved where they are many, so
    that every bin forgets by its own evidence, over what the drafter says of itself."""

    PRIOR_WEIGHT, MEMORY = 2.0, 256.0  # drafts

    def __init__(self) -> None:
        odds = LOWEST + 0.5 + np.arange(BINS)
        length = np.arange(MATCHES + 1)
        own = 1 / (1 + np.exp(-odds))
        looked_up = np.where(length < 3, 0.1, length / (length + 2))
        prior = np.concatenate([own, own, own, looked_up, [1.0, 0.0]])
        self._hits, self._tries = self.PRIOR_WEIGHT * prior, np.full(COUNT, self.PRIOR_WEIGHT)

    @property
    def table(self) -> np.ndarray:
        """[COUNT] float64."""
        return self._hits / self._tries

    def record(self, judged: Judged) -> None:
        """A draft behind one that was not kept says nothing, nor does one behind a dead one."""
        for live, right, own in zip(judged.live, judged.right, judged.bins, strict=True):
            for i, which in enumerate(own[: min(right, live) + 1]):
                self._tries[which] += 1
                self._hits[which] += i < right
                if self._tries[which] > self.MEMORY:
                    self._tries[which] /= 2
                    self._hits[which] /= 2


class Overlap:
    """Distinct experts by columns: n columns touch as many as n ** g that choose at random, with the g that has fitted
    best lately. Columns of one text choose alike: 8 touched 39.4 of 256 experts in lucebox-hub/lucebox-hub#501, and 15
    58.9, top 8; g = 0.8 says 39.5 and 61.9."""

    FADE, USUAL = 0.98, 0.8  # per round; g until rounds say more

    def __init__(self, experts: int, top: int) -> None:
        self._experts, self._missed = experts, 1 - top / experts
        self._powers = np.linspace(0.3, 1.1, 33)
        self._error = (self._powers - self.USUAL) ** 2

    def distinct(self, columns: np.ndarray) -> np.ndarray:
        """Experts a layer for passes of so many live columns."""
        return self._curve(self._powers[np.argmin(self._error)], columns)

    def record(self, columns: int, experts: float) -> None:
        """A pass of so many live columns touched so many experts a layer."""
        found = self._curve(self._powers, np.asarray(columns))
        self._error = self.FADE * self._error + (found / max(experts, 1.0) - 1) ** 2

    def _curve(self, power: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self._experts * (1 - self._missed**columns**power)


class Share:
    """The share of a round's time that goes with its distinct experts: a regression of times on experts within rounds
    of one shape, drawn to what their bytes say until enough has been seen."""

    FADE, RATE, SPREAD = 0.995, 0.1, 0.15  # per round; of the means; how far the bytes may be wrong
    OUTLIER = 2.0  # times the mean: something else ran

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._means: dict[tuple[int, int], tuple[int, float, float]] = {}  # rounds, seconds, experts
        self._rounds = self._xx = self._xy = self._yy = 0.0

    @property
    def value(self) -> float:
        slope = self._xy / self._xx if self._xx else 0.0
        noise = max((self._yy - slope * self._xy) / max(self._rounds, 1.0), 1e-4)
        weight, own = self._xx / noise, 1 / self.SPREAD**2
        return float(np.clip((weight * slope + own * self._prior) / (weight + own), 0.0, 0.95))

    def record(self, shape: tuple[int, int], seconds: float, experts: float) -> None:
        """A round of a shape (rows, width) took so long and touched so many experts a layer."""
        rounds, mean_s, mean = self._means.get(shape, (0, seconds, experts))
        if rounds and seconds > self.OUTLIER * mean_s:
            return
        if rounds > 1:  # the first also pays for building its kernels
            x, y = experts / mean - 1, seconds / mean_s - 1
            self._rounds = self.FADE * self._rounds + 1
            self._xx = self.FADE * self._xx + x * x
            self._xy = self.FADE * self._xy + x * y
            self._yy = self.FADE * self._yy + y * y
        rate = max(self.RATE, 1 / (rounds + 1)) if rounds != 1 else 1.0
        self._means[shape] = (rounds + 1, mean_s + rate * (seconds - mean_s), mean + rate * (experts - mean))


@dataclass(frozen=True)
class Sizes:
    """Of a mixture-of-experts target: experts a layer, those a column takes, and the bytes of one in all layers and of
    whatever else a pass reads."""

    experts: int
    top: int
    expert_bytes: int
    other_bytes: int

    @staticmethod
    def of(target: Target) -> Sizes | None:
        """Of a loaded model; None where it has no experts."""
        config = target.config
        if not isinstance(config, TextConfig) or config.moe is None:
            return None
        moe, arrays = config.moe, cast(list[tuple[str, mx.array]], tree_flatten(cast(nn.Module, target).parameters()))
        routed = sum(a.nbytes for name, a in arrays if ".experts." in name)
        rest = sum(a.nbytes for name, a in arrays if ".experts." not in name)
        return Sizes(moe.experts, moe.top_k, routed // moe.experts, rest)

    @property
    def share(self) -> float:
        """Of a round's time, what a pass over four columns spends on experts by their bytes. Drafting, attention and
        the host take time as well, so 0.6 of it: a rough guess that stands until rounds have been measured."""
        read = self.expert_bytes * self.experts * (1 - (1 - self.top / self.experts) ** 4)
        return 0.6 * read / (read + self.other_bytes)


class Confidence:
    """Cuts drafts and learns what of them to cut.

    The threshold is the one under which the last rounds would have brought most tokens a second: every column that
    lives adds its chance to the tokens, and its experts to the time. So a column lives if it is worth more than it
    costs at the present price of a token, where many columns already pay for the experts at hand too.

    Where no threshold would bring GAIN more tokens a second than trying every draft, nothing is cut, and drafts are
    weighed in few rounds, to see when that changes.
    """

    ROUNDS, EVERY = 32, 4  # that are looked back on; between two looks
    GAIN, SELDOM = 1.01, 16  # what it takes to cut at all; rounds, of which one is weighed while it does not pay
    THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __init__(self, sizes: Sizes, threshold: float | None = None, share: float | None = None) -> None:
        """threshold: always this one (0 cuts nothing), instead of what pays. share: of a round's time that goes with
        its experts, always this one, instead of what times say."""
        self.calibration = Calibration()
        self.overlap, self.share = Overlap(sizes.experts, sizes.top), Share(sizes.share if share is None else share)
        self._measures = share is None
        self._fixed, self.threshold = threshold, self._first() if threshold is None else threshold
        self._table = mx.array(self.calibration.table, mx.float32)
        self._past: deque[list[list[int]]] = deque(maxlen=self.ROUNDS)  # bins of rounds, by row
        self._weighed = self._built = 0  # rounds
        self._pays = True

    def _first(self) -> float:
        """The threshold before anything is known: what the fifth column of a row must be worth by the bytes, where four
        bring three tokens. Widths whose time is measured without a cut would look dearer than they are."""
        four, five = self.overlap.distinct(np.array([4, 5]))
        worth = 3 * self.share.value * (five / four - 1)
        return max(t for t in self.THRESHOLDS if t <= worth)

    @staticmethod
    def of(target: Target) -> Confidence | None:
        """For a target; None where no column could save anything: without experts all columns cost the same, and MLX's
        own products read an expert anew for every column that takes it, so that to share one saves nothing."""
        sizes = Sizes.of(target)
        return None if sizes is None or not kernels.usable("experts") else Confidence(sizes)

    def looks(self) -> bool:
        """Whether the drafter should say how sure it is in the round that is being built."""
        self._built += 1
        return self._pays or self._built % self.SELDOM == 0

    def cut(self, draft: Draft) -> Draft:
        """The same with its dead columns named, where its drafter says how sure it is."""
        if draft.bins is None:
            return draft
        through = mx.cumprod(self._table[draft.bins], axis=1)
        return replace(draft, live=(through >= self.threshold).sum(axis=1).astype(mx.int32))

    def record(self, judged: Judged | None, shape: tuple[int, int], experts: float, seconds: float | None) -> None:
        """A round of a shape (rows, width) that touched so many experts a layer, and took so long.

        judged: of the rows that count; None where nothing was weighed. seconds: None where the time says nothing.
        """
        rows, width = shape
        if judged is None or len(judged.live) == rows:
            self.overlap.record(rows + (rows * width if judged is None else sum(judged.live)), experts)
            if self._measures and seconds is not None:
                self.share.record(shape, seconds, experts)
        if judged is None or not judged.bins:
            return
        self.calibration.record(judged)
        self._table = mx.array(self.calibration.table, mx.float32)
        self._past.append(judged.bins)
        self._weighed += 1
        if self._fixed is None and self._weighed % self.EVERY == 0:
            threshold, gain = self._best()
            self._pays = gain >= self.GAIN
            self.threshold = threshold if self._pays else 0.0

    def _best(self) -> tuple[float, float]:
        """The threshold that would have been best for the rounds behind, and the speed over that of cutting nothing."""
        table, share = self.calibration.table, self.share.value
        through = [np.cumprod(table[np.array(rows)], axis=1) for rows in self._past]
        counts, tokens = np.zeros((len(self.THRESHOLDS), len(through))), np.zeros(len(self.THRESHOLDS))
        for i, chances in enumerate(through):
            alive = chances >= np.array(self.THRESHOLDS)[:, None, None]
            counts[:, i] = len(chances) + alive.sum(axis=(1, 2))
            tokens += len(chances) + (alive * chances).sum(axis=(1, 2))
        experts = self.overlap.distinct(counts).sum(axis=1)
        now = experts[np.searchsorted(self.THRESHOLDS, self.threshold)]
        rates = tokens / (1 + share * (experts / now - 1))
        best = int(np.argmax(rates))
        return self.THRESHOLDS[best], float(rates[best] / rates[0])
