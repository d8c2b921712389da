"""What is kept of earlier rows spares work and changes no text; what it takes is counted to the byte."""

import gc
import itertools
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest
from engines import Job, Models, engine_of, prompts, random_widths, request, rounds_needed, run, smallest, solo
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.cache import GROW_TOK, Snapshot, Trunk
from mlx_mtp.draft_length import make_policy
from mlx_mtp.engine import Engine
from mlx_mtp.prefixes import Prefix, Prefixes, Spacing, arrays_of, shared
from mlx_mtp.rows import GREEDY, Request, Sampling
from mlx_mtp.scheduler import Limits

PLENTY = 2**30
CLOSE = Spacing(every_tok=20, tail_tok=8, share_tok=6)  # the same laws on prompts a hundredth as long
SEEDED = Sampling(0.9, top_k=20, seed=5)
PENALISED = Sampling(0.9, seed=6, repetition_penalty=1.4, presence_penalty=0.5)


# the store --------------------------------------------------------------------------------------------------


def prefix(tokens: Sequence[int], trunk: Trunk | None = None, kib: int = 1, back: int = 0) -> Prefix:
    """A prefix whose own arrays take so many KiB."""
    window = mx.zeros((1, 1, 16 * kib, 8))
    ids = np.array(tokens, np.int32)
    return Prefix(ids, Snapshot(len(ids), {0: (window, mx.zeros_like(window))}, trunk or Trunk()), None, back)


def parked(positions: int) -> Trunk:
    """The full layer of a row that has left: 64 bytes a position."""
    trunk, shape = Trunk(), (1, 1, positions, 8)
    trunk.buffers = {1: (mx.zeros(shape), mx.zeros(shape))}
    return trunk


def known(store: Prefixes, *tokens: int) -> int:
    return store.find(np.array(tokens, np.int32))[1]


def lengths(store: Prefixes) -> list[int]:
    return sorted(p.length for p in store._prefixes)


def test_the_longest_prefix_that_leaves_a_token_to_compute_is_found():
    store = Prefixes(PLENTY)
    for tokens in ((1, 2), (1, 2, 3, 4), (1, 9), (7,)):
        store.add(prefix(tokens))
    assert known(store, 1, 2, 3, 4, 5) == 4
    assert known(store, 1, 2, 3, 4) == 2  # all four would leave nothing to ask for
    assert known(store, 1, 9, 3) == 2 and known(store, 7, 7) == 1
    assert known(store, 7) == known(store, 1, 3, 3) == known(store, 2) == 0
    assert Prefixes(PLENTY).find(np.array([1, 2], np.int32)) == (None, 0)


def test_a_prefix_may_be_used_up_to_a_few_positions_before_its_end():
    store = Prefixes(PLENTY)
    store.add(prefix(range(10), back=3))
    assert known(store, *range(10)) == 9
    assert known(store, *range(8), 99, 99, 99) == 8 and known(store, *range(7), 99) == 7
    assert known(store, *range(6), 99, 99, 99, 99) == known(store, *range(7)) == 0
    store.add(prefix(range(2), back=9))
    assert known(store, 0, 5) == 1 and known(store, 5, 6) == 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=9), st.lists(st.integers(0, 2), min_size=1)
)
def test_finding_is_the_same_as_trying_all(kept, wanted):
    store = Prefixes(PLENTY)
    for i, tokens in enumerate(kept):
        store.add(prefix(tokens, back=i % 4))
    ids, best = np.array(wanted, np.int32), 0
    for one in store._prefixes:
        common = min(shared(one.tokens, ids), len(ids) - 1)
        best = max(best, common if common >= one.length - one.back else 0)
    assert known(store, *wanted) == best


def test_the_least_recently_used_goes_first():
    store = Prefixes(PLENTY)
    kept = [prefix([n] * (n + 1)) for n in range(4)]
    for one in kept:
        store.add(one)
    assert known(store, 0, 1) == 1
    store.fit(3 * kept[0].own_bytes)
    assert lengths(store) == [1, 3, 4]
    store.fit(2 * kept[0].own_bytes - 1)
    assert lengths(store) == [1]
    store.fit(0)
    assert not len(store) and store.nbytes == 0


