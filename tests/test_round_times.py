"""What rounds of a width cost, learnt from times that change for other reasons too."""

import json
import random
from collections.abc import Callable

import pytest

from mlx_mtp.round_times import KEPT, NEAR, PROVEN, SAMPLES, RoundTimes

Pace = Callable[[int], float]


def told(widths: list[int], cost: dict[int, float], pace: Pace = lambda n: 1.0, rows: int = 1) -> RoundTimes:
    """Times of rounds of these widths, where the n-th takes `pace(n)` times as long as it should."""
    times = RoundTimes(8)
    for n, width in enumerate(widths):
        times.learn(rows, width, 0.02 * cost[width] * pace(n))
    return times


def looks(width: int, count: int, every: int = 10) -> list[int]:
    """Rounds of one width with one of width 0 now and then."""
    return [0] * 4 + ([width] * every + [0]) * count + [width] * every


COST = {0: 1.0, 2: 1.4, 4: 1.9}


def test_a_width_is_known_after_two_rounds_and_costs_what_they_took_beside_those_before():
    times = told([0, 0], COST)
    assert times.known(1) == frozenset() and times.begun(1, 0)
    times = told([0, 0, 0, 2], COST)
    assert times.known(1) == {0} and times.begun(1, 2) and not times.begun(1, 3)
    times = told([0, 0, 0, 2, 2], COST)
    assert times.known(1) == {0, 2} and times.costs(1)[2] == pytest.approx(1.4)


def test_rounds_before_those_of_width_0_are_compared_with_them():
    assert told([2, 2, 0, 0], COST).known(1) == frozenset()
    times = told([2, 2, 0, 0, 0], COST)
    assert times.known(1) == {0, 2} and times.costs(1)[2] == pytest.approx(1.4) and not times.comparisons(1, 2)
    assert told([2, 2, 0, 0, 0], COST, lambda n: 0.8 if n == 1 else 1.0).costs(1)[2] == pytest.approx(1.4)
    assert told([2, 0, 0, 0], COST).known(1) == {0, 2}


