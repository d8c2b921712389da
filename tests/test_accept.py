"""Both acceptance rules are exact: the text has the target's own distribution, or is the target's own choice."""

import math
from dataclasses import replace
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from engines import Models, engine_of, full_pass, processed, prompts, request, run, smallest

from mlx_mtp.accept import Verdict, matching, rejection, verdict
from mlx_mtp.processors import History, Processors
from mlx_mtp.rows import GREEDY, Candidates, Draft, Request, Sampling
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Limits

# A false alarm once in ten million runs; where seeds are fixed, a pass stays a pass.
LEVEL_DEVIATIONS = 5.1993  # of a normal variable


def critical(freedom: int) -> float:
    """The chi-square value that is exceeded by chance as rarely as LEVEL_DEVIATIONS (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + LEVEL_DEVIATIONS * part**0.5) ** 3


def statistic(counts: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """Chi-square of counts against probabilities, cells with less than 5 expected joined; and degrees of freedom."""
    expected = p * counts.sum()
    small = expected < 5
    assert counts[p == 0].sum() == 0, "a token that the target never says"
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    return float(((observed - expected) ** 2 / np.where(keep, expected, 1))[keep].sum()), int(keep.sum()) - 1


def power(p: np.ndarray, q: np.ndarray, n: int) -> float:
    """The chance that n draws from q are told from p; the noncentral chi-square taken as normal."""
    cells = p > 0
    off, freedom = n * ((q - p)[cells] ** 2 / p[cells]).sum(), cells.sum() - 1
    deviations = (freedom + off - critical(freedom)) / (2 * (freedom + 2 * off)) ** 0.5
    return math.erfc(-deviations / 2**0.5) / 2


def fits(counts: np.ndarray, p: np.ndarray) -> bool:
    value, freedom = statistic(counts, p)
    return value < critical(freedom)


# rejection sampling on arrays ---------------------------------------------------------------------------------

VOCAB, WIDTH, SAMPLES = 6, 3, 120_000
SAMPLING = Sampling(temperature=0.9, top_k=5)
PENALTIES = {"presence_penalty": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.6, "logit_bias": ((2, 1.0),)}
STEERED = replace(SAMPLING, **PENALTIES)
PROMPT = (1, 4)


def tree(seed: int, scale: float = 1.2) -> np.ndarray:
    """Logits [V + 1, V + 1, V + 1, V] of a language whose next token depends on the last three; index V: none yet."""
    return np.random.default_rng(seed).normal(0, scale, (VOCAB + 1,) * 3 + (VOCAB,)).astype(np.float32)


TARGET = tree(1)
DRAFTER = (0.6 * TARGET + 0.8 * tree(2)).astype(np.float32)  # agrees about as often as a real one


def after(table: np.ndarray, said: mx.array) -> mx.array:
    """Logits [N, V] after the tokens said [N, n], n <= 3."""
    none = mx.full((said.shape[0], 3 - said.shape[1]), VOCAB, mx.int32)
    context = mx.concatenate([none, said], axis=1)
    return mx.array(table)[context[:, 0], context[:, 1], context[:, 2]]


@cache
def fresh(count: int, seed: int, sampling: Sampling = SAMPLING) -> Sampler:
    """`count` rows that judge by rejection sampling, each with its own seed."""
    rng = np.random.default_rng(seed)
    seeds = [int(s) for s in rng.integers(0, 2**63, count)]
    return Sampler([RowSampler(sampling, s, False) for s in seeds]).steered(begun(count, sampling))


def begun(count: int, sampling: Sampling) -> Processors | None:
    """What steers so many rows alike, which have read PROMPT and said nothing."""
    history = History(VOCAB)
    history.join(Request(PROMPT, 1, sampling))
    one = history.processors(slice(0, 1))
    if one is None:
        return None
    given = {k: v for k, v in vars(one).items() if v is not None}
    return Processors(**{k: mx.broadcast_to(v, (count, *v.shape[1:])) for k, v in given.items()})


def columns(sampler: Sampler, logits: mx.array, said: mx.array) -> mx.array:
    """logits [N, V] after the tokens said [N, n] as the sampler filters them, [N, 1, V]."""
    z = logits[:, None]
    return sampler.filter(sampler.processors.columns(z, said, said.shape[1]) if sampler.processors else z)


def clustered(z: mx.array, step: int) -> tuple[mx.array, mx.array]:
    """Four of the tokens' logits and their ids, in another order at every step, as a clustered head gives them."""
    ids = mx.array(np.random.default_rng(step).permutation(VOCAB)[:4], mx.int32)
    ids = mx.broadcast_to(ids, (z.shape[0], 4))
    return mx.take_along_axis(z, ids, axis=-1), ids


