"""Who joins, in what order, and how prompts enter beside rows that decode: decisions, and the engine under them."""

import itertools
from dataclasses import replace

import mlx.core as mx
import pytest
from engines import (
    Job,
    assert_true_logprobs,
    engine_of,
    fixture,
    prompts,
    random_widths,
    request,
    run,
    smallest,
    solo,
    texts,
)

from mlx_mtp.engine import Engine
from mlx_mtp.rows import GREEDY, Request, RequestError, Sampling
from mlx_mtp.sampling import RowSampler
from mlx_mtp.scheduler import CHUNK_STEP, Chunk, Limits, Row, Scheduler, neighbours


def row(number: int, prompt: int, max_tokens: int = 8, priority: int = 0) -> Row:
    wanted = Request(tuple([5] * prompt), max_tokens, GREEDY, priority=priority)
    return Row(number, wanted, RowSampler.of(GREEDY))


def scheduler(*rows: Row, **limits) -> Scheduler:
    """A scheduler whose rows cost a byte a position."""
    made = Scheduler(Limits(**limits), lambda positions: positions)
    for one in rows:
        made.submit(one)
    return made


def ids(rows: list[Row]) -> list[int]:
    return [one.id for one in rows]


def learn(made: Scheduler, seconds: float, tokens: int) -> None:
    """A pass over so many tokens of a prompt alone took so long."""
    made.timed_chunks(seconds, [Chunk(row(99, tokens), tokens, False)], False)


def feed(made: Scheduler) -> dict[int, int]:
    """Take the coming pass's chunks as sent; request -> tokens."""
    sent = {}
    for chunk in made.chunks():
        assert chunk.count > 0 and chunk.last == (chunk.count == chunk.row.left)
        chunk.row.prefilled += chunk.count
        sent[chunk.row.id] = chunk.count
    return sent


# who joins ----------------------------------------------------------------------------------------------------


def test_rows_join_in_order_of_arrival_and_get_dense_places():
    made = scheduler(*(row(i, 4) for i in range(5)), max_rows=3)
    assert ids(made.admit()) == [0, 1, 2] and [r.index for r in made.rows] == [0, 1, 2]
    assert made.admit() == [] and ids(made.waiting) == [3, 4]
    assert made.leave(made.rows[0]) == 2
    assert ids(made.rows) == [2, 1] and [r.index for r in made.rows] == [0, 1]
    assert ids(made.admit()) == [3] and made.rows[2].index == 2


def test_higher_priorities_join_first():
    made = scheduler(row(0, 4), row(1, 4, priority=1), row(2, 4), row(3, 4, priority=1), max_rows=3)
    assert ids(made.admit()) == [1, 3, 0]


def test_a_row_that_leaves_has_no_place():
    made = scheduler(row(0, 4), row(1, 4))
    first, second = made.admit()
    made.leave(second)
    assert second.index == -1 and made.find(1) is None and made.find(0) is first


def test_nobody_overtakes_a_row_that_waits_for_memory():
    made = scheduler(row(0, 50, 10), row(1, 50, 10), row(2, 2, 2), kv_bytes=100)
    assert ids(made.admit()) == [0]
    assert made.admit() == []
    made.leave(made.rows[0])
    assert ids(made.admit()) == [1, 2]


def test_a_request_that_could_not_even_run_alone_is_refused_at_once():
    made = scheduler(kv_bytes=20)
    with pytest.raises(RequestError, match=r"15 \+ 8\) need .* lower max_tokens"):
        made.submit(row(0, 15))
    assert not made.waiting


def test_memory_is_never_given_to_more_rows_than_the_limit_allows():
    models = smallest()
    wanted = [request(p, 6) for p in prompts(models, (3, 20, 7, 12, 4, 9))]
    engine = engine_of(models, "near", 2)

    def bytes_of(positions: int) -> int:
        return engine.cache.row_bytes(positions) + engine.drafter.row_bytes(positions)

    two = 2 * bytes_of(26)
    engine = engine_of(models, "near", 2, Limits(kv_bytes=two))
    for one in wanted:
        engine.submit(one)
    most = 0
    while not engine.idle:
        engine.step()
        live = engine.scheduler.rows
        assert sum(bytes_of(len(r.request.prompt) + 6) for r in live) <= two
        most = max(most, len(live))
    assert most == 2