def test_a_store_never_keeps_more_than_its_own_budget():
    store = Prefixes(2500)
    for n in range(1, 5):
        store.add(prefix([n] * n))
        store.fit(PLENTY)
        assert store.nbytes <= 2500
    assert lengths(store) == [3, 4]


def test_the_same_tokens_are_kept_once():
    store, new = Prefixes(PLENTY), prefix([1, 2, 3])
    store.add(prefix([1, 2, 3]))
    store.add(new)
    assert len(store) == 1 and store.find(np.array([1, 2, 3, 4], np.int32))[0] is new


def test_of_the_same_tokens_the_one_that_reaches_further_back_stays_and_the_older_full_layers_go():
    store, trunk, newer = Prefixes(PLENTY), parked(GROW_TOK), parked(2 * GROW_TOK)
    store.add(prefix(range(20), trunk, back=16))
    store.add(prefix(range(20), newer, back=1))
    assert known(store, *range(8), 99) == 8 and len(store) == 1
    assert store.nbytes == prefix([1]).own_bytes + newer.nbytes and not trunk.snapshots


def test_what_several_prefixes_share_is_counted_once_and_goes_with_the_last():
    store, trunk = Prefixes(PLENTY), parked(2 * GROW_TOK)
    for n in (GROW_TOK + 8, GROW_TOK + 4):
        store.add(prefix(range(n), trunk))
    own = prefix([1]).own_bytes
    assert own == 1024 and trunk.nbytes == 2 * GROW_TOK * 64
    assert store.nbytes == 2 * own + trunk.nbytes
    store.fit(own + trunk.nbytes)
    assert store.nbytes == own + trunk.nbytes
    store.fit(own + trunk.nbytes - 1)
    assert store.nbytes == 0


def test_a_shared_part_that_nobody_reaches_any_more_is_given_back():
    store, trunk = Prefixes(PLENTY), parked(4 * GROW_TOK)
    long, short = prefix(range(4 * GROW_TOK), trunk), prefix(range(10), trunk)
    store.add(long)
    store.add(short)
    del long
    store.fit(store.nbytes - 1)
    assert lengths(store) == [10] and trunk.nbytes == GROW_TOK * 64
    assert store.nbytes == short.own_bytes + trunk.nbytes


@given(st.integers(0, 30000), st.integers(1, 30000))
def test_prefixes_of_a_prompt_are_kept_at_its_end_near_it_and_in_between(begin, more):
    end, spacing = begin + more, Spacing()
    stops = spacing.stops(begin, end)
    assert stops == sorted(set(stops)) and stops[-1] == end and stops[0] > begin
    assert max(np.diff([begin, *stops])) <= spacing.every_tok
    assert all(at % Limits().alone_tok == 0 for at in stops[:-1])
    assert more < 384 or any(128 <= end - at < 384 for at in stops)


# what is computed ---------------------------------------------------------------------------------------------


def engine(models: Models, kind: str = "rand", width: int = 3, **limits) -> Engine:
    """An engine that keeps all that it may."""
    chunks = {"alone_tok": 16, "chunk_tok": 16, "first_chunk_tok": 8}
    limits = {"prefix_bytes": PLENTY, "spacing": CLOSE} | chunks | limits
    return engine_of(models, kind, width, Limits(**limits))


def cached(outcomes: list) -> list[int]:
    return [o.stats.cached_tokens for o in outcomes]


def test_a_turn_that_only_appends_costs_only_its_new_tokens():
    models = smallest()
    kept, prompt = engine(models, spacing=Spacing()), prompts(models, (50,))[0]
    for new in prompts(models, (1, 3, 17, 40), seed=2):
        outcome = run(kept, [request(prompt, 7)])[0]
        assert outcome.tokens == solo(models, request(prompt, 7))
        known_next = len(prompt) + 6  # the newest token has not been computed
        prompt = (*prompt, *outcome.tokens, *new)
        assert cached(run(kept, [request(prompt, 1)])) == [known_next]
        kept.scheduler.prefixes.fit(kept.scheduler.prefixes.nbytes)


