"""The repetition guard detects endless repetition, and ignores ordinary repetition."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.loops import LoopGuard, LoopLimits
from mlx_mtp.rows import RequestError

SMALL = LoopLimits(period_tok=6, repeats=3, least_tok=8)


def loops_at(tokens: list[int], limits: LoopLimits) -> int | None:
    """Reference: the first length at which some period has occurred `repeats` times, over at least `least_tok`."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, limits.period_tok + 1):
            length = max(period * limits.repeats, limits.least_tok)
            tail = tokens[end - length : end] if end >= length else []
            if tail and all(tail[i] == tail[i - period] for i in range(period, length)):
                return end
    return None


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_loop_is_detected_at_the_first_possible_token(start, piece):
    tokens = start + piece * 9
    guard = LoopGuard(SMALL)
    seen = next((i for i, token in enumerate(tokens, start=1) if guard.push([token])), None)
    assert seen == loops_at(tokens, SMALL) is not None
    at_once = LoopGuard(SMALL)
    assert at_once.push(tokens) and at_once.period_tok == guard.period_tok


def test_ordinary_repetition_is_not_a_loop():
    choose = random.Random(1)
    table = [token for row in range(400) for token in (5, 6, 7, choose.randrange(10))]
    assert not LoopGuard(LoopLimits()).push(table)
    assert not LoopGuard(LoopLimits()).push([9] * 700)  # a ruler
    assert LoopGuard(LoopLimits()).push([9] * 800)


def test_default_limits_detect_a_repeated_paragraph():
    guard = LoopGuard(LoopLimits())
    assert guard.push([*range(1000), *[*range(250)] * 8])
    assert guard.period_tok == 250


@pytest.mark.parametrize("wrong", [{"period_tok": 0}, {"repeats": 1}, {"least_tok": 0}])
def test_limits_that_would_stop_all_output_are_rejected(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} of the repetition guard is"):
        LoopLimits(**wrong)