def test_a_rows_cost_is_what_the_cache_takes_for_it():
    engine = engine_of(smallest(), "rand", 2)
    for positions in (1, 200, 257, 1500):
        mx.eval(engine.cache.state())
        before = sum(a.nbytes for a in arrays(engine))
        number = engine.cache.join(positions)
        after = sum(a.nbytes for a in arrays(engine))
        assert engine.cache.row_bytes(positions) == pytest.approx(after - before, rel=0.02)
        engine.cache.leave(number)


def arrays(engine: Engine) -> list[mx.array]:
    """The keys and values of a cache."""
    _, ring, full, _ = engine.cache.state()
    return [a for pair in ring.values() for a in pair] + [a for rows in full.values() for p in rows for a in p]


# how prompts enter --------------------------------------------------------------------------------------------


def test_while_nobody_decodes_a_prompt_enters_in_the_widest_chunks():
    made = scheduler(row(0, 70), alone_tok=32, chunk_tok=32)
    made.admit()
    assert [feed(made) for _ in range(4)] == [{0: 32}, {0: 32}, {0: 6}, {}]


@pytest.mark.parametrize(("prompt", "sent"), [(9, [9]), (10, [10]), (11, [1, 10]), (95, [64, 21, 10])])
def test_the_tail_of_a_prompt_that_is_kept_is_a_chunk_of_its_own(prompt, sent):
    made = Scheduler(Limits(alone_tok=64, prefix_bytes=1), lambda positions: 1, tail=10)
    made.submit(row(0, prompt))
    made.admit()
    assert [feed(made)[0] for _ in sent] == sent and made.rows[0].left == 0


def test_beside_running_rows_a_chunk_is_small_until_the_speed_is_known():
    made = scheduler(row(0, 3), row(1, 500), alone_tok=256, chunk_tok=256, first_chunk_tok=48, max_rows=1)
    made.admit()
    feed(made)
    made.limits = Limits(alone_tok=256, chunk_tok=256, first_chunk_tok=48)
    made.admit()
    assert feed(made) == {1: 48}


def test_a_chunk_beside_running_rows_takes_no_longer_than_the_bound():
    made = scheduler(row(0, 3), row(1, 50_000), alone_tok=2048, chunk_tok=2048, stall_s=0.1)
    made.admit()
    made.rows[0].prefilled = 3
    for _ in range(40):  # a round takes 20 ms, a prompt token half a millisecond
        made.timed_round(0.020)
        chunks, chunk = made.chunks(), sum(feed(made).values())
        made.timed_chunks(0.020 + 0.0005 * chunk, chunks, True)
    assert 0.7 * 0.1 < 0.0005 * chunk <= 0.1
    made.timed_chunks(10.0, made.chunks(), True)  # one bad moment narrows it, and never to nothing
    assert CHUNK_STEP <= sum(feed(made).values()) < chunk


@pytest.mark.parametrize("alone", [False, True])
def test_nor_does_it_where_tokens_behind_a_long_context_take_longer(alone):
    """Whatever the passes before it were: beside a round, or over this prompt alone."""
    made = scheduler(row(0, 3), row(1, 60_000), alone_tok=128, chunk_tok=2048, stall_s=0.1)
    made.admit()
    seconds = []
    for step in range(200):
        made.rows[0].prefilled = 0 if alone and step < 20 else 3
        made.rows[0].done = alone and step < 20
        made.timed_round(0.020)
        chunks = made.chunks()
        feed(made)
        extra = sum(c.count * (0.0002 + 1e-7 * (c.start + c.count)) for c in chunks)
        if not made.rows[0].done:
            seconds.append(extra)
        made.timed_chunks(0.020 * (not made.rows[0].done) + extra, chunks, not made.rows[0].done)
    assert made.rows[1].prefilled > 10_000 and max(seconds) <= 0.1 and min(seconds[5:]) > 0.05


def test_a_short_prompt_behind_a_long_one_enters_at_once_and_the_long_one_goes_on():
    made = scheduler(row(0, 1000), row(1, 10), row(2, 30), alone_tok=64, chunk_tok=64)
    made.admit()
    assert feed(made) == {0: 32, 1: 10, 2: 22}
    made.rows[1].done = True  # it decodes and ends; the others go on
    assert feed(made) == {0: CHUNK_STEP, 2: 8}  # about as much as the other, which gets its first token


