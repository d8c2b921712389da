"""How many tokens to draft in a round. Plain Python: it knows counts and seconds, and no arrays.

k is the number of draft tokens of every sequence in a round; k = 0 is plain decoding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from mlx_mtp.rows import RequestError

MAX_WIDTH = 15  # the cache's rings leave room for so many


@dataclass(frozen=True)
class DraftRound:
    """A finished round, as the policy sees it; lists have one entry a sequence.

    num_accepted: accepted draft tokens, 0 to k. matched: what `choose` was given for this round.
    seconds: None where the time says nothing, such as a round that ran together with a prompt chunk.
    """

    k: int
    num_accepted: Sequence[int]
    matched: Sequence[bool]
    seconds: float | None


class DraftLengthPolicy(Protocol):
    """Chooses k for every round. A round is chosen while the one before it still runs."""

    drafts: bool
    """Whether it ever drafts. If not, tokens that a grammar forces are not drafted either."""

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        """k of the next round, 0 to MAX_WIDTH.

        matched: per sequence, whether prompt lookup has found its last tokens elsewhere.
        lag: tokens of all sequences that the drafter has not seen yet.
        """
        ...

    def record(self, done: DraftRound) -> None:
        """Learn from a finished round."""
        ...


class ConstantPolicy:
    """Always the same k."""

    def __init__(self, k: int) -> None:
        self._k, self.drafts = k, k > 0

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        return self._k

    def record(self, done: DraftRound) -> None:
        pass


class HeuristicPolicy:
    """Two more when at least half of the sequences accepted all draft tokens, else one less; at least 1.

    As `num_assistant_tokens_schedule="heuristic"` in transformers 5.14 `generation/candidate_generator.py`.
    """

    drafts = True

    def __init__(self, k: int = 4) -> None:
        self._k = k

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        return self._k

    def record(self, done: DraftRound) -> None:
        if done.k and done.num_accepted:
            full = sum(n == done.k for n in done.num_accepted) * 2 >= len(done.num_accepted)
            self._k = min(MAX_WIDTH, self._k + 2) if full else max(1, self._k - 1)


@dataclass(frozen=True)
class CostProfile:
    """What a round costs, by batch size: k -> plain rounds, for k = 0, 1, ... of one length for all batch sizes.

    catch_up: cost of a token that the drafter has not seen yet, in plain rounds; 0 for drafters that need not catch up.
    """

    costs: Mapping[int, Sequence[float]]
    catch_up: float = 0.0

    def of(self, batch: int) -> list[float]:
        """Costs at a batch size; one that was not measured lies between its neighbours."""
        known = sorted(self.costs)
        at = min(bisect_left(known, batch), len(known) - 1)
        high, low = known[at], known[max(at - 1, 0)]
        part = min(1.0, (batch - low) / (high - low)) if high > low and batch < high else 1.0
        return [a + part * (b - a) for a, b in zip(self.costs[low], self.costs[high], strict=True)]


# Before anything is measured: a round costs its plain pass and a little for every token drafted.
PRIOR_PROFILE = CostProfile({1: [1 + 0.1 * k for k in range(9)]})


class Acceptance:
    """How often the draft token at each position is accepted, given that all before it were.

    A rate that fades over a long-run mean, which itself begins at the rate of the position before.
    """

    DECAY = 0.93  # of the counts, per sequence and round
    PRIOR = 0.7  # of the first position
    FADING_WEIGHT, MEAN_WEIGHT = 4.0, 8.0  # how many draft tokens what a rate falls back to counts for
    LONG_RUN = 256  # draft tokens that the mean remembers

    def __init__(self, max_k: int) -> None:
        self._accepted, self._drafted = [0.0] * max_k, [0.0] * max_k
        self._mean, self._count = [0.0] * max_k, [0] * max_k

    def record(self, k: int, num_accepted: Sequence[int]) -> None:
        decay = self.DECAY ** len(num_accepted)
        for i in range(len(self._mean)):
            judged = [n > i for n in num_accepted if k > i and n >= i]
            self._accepted[i] = decay * self._accepted[i] + sum(judged)
            self._drafted[i] = decay * self._drafted[i] + len(judged)
            for accepted in judged:
                self._count[i] = min(self._count[i] + 1, self.LONG_RUN)
                self._mean[i] += (accepted - self._mean[i]) / self._count[i]

    def expected_tokens(self) -> list[float]:
        """Tokens that a sequence gains from a round, by k."""
        alive, rate, tokens = 1.0, self.PRIOR, [1.0]
        for i, count in enumerate(self._count):
            long_run = (self._mean[i] * count + rate * self.MEAN_WEIGHT) / (count + self.MEAN_WEIGHT)
            rate = (self._accepted[i] + self.FADING_WEIGHT * long_run) / (self._drafted[i] + self.FADING_WEIGHT)
            alive *= rate
            tokens.append(tokens[-1] + alive)
        return tokens


class GoodputPolicy:
    """The k with the highest goodput: expected tokens of a round over its cost (SmartSpec, Liu et al. 2024).

    Costs are those of a profile; for k > 0 they are scaled by one number. It is corrected wherever a few plain rounds
    have followed drafted ones: in checks, now and then while it drafts, and after probes, while it does not.
    """

    SWITCH = 1.03  # how much better another k must be
    FIRST_PROBE, LAST_PROBE = 32, 512  # plain rounds before one that drafts a token, doubled while that does not pay
    CHECK_EVERY, CHECK_ROUNDS = 16, 3  # drafted rounds between checks, at goodput 1; plain rounds of a check
    CORRECTION = 0.5  # share of a measured error that is believed
    WRONG = 1.25  # an error after which the next probe follows at once
    MAX_CATCH_UP = 1.0  # plain rounds that a drafter's catching up may cost
    drafts = True

    def __init__(self, profile: CostProfile = PRIOR_PROFILE) -> None:
        self.profile = profile
        self._max_k = len(profile.of(1)) - 1
        self._acceptance = {matched: Acceptance(self._max_k) for matched in (False, True)}
        self._k: int | None = None  # the best, as far as is known
        self._plain_rounds, self._wait = 0, 0  # where the prior does not draft, the first round is a probe
        self._drafted_rounds = 0
        self._scale = 1.0
        # Seconds over profiled cost, of the newest rounds that were all plain or all drafted, and of those before them.
        self._run_of, self._run, self._before = (0, False), list[float](), list[float]()

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        costs, tokens = self._costs(len(matched)), self._expected_tokens(matched)
        goodput = [t / c for t, c in zip(tokens, costs, strict=True)]
        k = max(range(len(goodput)), key=goodput.__getitem__)
        if self._k is not None and goodput[k] <= self.SWITCH * goodput[self._k]:
            k = self._k
        self._k = k if goodput[k] >= 1 else 0
        late = lag * self.profile.catch_up > self.MAX_CATCH_UP
        if self._k and not late:
            return self._k if not self._is_check(goodput[self._k]) else 0
        hopeless = all(1 + k <= cost for k, cost in enumerate(costs) if k)  # unless the profile is quite wrong
        return int(self._is_probe(self.LAST_PROBE if hopeless else self._wait, late))

    def _is_check(self, goodput: float) -> bool:
        """Whether this round is one of a check. The more drafting gains, the less errors of the profile matter."""
        self._plain_rounds, self._drafted_rounds = 0, self._drafted_rounds + 1
        due = self.CHECK_EVERY * goodput**2
        if self._drafted_rounds >= due + self.CHECK_ROUNDS:
            self._drafted_rounds, self._wait = 0, self.FIRST_PROBE
            return True
        return self._drafted_rounds > due

    def _is_probe(self, wait: int, late: bool) -> bool:
        self._plain_rounds, self._drafted_rounds = self._plain_rounds + 1, 0
        if self._plain_rounds < wait or late:
            return False
        self._plain_rounds, self._wait = 0, min(max(2 * self._wait, self.FIRST_PROBE), self.LAST_PROBE)
        return True

    def record(self, done: DraftRound) -> None:
        batch = len(done.num_accepted)
        for matched, acceptance in self._acceptance.items():
            own = [n for n, m in zip(done.num_accepted, done.matched, strict=True) if m == matched]
            if done.k and own:
                acceptance.record(done.k, own)
        if done.k and not self._k and batch + sum(done.num_accepted) > batch * self._costs(batch)[1]:
            self._plain_rounds = self.LAST_PROBE  # a probe that has paid: the next follows at once
        if done.seconds is not None:
            cost = self.profile.of(batch)[min(done.k, self._max_k)]
            self._compare((batch, done.k > 0), done.seconds / cost)

    def _compare(self, run_of: tuple[int, bool], time: float) -> None:
        """Correct the scale when a few plain rounds have followed drafted ones of the same batch size."""
        if run_of != self._run_of:
            self._before, self._run = self._run if run_of[0] == self._run_of[0] else [], []
            self._run_of = run_of
        self._run = [*self._run, time][-self.CHECK_ROUNDS :]
        if run_of[1] or not self._before or len(self._run) < self.CHECK_ROUNDS:
            return
        error = median(self._before) / median(self._run) / self._scale
        weight = self.CORRECTION * len(self._before) / self.CHECK_ROUNDS
        self._scale *= min(max(error, 0.5), 2.0) ** weight
        self._before = []
        if not 1 / self.WRONG < error < self.WRONG:
            self._plain_rounds = self.LAST_PROBE  # while it does not draft, the next probe follows at once

    def _costs(self, batch: int) -> list[float]:
        first, *rest = self.profile.of(batch)
        return [first, *(max(first, self._scale * cost) for cost in rest)]

    def _expected_tokens(self, matched: Sequence[bool]) -> list[float]:
        """Mean over the sequences, by k."""
        share = sum(matched) / max(len(matched), 1)
        without, with_match = (self._acceptance[m].expected_tokens() for m in (False, True))
        return [a + share * (b - a) for a, b in zip(without, with_match, strict=True)]


def make_policy(width: int | str, profile: CostProfile = PRIOR_PROFILE) -> DraftLengthPolicy:
    """An integer from 0 to MAX_WIDTH, "heuristic" or "auto". Raises RequestError."""
    if width == "heuristic":
        return HeuristicPolicy()
    if width == "auto":
        return GoodputPolicy(profile)
    if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= MAX_WIDTH:
        raise RequestError(f"width is {width!r}; expected 0 to {MAX_WIDTH}, 'auto' or 'heuristic'")
    return ConstantPolicy(width)
