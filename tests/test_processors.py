"""Penalties and bias: the rule at every column of a draft, the tables behind it, and whole texts that obey it."""

import copy
import io
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    Job,
    Listed,
    Models,
    engine_of,
    fixture,
    full_pass,
    processed,
    prompts,
    request,
    rounds_needed,
    run,
    smallest,
    solo,
    texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp import load
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, ConstantPolicy, HeuristicPolicy
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.kernels.noise import gumbel
from mlx_mtp.processors import History, Processors
from mlx_mtp.rows import GREEDY, Draft, Request, RequestError, Sampling
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Limits

VOCAB, WIDTH = 12, 4

settings_of_a_row = st.builds(
    Sampling,
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -1.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.6, 10.0]),
    logit_bias=st.sampled_from([(), (), ((3, 2.5), (0, -100.0)), ((VOCAB - 1, 100.0),)]),
)
tokens_of_a_row = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
rows_ = st.lists(st.tuples(settings_of_a_row, tokens_of_a_row, tokens_of_a_row), min_size=1, max_size=5)


def told(rows: list[tuple[Sampling, list[int], list[int]]]) -> History:
    """A history of rows as (settings, prompt, text)."""
    history = History(VOCAB)
    for sampling, prompt, _ in rows:
        history.join(Request(tuple(prompt), 1, sampling))
    longest = max(len(text) for _, _, text in rows)
    padded = mx.array([text + [0] * (longest - len(text)) for _, _, text in rows], mx.int32)
    history.add(slice(0, len(rows)), padded, mx.array([len(text) for _, _, text in rows], mx.int32))
    return history


def drawn(seed: int, *shape: int) -> tuple[mx.array, mx.array]:
    """Logits [B, K + 1, V] and drafts [B, K] from few tokens, so that they repeat."""
    rng = np.random.default_rng(seed)
    draft = rng.integers(0, 5, (shape[0], shape[1] - 1)).astype(np.int32)
    return mx.array(rng.normal(0, 3, shape).astype(np.float32)), mx.array(draft)


# the rule ---------------------------------------------------------------------------------------------------