@pytest.mark.parametrize(
    "pace",
    [lambda n: 3.0 if n // 40 % 2 else 1.0, lambda n: 1 + n / 50, lambda n: 0.2 if n > 100 else 1.0],
    ids=["by turns", "slower and slower", "suddenly faster"],
)
def test_costs_do_not_depend_on_the_pace_of_the_machine(pace):
    times = told(looks(2, 20), COST, pace)
    assert times.comparisons(1, 2) == KEPT and times.costs(1)[2] == pytest.approx(1.4, rel=0.03)


def test_a_width_first_seen_while_the_machine_was_slow_is_put_right_by_a_look():
    def slow_at_first(n: int) -> float:
        return 2.0 if n < 4 else 1.0

    assert told(looks(2, 0), COST, slow_at_first).costs(1)[2] < 1.2
    assert told(looks(2, 1), COST, slow_at_first).costs(1)[2] == pytest.approx(1.4, rel=0.01)


def test_a_width_is_first_compared_with_rounds_of_width_0_and_not_with_what_others_seem_to_cost():
    """The machine was slow when width 2 was timed, which seems to cost less than it does ever since."""
    times = told([0] * 4 + [2] * 10 + [0, 0, 4, 4], COST, lambda n: 2.0 if n < 4 else 1.0)
    assert times.costs(1)[2] < 1.2 and times.costs(1)[4] == pytest.approx(1.9)


def test_a_width_that_was_hardly_compared_does_not_say_what_a_plain_round_takes():
    times = told([0] * 4 + [2] * 3, COST, lambda n: 2.0 if n < 4 else 1.0)
    assert times.costs(1)[2] == 1 and times.plain_s(1) == pytest.approx(2 * 0.02)
    for width in (0, 2, 2):
        times.learn(1, width, 0.02 * COST[width])
        assert times.plain_s(1) == pytest.approx(0.02)


def test_a_round_says_nothing_if_the_machine_changed_around_it():
    look = 4 + 10  # the first look
    steady, changed = told(looks(2, 1), COST), told(looks(2, 1), COST, lambda n: 2.0 if n >= look else 1.0)
    assert not changed.comparisons(1, 2) and changed.costs(1)[2] == pytest.approx(1.4)
    assert steady.comparisons(1, 2) == 1
    for _ in range(PROVEN - 1):
        for times in (steady, changed):
            for width in [0] + [2] * 10:
                times.learn(1, width, 0.02 * COST[width])
    assert changed.comparisons(1, 2) < PROVEN <= steady.comparisons(1, 2)


def test_one_round_that_was_interrupted_moves_nothing():
    times = told(looks(2, 9), COST, lambda n: 20.0 if n == 4 + 11 * 5 + 10 else 1.0)
    assert times.costs(1)[2] == pytest.approx(1.4, rel=0.01)


def test_old_comparisons_are_forgotten():
    times = told(looks(2, KEPT), COST)
    for width in looks(2, KEPT):
        times.learn(1, width, 0.02 if not width else 0.06)
    assert times.costs(1)[2] == pytest.approx(3.0, rel=0.01)


def test_a_width_tried_amid_another_one_is_put_down_to_width_0():
    widths = looks(2, PROVEN) + [4] * (SAMPLES + 1) + [2] * (NEAR + 1)
    times = told(widths, COST, lambda n: 1 + n / 200)
    assert times.costs(1)[4] == pytest.approx(1.9, rel=0.05)


def test_costs_never_fall_with_the_width_and_the_better_known_one_prevails():
    times = told(looks(2, 6), COST)
    for width in (4, 4):
        times.learn(1, width, 0.02)  # as if twice as wide a round took less
    costs = times.costs(1)
    assert costs[2] == costs[4] and 1.3 < costs[2] < 1.4
    assert times.costs(1) == sorted(times.costs(1))


def test_nothing_costs_less_than_a_round_without_drafts_and_what_is_not_known_costs_as_the_next_narrower():
    times = told([0, 0, 0, 2, 2, 4, 4], {0: 1.0, 2: 0.7, 4: 1.9})
    assert times.costs(1) == pytest.approx([1.0, 1.0, 1.0, 1.0, 1.9, 1.9, 1.9, 1.9, 1.9])


def test_batches_of_other_sizes_are_learnt_by_themselves():
    times = told(looks(2, 4), COST)
    assert times.known(4) == frozenset()
    for width, seconds in ((0, 0.05), (0, 0.05), (2, 0.15), (2, 0.15)):
        times.learn(4, width, seconds)
    assert times.costs(4)[2] == pytest.approx(3.0) and times.costs(1)[2] == pytest.approx(1.4, rel=0.01)


def test_a_width_that_nothing_can_be_compared_with_stays_unknown():
    times = told([0, 0, 0, 2, 2], COST)
    for width in (2, 2, 2):
        times.learn(3, width, 0.5)
    assert times.known(3) == frozenset() and times.plain_s(3) is None


def test_the_time_of_a_round_without_drafts_is_known_from_rounds_with_some():
    times = told(looks(2, 5), COST, lambda n: 1.0 if n < 50 else 3.0)
    assert times.plain_s(1) == pytest.approx(3 * 0.02, rel=0.02)
    assert times.plain_s(2) is None


def again(times: RoundTimes) -> RoundTimes:
    """What the next process makes of what this one has kept."""
    after = RoundTimes(8)
    after.restore(times.state())
    return after


@pytest.mark.parametrize("seed", range(20))
def test_whatever_rounds_took_can_be_kept(seed):
    """Some other program makes any round take several times as long, so that what was kept is contradicted."""
    rng, times = random.Random(seed), RoundTimes(4)
    for _ in range(40):
        for _ in range(rng.randrange(60)):
            width = rng.choice([0, 0, 0, 1, 2, 4])
            rows, slower = rng.choice([1, 1, 1, 1, 2]), rng.choice([1.0, 1.0, 1.0, 2.0, 4.0])
            times.learn(rows, width, 0.02 * (1 + 0.3 * width) * slower, late=rng.random() < 0.1)
        after = RoundTimes(4)
        after.restore(json.loads(json.dumps(times.state())))
        for rows in (1, 2):
            assert after.known(rows) <= times.known(rows) and min(after.costs(rows)) == 1
        times = after


def test_what_was_kept_is_believed_until_a_comparison_contradicts_it_and_then_all_of_it_is_forgotten():
    kept = told([*looks(2, 4), *looks(4, 4)], COST)
    borne_out, contradicted = again(kept), again(kept)
    for width in [0, 0, 2, 0, 0, 0]:
        borne_out.learn(1, width, 0.02 * COST[width])
        contradicted.learn(1, width, 0.02 * (3.0 if width else 1.0))
    assert not borne_out.believed(1, 2) and borne_out.believed(1, 4)
    assert borne_out.costs(1)[4] == pytest.approx(1.9)
    assert contradicted.known(1) == {0, 2} and contradicted.costs(1)[2] == pytest.approx(3.0)
    assert {key[1] for key in contradicted.state()} == {0, 2}


def test_a_round_that_also_makes_up_for_others_contradicts_nothing():
    times = again(told([*looks(2, 4), *looks(4, 4)], COST))
    for width in [0, 0, 2, 0, 0, 0]:
        times.learn(1, width, 0.02 * (3.0 if width else 1.0), late=width > 0)
        assert not times.contrary
    assert times.known(1) == {0, 2, 4} and times.believed(1, 2)


@pytest.mark.parametrize("took", [1.4, 3.0])
def test_a_round_is_contrary_if_it_takes_much_longer_than_was_kept(took):
    times = again(told(looks(2, 4), COST))
    for seconds in (1.0, 1.0):
        times.learn(1, 0, seconds)
    times.learn(1, 2, took)
    assert times.contrary == (took > 2)
    times.learn(1, 0, 1.0)
    assert not times.contrary


def test_one_first_round_is_enough_if_not_even_all_of_its_drafts_would_pay():
    assert told([0, 0, 0, 2], {0: 1.0, 2: 3.1}).known(1) == {0, 2}
    assert told([0, 0, 0, 2], {0: 1.0, 2: 2.9}).known(1) == {0}
    assert told([0, 0, 0, 1], {0: 1.0, 1: 2.1}).known(1) == {0}, "of the narrowest all others are judged by"
