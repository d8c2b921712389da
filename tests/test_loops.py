"""loops.py: a text that repeats itself without end is noticed, and one that only repeats much is not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.loops import LoopGuard, LoopLimits
from mlx_mtp.rows import RequestError

SMALL = LoopLimits(period_tok=6, repeats=3, least_tok=8)


def loops_at(tokens: list[int], limits: LoopLimits) -> int | None:
    """The law: the first length at which the last `period` tokens have come `repeats` times, over enough tokens."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, limits.period_tok + 1):
            length = max(period * limits.repeats, limits.least_tok)
            tail = tokens[end - length : end] if end >= length else []
            if tail and all(tail[i] == tail[i - period] for i in range(period, length)):
                return end
    return None


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_a_loop_is_noticed_when_it_is_one_and_not_before(start, piece):
    tokens = start + piece * 9
    guard = LoopGuard(SMALL)
    seen = next((i for i, token in enumerate(tokens, start=1) if guard.push([token])), None)
    assert seen == loops_at(tokens, SMALL) is not None
    at_once = LoopGuard(SMALL)
    assert at_once.push(tokens) and at_once.period_tok == guard.period_tok


def test_text_that_only_repeats_much_is_no_loop():
    choose = random.Random(1)
    table = [token for row in range(400) for token in (5, 6, 7, choose.randrange(10))]
    assert not LoopGuard(LoopLimits()).push(table)
    assert not LoopGuard(LoopLimits()).push([9] * 700)  # a ruler
    assert LoopGuard(LoopLimits()).push([9] * 800)


def test_the_default_notices_a_paragraph_that_comes_again_and_again():
    guard = LoopGuard(LoopLimits())
    assert guard.push([*range(1000), *[*range(250)] * 8])
    assert guard.period_tok == 250


@pytest.mark.parametrize("wrong", [{"period_tok": 0}, {"repeats": 1}, {"least_tok": 0}])
def test_limits_that_would_end_every_text_are_refused(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} of the loop guard is"):
        LoopLimits(**wrong)
