"""A recurrent layer gives what it gives of the committed text alone, however rows were drafted, moved or copied."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from histories import WIDEST, Deed, History, follow, histories
from hypothesis import given, settings

from mlx_mtp.cache import Cache, Snapshot, Trunk
from mlx_mtp.states import Columns, Held, StateSpec

TAPS, PRIME = 3, 4093
SPEC = StateSpec((1, 2), 1, TAPS)


def mixed(x: list[float]) -> float:
    """What a column's last TAPS inputs come to."""
    return x[-1] + 3 * x[-2] + 7 * x[-3]


def scan(state: mx.array, again: Columns | None, own: Columns, takes: bool) -> tuple[mx.array, mx.array]:
    """Folds every number into the state so that all of them, and their order, show in it; exact in float32."""
    if again is not None:
        state = run(state, again)[1]
    out, after = run(state, own)
    return out, after if takes else state


def run(state: mx.array, columns: Columns) -> tuple[mx.array, mx.array]:
    x, out = columns.inputs[..., 0], []
    for t in range(x.shape[1] - TAPS + 1):
        brought = x[:, t + 2] + 3 * x[:, t + 1] + 7 * x[:, t]
        new = mx.remainder(31 * state + brought[:, None, None], PRIME)
        out.append(new[:, 0])
        state = new if columns.counts is None else mx.where((t < columns.counts)[:, None, None], new, state)
    return mx.stack(out, axis=1), state


def folded(ids: list[int]) -> float:
    """The state after a text, as defined."""
    state, padded = 0.0, [0.0] * (TAPS - 1) + [float(i) for i in ids]
    for t in range(len(ids)):
        state = (31 * state + mixed(padded[t : t + TAPS])) % PRIME
    return state


class Rows(History[list[int]]):
    """A cache with one recurrent layer."""

    def __init__(self) -> None:
        super().__init__(Cache((SPEC,), WIDEST, mx.float32))
        self.kept: list[tuple[Held, list[int]]] = []

    def join(self, snapshot: Snapshot | None = None, ids: Sequence[int] = ()) -> None:
        assert self.cache.join(1, snapshot) == len(self.rows)
        self.rows.append(list(ids))

    def again(self, which: int, back: int = 0) -> None:
        if self.kept:  # a state has no earlier positions
            held, ids = self.kept[which % len(self.kept)]
            self.join(Snapshot(len(ids), {}, Trunk(), held), ids)

    def keep(self, row: int, length: int | None = None) -> None:
        """Hold a row as it was at a length, by default its own."""
        length = len(self.rows[row]) if length is None else length
        if not length:
            return
        held = self.cache.snapshot(row, length).held
        assert held is not None
        self.kept.append((held, self.rows[row][:length]))

    def round(self, kept: list[int], columns: int) -> None:
        """A pass over the first rows of which those that keep nothing are known to."""
        self.write(0, kept, columns, frozenset(b for b, count in enumerate(kept) if not count))

    def write(self, first: int, kept: list[int], columns: int, still: frozenset[int] | None = None) -> None:
        """A pass over rows from `first` on, and its commit; checks what every column of it gives."""
        rows = slice(first, first + len(kept))
        ids = np.arange(self._next, self._next + len(kept) * columns).reshape(len(kept), columns)
        self._next = (self._next + ids.size) % 1000
        pass_ = self.cache.open(rows, columns, still)
        got = np.array(pass_.recur(0, mx.array(ids[..., None].astype(np.float32)), scan))
        for b in set(range(len(kept))) - (still or set()):
            there = [folded(self.rows[first + b] + ids[b, : c + 1].tolist()) for c in range(columns)]
            assert got[b, :, 0].tolist() == there
        self.cache.commit(rows, mx.array(kept, mx.int32), columns)
        for b, count in enumerate(kept):
            self.rows[first + b] += ids[b, :count].tolist()

    def do(self, deed: Deed) -> None:
        live, row = len(self.rows), deed.row
        some = deed.some(live)
        if deed.name == "open" and live:  # a round of which nobody knows what is kept
            self.write(0, some[: row + 1], deed.columns)
        elif deed.name == "end" and live:  # in the midst of a round, with another one on its way
            begun, wasted = len(self.rows[row]), 1 + deed.which % 2
            some[row] = max(1, some[row])
            self.round(some, deed.columns)
            self.round([min(k, wasted) for k in deed.kept[:live]], wasted)
            self.keep(row, begun + 1 + deed.which % some[row])
        elif deed.name == "undo" and live:
            state, bounds, told = self.cache.state(), list(self.cache.bounds), [list(r) for r in self.rows]
            self.round(some, deed.columns)
            self.cache.restore(state)
            self.cache.bounds, self.rows = bounds, told