def test_every_prompt_ends_however_many_short_ones_come():
    made = scheduler(row(0, 200), alone_tok=20, chunk_tok=20, max_rows=8)
    for i in range(1, 60):
        made.submit(row(i, 15))
        made.admit()
        feed(made)
        for one in [r for r in made.rows if r.id and not r.left]:
            made.leave(one)
        if not any(r.id == 0 and r.left for r in made.rows):
            return
    raise AssertionError("the first prompt starved")


def test_a_prompt_of_higher_priority_is_fed_first():
    made = scheduler(row(0, 100), row(1, 100, priority=1), alone_tok=40, chunk_tok=40)
    made.admit()
    assert made.rows[0].id == 1
    sent = feed(made)
    assert sent[1] == 20 and sent[0] == 20 or sent == {1: 40}
    assert list(sent)[0] == 1


def test_short_prompts_enter_together_as_many_as_the_bound_allows():
    made = scheduler(*(row(i, 30) for i in range(4)), row(4, 500), row(5, 20), alone_tok=64, stall_s=0.1)
    made.admit()

    def fed() -> dict[int, int]:
        sent = feed(made)
        for one in made.rows:
            one.done = not one.left  # nobody is to decode
        return sent

    assert fed() == {0: 30, 5: 20, 1: 14}  # as long as the speed is unknown
    learn(made, 0.064, 64)
    assert fed() == {1: 16, 2: 30, 3: 30}  # of 100 tokens; the long one waits
    assert fed() == {4: 64} and fed() == {4: 64}
    learn(made, 1e-6, 64)
    learn(made, 1e-6, 64)
    made.submit(row(6, 64))
    made.submit(row(7, 64))
    made.admit()
    assert fed() == {4: 32, 6: 64, 7: 64}  # the first in line is long: its half, and the short ones


def side_by_side(*counts: int) -> list[Chunk]:
    rows = [row(i, 100) for i in range(len(counts))]
    for i, one in enumerate(rows):
        one.index = i
    return [Chunk(one, count, False) for one, count in zip(rows, counts, strict=True) if count]


def grouped(chunks: list[Chunk], *full: int) -> list[list[int]]:
    """full: rows that cannot be given more than is their own."""
    return [[c.row.id for c in group] for group in neighbours(chunks, lambda row, _: row not in full)]


def test_chunks_of_neighbours_make_one_pass_if_little_of_it_is_in_vain():
    assert grouped([]) == []
    assert grouped(side_by_side(10, 9, 10)) == [[0, 1, 2]]
    assert grouped(side_by_side(10, 9, 10)[::-1]) == [[0, 1, 2]]
    assert grouped(side_by_side(10, 0, 10)) == [[0], [2]]  # the row between has nothing to feed
    assert grouped(side_by_side(10, 2, 2, 50)) == [[0], [1, 2], [3]]
    assert grouped(side_by_side(10, 9, 10), 1) == [[0], [1], [2]]
    assert grouped(side_by_side(10, 9, 10), 0, 2) == [[0, 1, 2]]


def test_a_round_runs_over_the_rows_up_to_the_last_that_decodes():
    made = scheduler(*(row(i, 4) for i in range(4)))
    made.admit()
    assert made.decoding() == []
    made.rows[2].prefilled = 4
    assert ids(made.decoding()) == [0, 1, 2]
    made.rows[0].prefilled = 4
    made.rows[2].done = True
    assert ids(made.decoding()) == [0]


# in an engine -------------------------------------------------------------------------------------------------


def waited(engine: Engine, wanted: Request) -> tuple[int, int, int]:
    """Steps until a request of one token has it; and by its statistics, passes and columns until then."""
    number = engine.submit(wanted)
    for step in itertools.count(1):
        for event in engine.step():
            if event.request == number:
                assert event.stats is not None
                return step, event.stats.first_passes, event.stats.first_columns
    raise AssertionError


@pytest.mark.parametrize(("chunk", "columns"), [(8, 4 + 4), (24, 4 + 12), (128, 4 + CHUNK_STEP)])
def test_a_short_request_behind_a_long_prompt_waits_for_a_pass_and_not_for_the_prompt(chunk, columns):
    models = smallest()
    long, short = prompts(models, (300, 4))
    engine = engine_of(models, "rand", 3, Limits(alone_tok=chunk, chunk_tok=chunk, first_chunk_tok=chunk))
    engine.submit(request(long, 4))
    engine.step()
    assert waited(engine, request(short, 1)) == (1, 1, columns)