def drawn_at_once(sampler: Sampler, count: int) -> Draft:
    """Drafts of `count` rows whose positions know nothing of each other, as a block drafter gives them."""
    block = mx.broadcast_to(mx.array(DRAFTER[VOCAB, VOCAB, :WIDTH]), (count, WIDTH, VOCAB))
    draft = sampler.draw_all(block, mx.broadcast_to(11 + mx.arange(WIDTH), (count, WIDTH)))
    assert draft.source is not None
    return draft


def drafted(sampler: Sampler, count: int, few: bool, certain: bool) -> Draft:
    """Drafts of `count` rows from DRAFTER. certain: the drafter's only choice, with no distribution to judge it by."""
    said, logits, ids = mx.zeros((count, 0), mx.int32), [], []
    for i in range(WIDTH):
        z, which = after(DRAFTER, said), None
        if few:
            z, which = clustered(z, i)
        drawn = sampler.draw(z, which, mx.full((count,), 11 + i, mx.int32), [said[:, m] for m in range(i)])
        token = drawn.tokens
        if certain:
            best = mx.argmax(z, axis=-1, keepdims=True)
            token = best[:, 0] if which is None else mx.take_along_axis(which, best, axis=-1)[:, 0]
        said = mx.concatenate([said, token[:, None].astype(mx.int32)], axis=1)
        logits.append(drawn.logits)
        ids.append(which)
    if certain:
        return Draft(said)
    return Draft(said, Candidates(mx.stack(logits, axis=1), mx.stack(ids, axis=1) if few else None))


def judged(draft: Draft, sampler: Sampler) -> Verdict:
    columns = [after(TARGET, draft.tokens[:, :i]) for i in range(WIDTH + 1)]
    start = mx.full((draft.tokens.shape[0],), 10, mx.int32)
    return verdict(draft, mx.stack(columns, axis=1), start, sampler)


def continued(result: Verdict, sampler: Sampler) -> np.ndarray:
    """Three tokens of every row: those kept, and where they are fewer the target's own after them."""
    tokens = np.array(result.tokens)[:, :3]
    kept = np.array(result.kept)
    for have in (1, 2):
        said = mx.array(tokens[:, :have])
        z = columns(sampler, after(TARGET, said), said)
        own = np.array(sampler.choose(z, mx.full((len(tokens), 1), 100 + have, mx.int32)))[:, 0]
        tokens[:, have] = np.where(kept <= have, own, tokens[:, have])
    return tokens


@cache
def joint(sampling: Sampling = SAMPLING) -> np.ndarray:
    """Exact probabilities [V, V, V] of the first three tokens."""
    p = np.zeros((VOCAB,) * 3)
    one = Sampler([RowSampler(sampling, 0, False)])
    for a, b in product(range(VOCAB), repeat=2):
        chance = 1.0
        for said in ((), (a,), (a, b)):
            logits = np.array(after(TARGET, mx.array([said], mx.int32).reshape(1, -1))[0])
            if sampling.processes:
                logits = processed(logits, PROMPT, said, sampling).astype(np.float32)
            z = one.filter(mx.array(logits)[None, None])
            share = np.array(mx.softmax(z[0, 0].astype(mx.float32)), np.float64)
            chance = chance * (share / share.sum() if len(said) == 2 else (share / share.sum())[(a, b)[len(said)]])
        p[a, b] = chance
    return p


def counts_of(tokens: np.ndarray) -> np.ndarray:
    flat = np.ravel_multi_index(tokens.T, (VOCAB,) * tokens.shape[1])
    return np.bincount(flat, minlength=VOCAB ** tokens.shape[1])


