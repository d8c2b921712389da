"""Constrained rows in the engine: valid texts, the same at every width and in any company, with few passes."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.grammar import Grammars, Tool
from mlx_mtp.guide import _bits
from mlx_mtp.pair import Pair
from mlx_mtp.processors import Steering
from mlx_mtp.rows import GREEDY, Request, RequestError, Sampling, Stats
from mlx_mtp.segments import Segmenter

SCHEMAS = Path(__file__).resolve().parent / "fixtures" / "schemas"
TOOLS = json.loads((SCHEMAS / "tools.json").read_text())
SEEDED, FREE = Sampling(temperature=0.8, seed=7), Sampling(temperature=1.0, top_k=64, top_p=0.95)
PLAIN = Sampling(temperature=0.7, seed=3, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return mlx_mtp.load("tiny")


@pytest.fixture(scope="module")
def grammars(pair) -> Grammars:
    return Grammars(pair.text, pair.vocab_size, pair.eos)


def run(pair: Pair, requests: list[Request], width: int | str) -> list[tuple[list[int], str, Stats]]:
    """(tokens, finish reason, statistics) of requests that are submitted together."""
    ids = [pair.submit(request, width) for request in requests]
    tokens, ends = {i: [] for i in ids}, {}
    while not pair.idle:
        for event in pair.step():
            tokens[event.request] += event.tokens
            if event.finish_reason:
                ends[event.request] = (event.finish_reason, event.stats)
    return [(tokens[i], *ends[i]) for i in ids]


def request(pair: Pair, prompt: str, sampling: Sampling = GREEDY, constraint=None, most: int = 300) -> Request:
    return Request(tuple(pair.text.encode(prompt)), most, sampling, pair.eos, constraint=constraint)


def answers(pair: Pair, grammars: Grammars, sampling: Sampling, names: list[str]) -> list[Request]:
    """A request for each tool's schema: as a call for every other one, else as an answer."""
    out = []
    for i, name in enumerate(names):
        schema = TOOLS[name]
        called = grammars.calls([Tool(name, schema, strict=True)], must=True, several=False)
        out.append(request(pair, "def f(x):\n", sampling, called if i % 2 else grammars.json(schema)))
    return out


def check(pair: Pair, names: list[str], texts: list[list[int]] | list[list[int] | None]) -> None:
    for i, (name, tokens) in enumerate(zip(names, texts, strict=True)):
        if tokens is None:
            continue
        segmenter = Segmenter(pair.text)
        segments = segmenter.push(tokens) + segmenter.finish()
        kind = "arguments" if i % 2 else "answer"
        jsonschema.validate(json.loads("".join(s.text for s in segments if s.kind == kind)), TOOLS[name])


Outcomes = list[tuple[list[int], str, Stats]]


def tell(what: str, outcomes: Outcomes, without: Outcomes) -> None:
    """Print tokens per round (pytest -rP), with the constraint and without."""
    for label, some in (("constrained", outcomes), ("not constrained", without)):
        total = Stats()
        for _, _, stats in some:
            total.add(stats)
        whole = sum(reason == "stop" for _, reason, _ in some)
        each = (total.generated_tokens - len(some)) / total.rounds
        print(f"{what}, {label}: {each:.2f} tokens per round; {whole} of {len(some)} texts came to their end")


def unbound(pair: Pair, requests: list[Request], width: int | str) -> Outcomes:
    """The first of some requests without their constraints."""
    sampling = replace(requests[0].sampling, logit_bias=())
    return run(pair, [replace(r, constraint=None, max_tokens=80, sampling=sampling) for r in requests[:12]], width)


SHORT = ["glob", "web_fetch", "search_flights", "set_thermostat", "stock_price", "tree", "filter", "unicode"]


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        (GREEDY, SHORT[:4]),
        (SEEDED, SHORT[4:]),
        pytest.param(GREEDY, [*TOOLS], marks=pytest.mark.slow),
        pytest.param(SEEDED, [*TOOLS], marks=pytest.mark.slow),
    ],
    ids=["greedy", "seeded", "all greedy", "all seeded"],
)
def test_schemas_are_kept_and_the_texts_are_those_without_drafting(pair, grammars, sampling, names):
    requests = answers(pair, grammars, sampling, names)
    plain, drafted = run(pair, requests, 0), run(pair, requests, 4)
    assert [reason for _, reason, _ in plain] == ["stop"] * len(names)
    assert [tokens for tokens, _, _ in drafted] == [tokens for tokens, _, _ in plain]
    check(pair, names, [tokens for tokens, _, _ in plain])
    if len(names) > len(SHORT):
        tell(f"tools, temperature {sampling.temperature}, width 4", drafted, unbound(pair, requests, 4))
    rounds = [sum(stats.rounds for _, _, stats in outcome) for outcome in (plain, drafted)]
    assert rounds[1] < 0.6 * rounds[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [0, 4, "auto"])
def test_forty_schemas_are_kept_where_nothing_is_seeded(pair, grammars, width):
    requests = answers(pair, grammars, FREE, [*TOOLS])
    outcomes = run(pair, requests, width)
    tell(f"tools, not seeded, width {width}", outcomes, unbound(pair, requests, width))
    ended = [tokens if reason == "stop" else None for tokens, reason, _ in outcomes]
    check(pair, [*TOOLS], ended)  # a text cut by its limit need not be whole
    assert ended.count(None) < 0.2 * len(TOOLS)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0}])