@pytest.mark.parametrize("short", [20, 50])
def test_it_waits_for_no_more_than_twice_its_own_columns(short):
    models = smallest()
    engine = engine_of(models, "rand", 3)
    engine.submit(request(prompts(models, (600,))[0], 4))
    for _ in range(2):
        engine.step()
    assert waited(engine, request(prompts(models, (short,))[0], 1)) == (1, 1, 2 * short)


def test_a_request_beside_one_that_decodes_waits_for_a_round_and_its_own_pass():
    models = smallest()
    running, short = prompts(models, (4, 9))
    engine = engine_of(models, "plain", 0)
    engine.submit(request(running, 60))
    for _ in range(4):
        engine.step()
    assert waited(engine, request(short, 1)) == (2, 2, 1 + 1 + 9)


@pytest.mark.parametrize("kind", ["plain", "fit", "dflash", "near", "fit+lookup"])
def test_prompts_that_enter_together_take_one_pass_and_their_texts_are_those_of_each_alone(kind, monkeypatch):
    models = fixture("edge")
    hot = (GREEDY, Sampling(seed=3), GREEDY, Sampling(seed=5, temperature=0.7, frequency_penalty=1.0))
    wanted = [
        replace(request(p, 6, sampling), logprobs=2 if i == 2 else None)
        for i, (p, sampling) in enumerate(zip(prompts(models, (20, 17, 18, 20)), hot, strict=True))
    ]
    alone = [solo(models, one) for one in wanted]
    engine = engine_of(models, kind, 2, Limits(alone_tok=32))
    learn(engine.scheduler, 0.001, 1)
    passes, opened = [], engine.cache.open

    def noted(rows: slice, columns: int, *rest: frozenset[int] | None, **how: bool):
        passes.append((rows, columns))
        return opened(rows, columns, *rest, **how)

    monkeypatch.setattr(engine.cache, "open", noted)
    outcomes = run(engine, wanted)
    assert passes[0] == (slice(0, 4), 20) and all(columns <= 3 for _, columns in passes[1:])
    assert texts(outcomes) == alone
    assert_true_logprobs(models, wanted[2], outcomes[2])


def test_long_prompts_that_enter_together_are_cut_where_they_are_cut_alone_and_begin_in_any_step():
    models = fixture("edge")
    wanted = [request(p, 5) for p in prompts(models, (70, 66, 90, 70, 31, 32))]
    jobs = [Job(one, at) for one, at in zip(wanted, (0, 0, 0, 1, 2, 2), strict=True)]
    for limits in (Limits(alone_tok=33), Limits(alone_tok=100), Limits(alone_tok=16, chunk_tok=64)):
        engine = engine_of(models, "fit", random_widths(4), limits)
        learn(engine.scheduler, 1e-5, 1)
        assert texts(run(engine, jobs)) == [solo(models, one) for one in wanted]


def test_running_rows_get_tokens_in_every_step_while_a_long_prompt_enters():
    models = smallest()
    short, long = prompts(models, (4, 200))
    engine = engine_of(models, "near", 2, Limits(alone_tok=16, chunk_tok=16, first_chunk_tok=16))
    running = engine.submit(request(short, 60))
    for _ in range(4):
        engine.step()
    engine.submit(request(long, 2))
    for _ in range(10):
        assert any(event.request == running for event in engine.step())


def test_a_request_of_high_priority_overtakes_those_that_wait():
    models = smallest()
    wanted = [Request(p, 5, GREEDY, priority=i // 3) for i, p in enumerate(prompts(models, (6, 7, 8, 9)))]
    engine = engine_of(models, "near", 2, Limits(max_rows=1))
    numbers = [engine.submit(one) for one in wanted]
    ended = []
    while not engine.idle:
        ended += [event.request for event in engine.step() if event.finish_reason]
    assert ended == [numbers[3], numbers[0], numbers[1], numbers[2]]


def test_under_any_limits_the_texts_are_the_same():
    models = fixture("edge")
    wanted = [request(p, 8) for p in prompts(models, (3, 20, 17, 24))]
    bytes_ = engine_of(models, "fit", 0).cache.row_bytes(32)
    for limits in (
        Limits(max_rows=1),
        Limits(alone_tok=1, chunk_tok=1),
        Limits(stall_s=0.0, first_chunk_tok=3),
        Limits(alone_tok=17, chunk_tok=17, kv_bytes=2 * bytes_),
    ):
        jobs = [Job(one, at) for at, one in enumerate(wanted)]
        assert texts(run(engine_of(models, "fit", random_widths(2), limits), jobs)) == [
            solo(models, one) for one in wanted
        ]