def shifted(p: np.ndarray, by: float) -> np.ndarray:
    """p with `by` of its mass moved from the likelier half to the other: total variation `by`."""
    order, q = np.argsort(p)[::-1], p.copy()
    half = np.cumsum(p[order]) <= 0.5
    down, up = order[half], order[~half & (p[order] > 0)]
    q[down] -= by * p[down] / p[down].sum()
    q[up] += by * p[up] / p[up].sum()
    return q


CASES = {"all_tokens": (False, False), "few_tokens": (True, False), "certain": (False, True)}


@pytest.mark.parametrize("sampling", [SAMPLING, STEERED], ids=["as_it_is", "steered"])
@pytest.mark.parametrize("case", CASES)
def test_rejection_sampling_has_the_targets_distribution_over_three_positions(case, sampling):
    sampler = fresh(SAMPLES, 3, sampling)
    result = judged(drafted(sampler, SAMPLES, *CASES[case]), sampler)
    p = joint(sampling)
    assert p.sum() == pytest.approx(1)
    counts = counts_of(continued(result, sampler))
    assert fits(counts, p.ravel())
    kept = np.array(result.kept)
    assert all((kept == n).mean() > 0.005 for n in range(1, WIDTH + 2)), "not every position was tested"
    for depth in (1, 2):  # and of the first one and two, where the test is sharper
        axes = tuple(range(depth, 3))
        assert fits(counts.reshape((VOCAB,) * 3).sum(axes).ravel(), p.sum(axes).ravel())


def test_a_block_drawn_at_once_is_judged_as_exactly_by_what_each_position_was_drawn_from():
    count = SAMPLES // 3
    sampler = fresh(count, 8)
    draft = drawn_at_once(sampler, count)
    assert draft.source is not None
    for position in range(WIDTH):
        q = np.array(mx.softmax(draft.source.logits[0, position]), np.float64)
        assert fits(np.bincount(np.array(draft.tokens[:, position]), minlength=VOCAB), q / q.sum())
    result = judged(draft, sampler)
    assert fits(counts_of(continued(result, sampler)), joint().ravel())
    assert all((np.array(result.kept) == n).any() for n in range(1, WIDTH + 2)), "not every position was tested"


def test_the_test_of_the_distribution_would_see_a_difference_of_two_hundredths():
    p = joint()
    for depth in (1, 2, 3):
        q = p.sum(tuple(range(depth, 3))).ravel()
        wrong = shifted(q, 0.02)
        assert abs(wrong - q).sum() / 2 == pytest.approx(0.02)
        assert power(q, wrong, SAMPLES) > 0.99


def test_drafts_of_highest_score_judged_as_if_drawn_are_seen_to_be_biased():
    # as transformers does it: the draft is the drafter's best token, the test divides by its probability
    sampler = fresh(SAMPLES, 3)
    drawn = drafted(sampler, SAMPLES, False, False)
    best = drafted(sampler, SAMPLES, False, True)
    columns = [after(DRAFTER, best.tokens[:, :i]) for i in range(WIDTH)]
    source = Candidates(sampler.filter(mx.stack(columns, axis=1)), None)
    assert drawn.source.logits.shape == source.logits.shape
    result = judged(Draft(best.tokens, source), sampler)
    assert not fits(counts_of(continued(result, sampler)), joint().ravel())


def test_the_steered_distribution_is_far_from_one_in_which_what_is_said_does_not_count():
    p, still = joint(STEERED).ravel(), joint(replace(STEERED, presence_penalty=0.0, frequency_penalty=0.0)).ravel()
    assert abs(p - still).sum() / 2 > 0.1
    assert power(p, shifted(p, 0.02), SAMPLES) > 0.99


def test_rejection_sampling_keeps_as_many_drafts_as_any_exact_rule_can():
    sampler = fresh(SAMPLES, 4)
    result = judged(drafted(sampler, SAMPLES, False, False), sampler)
    none = mx.zeros((1, 0), mx.int32)
    p, q = (
        np.array(mx.softmax(fresh(1, 0).filter(after(table, none)[:, None])[0, 0]), np.float64)
        for table in (TARGET, DRAFTER)
    )
    best = np.minimum(p, q).sum()
    got = (np.array(result.kept) > 1).mean()
    assert got == pytest.approx(best, abs=5 * (best * (1 - best) / SAMPLES) ** 0.5)


