"""Draft length policies on a simulator: outputs of known acceptance on machines of known cost.

All times are over those of plain decoding or of the best constant length, and all policies are new: they begin cold.
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from mlx_mtp.draft_length import (
    MAX_WIDTH,
    ConstantPolicy,
    CostProfile,
    DraftLengthPolicy,
    DraftRound,
    GoodputPolicy,
    HeuristicPolicy,
    make_policy,
)
from mlx_mtp.rows import RequestError

Cost = Callable[[int, int], float]  # (batch, k) -> seconds of a round
FIXTURES = Path(__file__).parent / "fixtures"
ROUNDS = json.loads((FIXTURES / "rounds.json").read_text())  # recorded with the embedded pair
NOISE = json.loads((FIXTURES / "noise.json").read_text())  # what rounds that are alike took on a shared machine
LENGTHS = range(9)  # that auto considers


def linear(per_column: float, per_draft: float) -> Cost:
    """Costs in units of one column: a dense model, a mixture of experts, or an old chip."""
    return lambda batch, k: 1 + per_column * (batch * (k + 1) - 1) + per_draft * k


def by_columns(points: dict[int, float], per_draft: float) -> Cost:
    """Known for some numbers of columns, batch * (k + 1); linear between them, and flat after the last."""

    def cost(batch: int, k: int) -> float:
        columns = batch * (k + 1)
        low = max(p for p in points if p <= columns)
        high = min((p for p in points if p >= columns), default=low)
        part = (columns - low) / (high - low) if high > low else 0.0
        return points[low] + part * (points[high] - points[low]) + per_draft * k

    return cost


MACHINES: dict[str, Cost] = {
    "memory-bound": linear(0.04, 0.04),
    "old chip": linear(0.6, 0.08),
    # Published, relative to one column: quantised 4-bit product on M4 Pro (mlx issue 3852), whole models on M5
    # (dense and mixture of experts), 26B-A4B on M2 Pro.
    "4 bit, M4 Pro": by_columns({1: 1, 2: 1, 3: 1.13, 4: 1.43, 5: 1.75, 8: 2.84, 10: 4.5}, 0.05),
    "dense, M5": linear(0.087, 0.05),
    "experts, M5": linear(0.425, 0.1),
    "experts, M2 Pro": by_columns({1: 1, 2: 1.74, 4: 3.12, 5: 3.82, 9: 6.13, 72: 40.0}, 0.1),
    "recorded": lambda batch, k: ROUNDS["cost"][str(batch)][k],
    "steps": by_columns({1: 1, 2: 1.1, 4: 1.1, 5: 1.5, 8: 1.5, 9: 2.7, 16: 2.7, 17: 3.5}, 0.06),
}
OUTPUTS: dict[str, Callable[[int], float]] = {  # position -> chance that a draft token there is accepted
    "enumeration": lambda at: 0.97,
    "code": lambda at: 0.8,
    "prose": lambda at: 0.45,
    "json": lambda at: 0.08,
    "useless": lambda at: 0.0,
    "alternating": lambda at: 0.9 if at // 200 % 2 else 0.1,
}
PATTERNS = (*OUTPUTS, "recorded code")


@cache
def output_of(pattern: str, tokens: int, seed: int) -> tuple[int, ...]:
    """For every position, how many draft tokens would be accepted there."""
    if pattern == "recorded code":
        found = [n for prompt in ROUNDS["acceptance"]["code"] for n in prompt]
        start = 37 * seed % len(found)
        return tuple((found[start:] + found * (tokens // len(found) + 1))[:tokens])
    rng, out = random.Random(seed), []
    for at in range(tokens):
        accepted = 0
        while accepted < MAX_WIDTH and rng.random() < OUTPUTS[pattern](at) * 0.97**accepted:
            accepted += 1
        out.append(accepted)
    return tuple(out)


def profiled(cost: Cost, wrong: float = 1.0, seed: int = 0, catch_up: float = 0.0) -> CostProfile:
    """What measuring some lengths three times on a noisy machine gives. wrong: a factor on all drafted rounds."""
    rng, costs, lengths = random.Random(seed), {}, (0, 1, 2, 4, 8)
    for batch in (1, 4, 8):
        took = {k: min(cost(batch, k) * (1 + 0.05 * abs(rng.gauss(0, 1))) for _ in range(3)) for k in lengths}
        took = {k: min(took[longer] for longer in lengths if longer >= k) for k in lengths}
        costs[batch] = [1.0]
        for k in LENGTHS[1:]:
            low, high = max(n for n in lengths if n <= k), min(n for n in lengths if n >= k)
            between = took[low] + (took[high] - took[low]) * (k - low) / max(high - low, 1)
            costs[batch].append(max(1.0, wrong * between / took[0]))
    return CostProfile(costs, catch_up)


def simulate(policy: DraftLengthPolicy, output: Sequence[int], cost: Cost, batch: int, tokens: int) -> float:
    """Seconds a token of so many a sequence, each of which begins at another place of the output. As in the engine, a
    round is chosen while the one before it runs."""
    rng, at = random.Random(0), [i * len(output) // batch for i in range(batch)]
    seconds = written = 0.0
    k = policy.choose([False] * batch)
    while written < tokens * batch:
        following = policy.choose([False] * batch)
        accepted = [min(output[place % len(output)], k) for place in at]
        at = [place + n + 1 for place, n in zip(at, accepted, strict=True)]
        took = cost(batch, k)
        seconds, written = seconds + took, written + sum(accepted) + batch
        policy.record(DraftRound(k, accepted, [False] * batch, took * (1 + 0.05 * abs(rng.gauss(0, 1)))))
        k = following
    return seconds / written


SEEDS = {64: 6, 128: 4, 600: 1}


@cache
def constant(machine: str, pattern: str, batch: int, tokens: int) -> tuple[float, ...]:
    """Seconds a token with every constant length, mean over some outputs."""
    outputs = [output_of(pattern, max(200, tokens * batch), seed) for seed in range(SEEDS[tokens])]
    runs = [[simulate(ConstantPolicy(k), o, MACHINES[machine], batch, tokens) for o in outputs] for k in LENGTHS]
    return tuple(sum(run) / len(run) for run in runs)


def auto_over(batch: int, tokens: int, wrong: float = 1.0) -> dict[tuple[str, str], tuple[float, float]]:
    """(machine, pattern) -> time of auto over that of the best constant length, and over that of plain decoding."""
    found = {}
    for machine, pattern in product(MACHINES, PATTERNS):
        cost, took = MACHINES[machine], []
        for seed in range(SEEDS[tokens]):
            output = output_of(pattern, max(200, tokens * batch), seed)
            took.append(simulate(GoodputPolicy(profiled(cost, wrong, seed)), output, cost, batch, tokens))
        mean, fixed = sum(took) / len(took), constant(machine, pattern, batch, tokens)
        found[machine, pattern] = mean / min(fixed), mean / fixed[0]
    return found


GOOD = ("enumeration", "code", "recorded code")


@pytest.mark.parametrize("batch, tokens", [(1, 64), (1, 128), (1, 600), (4, 128), (8, 64), (8, 128), (8, 600)])
def test_auto_is_close_to_the_best_constant_length_and_never_clearly_slower_than_plain(batch, tokens):
    """From the first round on. Costs between the lengths that are profiled may have steps that no profile shows; there
    single cells are further off."""
    found = auto_over(batch, tokens)
    regret = [best for best, _ in found.values()]
    good = [best for (_, pattern), (best, _) in found.items() if pattern in GOOD]
    print(f"regret {sum(regret) / len(regret) - 1:.3f}", sorted(((v, k) for k, v in found.items()), reverse=True)[:3])
    assert sum(regret) / len(regret) < 1.05
    assert sum(good) / len(good) < 1 / 0.92 and max(good) < 1.3
    assert max(plain for _, plain in found.values()) < {64: 1.085, 128: 1 / 0.95, 600: 1.02}[tokens]


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_useless_drafts_cost_five_percent_at_first_and_three_later(batch):
    for machine, cost in MACHINES.items():
        policy = GoodputPolicy(profiled(cost))
        first, later = (simulate(policy, (0,) * 64, cost, batch, n) / cost(batch, 0) * batch for n in (128, 1000))
        assert first < 1 / 0.95 and later < 1 / 0.97, machine


@pytest.mark.parametrize("wrong", [0.7, 1.43])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_profile_that_is_wrong_by_thirty_percent_is_found_out(batch, wrong):
    found = auto_over(batch, 600, wrong)
    regret = [best for best, _ in found.values()]
    assert sum(regret) / len(regret) < 1.06
    assert max(plain for _, plain in found.values()) < 1.15
    assert sum(plain > 1.05 for _, plain in found.values()) <= 2


def in_turns(
    policy: DraftLengthPolicy,
    turns: Sequence[tuple[float, int]],
    per_draft: float,
    batch: int,
    seed: int = 0,
    noise: Sequence[float] = (),
) -> list[float]:
    """Time over plain decoding's in turn after turn, each of so many rounds that accept a draft token with such a
    chance; it costs per_draft plain rounds."""
    rng, found, n = random.Random(seed), [], 37 * seed
    k = policy.choose([False] * batch)
    for chance, rounds in turns:
        seconds = tokens = 0.0
        for _ in range(rounds):
            following, n = policy.choose([False] * batch), n + 1
            accepted = [next((i for i in range(k) if rng.random() >= chance), k) for _ in range(batch)]
            took = 1 + per_draft * k
            seconds, tokens = seconds + took, tokens + 1 + sum(accepted) / batch
            slower = noise[n % len(noise)] if noise else 1 + 0.05 * abs(rng.gauss(0, 1))
            policy.record(DraftRound(k, accepted, [False] * batch, took * slower))
            k = following
        found.append(seconds / tokens)
    return found


def auto_of(per_draft: float) -> GoodputPolicy:
    return GoodputPolicy(profiled(linear(0.0, per_draft)))


@pytest.mark.parametrize("per_draft", [0.3, 0.45])
@pytest.mark.parametrize("batch, limit", [(1, 1.16), (8, 1.04)])
def test_good_outputs_followed_by_useless_ones_cost_little(batch, limit, per_draft):
    for chance, seed in product((0.0, 0.1, 0.3), range(4)):
        turns = [(0.8, 300), (chance, 128)] * 3
        assert max(in_turns(auto_of(per_draft), turns, per_draft, batch, seed)[1::2]) < limit


@pytest.mark.parametrize("batch", [1, 8])
def test_drafting_is_taken_up_again_when_drafts_become_good(batch):
    before, useless, after = in_turns(auto_of(0.2), [(0.9, 200), (0.0, 400), (0.9, 400)], 0.2, batch)
    assert before < 0.5 and useless < 1.1 and after < 0.6


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("chance, per_draft", [(0.0, 0.3), (0.09, 0.125), (0.3, 0.3), (0.96, 1.6), (1.0, 1.6)])
def test_recorded_noise_does_not_make_it_draft_where_drafting_does_not_pay(chance, per_draft, noise):
    found = [in_turns(auto_of(per_draft), [(chance, 800)], per_draft, 1, s, NOISE[noise])[0] for s in range(8)]
    assert sum(found) / len(found) < 1.01 and max(found) < 1.03


@pytest.mark.parametrize("noise", NOISE)
def test_recorded_noise_does_not_keep_it_from_drafting_where_drafting_pays(noise):
    found = [in_turns(auto_of(0.2), [(0.8, 800)], 0.2, 1, s, NOISE[noise])[0] for s in range(8)]
    best = min(sum(in_turns(ConstantPolicy(k), [(0.8, 800)], 0.2, 1, s)[0] for s in range(8)) for k in LENGTHS)
    assert sum(found) < 1.03 * best


@pytest.mark.parametrize("batch", [1, 8])
def test_a_round_that_hung_does_not_end_drafting(batch):
    policy = auto_of(0.2)
    in_turns(policy, [(0.8, 200)], 0.2, batch)
    policy.record(DraftRound(4, [0] * batch, [False] * batch, 100.0))
    assert in_turns(policy, [(0.8, 200)], 0.2, batch)[0] < 0.65


def with_catch_up(chance: float, batch: int, length: int, rounds: int = 4000) -> float:
    """Time over plain decoding's with a drafter that reads every token it has missed before it drafts, at 0.02 plain
    rounds a token, and outputs that end after so many rounds."""
    policy, rng, lag, seconds, tokens = (
        GoodputPolicy(profiled(linear(0.0, 0.3), catch_up=0.02)),
        random.Random(0),
        0,
        0,
        0,
    )
    for n in range(rounds):
        lag = lag if n % length else 0
        k = policy.choose([False] * batch, lag)
        accepted = [next((i for i in range(k) if rng.random() >= chance), k) for _ in range(batch)]
        took = 1 + 0.3 * k + (0.02 * lag if k else 0)
        lag = 0 if k else lag + batch
        seconds, tokens = seconds + took, tokens + 1 + sum(accepted) / batch
        policy.record(DraftRound(k, accepted, [False] * batch, took))
    return seconds / tokens


@pytest.mark.parametrize("batch, length", [(1, 128), (1, 4000), (8, 128), (8, 4000)])
def test_a_drafter_that_must_catch_up_costs_little_if_useless_and_gains_if_good(batch, length):
    assert with_catch_up(0.05, batch, length) < 1.015
    assert with_catch_up(0.8, batch, length) < 0.75


def test_prompt_lookup_gains_where_outputs_repeat_and_costs_little_where_they_do_not():
    """Recorded: at every place of an output, how many tokens of a match would be accepted, and whether there is one."""
    for machine, (name, outputs) in product(MACHINES, ROUNDS["lookup"].items()):
        cost, places = MACHINES[machine], [place for output in outputs for place in output]
        policy, at, seconds, tokens, known = GoodputPolicy(profiled(cost)), 0, 0.0, 0, False
        while tokens < 1000:
            k = policy.choose([known])
            could, matched = places[at % len(places)]
            seconds, tokens, at = seconds + cost(1, k), tokens + min(could, k) + 1, at + min(could, k) + 1
            policy.record(DraftRound(k, [min(could, k)], [known], cost(1, k)))
            known = matched > 1
        assert tokens / seconds > 0.95, (machine, name)
        assert tokens / seconds > 1.4 or (machine, name) != ("memory-bound", "code, again")


@pytest.mark.parametrize("batch", [1, 8])
def test_a_profile_by_which_no_draft_could_pay_is_found_out_too(batch):
    """It was measured while something else had the machine."""
    policy = GoodputPolicy(CostProfile({1: [1.0, *[20.0] * 8]}))
    assert in_turns(policy, [(0.9, 4000), (0.9, 400)], 0.2, batch)[1] < 0.6


def test_without_any_times_it_still_chooses():
    policy = GoodputPolicy()
    for _ in range(200):
        k = policy.choose([False] * 2)
        policy.record(DraftRound(k, [0, 0], [False] * 2, None))
    assert sum(policy.choose([False] * 2) for _ in range(20)) <= 1


# the others -------------------------------------------------------------------------------------------------


def test_heuristic_grows_by_two_after_a_full_round_and_shrinks_by_one_otherwise():
    policy = HeuristicPolicy(4)
    policy.record(DraftRound(4, [4], [False], None))
    assert policy.choose([False]) == 6
    policy.record(DraftRound(6, [2], [False], None))
    assert policy.choose([False]) == 5
    for _ in range(20):
        policy.record(DraftRound(policy.choose([False]), [0], [False], None))
    assert policy.choose([False]) == 1


@pytest.mark.parametrize("width", [-1, 16, True, 2.5, "fast", None])
def test_a_length_that_makes_no_sense_is_refused(width):
    with pytest.raises(RequestError, match="expected 0 to 15"):
        make_policy(width)


def test_only_a_constant_length_of_0_never_drafts():
    assert not make_policy(0).drafts
    assert all(make_policy(width).drafts for width in (1, "auto", "heuristic"))
