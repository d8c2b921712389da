"""The text never depends on drafting: not on the drafter, the width, the batch, or on who joins and leaves."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from engines import (
    SHAPES,
    Job,
    Listed,
    Models,
    assert_true_logprobs,
    engine_of,
    fixture,
    goldens,
    logprobs_of,
    packed,
    prompts,
    random_widths,
    request,
    rounds_needed,
    run,
    smallest,
    solo,
    texts,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mtp.draft_length import DraftLengthPolicy, GoodputPolicy, HeuristicPolicy
from mlx_mtp.rows import GREEDY, Request, Sampling
from mlx_mtp.scheduler import Limits

shapes = pytest.mark.parametrize("shape", SHAPES)
SEEDED = Sampling(temperature=0.8, top_k=40, seed=7)
NUCLEUS = Sampling(temperature=1.1, top_p=0.9, min_p=0.01, seed=2**63)
SMALL_CHUNKS = Limits(alone_tok=11, chunk_tok=11, first_chunk_tok=5)


def four(models: Models, tokens: int = 12) -> list[Request]:
    """Two greedy and two seeded requests whose texts begin before, at and past the window of 16."""
    settings_ = (GREEDY, SEEDED, GREEDY, NUCLEUS)
    drawn = prompts(models, (5, 17, 41, 14), seed=3)
    return [request(p, tokens, s) for p, s in zip(drawn, settings_, strict=True)]


def assert_same_texts(models: Models, kind: str, depth: int | DraftLengthPolicy, limits: Limits | None = None) -> None:
    """Four requests, two of which come while the others run, have the texts they have alone without drafts."""
    wanted = four(models)
    jobs = [Job(r, at) for r, at in zip(wanted, (0, 0, 3, 5), strict=True)]
    assert texts(run(engine_of(models, kind, depth, limits), jobs)) == [solo(models, r) for r in wanted]


def slow(*values: object) -> Any:
    """A case that a default one covers with a smaller model or in other company."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("width", range(1, 8))
def test_four_rows_have_the_texts_of_plain_decoding_at_every_width(width):
    assert_same_texts(smallest(), "near", width)


@pytest.mark.parametrize(
    "shape, width",
    [
        ("edge", 2),
        ("moe", 4),
        ("dense", 3),
        ("unified", 6),
        *(slow("edge", width) for width in (1, 3, 4, 5, 6, 7)),
        slow("moe", 1),
        slow("moe", 7),
    ],
)
def test_four_rows_of_every_shape_have_the_texts_of_plain_decoding(shape, width):
    assert_same_texts(fixture(shape), "fit", width)


@pytest.mark.parametrize(
    "shape, kind",
    [
        ("edge", "fit"),
        ("moe", "fit"),
        ("dense", "near"),
        ("unified", "rand"),
        ("edge", "fit+lookup"),
        ("moe", "dflash+lookup"),
        *(slow(*case) for case in product(("edge", "moe"), ("plain", "rand", "near"))),
        slow("edge", "lookup"),
        slow("moe", "near+lookup"),
    ],
)
def test_width_may_change_every_round(shape, kind):
    assert_same_texts(fixture(shape), kind, random_widths(), SMALL_CHUNKS)


@pytest.mark.parametrize(
    "shape, depth",
    [
        ("edge", HeuristicPolicy),
        ("moe", GoodputPolicy),
        slow("moe", HeuristicPolicy),
        slow("edge", GoodputPolicy),
        *(slow(*case) for case in product(("dense", "unified"), (HeuristicPolicy, GoodputPolicy))),
    ],
)
def test_width_may_follow_what_was_kept_and_what_it_took(shape, depth):
    assert_same_texts(fixture(shape), "fit", depth())


@pytest.mark.parametrize(
    "shape, sampling, width",
    [
        ("edge", GREEDY, 2),
        ("edge", SEEDED, 15),
        ("moe", SEEDED, 2),
        ("moe", GREEDY, 15),
        slow("edge", GREEDY, 15),
        slow("edge", SEEDED, 2),
        slow("moe", GREEDY, 2),
        slow("moe", SEEDED, 15),
    ],
)
def test_one_row_has_the_text_of_plain_decoding(shape, sampling, width):
    models = fixture(shape)
    wanted = request(goldens(shape)["short/ids"], 18, sampling)
    assert texts(run(engine_of(models, "fit", width), [wanted])) == [solo(models, wanted)]


@pytest.mark.parametrize("shape, bits", [("edge", 8), ("moe", 4), slow("edge", 4), slow("moe", 8)])
def test_quantised_targets_are_as_exact(shape, bits):
    models = packed(shape, bits)
    assert_same_texts(models, "fit", 3)
    assert_same_texts(models, "self", random_widths(), SMALL_CHUNKS)