@given(rows=rows_, seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_column_j_is_processed_as_if_the_first_j_drafts_had_been_said(rows, seed):
    logits, draft = drawn(seed, len(rows), WIDTH + 1, VOCAB)
    rule = told(rows).processors(slice(0, len(rows)))
    if rule is None:
        assert not any(s.processes for s, _, _ in rows)
        return
    got = np.array(rule.columns(logits, draft))
    for b, (sampling, prompt, text) in enumerate(rows):
        for j in range(WIDTH + 1):
            said = [*text, *draft[b, :j].tolist()]
            want = processed(np.array(logits[b, j]), prompt, said, sampling)
            np.testing.assert_allclose(got[b, j], want, rtol=1e-5, atol=1e-5)


@given(rows=rows_, seed=st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_a_column_has_the_same_bits_at_any_width_in_any_round_and_beside_any_rows(rows, seed):
    logits, draft = drawn(seed, len(rows), WIDTH + 1, VOCAB)
    everybody = told(rows).processors(slice(0, len(rows)))
    for b, row in enumerate(rows):
        alone = told([row]).processors(slice(0, 1))
        here, own = logits[b : b + 1], draft[b : b + 1]
        whole = here if everybody is None else everybody.columns(logits, draft)[b : b + 1]
        if alone is None:
            assert mx.array_equal(whole, here)  # this row asks for nothing
            continue
        assert mx.array_equal(whole, alone.columns(here, own))
        for j in range(WIDTH + 1):
            later = told([(row[0], row[1], [*row[2], *own[0, :j].tolist()])]).processors(slice(0, 1))
            for end in range(j + 1, WIDTH + 2):  # the same column in a round that begins there
                part = later.columns(here[:, j:end], own[:, j : end - 1])
                assert mx.array_equal(part, whole[:, j:end])


@given(rows=rows_, seed=st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_a_drafters_step_is_the_targets_column_for_all_tokens_and_for_some(rows, seed):
    logits, draft = drawn(seed, len(rows), WIDTH + 1, VOCAB)
    rule = told(rows).processors(slice(0, len(rows)))
    if rule is None:
        return
    want = rule.columns(logits, draft)
    rng = np.random.default_rng(seed)
    for i in range(WIDTH + 1):
        drafted = [draft[:, m] for m in range(i)]
        assert mx.array_equal(rule.step(logits[:, i], None, drafted), want[:, i])
        ids = mx.array(np.stack([rng.permutation(VOCAB)[:7] for _ in rows]))
        got = rule.step(mx.take_along_axis(logits[:, i], ids, axis=-1), ids, drafted)
        assert mx.array_equal(got, mx.take_along_axis(want[:, i], ids, axis=-1))


def test_a_draft_is_drawn_from_processed_logits_and_reports_them():
    history = told([(Sampling(logit_bias=((2, 50.0),), frequency_penalty=2.0), [1], [2])])
    own = [RowSampler(Sampling(), 5, False)]
    plain = Sampler(own)
    sampler = plain.steered(history.processors(slice(0, 1)))
    logits, position = mx.zeros((1, VOCAB)), mx.array([4])
    drawn = sampler.draw(logits, None, position, [mx.array([7]), mx.array([7])])
    kept = drawn.logits
    assert drawn.tokens.item() == 2 and kept is not None
    assert kept[0, 2].item() == 48 and kept[0, 7].item() == -4 and kept[0, 1].item() == 0
    assert not sampler.order_decides
    assert plain.processors is None and plain.steered(None) is plain


# tables -----------------------------------------------------------------------------------------------------

REPEATS = Sampling(repetition_penalty=1.2)
COUNTS = Sampling(presence_penalty=0.5)
BIASED = Sampling(logit_bias=((1, 3.0),))


def bytes_of(history: History) -> int:
    return sum(table.nbytes for table in history.state() if table is not None)


def test_tables_exist_only_while_a_live_row_needs_them():
    history = History(1000)
    sizes = []
    for sampling in (GREEDY, COUNTS, BIASED, REPEATS):
        history.join(Request((5, 6), 3, sampling))
        sizes.append(bytes_of(history))
    assert sizes == [0, 2 * 4000, 3 * 8000, 4 * 9000]
    for row, size in ((3, 3 * 8000), (2, 2 * 4000), (1, 0), (0, 0)):
        history.leave(row)
        assert bytes_of(history) == size


@pytest.mark.parametrize("gone", range(4))
def test_the_last_row_moves_into_a_gap(gone):
    rows = [(REPEATS, [1, 2], [3, 3]), (COUNTS, [4], [5]), (BIASED, [6], [6]), (replace(REPEATS, seed=1), [8, 9], [8])]
    history = told(rows)
    history.leave(gone)
    last = rows.pop()
    if gone < len(rows):
        rows[gone] = last
    logits, draft = drawn(1, 3, WIDTH + 1, VOCAB)
    left, fresh = history.processors(slice(0, 3)), told(rows).processors(slice(0, 3))
    assert left is not None and fresh is not None
    assert mx.array_equal(left.columns(logits, draft), fresh.columns(logits, draft))


def test_a_pass_over_rows_that_ask_for_nothing_has_no_processors_whoever_else_is_live():
    history = told([(GREEDY, [1], [2]), (REPEATS, [1], [2])])
    assert history.processors(slice(0, 1)) is None
    assert isinstance(history.processors(slice(0, 2)), Processors)


def test_what_was_added_and_never_dispatched_is_taken_back():
    history = told([(COUNTS, [1], [2])])
    before = history.state()
    history.add(slice(0, 1), mx.array([[3, 4]]), mx.array([2]))
    assert history.state()[0].sum().item() == 3
    history.restore(before)
    assert history.state()[0].sum().item() == 1


# texts ------------------------------------------------------------------------------------------------------

SETTINGS = (
    Sampling(0.0, repetition_penalty=1.4),
    Sampling(0.8, top_k=40, seed=7, presence_penalty=1.2, frequency_penalty=0.7),
    Sampling(0.0, frequency_penalty=1.5, logit_bias=((5, 1.5), (9, -100.0), (30, 0.5))),
    Sampling(1.1, top_p=0.9, min_p=0.01, seed=2**63, repetition_penalty=0.8, frequency_penalty=-0.4),
    Sampling(0.9, seed=3, logit_bias=((7, 2.0), *((t, -100.0) for t in range(0, 40, 2)))),
    GREEDY,
    Sampling(0.8, top_k=40, seed=7),
)
SMALL_CHUNKS = Limits(alone_tok=11, chunk_tok=11, first_chunk_tok=5)


def seven(models: Models, tokens: int) -> list[Request]:
    drawn = prompts(models, (5, 17, 31, 14, 3, 9, 20), seed=3)
    return [request(p, tokens, s) for p, s in zip(drawn, SETTINGS, strict=True)]


def steered_like_reference(models: Models, wanted: Request, text: list[int]) -> list[int]:
    """What a plain loop over full logits says after every beginning of a text: numpy, but for the noise."""
    s, out = wanted.sampling, []
    logits = np.array(full_pass(models, (*wanted.prompt, *text))[len(wanted.prompt) - 1 : -1])
    for i, row in enumerate(logits):
        z = processed(row, wanted.prompt, text[:i], s)
        if not s.greedy:
            z = z / s.temperature
            assert not s.min_p or s.top_p < 1
            order = np.argsort(-z)
            share = np.exp(z[order] - z.max())
            share /= share.sum()
            drop = (np.cumsum(share) - share >= s.top_p) & (np.arange(len(z)) > 0)
            if s.top_k:
                drop |= np.arange(len(z)) >= s.top_k
            share /= share[0]
            z[order[drop | (share < s.min_p)]] = -np.inf
            seed = mx.array([s.seed & 0xFFFFFFFF, s.seed >> 32], mx.uint32)
            z = z + np.array(gumbel(seed, mx.array(len(wanted.prompt) + i), mx.arange(len(z))))
        out.append(int(np.argmax(z)))
    return out


def test_plain_decoding_says_what_a_plain_loop_says_and_every_setting_changes_the_text():
    models = smallest()
    for wanted in seven(models, 10)[:5]:
        text = solo(models, wanted)
        assert text == steered_like_reference(models, wanted, text)
        bare = Sampling(**{k: getattr(wanted.sampling, k) for k in ("temperature", "top_k", "top_p", "min_p", "seed")})
        assert text != solo(models, replace(wanted, sampling=bare))


@pytest.mark.parametrize(
    "width", [0, 3, 7, "heuristic", *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 2, 4, 5, 6))]
)
def test_seven_rows_with_settings_of_their_own_have_their_solo_texts_at_every_width(width):
    models = smallest()
    wanted = seven(models, 10)
    jobs = [Job(r, at) for r, at in zip(wanted, (0, 0, 3, 5, 5, 6, 9), strict=True)]
    depth = HeuristicPolicy() if width == "heuristic" else width
    assert texts(run(engine_of(models, "near", depth, SMALL_CHUNKS), jobs)) == [solo(models, r) for r in wanted]


CLUSTERED, WHOLE_HEAD = ("edge", 3), ("dense", 2)


@pytest.mark.parametrize("shape, width", [CLUSTERED, pytest.param(*WHOLE_HEAD, marks=pytest.mark.slow)])
def test_rows_drafted_by_an_assistant_have_their_solo_texts(shape, width):
    models = fixture(shape)
    wanted = seven(models, 8)[:5]
    jobs = [Job(r, i) for i, r in enumerate(wanted)]
    assert texts(run(engine_of(models, "fit", width), jobs)) == [solo(models, r) for r in wanted]


@pytest.mark.parametrize("own", SETTINGS[:5])
def test_one_row_has_the_text_of_plain_decoding(own):
    models = smallest()
    wanted = request((9, 30, 5, 9), 14, own)
    assert texts(run(engine_of(models, "near", 5), [wanted])) == [solo(models, wanted)]


class Blind(MtpDrafter):
    """An assistant that is not told what steers the target."""

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        blind = copy.copy(sampler)
        blind.processors = None
        return super().propose(rows, bonus, blind, width)


def test_a_drafter_that_is_steered_as_the_target_is_has_more_drafts_kept():
    pair = load("tiny")  # fitted to each other, with a clustered head
    code = ("import os\n\nclass Stack:\n    def __init__(self):\n", "for i in range(10):\n    print(")
    own = (Sampling(0.0, presence_penalty=2.0, frequency_penalty=2.0), Sampling(0.0, repetition_penalty=1.3))
    wanted = [request(pair.text.encode(text), 30, s) for text in code for s in own]
    said, kept = [], []
    for kind in (MtpDrafter, Blind):
        cache = Cache(pair._model.specs, MAX_WIDTH, mx.float32)
        engine = Engine(
            pair._model, cache, kind(pair._model, pair._loaded.drafter.model, cache), ConstantPolicy(4), Limits()
        )
        outcomes = run(engine, wanted)
        said.append(texts(outcomes))
        kept.append(sum(o.stats.kept for o in outcomes) / sum(o.stats.drafted for o in outcomes))
    assert said[0] == said[1]
    assert kept[0] > kept[1] + 0.1, kept


@pytest.mark.parametrize("width", [1, 4, 7])
def test_a_model_that_drafts_for_itself_is_accepted_completely(width):
    models, tokens = smallest(), 17
    unseeded = Sampling(1.3, top_k=9, repetition_penalty=1.4, frequency_penalty=0.8, logit_bias=((3, 1.0),))
    own = (*SETTINGS[:4], unseeded)
    wanted = [request(p, tokens, s) for p, s in zip(prompts(models, (3, 17, 20, 9, 4)), own, strict=True)]
    for outcome in run(engine_of(models, "self", width), wanted):
        assert outcome.stats.rounds == rounds_needed(tokens, width)
        assert outcome.stats.kept == outcome.stats.drafted


def test_an_assistant_is_steered_by_what_it_has_drafted_itself():
    models = fixture("dense")
    others = tuple((token, -100.0) for token in range(models.vocab) if token not in (40, 41))
    alternates = Sampling(0.0, presence_penalty=2.0, frequency_penalty=2.0, logit_bias=others)
    engine = engine_of(models, "fit", 6, Limits())
    engine.submit(request((5, 6, 7), 20, alternates))
    engine.step()
    engine.step()
    assert engine._running is not None and engine._running.draft is not None
    (draft,) = engine._running.draft.tolist()
    assert set(draft) == {40, 41} and min(draft.count(40), draft.count(41)) >= 2


def test_a_request_that_continues_a_kept_prefix_is_penalised_for_its_whole_prompt():
    models = smallest()
    engine = engine_of(models, "near", 2, Limits(prefix_bytes=2**30))
    first = request(prompts(models, (30,), seed=4)[0], 12)
    [said] = texts(run(engine, [first]))
    following = request((*first.prompt, *said, 7), 16, Sampling(0.0, repetition_penalty=1.6))
    [outcome] = run(engine, [following])
    assert outcome.stats.cached_tokens >= len(first.prompt)
    assert outcome.tokens == solo(models, following) == steered_like_reference(models, following, outcome.tokens)


def test_an_engine_has_no_tables_and_builds_nothing_more_once_nobody_asks():
    models = smallest()
    sizes = []
    for others in ([], [request((5, 6, 7), 4, SETTINGS[1]), request((3, 4), 3, SETTINGS[0])]):
        engine = engine_of(models, "near", Listed([2]))
        run(engine, others)
        assert engine.runner._history.state() == (None, None, None)
        engine.submit(request((8, 9), 9))
        for _ in range(2):
            engine.step()
        graph = io.StringIO()
        mx.export_to_dot(graph, engine._build().output.vector)
        sizes.append(graph.getvalue().count("\n"))
        assert engine.runner._history.state() == (None, None, None)
    assert sizes[0] == sizes[1] > 100


# what is refused --------------------------------------------------------------------------------------------


def test_a_bias_for_a_token_that_there_is_not_is_refused_when_it_is_submitted():
    models = smallest()
    engine = engine_of(models, "plain", 0)
    for token, fine in ((models.vocab - 1, True), (models.vocab, False), (2**31 - 1, False)):
        wanted = request((5, 6), 2, Sampling(logit_bias=((3, 1.0), (token, 1.0))))
        if fine:
            engine.submit(wanted)
            continue
        with pytest.raises(RequestError, match=f"^logit_bias names token {token}; the vocabulary has 48 tokens, 0 to"):
            engine.submit(wanted)
    assert len(engine.scheduler.waiting) == 1


@pytest.mark.parametrize(
    "values, said",
    [
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan; expected a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected 0.01 to 10"),
        ({"repetition_penalty": True}, "repetition_penalty is True; expected a number from 0.01 to 10"),
        ({"logit_bias": {3: 1.0}}, "logit_bias is a dict; expected a tuple of (token id, bias) pairs"),
        ({"logit_bias": ((3, 1.0, 2),)}, "logit_bias is a tuple; expected a tuple of (token id, bias) pairs"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias names token 3 twice; give one bias for it"),
        ({"logit_bias": ((-1, 1.0),)}, "a token id in logit_bias is -1; expected 0 to 2147483647"),
        ({"logit_bias": (("3", 1.0),)}, "a token id in logit_bias is '3'; expected an integer"),
        ({"logit_bias": ((3, 101),)}, "the bias of token 3 is 101; expected -100 to 100"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(values, said):
    with pytest.raises(RequestError) as refused:
        Sampling(**values)
    assert str(refused.value) == said