def test_a_draft_from_the_targets_own_distribution_is_always_kept():
    sampler = fresh(2000, 5)
    z = sampler.filter(mx.broadcast_to(mx.array(TARGET[0, 0, :4]), (2000, 4, VOCAB)))
    tokens = mx.stack([sampler.draw(z[:, i], None, mx.full((2000,), i)).tokens for i in range(3)], axis=1)
    position = mx.broadcast_to(mx.arange(4), (2000, 4))
    result = rejection(Draft(tokens, Candidates(z[:, :3], None)), z, position, sampler)
    assert mx.all(result.kept == 4).item()


def test_a_draft_that_the_target_never_says_is_never_kept():
    sampler = fresh(500, 6, Sampling())
    z = mx.broadcast_to(mx.array([0.0, 1.0, -mx.inf, 0.5]), (500, 3, 4))
    draft = Draft(mx.full((500, 2), 2, mx.int32), Candidates(mx.zeros((500, 2, 4)), None))
    result = rejection(draft, z, mx.broadcast_to(mx.arange(3), (500, 3)), sampler)
    assert mx.all(result.kept == 1).item()
    assert not mx.any(result.tokens[:, 0] == 2).item()


def test_draft_test_and_replacement_use_noise_that_is_independent():
    # were the noise of the draft that of its replacement, a rejected draft's runner-up would follow it too often
    sampler = fresh(SAMPLES, 7, Sampling())
    q, p = mx.array([0.0, 0.0, 0.0, 0.0]), mx.array([-9.0, 0.0, 0.0, 0.0])
    position = mx.full((SAMPLES,), 5, mx.int32)
    token = sampler.draw(mx.broadcast_to(q, (SAMPLES, 4)), None, position).tokens
    z = mx.broadcast_to(p, (SAMPLES, 2, 4))
    source = Candidates(mx.broadcast_to(q, (SAMPLES, 1, 4)), None)
    at = mx.stack([position, position + 1], axis=1)
    result = rejection(Draft(token[:, None], source), z, at, sampler)
    rejected = np.array(token) == 0
    counts = np.bincount(np.array(result.tokens)[rejected, 0], minlength=4)[1:]
    assert fits(counts, np.full(3, 1 / 3))


# coupling and greedy ------------------------------------------------------------------------------------------


def test_matching_keeps_drafts_up_to_the_first_that_differs():
    chosen = mx.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    draft = mx.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    result = matching(draft, chosen)
    assert result.kept.tolist() == [4, 2, 1, 3]
    assert result.bonus.tolist() == [4, 2, 1, 3]


def test_a_greedy_verdict_is_the_arg_max_whatever_was_drafted():
    logits = mx.random.normal((3, 4, 9), key=mx.random.key(1))
    best = mx.argmax(logits, axis=-1)
    draft = Draft(mx.concatenate([best[:, :2], best[:, 2:3] * 0 + 8], axis=1).astype(mx.int32))
    result = verdict(draft, logits, mx.zeros((3,), mx.int32), Sampler([RowSampler.of(GREEDY)] * 3))
    assert result.tokens.tolist() == best.tolist()
    assert result.kept.tolist() == [4 if b == 8 else 3 for b in best[:, 2].tolist()]


@pytest.mark.parametrize("width", [0, 1, 3])
def test_coupled_choices_do_not_depend_on_the_draft_or_on_where_a_round_begins(width):
    sampler = Sampler([RowSampler.of(Sampling(0.8, top_k=7, seed=s)) for s in (1, 2)])
    logits = mx.random.normal((2, 12, 20), key=mx.random.key(2)) * 2
    whole = verdict(Draft(mx.zeros((2, 11), mx.int32)), logits, mx.array([30, 50]), sampler).tokens
    for begin in range(0, 12 - width, 4):
        part = logits[:, begin : begin + width + 1]
        draft = Draft(mx.full((2, width), 3, mx.int32))
        got = verdict(draft, part, mx.array([30, 50]) + begin, sampler).tokens
        assert got.tolist() == whole[:, begin : begin + width + 1].tolist()


