"""Filters keep what a plain reference keeps, row by row; noise is a function of seed, position and token."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.kernels.noise import gumbel
from mlx_mtp.rows import GREEDY, RequestError, Sampling
from mlx_mtp.sampling import DRAFT_STREAM, RowSampler, Sampler

VOCAB = 40


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """One distribution's filters in the order of transformers' logits processors, in double precision."""
    if s.greedy:
        return np.ones(len(logits), bool)  # nothing is drawn: the best token is the best token of all
    z = logits.astype(np.float64) / s.temperature
    if s.top_k:
        z = np.where(z < np.sort(z)[::-1][min(s.top_k, len(z)) - 1], -np.inf, z)
    if s.top_p < 1:
        order = np.argsort(-z, kind="stable")
        share = np.exp(z[order] - z.max())
        share /= share.sum()
        drop = np.cumsum(share) - share >= s.top_p
        drop[0] = False
        z[order[drop]] = -np.inf
    if s.min_p:
        share = np.exp(z - z.max())
        z = np.where(share < s.min_p, -np.inf, z)
    return np.isfinite(z)


def row(sampling: Sampling) -> RowSampler:
    return RowSampler.of(sampling)


def filtered(logits: np.ndarray, rows: list[Sampling]) -> np.ndarray:
    """logits [B, L, V] through one sampler."""
    return np.array(Sampler([row(s) for s in rows]).filter(mx.array(logits)))


def random_logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, shape).astype(np.float32)


settings_of_a_row = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, VOCAB, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-4]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.none() | st.integers(0, 2**64 - 1),
)


@given(rows=st.lists(settings_of_a_row, min_size=1, max_size=5), seed=st.integers(0, 2**20))
@settings(max_examples=200)
def test_every_row_keeps_what_its_own_settings_keep(rows, seed):
    logits = random_logits(seed, len(rows), 3, VOCAB)
    got = filtered(logits, rows) if any(not s.greedy for s in rows) else None
    for b, sampling in enumerate(rows):
        if sampling.greedy or got is None:
            continue
        for column in range(3):
            want = reference(logits[b, column], sampling)
            assert np.isfinite(got[b, column]).tolist() == want.tolist()
            scaled = logits[b, column] / sampling.temperature
            np.testing.assert_allclose(got[b, column][want], scaled[want], rtol=1e-5, atol=1e-6)


@given(rows=st.lists(settings_of_a_row, min_size=2, max_size=6), seed=st.integers(0, 2**20))
@settings(max_examples=60)
def test_a_row_draws_the_same_token_alone_and_beside_others(rows, seed):
    logits = mx.array(random_logits(seed, len(rows), 1, VOCAB))
    own = [RowSampler(s, i, s.seed is not None) for i, s in enumerate(rows)]
    position = mx.arange(len(rows))[:, None] + 5
    sampler = Sampler(own)
    if sampler.greedy:
        return
    together = sampler.choose(sampler.filter(logits), position)[:, 0].tolist()
    for b, alone in enumerate(own):
        cut = slice(b, b + 1)
        if alone.sampling.greedy:
            assert together[b] == mx.argmax(logits[b, 0]).item()
        else:
            one = Sampler([alone])
            assert together[b] == one.choose(one.filter(logits[cut]), position[cut]).item()


def test_a_greedy_row_is_certain_beside_rows_that_draw():
    logits = mx.array(random_logits(3, 3, 200, VOCAB))
    sampler = Sampler([row(GREEDY), row(Sampling(2.0)), row(Sampling(1.0, top_k=1, seed=4))])
    position = mx.broadcast_to(mx.arange(200), (3, 200))
    tokens = sampler.choose(sampler.filter(logits), position)
    assert mx.array_equal(tokens[0], mx.argmax(logits[0], axis=-1))
    assert mx.array_equal(tokens[2], mx.argmax(logits[2], axis=-1))
    assert not mx.array_equal(tokens[1], mx.argmax(logits[1], axis=-1))


def test_the_order_is_temperature_top_k_top_p_min_p():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))[None, None]
    # over the three that top_k leaves the first two have .78; over all four they would have .7
    assert np.isfinite(filtered(logits, [Sampling(top_k=3, top_p=0.75)]))[0, 0].tolist() == [1, 1, 0, 0]
    assert np.isfinite(filtered(logits, [Sampling(top_p=0.75)]))[0, 0].tolist() == [1, 1, 1, 0]
    # at temperature 1/2 the shares are .53 .3 .13 .03
    assert np.isfinite(filtered(logits, [Sampling(0.5, top_p=0.75)]))[0, 0].tolist() == [1, 1, 0, 0]
    assert np.isfinite(filtered(logits, [Sampling(0.5, min_p=0.2)]))[0, 0].tolist() == [1, 1, 1, 0]
    assert np.isfinite(filtered(logits, [Sampling(min_p=0.5)]))[0, 0].tolist() == [1, 1, 1, 0]
    assert np.isfinite(filtered(logits, [Sampling(min_p=0.51)]))[0, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.3), Sampling(min_p=1.0)])
def test_tokens_that_tie_with_the_last_one_kept_stay(sampling):
    logits = np.array([[[1.0, 3.0, 3.0, 0.0, 3.0]]], np.float32)
    assert np.isfinite(filtered(logits, [sampling]))[0, 0].tolist() == [0, 1, 1, 0, 1]


def test_at_least_one_token_stays():
    logits = random_logits(4, 1, 50, VOCAB)
    kept = np.isfinite(filtered(logits, [Sampling(0.01, top_k=1000, top_p=1e-9, min_p=1.0)]))
    assert (kept.sum(-1) >= 1).all()
    assert (np.argmax(logits, -1) == np.argmax(kept, -1)).all()


def test_tokens_that_are_impossible_before_stay_impossible():
    logits = random_logits(5, 1, 1, VOCAB)
    logits[..., ::2] = -np.inf
    for sampling in (Sampling(0.8), Sampling(top_k=30), Sampling(top_p=0.99), Sampling(min_p=0.001)):
        kept = np.isfinite(filtered(logits, [sampling]))[0, 0]
        assert not kept[::2].any() and kept.any()


def test_a_draw_is_from_the_candidates_and_reports_their_filtered_logits():
    logits = mx.array(random_logits(6, 400, 8))
    ids = mx.broadcast_to(mx.array([3, 39, 7, 20, 21, 0, 1, 30]), (400, 8))
    rows = [RowSampler(Sampling(top_k=3), i, False) for i in range(400)]
    drawn = Sampler(rows).draw(logits, ids, mx.zeros((400,), mx.int32))
    tokens, kept = drawn.tokens, drawn.logits
    column = np.argmax(np.array(ids) == np.array(tokens)[:, None], axis=1)
    assert (np.isfinite(np.array(kept)).sum(1) == 3).all()
    assert np.isfinite(np.take_along_axis(np.array(kept), column[:, None], 1)).all()
    assert tokens.dtype == mx.int32 and len(set(tokens.tolist())) > 3


def test_a_clustered_draft_has_the_noise_of_its_token_not_of_its_column():
    ids = mx.array([[5, 2, 9]])
    sampler = Sampler([row(Sampling(seed=12))])
    got = sampler.noise(mx.array([[7]]), ids[:, None], 3, mx.array(0, mx.uint32))
    whole = sampler.noise(mx.array([[7]]), None, 12, mx.array(0, mx.uint32))
    assert got[0, 0].tolist() == [whole[0, 0, i].item() for i in (5, 2, 9)]


def test_seeds_of_64_bits_are_used_whole():
    sampler = Sampler([row(Sampling(seed=s)) for s in (1, 1 + 2**32, 1 + 2**63, 2**64 - 1)])
    noise = sampler.noise(mx.zeros((4, 1), mx.int32), None, 5, mx.zeros((4, 1), mx.uint32))
    assert len({tuple(n) for n in noise[:, 0].tolist()}) == 4
    seed = mx.array([0xFFFFFFFF, 0xFFFFFFFF], mx.uint32)
    assert mx.array_equal(noise[3, 0], gumbel(seed, mx.array(0), mx.arange(5)))


def test_streams_of_an_unseeded_row_differ_and_a_seeded_row_has_one():
    logits = mx.zeros((2, 1000))
    sampler = Sampler([RowSampler(Sampling(), 5, False), RowSampler(Sampling(seed=5), 5, True)])
    position = mx.array([9, 9])
    drafts = sampler.draw(logits, None, position).tokens
    chosen = sampler.choose(sampler.filter(logits[:, None]), position[:, None])[:, 0]
    assert drafts[0].item() != chosen[0].item()
    assert drafts[1].item() == chosen[1].item()
    assert sampler._stream(DRAFT_STREAM).tolist() == [[DRAFT_STREAM], [0]]


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    sampler = Sampler([RowSampler(Sampling(), s, False) for s in range(50)])
    u = np.array(sampler.uniform(mx.broadcast_to(mx.arange(2000), (50, 2000))), np.float64)
    assert 0 < u.min() and u.max() < 1
    counts, _ = np.histogram(u, 20, (0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 19 + 5 * 38**0.5


def test_unseeded_requests_get_seeds_of_their_own_and_greedy_ones_need_none():
    seeds = {RowSampler.of(Sampling()).seed for _ in range(50)}
    assert len(seeds) == 50
    assert RowSampler.of(GREEDY) == RowSampler(GREEDY, 0, True)
    assert not RowSampler.of(Sampling()).coupled and RowSampler.of(Sampling(seed=0)).coupled


@pytest.mark.parametrize(
    "values, said",
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number from 0 to 100"),
        ({"temperature": True}, "temperature is True; expected a number from 0 to 100"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number from 0 to 100"),
        ({"top_p": 1.01}, "top_p is 1.01; expected 0 to 1"),
        ({"top_p": 0}, "top_p is 0, which keeps no token; use temperature 0 for greedy decoding"),
        ({"min_p": -1}, "min_p is -1; expected 0 to 1"),
        ({"top_k": -1}, "top_k is -1; expected 0 to 2147483647"),
        ({"top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"seed": -1}, "seed is -1; expected 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected 0 to 18446744073709551615"),
        ({"seed": "1"}, "seed is '1'; expected an integer"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(values, said):
    with pytest.raises(RequestError, match=f"^{said}$"):
        Sampling(**values)
