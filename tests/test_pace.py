"""How long prompt tokens take: what was learnt from passes is what comes out, and nonsense never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.pace import Pace


def taught(base: float, slope: float, chunks: list[tuple[int, int]]) -> Pace:
    pace = Pace()
    for start, count in chunks:
        pace.learn(count * (base + slope * (start + count)), [(start, count)])
    return pace


@pytest.mark.parametrize(("base", "slope"), [(0.001, 0.0), (0.0002, 1e-7), (0.0, 1e-7)])
def test_tokens_that_fit_take_the_time_that_was_given(base, slope):
    pace = taught(base, slope, [(n * 512, 512) for n in range(40)])
    for start in (0, 5000, 21_000, 40_000):
        fits = pace.fits(0.25, start)
        assert fits * (base + slope * (start + fits)) == pytest.approx(0.25, rel=0.05)


def test_passes_that_saw_about_as_much_tell_no_slope():
    pace = taught(0.001, 0.0, [(0, 60), (0, 64), (0, 62)])
    pace.learn(0.080, [(0, 64)])  # a bad moment
    assert 100 < pace.fits(0.25, 3000) <= 250


def test_nothing_is_known_before_the_first_pass():
    assert not Pace().known and taught(0.001, 0.0, [(0, 1)]).known


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 512), st.floats(1e-6, 10)), min_size=1, max_size=30),
    st.integers(0, 30_000),
)
def test_whatever_was_learnt_some_number_of_tokens_fits_and_fewer_behind_a_longer_context(passes, start):
    pace = Pace()
    for at, count, seconds in passes:
        pace.learn(seconds, [(at, count)])
    assert pace.fits(0.25, start) >= pace.fits(0.25, start + 1000) >= 0
