"""The largest values without a sort are those that a sort finds; the nucleus is that of a sort."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.accept import verdict
from mlx_mtp.logprobs import pack
from mlx_mtp.rows import GREEDY, Draft, Sampling
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.top_k import SORTED, falling, nucleus, top_k

VOCABULARY = 262_144


def columns(count: int, seed: int, spacing: float) -> np.ndarray:
    """[2, 3, count] float32; spacing: of the values there are, 0 for none."""
    x = np.random.default_rng(seed).normal(0, 3, (2, 3, count)).astype(np.float32)
    return np.round(x / spacing) * np.float32(spacing) if spacing else x


def sorted_(x: np.ndarray) -> np.ndarray:
    return np.sort(x, axis=-1)[..., ::-1]


@given(
    count=st.sampled_from([1, 7, 100, SORTED, SORTED + 1, 5000, 9973, 32_000, 151_936]),
    k=st.sampled_from([1, 2, 20, 64, 192, 1000]),
    spacing=st.sampled_from([0.0, 0.0625, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_k_largest_values_are_found_whatever_ties_with_them(count, k, spacing, seed):
    x, k = columns(count, seed, spacing), min(k, count)
    places = top_k(mx.array(x), k)
    assert places.dtype == mx.int32 and places.shape == (2, 3, k)
    found = np.array(places)
    assert (np.diff(found, axis=-1) > 0).all(), "ascending, none twice"
    assert np.array_equal(sorted_(np.take_along_axis(x, found, axis=-1)), sorted_(x)[..., :k])
    assert np.array_equal(np.array(falling(mx.array(x), k)), sorted_(x)[..., :k])


def test_a_column_s_largest_values_do_not_depend_on_the_columns_beside_it():
    x = mx.array(columns(9000, 1, 0.5))
    together = top_k(x, 50)
    for row in range(2):
        for column in range(3):
            alone = top_k(x[row : row + 1, column : column + 1], 50)
            assert mx.array_equal(together[row, column], alone[0, 0])


def test_impossible_tokens_come_last_and_fill_up():
    x = np.full((1, 1, 9000), -np.inf, np.float32)
    x[..., [8999, 17, 4000]] = 1.0, 2.0, 3.0
    assert {17, 4000, 8999} <= set(top_k(mx.array(x), 10)[0, 0].tolist())
    assert falling(mx.array(x), 4)[0, 0].tolist() == [3.0, 2.0, 1.0, -np.inf]


@given(
    count=st.sampled_from([1, 2, 33, 640, 5000]),
    p=st.sampled_from([1e-5, 0.1, 0.47, 0.9, 0.95]),
    spacing=st.sampled_from([0.0, 0.25, 4.0]),
    shift=st.sampled_from([0.0, -40.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_the_nucleus_is_that_of_a_sort(count, p, spacing, shift, seed):
    x = columns(count, seed, spacing) + np.float32(shift)
    if count > 2:
        x[..., :: count // 3] = -np.inf
    falling_ = sorted_(x.astype(np.float64))
    share = np.exp(falling_ - falling_[..., :1])
    share /= share.sum(axis=-1, keepdims=True)
    before = np.cumsum(share, axis=-1) - share
    wanted = np.min(np.where(before < p, falling_, np.inf), axis=-1, keepdims=True)
    near = np.abs(before - p).min(axis=-1, keepdims=True) < 1e-6  # rounding decides
    got = np.array(nucleus(mx.array(x), mx.full((2, 1, 1), p)))
    assert (near | (got == wanted)).all()


LENGTHS = {"sort": 0, "argsort": 0, "partition": 0, "argpartition": 0, "topk": 0}
SETTINGS = [
    Sampling(top_k=64, top_p=0.95),
    Sampling(top_k=64, top_p=0.95, seed=1),
    Sampling(top_p=0.95),
    Sampling(min_p=0.1),
    Sampling(top_k=900),
    Sampling(seed=4),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_no_sampler_sorts_the_vocabulary(sampling, monkeypatch):
    longest = [0]

    def watched(sort):
        def run(x, *given, **named):
            longest[0] = max(longest[0], x.shape[-1])
            return sort(x, *given, **named)

        return run

    for name in LENGTHS:
        monkeypatch.setattr(mx, name, watched(getattr(mx, name)))
    logits = mx.zeros((1, 3, VOCABULARY))  # graphs are built, nothing is computed
    sampler = Sampler([RowSampler.of(sampling)])
    drafts = [sampler.draw(logits[:, i], None, mx.array([i])).tokens for i in range(2)]
    verdict(Draft(mx.stack(drafts, axis=1)), logits, mx.array([9]), sampler)
    pack(logits, mx.zeros((1, 3), mx.int32), 20)
    assert 64 <= longest[0] <= VOCABULARY // 8


def test_log_probabilities_of_a_real_vocabulary_are_the_best_there_are():
    logits = mx.random.normal((1, 2, VOCABULARY), key=mx.random.key(3)) * 3
    packed = pack(logits, mx.argmax(logits, axis=-1).astype(mx.int32), 5)
    best = np.argsort(-np.array(logits), axis=-1)[..., :5]
    assert np.array_equal(np.sort(np.array(packed[..., 6:]), axis=-1), np.sort(best, axis=-1))


def test_a_greedy_row_beside_others_says_the_first_of_any_number_of_best_tokens():
    rows = [RowSampler.of(s) for s in (GREEDY, Sampling(top_k=3), Sampling(top_k=3, seed=1))]
    logits = mx.zeros((3, 2, 9000))
    for count in (0, 1):
        draft = Draft(mx.full((3, count), 5, mx.int32))
        result = verdict(draft, logits[:, : count + 1], mx.array([4, 5, 6]), Sampler(rows))
        assert result.tokens[0].tolist() == [0] * (count + 1)
