"""What a row's queries see is what was committed to it and nothing else, however rows were drafted, moved or copied."""

import gc
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest
from engines import Job, engine_of, prompts, request, run, smallest
from histories import WIDEST, Deed, History, follow, histories
from hypothesis import given, settings

from mlx_mtp.cache import GROW_TOK, Cache, LayerSpec, Part, Snapshot, Trunk, View
from mlx_mtp.prefixes import Prefix
from mlx_mtp.scheduler import Limits

WINDOW, HEADS, DIM = 6, 2, 4
SPECS = (LayerSpec(WINDOW, HEADS, DIM), LayerSpec(None, HEADS, DIM))
SLIDING, FULL = 0, 1


def marks(ids: np.ndarray, layer: int) -> tuple[mx.array, mx.array]:
    """Keys and values [B, H, L, D] that carry a number for every column [B, L], their layer and their head."""
    head, dim = np.arange(HEADS)[None, :, None, None], np.arange(DIM)
    keys = ids[:, None, :, None] * 64.0 + layer * 32 + head * 8 + dim
    return mx.array(keys.astype(np.float32)), mx.array((-keys).astype(np.float32))


def seen(part: Part, row: int, column: int, layer: int) -> list[int]:
    """The numbers of the columns that a query sees in a part; every head and dimension must tell the same."""
    mask = np.array(part.mask)
    visible = mask[min(row, mask.shape[0] - 1), 0, column]
    keys, values = np.array(part.keys)[row][:, visible], np.array(part.values)[row][:, visible]
    ids = (keys[0, :, 0] // 64).astype(int)
    want_keys, want_values = marks(ids[None], layer)
    assert (keys == np.array(want_keys)[0]).all() and (values == np.array(want_values)[0]).all()
    return sorted(ids.tolist())


def seen_by(view: View, row: int, column: int, layer: int) -> list[int]:
    one = len(view.parts) == 1
    return seen(view.parts[0 if one else row], row if one else 0, column, layer)


@dataclass
class Told:
    """A row as it should be: the numbers of its committed columns. rejected: what the host has not yet heard of."""

    ids: list[int] = field(default_factory=list)
    rejected: int = 0
    begin: int = 0  # how many of them it had when it joined


class Rows(History[Told]):
    """A cache with a sliding and a full layer."""

    def __init__(self) -> None:
        super().__init__(Cache(SPECS, WIDEST, mx.float32))
        self.kept: list[tuple[Snapshot, Told]] = []

    def join(self, snapshot: Snapshot | None = None, ids: list[int] | None = None) -> None:
        ids = list(ids or [])
        assert self.cache.join(1, snapshot, len(ids)) == len(self.rows)
        self.rows.append(Told(ids, begin=len(ids)))

    def keep(self, row: int) -> None:
        told = self.rows[row]
        if told.ids:
            self.kept.append((self.cache.snapshot(row, len(told.ids)), Told(list(told.ids), begin=told.begin)))

    def again(self, which: int, back: int) -> None:
        if not self.kept:
            return
        snapshot, told = self.kept[which % len(self.kept)]
        count = max(told.begin, len(told.ids) - min(back, self.cache.back(0)))
        self.join(snapshot, told.ids[:count])

    def write(self, first: int, kept: list[int], columns: int, known: bool = False) -> None:
        """A pass over rows from `first` on, and its commit; checks what every query of it sees. known: the host has
        decided what is kept, as of prompts."""
        rows = slice(first, first + len(kept))
        ids = np.arange(self._next, self._next + len(kept) * columns).reshape(len(kept), columns)
        self._next += ids.size
        pass_ = self.cache.open(rows, columns)
        for layer in (SLIDING, FULL):
            view = pass_.store(layer, *marks(ids, layer))
            for b in range(len(kept)):
                for column in range(columns):
                    there = self.rows[first + b].ids + ids[b, : column + 1].tolist()
                    reach = WINDOW if layer == SLIDING else len(there)
                    assert seen_by(view, b, column, layer) == there[-reach:]
        self.cache.commit(rows, mx.array(kept, mx.int32), columns)
        for b, count in enumerate(kept):
            told = self.rows[first + b]
            self.cache.settle(first + b, told.rejected)  # the verdict before is read while this pass runs
            told.rejected = 0 if known else columns - count
            if known:
                self.cache.settle(first + b, columns - count)
            told.ids += ids[b, :count].tolist()

    def do(self, deed: Deed) -> None:
        if deed.name == "chunks" and self.rows:  # some shorter than others, where that does no harm
            spare = [self.cache.spare(b, deed.count) for b in range(deed.row + 1)]
            shorter = zip(spare, deed.kept, strict=False)
            kept = [max(1, deed.count - 3 * k) if can else deed.count for can, k in shorter]
            self.write(0, kept, deed.count, known=True)
        elif deed.name == "forget" and self.kept:
            self.kept.pop(deed.which % len(self.kept))[0].trunk.trim()

    def check(self) -> None:
        """A drafter, too, sees what was committed: the last window + 1 positions, or all."""
        if not self.rows:
            return
        everyone = slice(0, len(self.rows))
        assert self.cache.lengths[everyone].tolist() == [len(told.ids) for told in self.rows]
        for layer, reach in ((SLIDING, WINDOW + 1), (SLIDING, WINDOW), (FULL, None)):
            view = self.cache.committed(layer, everyone, reach)
            for row, told in enumerate(self.rows):
                assert seen_by(view, row, 0, layer) == told.ids[-(reach or len(told.ids) or 1) :]


plans = histories(longest=30, length=22, more=("chunks", "keep", "again", "forget"))


@given(plans)
@settings(max_examples=150)
def test_queries_and_drafters_see_what_was_committed_whatever_happened(plan):
    follow(Rows(), plan)


@pytest.mark.slow
@given(plans)
@settings(max_examples=3000)
def test_queries_and_drafters_see_what_was_committed_in_thousands_of_histories(plan):
    follow(Rows(), plan)


def test_the_ring_wraps_many_times():
    rows = Rows()
    rows.join()
    rows.join()
    for i in range(30):
        rows.write(0, [i % (WIDEST + 2), (i * 7) % (WIDEST + 2)], WIDEST + 1)
        rows.check()
    assert min(len(told.ids) for told in rows.rows) > 3 * rows.cache.ring_size(WINDOW)


def contents(cache: Cache, rows: slice) -> list[np.ndarray]:
    """All that may be seen of some rows, layer by layer."""
    out = [np.array(cache.lengths[rows])]
    for layer in (SLIDING, FULL):
        for part in cache.committed(layer, rows, None if layer == FULL else WINDOW + 1).parts:
            mask = np.array(part.mask)[:, :, 0, :, None]
            out += [np.where(mask, np.array(part.keys), 0), np.where(mask, np.array(part.values), 0)]
    return out


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_rejected_block_leaves_the_row_as_if_it_had_never_been_drafted():
    rows = Rows()
    rows.join()
    rows.write(0, [13], 13)
    before = contents(rows.cache, slice(0, 1))
    for columns in (1, 4, 4, 2):
        rows.write(0, [0], columns)
        assert same(contents(rows.cache, slice(0, 1)), before)


def test_committing_a_part_is_the_same_as_replaying_only_that_part():
    models = smallest()
    (tokens,) = prompts(models, (21,), seed=4)
    wrong, one = (7, 7, 7), slice(0, 1)
    drafted, replayed = (Cache(models.target.specs, 5, mx.float32) for _ in range(2))
    for cache in (drafted, replayed):
        cache.join(1)
    at = 0
    for kept in (5, 1, 2, 3, 4, 1, 2, 3):
        for cache, ids in ((drafted, (*tokens[at : at + kept], *wrong)), (replayed, tokens[at : at + kept])):
            models.target.forward(mx.array([ids]), cache.open(one, len(ids)))
            cache.commit(one, mx.array([kept], mx.int32), len(ids))
            cache.settle(0, len(ids) - kept)
        at += kept
    for layer, spec in enumerate(models.target.specs):
        reach = spec.window + 1 if spec.window else None
        (a,), (b,) = (c.committed(layer, one, reach).parts for c in (drafted, replayed))
        mask = np.array(a.mask)[0, 0, 0]
        assert (mask == np.array(b.mask)[0, 0, 0]).all() and mask.sum() == min(at, reach or at)
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            np.testing.assert_allclose(np.array(x)[:, :, mask], np.array(y)[:, :, mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [1, WIDEST + 1])
@pytest.mark.parametrize("extra", [0, 1, WIDEST + 1])
def test_a_snapshot_holds_although_the_row_ran_on_for_two_of_the_widest_rounds(last, extra):
    rows = Rows()
    rows.join()
    rows.write(0, [25], 25)
    rows.write(0, [last], WIDEST + 1)
    ids = rows.rows[0].ids[:26]  # the text ended with the first column of that round
    rows.write(0, [extra], WIDEST + 1)  # and a pass was already on its way
    kept = rows.cache.snapshot(0, len(ids))
    rows.leave(0)
    rows.join()
    rows.join(kept, ids)
    rows.check()
    rows.write(0, [3, 2], WIDEST + 1)
    rows.check()


def test_a_snapshot_is_not_changed_by_what_its_row_or_its_heirs_do():
    rows = Rows()
    rows.join()
    rows.write(0, [11], 11)
    ids = list(rows.rows[0].ids)
    kept = rows.cache.snapshot(0, len(ids))
    rows.write(0, [40], 40)
    for _ in range(2):
        rows.join(kept, ids)
        rows.write(len(rows.rows) - 1, [9], 9)
    rows.join(kept, ids)
    rows.check()


def test_what_was_rejected_takes_no_room():
    rows = Rows()
    rows.join()
    for _ in range(100):
        rows.write(0, [1], WIDEST + 1)
    assert rows.cache.bounds == [100 + WIDEST] and rows.cache._full[FULL][0][0].shape[2] == GROW_TOK


def test_a_buffer_grows_no_further_than_admission_counts():
    for most, first in ((700, 100), (1279, 1100), (2000, 256), (3068, 2700)):
        rows = Rows()
        rows.cache.join(first, most=most)
        rows.rows.append(Told())
        while len(rows.rows[0].ids) < most:
            count = min(128, most - len(rows.rows[0].ids))
            rows.cache.bounds[0] = len(rows.rows[0].ids)
            pass_ = rows.cache.open(slice(0, 1), count)
            for layer in (SLIDING, FULL):
                pass_.store(layer, *marks(np.ones((1, count), int), layer))
            rows.cache.commit(slice(0, 1), mx.array([count], mx.int32), count)
            rows.rows[0].ids += [1] * count
        pass_ = rows.cache.open(slice(0, 1), 2 * (WIDEST + 1))  # it runs on by two of the widest rounds
        pass_.store(FULL, *marks(np.ones((1, 2 * (WIDEST + 1)), int), FULL))
        assert taken(rows.cache) <= rows.cache.row_bytes(most)
        assert rows.cache.row_bytes(most) <= rows.cache.row_bytes(1) + (most + 2 * GROW_TOK) * 2 * HEADS * DIM * 4


def taken(cache: Cache) -> int:
    """Bytes of a cache's keys and values."""
    _, ring, full, _ = cache.state()
    return sum(a.nbytes for p in (*ring.values(), *(p for rows in full.values() for p in rows)) for a in p)


def test_a_row_takes_over_what_it_continues_and_copies_what_others_need():
    rows = Rows()
    rows.join()
    rows.write(0, [40], 40)
    rows.keep(0)
    rows.write(0, [25], 25)
    rows.keep(0)
    (short, _), (long, _) = rows.kept
    rows.leave(0)
    trunk, buffers = long.trunk, long.trunk.buffers[FULL]
    rows.again(0, 0)  # the longer snapshot still needs the buffers
    assert long.trunk is trunk and trunk.buffers[FULL] == buffers and short.trunk is not trunk
    rows.again(1, 0)  # and now nobody
    assert long.trunk is trunk and not trunk.buffers and rows.cache._full[FULL][1] == buffers
    rows.again(1, 2)  # from a live row
    rows.write(0, [3, 2, 1], 3)
    rows.check()


def test_a_full_buffer_grows_and_keeps_what_it_holds():
    rows = Rows()
    rows.join()
    rows.join()
    for count in (100, 150, 30, 60):
        rows.write(1, [count], count)
    assert rows.cache._full[FULL][1][0].shape[2] > GROW_TOK
    assert rows.cache._full[FULL][0][0].shape[2] == GROW_TOK
    rows.check()


def test_a_row_that_leaves_gives_its_place_to_the_last_and_its_memory_back():
    rows = Rows()
    for i in range(6):
        rows.join()
        rows.write(i, [3 * i + 2], 3 * i + 2)
    for row in (1, 4, 0, 0):
        rows.leave(row)
        rows.check()
    assert [len(told.ids) for told in rows.rows] == [8, 17]
    assert rows.cache._ring[SLIDING][0].shape[0] <= 4 and len(rows.cache._full[FULL]) == 2
    rows.leave(0)
    rows.leave(0)
    assert rows.cache._ring[SLIDING][0].shape[0] == 0 and not rows.cache._full[FULL]


def test_passes_that_were_built_and_not_run_can_be_taken_back():
    rows = Rows()
    rows.join()
    rows.join()
    rows.write(0, [7, 7], 7)
    before, state = contents(rows.cache, slice(0, 2)), rows.cache.state()
    pass_ = rows.cache.open(slice(0, 2), 3)
    for layer in (SLIDING, FULL):
        pass_.store(layer, *marks(np.full((2, 3), 999), layer))
    rows.cache.commit(slice(0, 2), mx.array([3, 1], mx.int32), 3)
    rows.cache.restore(state)
    for row in range(2):
        rows.cache.settle(row, 3)
    assert same(contents(rows.cache, slice(0, 2)), before)
    rows.check()


def test_a_ring_has_room_for_the_window_and_two_of_the_widest_rounds():
    for window in (1, 6, 512, 1024):
        for widest in (0, 3, 15):
            size = Cache((), widest, mx.float32).ring_size(window)
            assert size >= window + 1 + 2 * (widest + 1) and size % 8 == 0 and size < window + 2 * widest + 12


# memory -----------------------------------------------------------------------------------------------------


def allocated_by_a_write(length: int, columns: int) -> int:
    """Bytes that the largest moment of a dispatched pass takes beyond what was there before."""
    specs = (LayerSpec(512, 2, 32), LayerSpec(None, 2, 32), LayerSpec(None, 1, 64))
    cache, one = Cache(specs, 15, mx.float32), slice(0, 1)
    cache.join(length + 64)
    cache.lengths, cache.bounds[0] = mx.array([length], mx.int32), length
    most = 0
    for step in range(4):
        new = [mx.random.normal((1, s.kv_heads, columns, s.head_dim)) for s in specs]
        mx.eval(new, cache.state())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        pass_ = cache.open(one, columns)
        for layer, keys in enumerate(new):
            pass_.store(layer, keys, keys)
        cache.commit(one, mx.array([1], mx.int32), columns)
        mx.eval(cache.state())
        if step:
            most = max(most, mx.get_peak_memory() - before)
    return most


@pytest.mark.parametrize("columns", [1, 4, 16])
def test_a_write_takes_no_more_memory_at_64k_than_at_1k(columns):
    short, long = allocated_by_a_write(1024, columns), allocated_by_a_write(65536, columns)
    assert long <= short + 4096
    assert short < 128 * 1024  # a ring takes 276 KiB, a buffer of 1k positions 520


def beyond_its_buffers(length: int, rows: int) -> int:
    """Bytes that an engine takes at its largest moment beyond its cache, with rows that continue long prefixes."""
    models = smallest()
    gc.collect()
    limits = Limits(prefix_bytes=2**40, alone_tok=4 * rows, first_chunk_tok=4)
    engine, base = engine_of(models, "rand", 3, limits), mx.get_active_memory()
    for row in range(rows):
        tokens, trunk = np.full(length, 5 + row, np.int32), Trunk()
        ring, full = {}, {}
        for i, s in enumerate(models.target.specs):
            size = engine.cache.ring_size(s.window) if s.window else length + 512
            made = tuple(mx.random.normal((1, s.kv_heads, size, s.head_dim)) for _ in range(2))
            (ring if s.window else full)[i] = made
        mx.eval(ring, full)
        trunk.buffers = full
        engine.scheduler.prefixes.add(Prefix(tokens, Snapshot(length, ring, trunk), None))
        engine.submit(request((*tokens, *range(5, 16)), 40))
        del ring, full, made, trunk
    for _ in range(2):
        engine.step()
    mx.reset_peak_memory()
    for _ in range(8):  # the rest of the prompts, whose ends are kept, and some rounds
        engine.step()
    assert len(engine.scheduler.prefixes) == 2 * rows and all(r.stats.cached_tokens for r in engine.scheduler.rows)
    _, ring, full, _ = engine.cache.state()
    held = [*ring.values(), *(pair for buffers in full.values() for pair in buffers)]
    kept = engine.scheduler.prefixes.nbytes
    return mx.get_peak_memory() - base - sum(a.nbytes for pair in held for a in pair) - kept


def test_no_step_of_an_engine_copies_its_buffers():
    models, length = smallest(), 32768
    full = sum(2 * 4 * s.kv_heads * s.head_dim * length for s in models.target.specs if not s.window)
    for rows in (1, 3):
        # attention's own scores and masks take some of it; a copy of the buffers would take rows * full
        assert beyond_its_buffers(length, rows) < 0.6 * rows * full


def test_rows_leave_nothing_behind_in_the_cache_of_an_engine():
    models = smallest()
    engine = engine_of(models, "near", 3)
    run(engine, [Job(request(p, 6), i) for i, p in enumerate(prompts(models, (5, 9, 2, 30, 4)))])
    assert not engine.cache.bounds
    assert all(not buffers for buffers in engine.cache._full.values())
    assert all(k.shape[0] == 0 for k, _ in engine.cache._ring.values())