@pytest.mark.parametrize("kind", ["rand", "near"])
def test_more_rows_than_fit_wait_and_have_the_same_texts(kind):
    models = smallest()
    wanted = four(models)
    engine = engine_of(models, kind, 3, Limits(max_rows=2, alone_tok=8, chunk_tok=8))
    assert texts(run(engine, wanted)) == [solo(models, r) for r in wanted]


@pytest.mark.parametrize("kind", ["rand", "dflash", "near"])
def test_a_long_prompt_stands_still_while_rows_behind_it_decode(kind):
    models = smallest()
    wanted = [request(p, 10) for p in prompts(models, (60, 4, 7))]
    limits = Limits(alone_tok=6, chunk_tok=6, first_chunk_tok=6)
    assert texts(run(engine_of(models, kind, 3, limits), wanted)) == [solo(models, r) for r in wanted]


REPEATING = ("plain", "rand", "dflash", "near", "lookup", "rand+lookup", "dflash+lookup", "near+lookup")


@pytest.mark.parametrize("kind", REPEATING)
@pytest.mark.parametrize("rows", [1, 4, slow(8)])
def test_every_kind_writes_the_texts_of_plain_decoding_at_changing_widths(kind, rows):
    """Greedy and seeded rows that join one after another, of texts that repeat themselves."""
    models, settings_ = smallest(), (GREEDY, SEEDED, GREEDY, NUCLEUS)
    wanted = [request(p * 3, 24, settings_[(i + rows) % 4]) for i, p in enumerate(prompts(models, (3, 6, 9, 4) * 2))]
    jobs = [Job(r, i) for i, r in enumerate(wanted[:rows])]
    engine = engine_of(models, kind, random_widths(rows), SMALL_CHUNKS)
    assert texts(run(engine, jobs)) == [solo(models, r) for r in wanted[:rows]]


# seeds ------------------------------------------------------------------------------------------------------


def test_seeded_text_is_a_function_of_weights_prompt_and_seed():
    models = smallest()
    wanted = [request(prompts(models, (11,))[0], 16, Sampling(seed=s)) for s in range(4)]
    alone = [solo(models, r) for r in wanted]
    for kind, width, order in (
        ("dflash", 3, (0, 1, 2, 3)),
        ("rand", 2, (2, 0, 3, 1)),
        ("near", 5, (3, 2, 1, 0)),
    ):
        jobs = [Job(wanted[i], at) for at, i in enumerate(order)]
        assert texts(run(engine_of(models, kind, width), jobs)) == [alone[i] for i in order]


def test_different_seeds_give_different_texts():
    models = fixture("edge")
    ids = goldens("edge")["short/ids"]
    told = {tuple(solo(models, request(ids, 16, Sampling(seed=s)))) for s in (0, 1, 2, 3, 2**32, 2**63)}
    assert len(told) == 6


def test_unseeded_requests_differ_from_one_to_the_next():
    models, ids = fixture("edge"), goldens("edge")["short/ids"]
    wanted = [request(ids, 16, Sampling())] * 4
    assert len({tuple(t) for t in texts(run(engine_of(models, "fit", 3), wanted))}) == 4


# acceptance -------------------------------------------------------------------------------------------------

SELF_SAMPLING = {"greedy": GREEDY, "seeded": Sampling(seed=1), "unseeded": Sampling()}


@pytest.mark.parametrize(
    "shape, width, how",
    [
        *(("edge", 7, how) for how in SELF_SAMPLING),
        *(("moe", 1, how) for how in SELF_SAMPLING),
        ("dense", 3, "greedy"),
        slow("dense", 3, "seeded"),
        slow("dense", 3, "unseeded"),
        *(slow("edge", 3, how) for how in SELF_SAMPLING),
    ],
)
def test_a_model_that_drafts_for_itself_is_accepted_completely(shape, width, how):
    models, tokens = fixture(shape), 18
    for lengths in ((11,), (3, 17, 40, 9)):
        wanted = [request(p, tokens, SELF_SAMPLING[how]) for p in prompts(models, lengths)]
        for outcome in run(engine_of(models, "self", width), wanted):
            assert outcome.stats.generated_tokens == tokens
            assert outcome.stats.rounds == rounds_needed(tokens, width)
            assert outcome.stats.kept == outcome.stats.drafted


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_model_that_drafts_for_itself_is_accepted_completely_beside_rows_that_join(at):
    models = smallest()
    first, second = (request(p, 25) for p in prompts(models, (8, 33)))
    outcomes = run(engine_of(models, "self", 3, SMALL_CHUNKS), [first, Job(second, at)])
    assert [o.stats.rounds for o in outcomes] == [rounds_needed(25, 3)] * 2


@shapes
def test_a_fitted_drafter_is_accepted_about_as_often_as_in_the_reference(shape):
    models, g = fixture(shape), goldens(shape)
    wanted = [request(g[f"{p}/ids"], 48) for p in ("short", "long")]
    outcomes = run(engine_of(models, "fit", 3), wanted)
    assert sum(o.stats.kept for o in outcomes) / sum(o.stats.drafted for o in outcomes) > 0.4