@pytest.mark.parametrize("width", [0, 4])
def test_schemas_of_the_json_schema_test_suite_are_kept(pair, grammars, sampling, width):
    """Texts are steered to their end, for the tiny model would fill every string up to its limit."""
    marks = [t for t in range(pair.vocab_size) if pair.text.shows(t) and pair.text.spell(t)[:1] in b'"}]' and t > 4]
    bias = tuple((t, 30.0) for t in (*marks, *pair.eos))
    suite = json.loads((SCHEMAS / "suite.json").read_text())
    chosen = Sampling(**sampling, logit_bias=bias)
    requests = [request(pair, "x = ", chosen, grammars.json(entry["schema"]), 80) for entry in suite]
    ended, outcomes = 0, run(pair, requests, width)
    tell(f"suite, {sampling}, width {width}", outcomes, unbound(pair, requests, width))
    for entry, (tokens, reason, _) in zip(suite, outcomes, strict=True):
        if reason == "stop":
            value = json.loads(pair.text.decode(tokens))
            jsonschema.Draft202012Validator(entry["schema"]).validate(value)
            ended += 1
    assert ended > 0.9 * len(suite)


def test_rows_with_and_without_a_constraint_do_not_touch_each_other(pair, grammars):
    schema = grammars.json(TOOLS["glob"])
    mixed = [
        request(pair, "class A:\n", most=24),
        request(pair, "import os\n", GREEDY, schema),
        request(pair, "def main(", PLAIN, most=24),
        request(pair, "x = ", SEEDED, schema),
    ]
    alone = [run(pair, [one], 0)[0][0] for one in mixed]
    for width in (0, 3):
        assert [tokens for tokens, _, _ in run(pair, mixed, width)] == alone


def test_a_constrained_row_may_join_and_leave_while_others_run(pair, grammars):
    free, bound = request(pair, "class A:\n", most=60), request(pair, "y", GREEDY, grammars.json(TOOLS["classify"]))
    alone = [run(pair, [one], 0)[0][0] for one in (free, bound)]
    first = pair.submit(free, 3)
    events = [e for _ in range(4) for e in pair.step()]
    second = pair.submit(bound, 3)
    while not pair.idle:
        events += pair.step()
    for i, expected in ((first, alone[0]), (second, alone[1])):
        assert [t for e in events if e.request == i for t in e.tokens] == expected


def test_reads_of_the_device_are_counted_and_none_is_added_for_rows_without_a_constraint(pair, grammars):
    ((_, _, bound),) = run(pair, [request(pair, "y", GREEDY, grammars.json(TOOLS["classify"]))], 3)
    ((_, _, free),) = run(pair, [request(pair, "y", most=30)], 3)
    assert bound.rounds < bound.host_reads - 1 <= 2 * bound.rounds
    assert free.host_reads == free.rounds + 1
    ((_, _, plain),) = run(pair, [request(pair, "y", GREEDY, grammars.json(TOOLS["classify"]))], 0)
    assert plain.host_reads == plain.rounds + 1


def test_forced_tokens_need_no_drafter(grammars):
    plain = mlx_mtp.load("tiny", drafter=None)
    schema = {"type": "object", "properties": {"a_rather_long_name": {"type": "boolean"}}}
    schema |= {"required": ["a_rather_long_name"], "additionalProperties": False}
    bound = request(plain, "y", GREEDY, grammars.json(schema))
    ((tokens, _, without),) = run(plain, [bound], 0)
    ((same, _, with_),) = run(plain, [bound], 4)
    assert same == tokens and with_.rounds < without.rounds / 2


def test_the_end_of_a_text_that_is_cut_short_is_a_matter_of_length(pair, grammars):
    ((tokens, reason, _),) = run(pair, [request(pair, "y", GREEDY, grammars.json(TOOLS["edit"]), most=5)], 4)
    assert reason == "length" and len(tokens) == 5


def test_a_constrained_text_must_be_able_to_end(pair, grammars):
    with pytest.raises(RequestError, match="cannot ignore the end tokens"):
        Request((2,), 5, constraint=grammars.json())


def test_bits_are_unpacked_in_the_order_of_tokens():
    words = np.array([[0b101, 1 << 31]], np.uint32)
    assert np.nonzero(np.array(_bits(mx.array(words), 64))[0])[0].tolist() == [0, 2, 63]
    assert _bits(mx.array(words), 40).shape == (1, 40)


def test_a_forced_token_is_drafted_surely_even_if_the_drafter_has_not_scored_it():
    steering = Steering(mx.array([[7], [-1]]), mx.ones((2, 32), mx.bool_), mx.array([-1, -1]))
    logits, ids = mx.array([[1.0, 2.0], [3.0, 4.0]]), mx.array([[5, 6], [5, 6]])
    forced, which = steering.force(logits, ids, 0)
    assert which is not None
    assert forced.tolist() == [[0.0, -float("inf")], [3.0, 4.0]] and which.tolist() == [[7, 8], [5, 6]]
    assert steering.force(logits, ids, 1) == (logits, ids)
    assert steering.force(mx.zeros((2, 32)), None, 0)[0][0].tolist().index(0.0) == 7


def test_a_drafter_all_of_whose_candidates_are_forbidden_still_drafts_something():
    allowed = mx.arange(32)[None] == 3
    steering = Steering(mx.zeros((1, 0), mx.int32), allowed, mx.array([0]))
    logits, ids = mx.array([[1.0, 2.0]]), mx.array([[3, 6]])
    assert steering.steer(logits, ids, 0).tolist() == [[1.0, -float("inf")]]
    assert steering.steer(logits, ids, 1).tolist() == logits.tolist()
    assert steering.steer(logits, ids + 7, 0).tolist() == logits.tolist()
