"""The round: one host read, one draft call a step, exact ends, cancels at any point, statistics that add up."""

import gc
import itertools
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    Job,
    Listed,
    Models,
    Noting,
    engine_of,
    fixture,
    goldens,
    packed,
    prompts,
    random_widths,
    request,
    run,
    smallest,
    solo,
    texts,
)

from mlx_mtp.draft_length import ConstantPolicy, DraftRound
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine, Pass
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.rows import GREEDY, Request, Sampling, Stats
from mlx_mtp.scheduler import Limits

# what the host waits for ------------------------------------------------------------------------------------

READS = ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "__iter__", "__array__", "__dlpack__")


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each way of waiting for the device was used since the counter was cleared."""
    counted: Counter = Counter()

    def watch(where: object, name: str, own=None) -> None:
        plain = own or getattr(where, name)

        def watched(*args, **kwargs):
            if where is not np or any(isinstance(a, mx.array) for a in args):
                counted[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(where, name, watched)

    for name in READS:
        watch(mx.array, name)
    for name in ("eval", "synchronize", "save", "savez"):
        watch(mx, name)
    for name in ("array", "asarray", "ascontiguousarray", "copy"):
        watch(np, name)
    return counted


def test_every_way_to_wait_for_the_device_is_noticed(reads):
    a = mx.array([1, 2])
    a.tolist(), a[0].item(), int(a[0]), float(a[0]), bool(a[0]), np.asarray(a), np.array(a), mx.eval(a), list(a)
    assert sum(reads.values()) >= 9


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind, sampling", [("plain", GREEDY), ("near", GREEDY), ("rand", Sampling()), ("rand", None)])
def test_the_host_reads_the_device_once_a_step(rows, kind, sampling, reads):
    models = smallest()
    mixed = [GREEDY, Sampling(seed=3), Sampling(0.8, top_k=9), Sampling(top_p=0.9)]
    wanted = [request(p, 14 + i, sampling or mixed[i % 4]) for i, p in enumerate(prompts(models, range(3, 3 + rows)))]
    engine = engine_of(models, kind, Listed([3, 0, 1, 5]))
    for one in wanted:
        engine.submit(one)
    steps = 0
    while not engine.idle:
        reads.clear()
        before = engine.host_reads
        engine.step()
        steps += 1
        assert dict(reads) == {"tolist": 1} and engine.host_reads == before + 1
    assert steps > 3


@pytest.mark.parametrize("kind", ["plain", "fit", "near"])
def test_penalties_bias_and_log_probabilities_take_no_read_of_their_own(kind, reads):
    models = fixture("edge")
    mixed = [
        Sampling(0.0, repetition_penalty=1.3),
        Sampling(seed=3, frequency_penalty=0.5, presence_penalty=1.0),
        Sampling(0.8, top_k=9, logit_bias=((5, 3.0), (8, -100.0))),
        GREEDY,
    ]
    engine = engine_of(models, kind, Listed([3, 0, 1, 5]))
    for i, p in enumerate(prompts(models, range(3, 7))):
        engine.submit(replace(request(p, 9 + i, mixed[i]), logprobs=(None, 0, 5, 2)[i]))
    while not engine.idle:
        reads.clear()
        engine.step()
        assert dict(reads) == {"tolist": 1}


def test_experts_are_counted_without_another_read(reads):
    engine = engine_of(fixture("moe"), "fit", 2)
    engine.submit(request(goldens("moe")["short/ids"], 8))
    while not engine.idle:
        reads.clear()
        engine.step()
        assert dict(reads) == {"tolist": 1}


@pytest.mark.parametrize("width", [1, 4])
def test_a_round_calls_the_drafter_once_per_drafted_token_whatever_the_rows(width, monkeypatch):
    models, calls, batches = fixture("edge"), [], []
    step, propose = Assistant.step, MtpDrafter.propose

    def counted(self, embedded, *args):
        calls.append(embedded.shape[0])
        return step(self, embedded, *args)

    def begun(self, rows, *args):
        batches.append(rows.stop - rows.start)
        return propose(self, rows, *args)

    monkeypatch.setattr(Assistant, "step", counted)
    monkeypatch.setattr(MtpDrafter, "propose", begun)
    engine = engine_of(models, "fit", width)
    for p in prompts(models, (3, 9, 17, 20, 5, 33, 8, 16)):
        engine.submit(request(p, 30))
    for _ in range(4):
        engine.step()
    for _ in range(3):
        calls.clear(), batches.clear()
        engine.step()
        assert batches == [8] and calls == [8] * width


# ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, width", [("plain", 3), ("fit", 0), ("fit", 3), ("self", 7)])
def test_a_text_has_exactly_as_many_tokens_as_were_asked_for(kind, width):
    models = fixture("edge")
    ids = goldens("edge")["short/ids"]
    longest = goldens("edge")["short/greedy"].tolist()
    wanted = [request(ids, n) for n in (1, 2, 3, 4, 5, 8, 9)]
    for one, outcome in zip(wanted, run(engine_of(models, kind, width), wanted), strict=True):
        assert outcome.tokens == longest[: one.max_tokens]
        assert outcome.reason == "length"


def test_one_token_takes_no_round():
    (outcome,) = run(engine_of(smallest(), "near", 3), [request((5, 6, 7), 1)])
    assert outcome.stats.rounds == 0 and len(outcome.events) == 1


@pytest.mark.parametrize("width", [0, 3, 7])
def test_a_text_ends_with_its_first_end_token_wherever_in_a_round_it_stands(width):
    models = fixture("edge")
    ids, text = goldens("edge")["short/ids"], goldens("edge")["short/greedy"].tolist()
    wanted, expected = [], []
    for i in range(12):
        wanted.append(request(ids, 40, eos=[text[i], 0]))
        expected.append(text[: text.index(text[i]) + 1])
    outcomes = run(engine_of(models, "self", width, Limits(max_rows=4)), wanted)
    assert texts(outcomes) == expected
    assert {o.reason for o in outcomes} == {"stop"}


@pytest.fixture
def passes(monkeypatch) -> list[Pass]:
    """The passes that were dispatched."""
    sent, dispatch = [], Engine._dispatch

    def watched(self, built):
        sent.append(built)
        return dispatch(self, built)

    monkeypatch.setattr(Engine, "_dispatch", watched)
    return sent


@pytest.mark.parametrize("width", [0, 3])
def test_a_row_alone_wastes_no_pass_and_a_row_among_others_at_most_one(width, passes):
    models = fixture("edge")
    ids, text = goldens("edge")["short/ids"], goldens("edge")["short/greedy"].tolist()
    (alone,) = run(engine_of(models, "fit", width), [request(ids, 40, eos=[text[11]])])
    assert len(passes) == 1 + alone.stats.rounds
    passes.clear()
    engine = engine_of(models, "fit", width)
    wanted = [request(ids, 40, eos=[text[11]]), request(goldens("edge")["long/ids"], 30), request(ids, 9)]
    outcomes = run(engine, wanted)
    for i, outcome in enumerate(outcomes):
        ran = sum(any(row.id == i for row in one.active) for one in passes)
        assert outcome.stats.rounds <= ran <= outcome.stats.rounds + 1
    assert len(passes) == 1 + max(o.stats.rounds for o in outcomes)


def test_a_first_token_is_handed_over_before_the_next_pass_is_dispatched(passes):
    """And on a CPU, where a dispatch takes as long as its pass, every token is; what is built is the same."""
    models = fixture("edge")
    wanted = [request(goldens("edge")[f"{name}/ids"], 12) for name in ("short", "long", "w")]
    expected, ahead = [solo(models, one) for one in wanted], {}
    for first in (False, True):
        passes.clear()
        engine = engine_of(models, "fit", 2)
        engine.hands_over_first = first
        numbers = [engine.submit(one) for one in wanted]
        seen, said = [], {number: [] for number in numbers}
        while not engine.idle:
            for event in engine.step():
                begins = not said[event.request]
                said[event.request] += event.tokens
                seen.append((begins, len(passes) - engine.host_reads))
        ahead[first] = seen
        assert [said[n] for n in numbers] == expected and len(passes) == engine.host_reads
    assert {passes_ahead for begins, passes_ahead in ahead[False] if begins} == {0}
    assert {passes_ahead for begins, passes_ahead in ahead[False] if not begins} == {0, 1}
    assert {passes_ahead for _, passes_ahead in ahead[True]} == {0}


def test_the_next_pass_is_dispatched_before_anything_is_learned_from_the_last(passes):
    """The device waits for the policy only at a prompt's and at an output's end, where nothing is built ahead."""
    models, learned = fixture("edge"), []

    class Policy(ConstantPolicy):
        def record(self, done: DraftRound) -> None:
            learned.append(len(passes) - engine.host_reads)

    engine = engine_of(models, "lookup", Policy(2))
    run(engine, [request(goldens("edge")[f"{name}/ids"], 12) for name in ("short", "w")])
    ahead = Counter(learned)
    assert ahead[1] > 4 and ahead[0] == 1 and len(ahead) == 2


@pytest.mark.parametrize("hands_over_first", [False, True])
@pytest.mark.parametrize("kind", ["rand", "near"])
def test_a_request_may_be_cancelled_before_any_step(kind, hands_over_first):
    models = smallest()
    first, second, third = (request(p, 12) for p in prompts(models, (41, 11, 16)))
    limits = Limits(max_rows=2, alone_tok=17, chunk_tok=17, first_chunk_tok=6)
    for cut in range(0, 9, 2 if hands_over_first else 1):
        jobs = [Job(first, 0, cut), second, third]
        engine = engine_of(models, kind, 2, limits)
        engine.hands_over_first = hands_over_first
        outcomes = run(engine, jobs)
        assert texts(outcomes)[1:] == [solo(models, second), solo(models, third)]
        if outcomes[0].reason is None:
            assert outcomes[0].tokens == solo(models, first)[: len(outcomes[0].tokens)]


def test_cancelling_says_what_the_request_had_cost_and_twice_says_nothing():
    models = smallest()
    engine = engine_of(models, "near", 2, Limits(max_rows=1))
    first, waits = engine.submit(request((5, 6, 7), 30)), engine.submit(request((5, 6), 4))
    for _ in range(4):
        engine.step()
    assert engine.cancel(waits).generated_tokens == 0
    stats = engine.cancel(first)
    assert stats.prompt_tokens == 3 and 0 < stats.generated_tokens < 30
    assert engine.idle and engine.cancel(first) is None and engine.cancel(99) is None
    assert engine.step() == []


def test_an_engine_without_requests_does_nothing():
    engine = engine_of(smallest(), "rand", 2)
    assert engine.idle and engine.step() == [] and engine.host_reads == 0


# statistics -------------------------------------------------------------------------------------------------


def check(stats: Stats, one: Request, tokens: list[int]) -> None:
    assert stats.prompt_tokens == len(one.prompt) and stats.cached_tokens == 0
    assert stats.generated_tokens == len(tokens)
    assert sum(stats.widths.values()) == stats.rounds
    assert len(stats.drafted_at) == len(stats.kept_at)
    assert all(k <= d for k, d in zip(stats.kept_at, stats.drafted_at, strict=True))
    assert stats.drafted_at == sorted(stats.drafted_at, reverse=True)
    assert stats.kept_at == sorted(stats.kept_at, reverse=True)
    assert all(d <= sum(n for w, n in stats.widths.items() if w > i) for i, d in enumerate(stats.drafted_at))
    # every round brings its kept drafts and one token more, except that the end of a text may cut the last
    assert len(tokens) - 1 in (stats.rounds + stats.kept, stats.rounds + stats.kept - 1)
    assert stats.host_reads >= stats.rounds + 1
    assert stats.prefill_s > 0 and (stats.decode_s > 0 or stats.rounds == 0)


@pytest.mark.parametrize("kind", ["plain", "rand", "fit", "near"])
def test_statistics_add_up(kind):
    models, g = fixture("edge"), goldens("edge")
    text = g["short/greedy"].tolist()
    wanted = [
        request(g["short/ids"], 25, eos=[text[17]]),
        request(g["long/ids"], 21),
        request(g["w/ids"], 1),
        request(g["wp1/ids"], 13, Sampling(seed=1)),
    ]
    engine = engine_of(models, kind, random_widths(3))
    outcomes = run(engine, wanted)
    for one, outcome in zip(wanted, outcomes, strict=True):
        check(outcome.stats, one, outcome.tokens)
        assert len(outcome.events) == outcome.stats.rounds + 1
        numbers = outcome.stats.to_json()
        assert numbers["rounds"] == outcome.stats.rounds and sum(numbers["widths"].values()) == numbers["rounds"]
    assert engine.total.generated_tokens == sum(len(o.tokens) for o in outcomes)
    assert engine.total.rounds == sum(o.stats.rounds for o in outcomes)
    assert engine.total.drafted == sum(o.stats.drafted for o in outcomes)


def test_the_draft_length_policy_learns_of_every_round():
    models, depth = fixture("edge"), Noting(2)
    wanted = [request(goldens("edge")[f"{p}/ids"], 12) for p in ("short", "long")]
    outcomes = run(engine_of(models, "fit", depth), wanted)
    assert len(depth.rounds) == max(o.stats.rounds for o in outcomes)
    for done in depth.rounds:
        assert 0 <= done.k <= 2 and all(0 <= n <= done.k for n in done.num_accepted)
        assert done.seconds is None or 0 < done.seconds < 60
    emitted = sum(len(done.num_accepted) + sum(done.num_accepted) for done in depth.rounds)
    assert emitted >= sum(len(o.tokens) - 1 for o in outcomes)


def test_a_prompt_chunk_beside_a_round_says_nothing_about_its_time():
    models, depth = smallest(), Noting(1)
    first, second = prompts(models, (4, 40))
    engine = engine_of(models, "rand", depth, Limits(alone_tok=8, chunk_tok=8, first_chunk_tok=8))
    run(engine, [request(first, 30), Job(request(second, 2), 8)])
    assert sum(done.seconds is None for done in depth.rounds) >= 5


def test_time_in_which_nothing_ran_counts_for_no_round():
    models, depth = smallest(), Noting(2)
    engine, ticks = engine_of(models, "near", depth), itertools.count()
    pauses = 0
    engine.timer.clock = lambda: next(ticks) / 1000 + 100 * pauses
    for _ in range(3):
        cancelled = engine.submit(request((5, 6, 7), 60))
        for _ in range(4):
            engine.step()
        engine.cancel(cancelled)
        pauses += 1
    run(engine, [request((5, 6, 7), 10)])
    assert depth.rounds and all(done.seconds is None or done.seconds < 1 for done in depth.rounds)


# what is left behind ----------------------------------------------------------------------------------------


def churn(models: Models, engine: Engine, count: int) -> None:
    """Many short requests, of which some are cancelled, some end early, some begin with what others have left."""
    pool, numbers = prompts(models, (1, 3, 9, 14, 20), seed=9), []
    for i in range(count):
        sampling = (GREEDY, Sampling(seed=i), Sampling(0.9, top_k=5))[i % 3]
        number = engine.submit(request(pool[i % 5], 1 + i % 4, sampling, eos=[i % models.vocab]))
        numbers.append(number)
        if i % 5 == 0:
            engine.step()
        if i % 11 == 0:
            engine.cancel(number)
        while len(engine.scheduler.waiting) > 8:
            engine.step()
    while not engine.idle:
        engine.step()


def left_behind(engine: Engine) -> int:
    """Bytes in use once the garbage is gone; the engine must hold no rows."""
    assert not engine.cache.bounds and not engine.scheduler.rows and not engine.scheduler.waiting
    assert len(engine.runner._samplers) <= 65
    engine.runner._samplers.clear()
    engine.scheduler.prefixes.clear()
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def check_leaks(kind: str, count: int) -> None:
    models = smallest()
    engine = engine_of(models, kind, random_widths(5, 3), Limits(prefix_bytes=2**20))
    churn(models, engine, 40)
    before = left_behind(engine)
    churn(models, engine, count)
    assert left_behind(engine) <= before + 128 * 1024  # a row's cache takes 70 KiB, and there were hundreds
    assert engine.cache.lengths.shape[0] == 0


@pytest.mark.parametrize("kind", ["near", pytest.param("rand", marks=pytest.mark.slow)])
def test_hundreds_of_short_requests_leave_nothing_behind(kind):
    check_leaks(kind, 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rand", "near"])
def test_ten_thousand_short_requests_leave_nothing_behind(kind):
    check_leaks(kind, 10_000)


def test_a_quantised_target_runs_in_an_engine_as_any_other():
    models = packed("edge", 4)
    wanted = request(goldens("edge")["short/ids"], 10)
    assert texts(run(engine_of(models, "self", 3), [wanted])) == [solo(models, wanted)]
