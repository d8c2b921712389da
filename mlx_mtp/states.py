"""States of recurrent layers, for every row, so that a row may take back what it has run. Knows no recurrence.

Keys and values of a rejected column are masked; a state that has taken a column in cannot give it up. So a row's state
stays at its `base`, a position, and beside it lies what the row's last pass brought in from there on, kept or not. The
next pass runs the kept ones of these columns over the state again, and then its own. Where it is certain what is kept
nothing has to be run again: a round without drafts takes its column in at once, and so does a prompt chunk wider than a
round, which is kept whole. Plain decoding runs every column once.

Rejecting columns is not advancing the row's length, here as well: nothing branches, shapes do not depend on what is
kept, and running a position again gives the bits that it gave before. A row that has ended, of which one more pass may
have run, can still be continued from where its text ended: what the pass before found is kept too, `_before`. That
takes a second state a row, and no time: arrays change hands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import copy, fit_rows, put


@dataclass(frozen=True)
class Columns:
    """What columns bring in: inputs [B, taps - 1 + T, F], the first taps - 1 only to be looked back at. counts [B]
    int32: how many of the T, from the first on, are taken in; None: all."""

    inputs: mx.array
    counts: mx.array | None = None


Scan = Callable[[mx.array, Columns | None, Columns, bool], tuple[mx.array, mx.array]]
"""(state [B, ...], again, own, takes) -> (outputs [B, T, ...] of own's columns, state with again's taken in, and with
own's too if it `takes`). Own's counts are None unless it takes.

Outputs of a column that does not count are unspecified. What a column does may depend on nothing but the state, itself,
and the taps - 1 inputs before it.
"""

Still = frozenset[int] | None
"""Of a round, the rows (counted from the pass's first) that keep nothing of it; all others keep its first column. None:
what is kept is open."""


@dataclass(frozen=True)
class StateSpec:
    """One recurrent layer. shape: of a row's state, float32. inputs: how many numbers a position brings in. taps: how
    many positions in a row a column looks at, itself included."""

    shape: tuple[int, ...]
    inputs: int
    taps: int


@dataclass(frozen=True)
class Held:
    """A row's states and inputs [1, ...] by layer, base [1] of all, and how many columns may lie behind it."""

    states: tuple[mx.array, ...]
    inputs: tuple[mx.array, ...]
    base: mx.array
    behind: int

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (*self.states, *self.inputs, self.base)


@dataclass
class Mark:
    """Where rows stood: by layer states [R, ...] and inputs [R, taps - 1 + n, F]; base [R]; behind: per row, how many
    of the n columns are its own."""

    states: list[mx.array]
    inputs: list[mx.array]
    base: mx.array
    behind: list[int]

    def resize(self, rows: int) -> None:
        self.states, self.inputs = ([fit_rows(x, rows) for x in xs] for xs in (self.states, self.inputs))
        self.base = fit_rows(self.base, rows)

    def move(self, row: int, last: int) -> None:
        """The last row takes another's place."""
        if row != last:
            self.states, self.inputs = ([put(x, row, x[last]) for x in xs] for xs in (self.states, self.inputs))
            self.base = put(self.base, row, self.base[last])
        self.behind[row] = self.behind[last]
        self.behind.pop()

    def set_rows(self, rows: slice, base: mx.array, behind: list[int]) -> None:
        """Before `set_layer`, which fits inputs to what may lie behind any row."""
        self.base, self.behind[rows] = put(self.base, rows, base), behind

    def set_layer(self, layer: int, rows: slice, state: mx.array, inputs: mx.array, looked_back: int) -> None:
        if rows == slice(0, self.states[layer].shape[0]):
            self.states[layer], self.inputs[layer] = state, inputs
            return
        self.states[layer] = put(self.states[layer], rows, state)
        size = looked_back + max(self.behind)
        self.inputs[layer] = put(_fit_columns(self.inputs[layer], size), rows, _fit_columns(inputs, size))


class States:
    """Rows are as dense as those of the cache that this belongs to. Without layers everything here does nothing."""

    def __init__(self, specs: tuple[StateSpec, ...], max_width: int, dtype: mx.Dtype) -> None:
        """dtype: of the inputs. max_width: widest round that will be asked for."""
        self.specs, self.dtype, self.widest = specs, dtype, max_width + 1
        self._now, self._before = self._nothing(), self._nothing()

    def _nothing(self) -> Mark:
        states = [mx.zeros((0, *s.shape)) for s in self.specs]
        inputs = [mx.zeros((0, s.taps - 1, s.inputs), self.dtype) for s in self.specs]
        return Mark(states, inputs, mx.zeros((0,), mx.int32), [])

    @property
    def row_bytes(self) -> int:
        """The most that a row takes: two states, and beside each what the widest round brings in."""
        slots = (s.taps - 1 + self.widest for s in self.specs)
        inputs = sum(self.dtype.size * n * s.inputs for n, s in zip(slots, self.specs, strict=True))
        return 2 * (inputs + sum(4 * math.prod(s.shape) for s in self.specs))

    # rows -------------------------------------------------------------------------------------------------------

    def join(self, held: Held | None) -> None:
        """Add a row, from its beginning or as it was held."""
        if not self.specs:
            return
        row = len(self._now.behind)
        for mark in (self._now, self._before):
            mark.resize(row)  # what a row that left has left behind goes
            mark.resize(row + 1)
            mark.behind.append(0)
        if held is None:
            return
        where = slice(row, row + 1)
        self._now.set_rows(where, held.base, [held.behind])
        for i, (state, inputs) in enumerate(zip(held.states, held.inputs, strict=True)):
            self._now.set_layer(i, where, state, inputs, self.specs[i].taps - 1)

    def hold(self, row: int, length: int) -> Held | None:
        """What it takes to continue a row from `length`, or from any position between its last pass's first and that;
        a copy, unevaluated. The row may have run past `length` by one pass."""
        if not self.specs:
            return None
        one, now, before = slice(row, row + 1), self._now, self._before
        stands, behind = now.base[one] <= length, max(now.behind[row], before.behind[row])
        sizes = [spec.taps - 1 + behind for spec in self.specs]

        def of(x: mx.array, y: mx.array) -> mx.array:
            return mx.where(mx.expand_dims(stands, tuple(range(1, x.ndim))), x, y)

        states = tuple(of(x[one], y[one]) for x, y in zip(now.states, before.states, strict=True))
        inputs = tuple(
            of(_fit_columns(x[one], size), _fit_columns(y[one], size))
            for x, y, size in zip(now.inputs, before.inputs, sizes, strict=True)
        )
        return Held(states, inputs, of(now.base[one], before.base[one]), behind)

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        if not self.specs:
            return
        last = len(self._now.behind) - 1
        for mark in (self._now, self._before):
            mark.move(row, last)
            mark.resize(last)

    def state(self) -> Any:
        """All arrays, as `Cache.state` has them."""
        return [(mark.states[:], mark.inputs[:], mark.base, mark.behind[:]) for mark in (self._now, self._before)]

    def restore(self, state: Any) -> None:
        """As `Cache.restore`."""
        self._now, self._before = (Mark(*parts) for parts in state)


class Replay:
    """One pass over a slice of rows, which every recurrent layer takes part in. Making it moves the rows' bases."""

    def __init__(self, states: States, rows: slice, columns: int, start: mx.array, still: Still) -> None:
        """start [B] int32: position of column 0, between the row's base and what was written."""
        self._states, self._rows = states, rows
        if not states.specs:
            return
        now, before = states._now, states._before
        self._whole = columns > states.widest  # wider than any round: a prompt chunk, which is kept whole
        self._takes = self._whole or (columns == 1 and still is not None)
        self._counts = None
        if self._takes and still:
            self._counts = mx.array([int(row not in still) for row in range(start.shape[0])], mx.int32)
        base, self._behind = now.base[rows], now.behind[rows]
        self._most, self._again = max(self._behind), start - base
        if not self._whole:  # nobody goes back to before what is kept whole
            before.set_rows(rows, base, self._behind)
        taken = columns if self._counts is None else self._counts
        now.set_rows(rows, start + taken if self._takes else start, [0 if self._takes else columns] * start.shape[0])

    def run(self, layer: int, inputs: mx.array, scan: Scan) -> mx.array:
        """inputs [B, L, F] of the pass's columns -> what `scan` makes of them [B, L, ...]."""
        states, back = self._states, self._states.specs[layer].taps - 1
        state, behind = states._now.states[layer], states._now.inputs[layer]
        if self._rows != slice(0, state.shape[0]):
            state, behind = state[self._rows], behind[self._rows]
        again = Columns(behind[:, : back + self._most], self._again) if self._most else None
        looked = self._looked_back(behind, back)
        own = Columns(mx.concatenate([looked, inputs.astype(states.dtype)], axis=1), self._counts)
        out, after = scan(state, again, own, self._takes)
        if not self._whole:
            states._before.set_layer(layer, self._rows, state, behind, back)
        states._now.set_layer(layer, self._rows, after, self._left(own, looked, back), back)
        return out

    def _looked_back(self, behind: mx.array, back: int) -> mx.array:
        """The inputs [B, taps - 1, F] before the pass's first column."""
        if not self._most:
            return behind[:, :back]
        at = self._again[:, None] + mx.arange(back)
        return mx.take_along_axis(behind, at[..., None], axis=1)

    def _left(self, own: Columns, looked: mx.array, back: int) -> mx.array:
        """What lies behind the base from now on, with what the first of it looks back at."""
        if not self._takes:
            return own.inputs
        last = own.inputs[:, own.inputs.shape[1] - back :]
        last = copy(last) if self._whole else last  # or all of a prompt chunk would stay
        return last if self._counts is None else mx.where(self._counts[:, None, None] > 0, last, looked)


def _fit_columns(x: mx.array, size: int) -> mx.array:
    """x [B, T, F] with T cut or zero-padded to `size`."""
    if x.shape[1] >= size:
        return x[:, :size]
    return mx.concatenate([x, mx.zeros((x.shape[0], size - x.shape[1], x.shape[2]), x.dtype)], axis=1)