def test_a_turn_whose_rendering_differs_in_the_last_few_tokens_costs_only_those():
    models = smallest()
    kept, (prompt, new) = engine(models, spacing=Spacing()), prompts(models, (60, 9))
    run(kept, [request(prompt, 4)])
    for cut, spared in ((1, 59), (16, 44), (17, 0)):
        wanted = request((*prompt[: len(prompt) - cut], 1, *new), 5)
        alone = engine(models, spacing=Spacing())
        run(alone, [request(prompt, 4)])
        (outcome,) = run(alone, [wanted])
        assert cached([outcome]) == [spared] and outcome.tokens == solo(models, wanted)


def test_an_edit_costs_the_part_behind_the_last_prefix_before_it():
    models = smallest()
    prompt, spacing = prompts(models, (100,))[0], Spacing(every_tok=50, tail_tok=8)
    # kept at 50, 96 and 100, each good for 16 positions before it
    for at, spared in ((97, 97), (83, 83), (79, 50), (36, 36), (33, 0)):
        kept = engine(models, spacing=spacing)
        run(kept, [request(prompt, 1)])
        wanted = request((*prompt[:at], (prompt[at] + 1) % 48, *prompt[at + 1 :]), 6)
        (outcome,) = run(kept, [wanted])
        assert cached([outcome]) == [spared] and outcome.tokens == solo(models, wanted)


def test_a_cancelled_request_leaves_what_it_has_computed():
    models = smallest()
    prompt, waits = prompts(models, (60, 5))
    for steps in (1, 2, 4, 7):
        kept = engine(models, max_rows=1, spacing=Spacing())
        number, behind = kept.submit(request(prompt, 40)), kept.submit(request(waits, 3))
        said = [t for _ in range(steps) for e in kept.step() for t in e.tokens]
        kept.cancel(behind)
        kept.cancel(number)
        committed = min(60, 16 * steps) + max(0, len(said) - 1)
        assert lengths(kept.scheduler.prefixes)[-1] == committed
        wanted = request((*prompt, *said, 7), 6)
        (outcome,) = run(kept, [wanted])
        assert cached([outcome]) == [committed] and outcome.tokens == solo(models, wanted)


def computed(outcomes: list) -> int:
    """Prompt tokens that went through the target."""
    return sum(o.stats.prompt_tokens - o.stats.cached_tokens for o in outcomes)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("at", [0, 1, 9])
def test_requests_with_the_same_prompt_share_one_prefill(count, at):
    models = smallest()
    prompt = prompts(models, (70,))[0]
    jobs = [Job(request(prompt, 8, (GREEDY, SEEDED)[i % 2]), at * i) for i in range(count)]
    outcomes = run(engine(models), jobs)
    assert computed(outcomes) == 70 + (count - 1)
    assert [o.tokens for o in outcomes] == [solo(models, job.request) for job in jobs]


def test_requests_that_differ_behind_a_common_beginning_compute_it_once():
    models = smallest()
    system, *tails = prompts(models, (90, 8, 11, 3, 30))
    wanted = [request((*system, 3 + i, *tail), 5) for i, tail in enumerate(tails)]
    outcomes = run(engine(models), wanted)
    assert cached(outcomes) == [0, 90, 90, 90]
    assert [o.tokens for o in outcomes] == [solo(models, one) for one in wanted]


def test_all_that_wait_for_the_same_prefix_go_on_together():
    models = smallest()
    (prompt,) = prompts(models, (50,))
    kept = engine(models)
    for _ in range(4):
        kept.submit(request(prompt, 9))
    live = []
    while not kept.idle:
        kept.step()
        live.append(len(kept.scheduler.rows))
    assert set(live) == {1, 4, 3, 0} and live == sorted(live[:-2]) + live[-2:]