@pytest.mark.parametrize("shape", ["edge", "moe"])
def test_every_row_accepts_its_own_drafts_whoever_runs_beside_it(shape):
    models, g = fixture(shape), goldens(shape)
    sizes = {"w": 5, "long": 20, "wp2": 9, "short": 24}  # rows leave, and the last takes their place
    wanted = [request(g[f"{p}/ids"], n) for p, n in sizes.items()]
    alone = [run(engine_of(models, "fit", 3), [r])[0] for r in wanted]
    beside = run(engine_of(models, "fit", 3), [Job(r, i // 2) for i, r in enumerate(wanted)])
    for one, other in zip(alone, beside, strict=True):
        assert [len(e.tokens) for e in other.events] == [len(e.tokens) for e in one.events]
        assert other.stats.rounds == one.stats.rounds


# schedules --------------------------------------------------------------------------------------------------

LONGEST = 14  # tokens a text
POOL = (1, 2, 3, 5, 7, 8, 9, 12, 16, 23)  # prompt lengths; the window is 8
KINDS = (
    GREEDY,
    Sampling(seed=1),
    Sampling(temperature=0.7, top_k=6, seed=2),
    Sampling(),
    Sampling(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5),
    Sampling(seed=3, presence_penalty=1.5, logit_bias=((4, 2.0), (11, -100.0))),
    Sampling(repetition_penalty=0.7, frequency_penalty=-0.5, logit_bias=((30, 2.0),)),
)

requests_ = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, len(POOL) - 1),
        "tokens": st.integers(1, LONGEST),
        "sampling": st.sampled_from(range(len(KINDS))),
        "at": st.integers(0, 14),
        "cancel": st.none() | st.integers(0, 25),
        "end": st.none() | st.integers(0, LONGEST - 1),
        "priority": st.integers(0, 1),
        "logprobs": st.none() | st.integers(0, 4),
    }
)
schedules = st.fixed_dictionaries(
    {
        "rows": st.lists(requests_, min_size=1, max_size=8),
        "widths": st.lists(st.integers(0, 7), min_size=1, max_size=8),
        "drafter": st.sampled_from(
            ["plain", "rand", "dflash", "near", "self", "lookup", "rand+lookup", "dflash+lookup"]
        ),
        "max_rows": st.integers(1, 8),
        "chunk": st.integers(1, 30),
        "first_chunk": st.integers(1, 12),
        "hands_over_first": st.booleans(),
    }
)


def check_schedule(plan: dict) -> None:
    """Whatever a schedule does, every row that is not cancelled has its solo text, the others a beginning of it."""
    models = smallest()
    pool = prompts(models, POOL, seed=1)
    jobs, expected = [], []
    for row in plan["rows"]:
        longest = request(pool[row["prompt"]], LONGEST, KINDS[row["sampling"]])
        known = longest.sampling.seed is not None or longest.sampling.greedy
        want, eos = solo(models, longest) if known else None, frozenset()
        if known and row["end"] is not None:
            eos = frozenset({want[row["end"]]})
            want = want[: want.index(want[row["end"]]) + 1]
        wanted = replace(longest, max_tokens=row["tokens"], eos=eos, priority=row["priority"], logprobs=row["logprobs"])
        jobs.append(Job(wanted, row["at"], row["cancel"]))
        expected.append(want[: row["tokens"]] if known else None)
    limits = Limits(
        plan["max_rows"], alone_tok=plan["chunk"], chunk_tok=plan["chunk"], first_chunk_tok=plan["first_chunk"]
    )
    engine = engine_of(models, plan["drafter"], Listed(plan["widths"]), limits)
    engine.hands_over_first = plan["hands_over_first"]
    for job, outcome, want in zip(jobs, run(engine, jobs), expected, strict=True):
        if outcome.reason is None:
            assert job.cancel is not None
            assert want is None or outcome.tokens == want[: len(outcome.tokens)]
        elif want is None:
            assert len(outcome.tokens) == job.request.max_tokens
        else:
            assert outcome.tokens == want
        if job.request.logprobs is not None:
            assert_true_logprobs(models, job.request, outcome)
        assert bool(logprobs_of(outcome)) == (job.request.logprobs is not None and bool(outcome.tokens))
    assert engine.runner._history.state() == (None, None, None)
    assert not engine.cache.bounds and not engine.scheduler.rows


@given(schedules)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_any_schedule_of_joins_ends_cancels_and_widths_gives_every_row_its_solo_text(plan):
    check_schedule(plan)


@pytest.mark.slow
@given(schedules)
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
def test_thousands_of_schedules_give_every_row_its_solo_text(plan):
    check_schedule(plan)
