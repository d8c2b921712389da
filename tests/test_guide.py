"""guide.py in the engine: exact with every kind of drafter, forced tokens for nothing, few reads, none waited for."""

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    DRAFTERS,
    Job,
    Listed,
    Models,
    Noting,
    disturbed,
    drafter_of,
    engine_of,
    random_widths,
    run,
    texts,
)

import mlx_mtp
from mlx_mtp.buffers import Slot
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, ConstantPolicy, DraftLengthPolicy
from mlx_mtp.engine import Engine, Pass
from mlx_mtp.grammar import Grammars, Tool
from mlx_mtp.pair import Pair
from mlx_mtp.rows import GREEDY, Request, Sampling
from mlx_mtp.scheduler import Limits

TOOLS = json.loads((Path(__file__).resolve().parent / "fixtures" / "schemas" / "tools.json").read_text())
SEEDED, FREE = Sampling(temperature=0.8, seed=7), Sampling(temperature=1.0)
USUAL_KINDS = ("fit", "dflash", "self", "lookup")
MORE_KINDS = tuple(kind for kind in DRAFTERS if kind != "rand" and kind not in USUAL_KINDS)
KINDS = (*USUAL_KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS))


@cache
def pair() -> Pair:
    return mlx_mtp.load("tiny", dtype="float32")


@cache
def models() -> Models:
    """The embedded pair with the drafters that tests make."""
    loaded = pair()._loaded
    assert loaded.drafter is not None
    near = disturbed(loaded.target.path, 0.03)
    return Models("tiny", loaded.target, {"fit": loaded.drafter.model}, near)


@cache
def grammars() -> Grammars:
    return Grammars(pair().text, pair().vocab_size, pair().eos)


def answer(schema: dict, sampling: Sampling = GREEDY, most: int = 120) -> Request:
    prompt = tuple(pair().text.encode("def f(x):\n"))
    return Request(prompt, most, sampling, pair().eos, constraint=grammars().json(schema))


def call(name: str, sampling: Sampling = GREEDY, must: bool = True, most: int = 60) -> Request:
    tools = [Tool(name, TOOLS[name], strict=True)]
    constraint = grammars().calls(tools, must=must, several=False)
    return Request(tuple(pair().text.encode("x = ")), most, sampling, pair().eos, constraint=constraint)


def free(text: str, most: int, sampling: Sampling = GREEDY) -> Request:
    return Request(tuple(pair().text.encode(text)), most, sampling, pair().eos)


@cache
def mixed() -> tuple[list[Request], list[list[int]]]:
    """Answers, calls, a call that need not come and a free text, greedy and seeded; and what each is on its own
    without drafting."""
    wanted = [
        answer(TOOLS["glob"]),
        call("stock_price", SEEDED),
        call("glob", GREEDY, must=False, most=20),
        free("import os\n", 20, SEEDED),
    ]
    return wanted, [run(engine_of(models(), "plain", 0), [one])[0].tokens for one in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_without_drafting_whatever_drafts(kind):
    wanted, alone = mixed()
    assert texts(run(engine_of(models(), kind, Listed([3, 0, 5])), wanted)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_k=20, seed=3, presence_penalty=0.5)])
@pytest.mark.parametrize("kind", [*USUAL_KINDS, *MORE_KINDS])
def test_tools_come_out_as_without_drafting_whatever_drafts(kind, sampling):
    names = [*TOOLS][::4]
    wanted = [answer(TOOLS[n], sampling) if i % 2 else call(n, sampling) for i, n in enumerate(names)]
    alone = texts(run(engine_of(models(), "plain", 0, Limits(max_rows=1)), wanted))
    for rows in (1, 4):
        assert texts(run(engine_of(models(), kind, random_widths(), Limits(max_rows=rows)), wanted)) == alone


class Watched(Engine):
    """Keeps how many tokens the drafter was asked for in every round that was run; a round built ahead may not be."""

    asked: list[int]

    def _dispatch(self, built: Pass) -> None:
        super()._dispatch(built)
        if built.guide is not None and built.guide.own:
            self.asked.append(built.guide.own)


def watched(depth: DraftLengthPolicy) -> Watched:
    rows = Cache(models().target.specs, MAX_WIDTH, mx.float32)
    engine = Watched(models().target, rows, drafter_of(models(), "fit", rows), depth, Limits())
    engine.asked, engine.hands_over_first = [], False
    return engine


LONG = {"const": {"kind": "a text of which not one token is the model's to choose", "more": [1, 2, 3, None, True]}}