def test_others_pass_a_request_that_waits_for_a_common_beginning_and_it_keeps_its_place():
    models = smallest()
    system, other, late = prompts(models, (80, 7, 6))
    kept = engine(models, max_rows=3, alone_tok=8, chunk_tok=8, first_chunk_tok=8)
    wanted = [request((*system, 3), 9), request((*system, 4), 9), request(other, 9), request(late, 9)]
    numbers = [kept.submit(one) for one in wanted]
    kept.step()
    live = [r.id for r in kept.scheduler.rows]
    assert live == [numbers[0], numbers[2]] and [r.id for r in kept.scheduler.waiting] == [numbers[1], numbers[3]]
    first: dict[int, int] = {}
    for step in itertools.count():
        for event in kept.step():
            first.setdefault(event.request, step)
        if kept.idle:
            break
    assert first[numbers[2]] < first[numbers[0]] == first[numbers[1]]


def test_nobody_waits_for_a_row_of_lower_priority_or_one_that_is_cancelled():
    models = smallest()
    (prompt,) = prompts(models, (80,))
    kept = engine(models, alone_tok=8, chunk_tok=8, first_chunk_tok=8)
    kept.submit(request(prompt, 3))
    kept.step()
    kept.submit(Request(prompt, 3, GREEDY, priority=1))
    kept.step()
    assert len(kept.scheduler.rows) == 2
    kept = engine(models, alone_tok=8, chunk_tok=8, first_chunk_tok=8)
    leader, follower = kept.submit(request(prompt, 3)), kept.submit(request(prompt, 3))
    kept.step()
    assert len(kept.scheduler.rows) == 1
    kept.cancel(leader)
    kept.step()
    assert [r.id for r in kept.scheduler.rows] == [follower]
    assert kept.scheduler.rows[0].stats.cached_tokens == 8


def test_a_model_that_drafts_for_itself_is_accepted_completely_behind_a_kept_prefix():
    models = smallest()
    kept, (prompt, new) = engine(models, "self"), prompts(models, (45, 9))
    (first,) = run(kept, [request(prompt, 17)])
    again = [request((*prompt, *first.tokens, *new), 25), request((*prompt[:40], 5), 25), request(prompt, 25)]
    for one in again:
        (outcome,) = run(kept, [one])
        assert outcome.stats.cached_tokens >= 40 and outcome.tokens == solo(models, one)
        assert outcome.stats.rounds == rounds_needed(25, 3)


def test_nobody_begins_before_a_place_where_the_windows_are_no_longer_whole():
    models = smallest()
    kept, (prompt, beside, new) = engine(models, "self", 15, spacing=Spacing()), prompts(models, (60, 30, 9), seed=4)
    text = solo(models, request(prompt, 40))
    end = next(i for i in range(8, 40) if text.index(text[i]) == i)
    (ended, _) = run(kept, [request(prompt, 40, eos=[text[end]]), request(beside, 60)])  # it ran on by two rounds
    assert ended.tokens == text[: end + 1]
    longer = (*prompt, *ended.tokens, 7)
    assert cached(run(kept, [request(longer, 1)])) == [60 + end]
    for cut in (2, 5, 9, 16):
        known_, wanted = len(longer) - cut, request((*longer[: len(longer) - cut], 1, 2, *new), 9)
        alone = engine(models, "self", 15, spacing=Spacing())
        for one in kept.scheduler.prefixes._prefixes:
            alone.scheduler.prefixes.add(one)
        (outcome,) = run(alone, [wanted])
        assert outcome.tokens == solo(models, wanted)
        assert cached([outcome]) == [60 + end if known_ >= 60 + end else min(known_, 60)]


