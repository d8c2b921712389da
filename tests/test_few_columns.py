"""Where top_k leaves few columns, drafts and verdicts are those of the whole vocabulary."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.accept import rejection, verdict
from mlx_mtp.processors import Processors
from mlx_mtp.rows import GREEDY, Candidates, Draft, Sampling
from mlx_mtp.sampling import DRAFT_STREAM, RowSampler, Sampler

VOCAB, WIDTH = 700, 3
DEFAULT = Sampling(top_k=64, top_p=0.95)


def random(seed: int, *shape: int, spacing: float = 0.0) -> mx.array:
    """Logits of a target or drafter; spacing: of the values there are, as bfloat16 has one."""
    x = mx.random.normal(shape, key=mx.random.key(seed)) * 3
    return mx.round(x / spacing) * spacing if spacing else x


def whole(z: mx.array, ids: mx.array | None) -> mx.array:
    """z [B, L, n] of tokens `ids` in their places among all, [B, L, V]."""
    if ids is None:
        return z
    return mx.put_along_axis(mx.full((*z.shape[:2], VOCAB), -mx.inf), ids, z, axis=-1)


settings_of_a_row = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    top_k=st.sampled_from([1, 2, 5, 64, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-4]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
without_top_k = st.builds(
    Sampling,
    temperature=st.sampled_from([0.7, 1.0]),
    top_p=st.sampled_from([0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.3]),
)
batches = st.lists(settings_of_a_row, min_size=1, max_size=4).filter(lambda rows: any(not s.greedy for s in rows))


@given(rows=batches, spacing=st.sampled_from([0.0, 0.125, 0.5]), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_few_columns_hold_what_the_filters_keep_of_all(rows, spacing, seed):
    logits = random(seed, len(rows), 2, VOCAB, spacing=spacing)
    sampler = Sampler([RowSampler.of(s) for s in rows])
    z, ids = sampler.narrowed(logits, None)
    most = max(s.top_k for s in rows if not s.greedy)
    assert (ids is None) == (2 * most + 64 >= VOCAB) and (ids is None or z.shape[-1] == 2 * most + 64)
    for row, sampling in enumerate(rows):
        if not sampling.greedy:
            assert mx.array_equal(whole(z, ids)[row], sampler.filter(logits)[row])


@given(rows=st.lists(settings_of_a_row | without_top_k, min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_filters_keep_the_same_of_few_tokens_and_of_them_among_many_impossible_ones(rows, seed):
    if all(s.greedy for s in rows):
        return
    sampler, logits = Sampler([RowSampler.of(s) for s in rows]), random(seed, len(rows), 2, 40)
    many = mx.concatenate([mx.full((len(rows), 2, 6000), -1e6), logits], axis=-1)
    assert mx.array_equal(sampler.filter(many)[..., 6000:], sampler.filter(logits))


def test_without_top_k_in_a_row_that_draws_all_columns_are_there():
    for other in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=600)):
        sampler = Sampler([RowSampler.of(s) for s in (DEFAULT, other)])
        assert sampler.narrowed(random(1, 2, 1, VOCAB), None)[1] is None
    assert Sampler([RowSampler.of(s) for s in (DEFAULT, GREEDY)]).narrowed(random(1, 2, 1, VOCAB), None)[1] is not None


def test_of_more_ties_than_columns_some_stay():
    sampler = Sampler([RowSampler.of(DEFAULT)])
    z, ids = sampler.narrowed(mx.zeros((1, 1, VOCAB)), None)
    assert ids is not None and len(set(ids[0, 0].tolist())) == 192 and mx.all(z == 0)


# drafts and verdicts ----------------------------------------------------------------------------------------


def sampler_of(rows: list[Sampling], count: int) -> Sampler:
    """`count` rows with these settings in turn, each with a seed of its own."""
    own = [rows[i % len(rows)] for i in range(count)]
    return Sampler([RowSampler(s, 1000 + i, s.greedy or s.seed is not None) for i, s in enumerate(own)])


def steered(sampler: Sampler, rows: int) -> Sampler:
    """Penalties, and a constraint that leaves half of the tokens in the first column and 3 in the second."""
    said = mx.broadcast_to((mx.arange(VOCAB) % 5 == 0).astype(mx.int32), (rows, VOCAB))
    penalty = mx.full((rows, 1, 1), 0.7)
    allowed = mx.arange(VOCAB) % mx.array([2, 250, 1, 9])[:, None] == 0
    allowed = mx.broadcast_to(allowed, (rows, WIDTH + 1, VOCAB))
    return sampler.steered(Processors(said, None, None, None, penalty, penalty, allowed))


MIXED = [DEFAULT, GREEDY, replace(DEFAULT, seed=1), Sampling(0.7, top_k=5, min_p=0.02), Sampling(1.5, top_k=20)]
BATCHES = {
    "default": [DEFAULT],
    "seeded": [replace(DEFAULT, seed=1)],
    "few": [Sampling(0.8, top_k=3)],
    "mixed": MIXED,
}


@pytest.mark.parametrize("plain", [True, False], ids=["as_it_is", "steered"])
@pytest.mark.parametrize("few", [False, True], ids=["all_tokens", "few_tokens"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_verdict_is_that_of_the_whole_vocabulary(batch, few, plain):
    count = 400
    sampler = sampler_of(BATCHES[batch], count)
    bare, sampler = sampler, sampler if plain else steered(sampler, count)
    target = random(5, count, WIDTH + 1, VOCAB, spacing=0.125)
    drafter = target[:, :WIDTH] + random(6, count, WIDTH, VOCAB) * 0.3
    start, some = mx.arange(count), mx.broadcast_to(mx.arange(0, VOCAB, 2, dtype=mx.int32), (count, VOCAB // 2))
    steps, sources = [], []
    for i in range(WIDTH):
        z, ids = drafter[:, i], None
        if few:
            z, ids = mx.take_along_axis(z, some, axis=-1), some
        position = start + 1 + i
        steps.append(bare.draw(z, ids, position))
        # The same from all columns: each token's noise is its own, wherever its column stands.
        at = whole(z[:, None], None if ids is None else ids[:, None])
        filtered = bare.filter(at)
        noise = bare.noise(position[:, None], None, VOCAB, bare._stream(DRAFT_STREAM))
        assert mx.array_equal(steps[-1].tokens, mx.argmax(filtered + noise, axis=-1)[:, 0])
        sources.append(filtered)
    tokens = mx.stack([s.tokens for s in steps], axis=1)
    logits = None if steps[0].logits is None else mx.stack([s.logits for s in steps], axis=1)
    source = None if logits is None else Candidates(logits, mx.stack([s.ids for s in steps], axis=1))
    assert source is None or source.ids.shape[-1] < VOCAB // 2
    got = verdict(Draft(tokens, source), target, start, sampler)

    processed = target if sampler.processors is None else sampler.processors.columns(target, tokens)
    z, position = sampler.filter(processed), start[:, None] + 1 + mx.arange(WIDTH + 1)
    chosen = sampler.choose(z, position)
    drawn = rejection(Draft(tokens, Candidates(mx.concatenate(sources, axis=1), None)), z, position, sampler)
    own = sampler.coupled
    kept = mx.where(own[:, 0], 1 + mx.cumprod(tokens == chosen[:, :-1], axis=1).sum(axis=1), drawn.kept)
    assert mx.array_equal(got.kept, kept)
    wanted, written = mx.where(own, chosen, drawn.tokens), mx.arange(WIDTH + 1) < kept[:, None]
    assert mx.array_equal(mx.where(written, got.tokens, -1), mx.where(written, wanted, -1))
    assert len(set(kept.tolist())) > 1, "not every case was tested"


def test_the_first_two_tokens_are_distributed_as_the_targets_filters_say():
    count, sampling = 20_000, Sampling(0.9, top_k=4, top_p=0.9)
    sampler = sampler_of([sampling], count)
    target, drafter = (mx.broadcast_to(random(seed, 1, 2, 200), (count, 2, 200)) for seed in (7, 8))
    drafter = 0.7 * target + 0.7 * drafter
    start = mx.arange(count)
    drawn = sampler.draw(drafter[:, 0], None, start + 1)
    source = Candidates(drawn.logits[:, None], drawn.ids[:, None])
    result = verdict(Draft(drawn.tokens[:, None], source), target, start, sampler)
    assert drawn.ids.shape == (count, 72)
    tokens, kept = np.array(result.tokens), np.array(result.kept)
    assert 0.05 < (kept == 1).mean() < 0.95
    for column, wrote in ((0, kept > 0), (1, kept > 1)):
        p = kept_share(np.array(target[0, column], np.float64), sampling)
        counts = np.bincount(tokens[wrote, column], minlength=200)
        assert counts[p == 0].sum() == 0
        expected = p[p > 0] * wrote.sum()
        assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 3 + 6 * 6**0.5


def kept_share(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities after temperature, top_k and top_p, in double precision; no ties."""
    order = np.argsort(-logits)[: sampling.top_k]
    share = np.exp((logits[order] - logits.max()) / sampling.temperature)
    share /= share.sum()
    share = np.where(np.cumsum(share) - share < sampling.top_p, share, 0)
    p = np.zeros(len(logits))
    p[order] = share / share.sum()
    return p