def test_coupled_choices_are_distributed_as_the_target_says():
    rows = [RowSampler.of(Sampling(0.9, top_k=5, seed=s)) for s in range(20_000)]
    sampler = Sampler(rows)
    z = sampler.filter(mx.broadcast_to(mx.array(TARGET[6, 6, 6]), (len(rows), 1, VOCAB)))
    p = np.array(mx.softmax(z[0, 0]), np.float64)
    tokens = np.array(sampler.choose(z, mx.full((len(rows), 1), 4, mx.int32)))[:, 0]
    assert fits(np.bincount(tokens, minlength=VOCAB), p / p.sum())


def test_every_row_of_a_mixed_batch_is_judged_by_its_own_rule():
    own = [
        RowSampler.of(GREEDY),
        RowSampler.of(Sampling(0.8, seed=3)),
        RowSampler(Sampling(1.2), 99, False),
        RowSampler(Sampling(0.7, top_k=4), 98, False),
    ]
    logits = mx.random.normal((4, 3, 10), key=mx.random.key(3)) * 2
    start = mx.array([5, 9, 2, 30])
    source = mx.random.normal((4, 2, 10), key=mx.random.key(4))
    tokens = mx.argmax(source, axis=-1).astype(mx.int32)
    together = verdict(Draft(tokens, Candidates(source, None)), logits, start, Sampler(own))
    for row, sampler in enumerate(own):
        cut = slice(row, row + 1)
        draft = Draft(tokens[cut], Candidates(source[cut], None))
        alone = verdict(draft, logits[cut], start[cut], Sampler([sampler]))
        kept = alone.kept.item()
        assert together.kept[row].item() == kept
        assert together.tokens[row, :kept].tolist() == alone.tokens[0, :kept].tolist()


# end to end ---------------------------------------------------------------------------------------------------


def exact(models: Models, prompt: tuple[int, ...], sampling: Sampling, depth: int) -> dict[tuple[int, ...], float]:
    """Probability of every beginning of `depth` tokens, by a full pass for each shorter one."""
    one, chances = Sampler([RowSampler(sampling, 0, False)]), {(): 1.0}
    for _ in range(depth):
        longer = {}
        for said, chance in chances.items():
            logits = np.array(full_pass(models, prompt + said)[-1])
            z = one.filter(mx.array(processed(logits, prompt, said, sampling).astype(np.float32))[None, None])
            share = np.array(mx.softmax(z[0, 0]), np.float64)
            for token in np.flatnonzero(share):
                longer[*said, int(token)] = chance * float(share[token] / share.sum())
        chances = longer
    return chances


THREE = Sampling(temperature=1.0, top_k=3)


def check_engine(kind: str, texts: int, seen: float, sampling: Sampling = THREE) -> None:
    """The first three tokens of many texts against their exact chances; `seen`: the total variation it would notice."""
    models = smallest()
    (prompt,) = prompts(models, (6,), seed=2)
    chances = exact(models, prompt, sampling, 3)
    p = np.array(list(chances.values()))
    assert power(p, shifted(p, seen), texts) > 0.99
    outcomes = run(engine_of(models, kind, 3, Limits(max_rows=60)), [request(prompt, 4, sampling)] * texts)
    where = {said: i for i, said in enumerate(chances)}
    counts = np.zeros(len(chances), int)
    for outcome in outcomes:
        counts[where[tuple(outcome.tokens[:3])]] += 1
    assert fits(counts, p)


@pytest.mark.parametrize("kind", ["near", pytest.param("near+lookup", marks=pytest.mark.slow)])
def test_an_engine_says_the_first_three_tokens_as_often_as_the_target_would(kind):
    check_engine(kind, 240, 0.35)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["near", "rand", "dflash", "lookup", "rand+lookup"])
@pytest.mark.parametrize("sampling", [THREE, replace(THREE, **PENALTIES)], ids=["as_it_is", "steered"])
def test_an_engine_says_the_first_three_tokens_as_often_in_many_texts(kind, sampling):
    check_engine(kind, 6000, 0.08, sampling)