def test_rows_that_end_in_one_round_are_all_kept_before_any_leaves_and_none_moves(monkeypatch):
    """Else what each leaves is cut from what the ones before it have left, which is then computed for nothing."""
    models, said = smallest(), []
    kept, begun = engine(models, width=0, first_chunk_tok=16), prompts(models, (5, 5, 5))
    keep, leave = kept._left, kept.cache.leave
    monkeypatch.setattr(kept, "_left", lambda row: said.append("kept") or keep(row))
    monkeypatch.setattr(kept.cache, "leave", lambda row: said.append(row) or leave(row))
    outcomes = run(kept, [request(prompt, 6) for prompt in begun])
    assert said == ["kept"] * 3 + [2, 1, 0]
    for prompt, outcome in zip(begun, outcomes, strict=True):
        further = request((*prompt, *outcome.tokens, 7), 6)
        (outcome,) = run(kept, [further])
        assert cached([outcome]) == [10] and outcome.tokens == solo(models, further)


def test_with_no_budget_nothing_is_kept():
    models = smallest()
    kept, wanted = engine(models, prefix_bytes=0), request(prompts(models, (40,))[0], 3)
    for _ in range(2):
        (outcome,) = run(kept, [wanted])
        assert cached([outcome]) == [0] and not len(kept.scheduler.prefixes)


def test_a_long_conversation_keeps_one_copy_of_its_full_layers():
    models = smallest()
    kept, (prompt, *new) = engine(models, spacing=Spacing()), prompts(models, (700, 30, 40, 50))
    windows = kept.cache.row_bytes(1) - full_bytes(kept, kept.cache.capacity(1))
    for turn, more in enumerate(new, start=1):
        (outcome,) = run(kept, [request(prompt, 6)])
        prompt = (*prompt, *outcome.tokens, *more)
        store = kept.scheduler.prefixes
        trunks = {id(p.cache.trunk): p.cache.trunk for p in store._prefixes}
        assert len(trunks) == 1 and len(store) == 2 * turn + 1  # two ends a turn, and one near the first prompt's end
        assert store.nbytes <= full_bytes(kept, kept.cache.capacity(len(prompt) + 6)) + len(store) * windows


def full_bytes(kept: Engine, positions: int) -> int:
    return sum(2 * 4 * s.kv_heads * s.head_dim * positions for s in kept.cache.specs if not s.window)


def test_a_conversation_that_branches_keeps_both_and_gives_the_first_back_when_it_is_old():
    models = smallest()
    kept, (system, one, two) = engine(models, spacing=Spacing()), prompts(models, (600, 40, 40))
    run(kept, [request((*system, *one), 6)])
    run(kept, [request((*system, *two), 6)])
    store = kept.scheduler.prefixes
    trunks = {id(p.cache.trunk): p.cache.trunk for p in store._prefixes}
    assert len(trunks) == 2 and store.nbytes == held(store)
    before, branch = store.nbytes, kept.scheduler.prefixes.find(np.array((*system, *two, 1), np.int32))[0]
    store.fit(before - 1)  # the beginning goes, then the first branch, with its full layers
    store.fit(store.nbytes - 1)
    store.fit(store.nbytes - 1)
    assert {id(p.cache.trunk) for p in store._prefixes} == {id(branch.cache.trunk)}
    wanted = request((*system, *two, 1, 2, 3), 6)
    (outcome,) = run(kept, [wanted])
    assert cached([outcome]) == [640] and outcome.tokens == solo(models, wanted)


def test_prefixes_make_way_for_rows_and_the_one_that_a_row_continues_goes_last():
    models = smallest()
    first, second, third = prompts(models, (200, 200, 200))
    cache = engine(models).cache
    kept = engine(models, kv_bytes=2 * cache.row_bytes(260), spacing=Spacing())
    said = [run(kept, [request(p, 5)])[0].tokens for p in (first, second)]
    assert lengths(kept.scheduler.prefixes) == [200, 200, 204, 204]
    wanted = [request((*first, *said[0], 7), 40), request(third, 40)]
    checked(kept)
    outcomes = run(kept, wanted)
    assert cached(outcomes) == [204, 0] and [o.tokens for o in outcomes] == [solo(models, one) for one in wanted]