@pytest.mark.parametrize("width", [1, 4])
def test_forced_tokens_come_several_a_round_and_cost_neither_a_drafter_nor_a_read(width):
    engine = watched(ConstantPolicy(width))
    (outcome,) = run(engine, [answer(LONG)])
    stats, tokens = outcome.stats, outcome.tokens
    assert stats is not None and json.loads(pair().text.decode(tokens)) == LONG["const"]
    forced = len(tokens) - 2  # the first comes with the prompt, the end is the model's choice among end tokens
    assert engine.asked in ([], [1], [width])  # for the end
    assert stats.rounds < forced / 6
    assert stats.host_reads == 1 + stats.rounds + len(engine.asked)


def test_nothing_is_drafted_at_width_0_not_even_what_is_forced():
    engine = watched(ConstantPolicy(0))
    (outcome,) = run(engine, [answer(LONG)])
    assert outcome.stats is not None and engine.asked == []
    assert outcome.stats.widths == {0: len(outcome.tokens) - 1}


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, FREE], ids=["greedy", "seeded", "free"])
def test_a_second_read_comes_only_with_rounds_that_ask_the_drafter(sampling):
    for wanted in (answer(TOOLS["search_flights"], sampling), call("set_thermostat", sampling)):
        engine = watched(ConstantPolicy(3))
        stats = run(engine, [wanted])[0].stats
        assert stats is not None and 0 < len(engine.asked) < stats.rounds
        assert stats.host_reads == 1 + stats.rounds + len(engine.asked)


def test_the_next_round_is_on_its_way_when_a_step_returns_unless_another_was_called_for():
    engine = watched(ConstantPolicy(3))
    engine.submit(answer(TOOLS["filter"]))
    idle, rounds = 0, 0
    while not engine.idle:
        engine.step()
        rounds += 1
        idle += engine._running is None
    certain = rounds - 1 - len(engine.asked)
    assert idle <= certain + 2  # and behind the prompt, and at the end
    assert rounds > 2 * idle


def test_a_drafter_that_copies_and_one_that_drafts_at_once_draft_what_is_forced():
    schema = {"type": "object", "properties": {"first": {"type": "boolean"}, "second_one": {"enum": [10, 20]}}}
    wanted = answer(schema | {"required": ["first", "second_one"], "additionalProperties": False})
    rounds = {}
    for kind in ("plain", "lookup", "dflash", "fit"):
        stats = run(engine_of(models(), kind, 3), [wanted])[0].stats
        assert stats is not None
        rounds[kind] = stats.rounds
    assert max(rounds["lookup"], rounds["dflash"], rounds["fit"]) <= rounds["plain"] + 1


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
def test_a_model_drafting_for_itself_knows_what_was_forced_without_it(sampling):
    """Steered at the first token that is free, it must draft the target's own."""
    wanted = [answer(TOOLS[name], sampling) for name in ("glob", "filter")]
    for some in (wanted[:1], wanted):
        for outcome in run(engine_of(models(), "self", 3), some):
            assert outcome.stats is not None and outcome.stats.acceptance_by_position[0] == 1.0


def test_a_prompt_beside_a_constrained_row_is_not_lost_when_its_round_is_undone():
    long = free(" ".join(f"name_{i} = {i}" for i in range(16)), 8)
    bound = [answer(LONG), answer(TOOLS["filter"], SEEDED)]
    limits = Limits(alone_tok=16, chunk_tok=16, first_chunk_tok=16)
    alone = [run(engine_of(models(), "plain", 0, limits), [one])[0].tokens for one in (*bound, long)]
    engine = engine_of(models(), "fit", 2, limits)
    assert texts(run(engine, [*bound, Job(long, 2)])) == alone


def test_rounds_of_which_every_draft_is_forced_say_nothing_about_the_drafter():
    policy = Noting(3)
    engine = watched(policy)
    run(engine, [answer(TOOLS["filter"])])
    assert len(policy.rounds) == len(engine.asked)
    assert sum(done.seconds is not None for done in policy.rounds) > len(policy.rounds) / 3


def test_what_the_host_writes_into_a_slot_is_what_the_graph_built_before_reads():
    slot = Slot(np.zeros((2, 3), np.uint32))
    total = (slot.array + 1).sum()
    slot.host[1] = 7
    assert total.item() == 6 + 21


def test_a_mask_takes_a_bit_a_token():
    engine = watched(ConstantPolicy(2))
    engine.submit(answer(TOOLS["glob"]))
    while engine._running is None or engine._running.guide is None:
        engine.step()
    guide = engine._running.guide
    assert guide._masks.host.nbytes == (guide.width + 1) * models().vocab // 8