plans = histories(longest=9, length=20, more=("open", "end", "undo"))


@given(plans)
@settings(max_examples=40)
def test_columns_give_what_the_committed_text_gives_whatever_happened(plan):
    follow(Rows(), plan)


@pytest.mark.slow
@given(plans)
@settings(max_examples=2000)
def test_columns_give_what_the_committed_text_gives_in_thousands_of_histories(plan):
    follow(Rows(), plan)


def test_rows_that_draft_and_do_not_by_turns_go_on_for_long():
    rows = Rows()
    rows.join()
    rows.join()
    for i in range(30):
        columns = (WIDEST + 1, 1, 1)[i % 3]
        rows.round([min(columns, i % (WIDEST + 2)), min(columns, (i * 7) % (WIDEST + 2))], columns)
    assert min(map(len, rows.rows)) > 2 * rows.cache.states.widest


def test_what_is_held_is_not_changed_by_what_its_row_or_its_heirs_do():
    rows = Rows()
    rows.join()
    rows.write(0, [11], 11)
    rows.write(0, [2], 4)
    rows.keep(0)
    rows.write(0, [40], 40)
    for _ in range(2):
        rows.again(0)
        rows.write(len(rows.rows) - 1, [3], 3)
    rows.again(0)
    rows.write(0, [1, 2, 3, 1], 4)


@pytest.mark.parametrize("kept, columns", [(k, c) for c in range(1, WIDEST + 2) for k in range(1, c + 1)])
def test_a_row_that_ended_is_continued_from_its_texts_end_whatever_pass_was_on_its_way(kept, columns):
    """A neighbour has it that the pass is over some of the rows."""
    for wasted, ends in [(w, e) for w in (0, 1, WIDEST + 1) for e in range(1, kept + 1)]:
        rows = Rows()
        rows.join()
        rows.join()
        rows.round([WIDEST, 1], WIDEST + 1)
        begun = len(rows.rows[0])
        rows.round([kept], columns)
        if wasted:
            rows.round([wasted, 1][: 1 + wasted % 2], wasted)
        rows.keep(0, begun + ends)
        rows.leave(0)
        rows.again(-1)
        rows.write(0, [2, 1], 2)


@pytest.mark.parametrize("columns", range(1, WIDEST + 3))
def test_a_row_may_begin_as_far_before_a_prompts_end_as_its_last_pass_was_wide(columns):
    rows = Rows()
    rows.join()
    rows.write(0, [9], 9)
    rows.write(0, [columns], columns)
    back = rows.cache.back(columns)
    assert back == (columns if columns <= rows.cache.tail else 0)
    ids = list(rows.rows[0])
    held = rows.cache.states.hold(0, len(ids))
    for count in range(len(ids) - back, len(ids) + 1):
        rows.kept.append((held, ids[:count]))
        rows.again(-1)
        rows.write(len(rows.rows) - 1, [2], 2)


def test_a_row_takes_no_more_than_admission_counts():
    rows = Rows()
    for _ in range(3):
        rows.join()
    for columns in (50, WIDEST + 1, 1, WIDEST + 1, WIDEST + 1):
        rows.write(0, [columns] * 3, columns)
        marks = rows.cache.states.state()
        taken = sum(a.nbytes for states, inputs, *_ in marks for a in (*states, *inputs))
        assert taken <= 3 * rows.cache.row_bytes(1)
    assert taken == 3 * rows.cache.row_bytes(1)


def test_a_pass_runs_its_own_columns_and_those_of_the_last_that_may_have_been_kept():
    """A round without drafts runs none of the last one again if that had none either, nor after a wide chunk."""
    rows, ran = Rows(), []

    def counting(state, again, own, takes):
        ran.append((again.inputs.shape[1] - TAPS + 1 if again else 0, own.inputs.shape[1] - TAPS + 1))
        return scan(state, again, own, takes)

    rows.join()
    for columns in (20, 1, 1, 4, 2, 1, 1, 3):
        still = frozenset() if columns < 20 else None
        pass_ = rows.cache.open(slice(0, 1), columns, still)
        pass_.recur(0, mx.zeros((1, columns, 1)), counting)
        rows.cache.commit(slice(0, 1), mx.array([columns]), columns)
    assert ran == [(0, 20), (0, 1), (0, 1), (0, 4), (4, 2), (2, 1), (0, 1), (0, 3)]