def test_prefixes_are_gone_before_a_row_that_needs_their_memory_begins():
    models = smallest()
    other, (first, second) = engine(models), prompts(models, (300, 400))
    room = other.cache.row_bytes(500) + other.drafter.row_bytes(500)
    kept = checked(engine(models, kv_bytes=room, spacing=Spacing()))
    run(kept, [request(first, 5)])
    assert len(kept.scheduler.prefixes) == 2
    kept.submit(request(second, 90))
    kept.step()
    assert len(kept.scheduler.prefixes) == 0 and kept.scheduler.rows


def test_a_request_that_needs_all_memory_still_continues_what_was_kept():
    models = smallest()
    other, (prompt,) = engine(models), prompts(models, (300,))
    room = other.cache.row_bytes(400) + other.drafter.row_bytes(400)
    kept = checked(engine(models, kv_bytes=room, spacing=Spacing()))
    (outcome,) = run(kept, [request(prompt, 5)])
    wanted = request((*prompt, *outcome.tokens, 9), 90)
    (outcome,) = run(kept, [wanted])
    assert cached([outcome]) == [304] and outcome.tokens == solo(models, wanted)


@pytest.fixture
def no_spare_buffers() -> Iterator[None]:
    """MLX gives an array a freed buffer that is a few pages larger, and then counts all of it."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


def test_nothing_is_left_once_the_store_is_cleared(no_spare_buffers):
    models = smallest()
    jobs = [Job(one, i // 2, 9 + i if i % 3 == 0 else None) for i, one in enumerate(pool(models))]
    run(engine(models, "near"), jobs)  # compiles what stays
    kept = engine(models, "near", prefix_bytes=400_000)
    before = in_use()
    run(kept, jobs)
    assert kept.scheduler.prefixes.nbytes > 30_000
    kept.scheduler.prefixes.clear()
    kept.runner._samplers.clear()
    assert in_use() <= before + 4096 and not kept.cache._trunks


def test_what_is_kept_takes_as_many_bytes_as_it_says(no_spare_buffers):
    models = smallest()
    kept = engine(models, "near", spacing=Spacing())
    for prompt in prompts(models, (700, 300)):
        run(kept, [request(prompt, 3), request((*prompt, 5, 6), 3)])
    kept.runner._samplers.clear()
    with_all, said = in_use(), kept.scheduler.prefixes.nbytes
    kept.scheduler.prefixes.clear()
    assert with_all - in_use() == pytest.approx(said, rel=0.01)


def in_use() -> int:
    """Bytes of all arrays, once the garbage is gone."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("wrong", ["windows", "full layers", "drafter"])
def test_a_wrong_prefix_would_be_noticed(wrong):
    models = smallest()
    kept, (one, two) = engine(models, "self", spacing=Spacing()), prompts(models, (40, 40))
    for prompt in (one, two):
        run(kept, [request(prompt, 1)])
    a, b = sorted(kept.scheduler.prefixes._prefixes, key=lambda p: p.tokens.tolist() == list(one))
    if wrong == "windows":
        a.cache.ring, b.cache.ring = b.cache.ring, a.cache.ring
    elif wrong == "full layers":
        a.cache.trunk.buffers, b.cache.trunk.buffers = b.cache.trunk.buffers, a.cache.trunk.buffers
    else:
        a.drafter, b.drafter = b.drafter, a.drafter
    wanted = request((*one, 5), 25)
    (outcome,) = run(kept, [wanted])
    assert cached([outcome]) == [40]
    if wrong == "drafter":
        assert outcome.tokens == solo(models, wanted) and outcome.stats.rounds > rounds_needed(25, 3)
    else:
        assert outcome.tokens != solo(models, wanted)


# texts ----------------------------------------------------------------------------------------------------------

POOL_TOK = (60, 33, 14)


