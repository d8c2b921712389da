"""A recurrent layer gives what it gives of the committed text alone, however rows were drafted, moved or copied."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from histories import WIDEST, Deed, History, follow, histories
from hypothesis import given, settings

from mlx_mtp.cache import Cache, Snapshot, Trunk
from mlx_mtp.states import Held, StateSpec

TAPS, PRIME = 3, 4093
SPEC = StateSpec((1, 2), 1, TAPS)


def mixed(x: list[float]) -> float:
    """What a column's last TAPS inputs come to."""
    return x[-1] + 3 * x[-2] + 7 * x[-3]


def scan(state: mx.array, inputs: mx.array, counts: mx.array | None) -> tuple[mx.array, mx.array]:
    """Folds every number into the state so that all of them, and their order, show in it; exact in float32."""
    x, out = inputs[..., 0], []
    for t in range(x.shape[1] - TAPS + 1):
        brought = x[:, t + 2] + 3 * x[:, t + 1] + 7 * x[:, t]
        new = mx.remainder(31 * state + brought[:, None, None], PRIME)
        out.append(new[:, 0])
        state = new if counts is None else mx.where(counts[:, t, None, None], new, state)
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

    def write(self, first: int, kept: list[int], columns: int) -> None:
        """A pass over rows from `first` on, and its commit; checks what every column of it gives."""
        rows = slice(first, first + len(kept))
        ids = np.arange(self._next, self._next + len(kept) * columns).reshape(len(kept), columns)
        self._next = (self._next + ids.size) % 1000
        pass_ = self.cache.open(rows, columns)
        got = np.array(pass_.recur(0, mx.array(ids[..., None].astype(np.float32)), scan))
        for b in range(len(kept)):
            there = [folded(self.rows[first + b] + ids[b, : c + 1].tolist()) for c in range(columns)]
            assert got[b, :, 0].tolist() == there
        self.cache.commit(rows, mx.array(kept, mx.int32), columns)
        for b, count in enumerate(kept):
            self.rows[first + b] += ids[b, :count].tolist()

    def do(self, deed: Deed) -> None:
        live, row = len(self.rows), deed.row
        some = deed.some(live)
        if deed.name == "end" and live:  # in the midst of a round, with another one on its way
            begun = len(self.rows[row])
            some[row] = max(1, some[row])
            self.write(0, some, deed.columns)
            self.write(0, [min(k, 2) for k in deed.kept[:live]], 2)
            self.keep(row, begun + 1 + deed.which % some[row])
        elif deed.name == "undo" and live:
            state, bounds, told = self.cache.state(), list(self.cache.bounds), [list(r) for r in self.rows]
            self.write(0, some, deed.columns)
            self.cache.restore(state)
            self.cache.bounds, self.rows = bounds, told


plans = histories(longest=9, length=20, more=("end", "undo"))


@given(plans)
@settings(max_examples=40)
def test_columns_give_what_the_committed_text_gives_whatever_happened(plan):
    follow(Rows(), plan)


@pytest.mark.slow
@given(plans)
@settings(max_examples=2000)
def test_columns_give_what_the_committed_text_gives_in_thousands_of_histories(plan):
    follow(Rows(), plan)


def test_the_ring_of_inputs_wraps_many_times():
    rows = Rows()
    rows.join()
    rows.join()
    for i in range(30):
        rows.write(0, [i % (WIDEST + 2), (i * 7) % (WIDEST + 2)], WIDEST + 1)
    assert min(map(len, rows.rows)) > 2 * rows.cache.states.ring_size(SPEC)


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


@pytest.mark.parametrize("columns", range(1, WIDEST + 3))
def test_a_row_may_begin_as_far_before_a_prompts_end_as_its_last_pass_was_wide(columns):
    rows = Rows()
    rows.join()
    rows.write(0, [9], 9)
    rows.write(0, [columns], columns)
    back = rows.cache.back(columns)
    assert back == (columns if columns <= rows.cache.tail else 0)
    held, ids = rows.cache.states.hold(0), list(rows.rows[0])
    for count in range(len(ids) - back, len(ids) + 1):
        rows.kept.append((held, ids[:count]))
        rows.again(-1)
        rows.write(len(rows.rows) - 1, [2], 2)


def test_a_row_takes_what_admission_counts():
    rows = Rows()
    for _ in range(3):
        rows.join()
    states, rings, *_ = rows.cache.states.state()
    assert sum(a.nbytes for a in (*states, *rings)) == 3 * rows.cache.row_bytes(1)


def test_passes_run_as_many_columns_as_may_have_been_kept_of_the_last_two():
    """The work of a pass follows its width and the last passes', not the widest that there could be."""
    rows, ran = Rows(), []

    def counting(state, inputs, counts):
        ran.append(inputs.shape[1] - TAPS + 1)
        return scan(state, inputs, counts)

    rows.join()
    for columns in (20, 1, 1, 4, 2, 1):
        pass_ = rows.cache.open(slice(0, 1), columns)
        pass_.recur(0, mx.zeros((1, columns, 1)), counting)
        rows.cache.commit(slice(0, 1), mx.array([columns]), columns)
        ran.append(0)
    assert ran == [20, 0, 1, 0, 1, 1, 0, 1, 1, 4, 0, 1, 4, 2, 0, 4, 2, 1, 0]