def pool(models: Models) -> list[Request]:
    """Requests of which many begin the same: cut, edited, extended by a reply of their own or of another."""
    out = []
    for base in prompts(models, POOL_TOK):
        reply = solo(models, request(base, 9))
        out += [
            request(base, 9),
            request(base, 9, SEEDED),
            request((*base, *reply[:7], 5, 6), 6),
            request((*base[:-3], 7, 8), 6, PENALISED),
            request((*base[: len(base) // 2], *base), 5),
        ]
    return out


plans = st.lists(
    st.tuples(st.integers(0, 5 * len(POOL_TOK) - 1), st.integers(0, 4), st.none() | st.integers(0, 9)), max_size=9
)


def follow(plan: list, kind: str, width: int | str, rows: int | None, kept_rows: float) -> None:
    """Run requests of the pool, some cancelled; all texts must be those of requests alone.

    rows, kept_rows: memory for so many of the longest rows, and of it for kept prefixes.
    """
    models, at, jobs = smallest(), 0, []
    for which, gap, cut in plan:
        at += gap
        jobs.append(Job(pool(models)[which], at, None if cut is None else at + cut))
    longest = engine(models).cache.row_bytes(120)
    kept = engine(models, kind, prefix_bytes=int(kept_rows * longest), kv_bytes=rows and rows * longest)
    kept.policy = random_widths(3, 5) if width == "random" else make_policy(width)
    kept.hands_over_first = len(plan) % 2 == 0
    for job, outcome in zip(jobs, run(checked(kept), jobs), strict=True):
        text = solo(models, job.request)
        assert outcome.tokens == (text if outcome.reason else text[: len(outcome.tokens)])
        assert outcome.reason or job.cancel is not None


def checked(kept: Engine) -> Engine:
    """The same engine; what it holds is compared with what it believes after every step."""
    step = kept.step

    def watched():
        events = step()
        check_bytes(kept)
        return events

    kept.step = watched
    return kept


def check_bytes(kept: Engine) -> None:
    """No row takes more than it was admitted with, prefixes take what they say, and both together what they may."""
    cache, scheduler = kept.cache, kept.scheduler
    _, ring, full, _ = cache.state()
    rows = sum(a.nbytes for pair in ring.values() for a in pair)
    rows += sum(a.nbytes for buffers in full.values() for pair in buffers for a in pair)
    reserved = sum(cache.row_bytes(len(r.prompt) + r.request.max_tokens) for r in scheduler.rows)
    assert rows <= reserved
    assert scheduler.prefixes.nbytes == held(scheduler.prefixes) <= scheduler.limits.prefix_bytes
    if scheduler.limits.kv_bytes is not None:
        assert reserved + scheduler.prefixes.nbytes <= scheduler.limits.kv_bytes


def held(store: Prefixes) -> int:
    """Bytes of all arrays that prefixes refer to, each counted once."""
    arrays = {}
    for one in store._prefixes:
        snapshots = [s for s in (one.cache, one.drafter) if isinstance(s, Snapshot)]
        for a in (
            *arrays_of([one.cache, one.drafter]),
            *(a for s in snapshots for p in s.trunk.buffers.values() for a in p),
        ):
            arrays[id(a)] = a.nbytes
    return sum(arrays.values())


@pytest.mark.parametrize(
    "kind, width, rows, kept_rows",
    [("rand", 0, None, 9), ("rand", "auto", 2, 1), ("near", 4, 3, 1.5), ("near", "random", None, 0.6)],
)
@given(plan=plans)
@settings(max_examples=4)
def test_texts_are_the_same_whatever_was_kept_shared_or_evicted(kind, width, rows, kept_rows, plan):
    follow(plan, kind, width, rows, kept_rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rand", "near", "self"])
@pytest.mark.parametrize("rows, kept_rows", [(None, 9), (1, 1), (2, 1), (4, 2), (8, 0.6)])
@given(plan=plans)
@settings(max_examples=100)
def test_texts_are_the_same_in_many_more_histories(kind, rows, kept_rows, plan):
    follow(plan, kind, "random", rows, kept_rows)
