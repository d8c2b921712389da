"""States of recurrent layers, for every row, so that a row may take back what it has run. Knows no recurrence.

Keys and values of a rejected column are masked; a state that has taken a column in cannot give it up. So a row's state
stays behind: it holds the positions before its `base`, and what those from there on brought in lies in a ring, position
p in slot p mod S, as keys and values of a sliding layer do. A pass runs them over the state again, up to its own first
column, and then its columns. Rejecting columns is not advancing the row's length, here as well: nothing is copied,
nothing branches, shapes do not depend on what is kept, and running a position again gives the bits that it gave before.

A pass moves the base up to where the pass before began. So a row that has ended, of which one more pass may have run,
can still be continued from where its text ended. A prompt chunk wider than a round is kept whole: it is taken in at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import copy, fit_rows, put, round_up

Scan = Callable[[mx.array, mx.array, mx.array | None], tuple[mx.array, mx.array]]
"""(state [B, ...], inputs [B, taps - 1 + T, F], counts [B, T] bool or None for all) -> (outputs [B, T, ...], state).

The first taps - 1 inputs are only looked back at. A column that does not count leaves the state as it was, and the rest
unspecified. What a column does may depend on nothing but the state, itself, and the taps - 1 inputs before it.
"""


@dataclass(frozen=True)
class StateSpec:
    """One recurrent layer. shape: of a row's state, float32. inputs: how many numbers a position brings in. taps: how
    many positions in a row a column looks at, itself included."""

    shape: tuple[int, ...]
    inputs: int
    taps: int


@dataclass(frozen=True)
class Held:
    """A row's states and inputs [1, ...] by layer, base [1] of all, and how many positions may lie behind it."""

    states: tuple[mx.array, ...]
    inputs: tuple[mx.array, ...]
    base: mx.array
    behind: int

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (*self.states, *self.inputs, self.base)


class States:
    """Rows are as dense as those of the cache that this belongs to. Without layers everything here does nothing."""

    def __init__(self, specs: tuple[StateSpec, ...], max_width: int, dtype: mx.Dtype) -> None:
        """dtype: of the inputs. max_width: widest round that will be asked for."""
        self.specs, self.dtype, self.widest = specs, dtype, max_width + 1
        self._state: list[mx.array] = [mx.zeros((0, *s.shape)) for s in specs]
        self._ring: list[mx.array] = [mx.zeros((0, self.ring_size(s), s.inputs), dtype) for s in specs]
        self._base = self._last = mx.zeros((0,), mx.int32)  # [R]; last: where the row's last pass began
        self._behind: list[tuple[int, int]] = []  # per row, at most: base up to last, and from there to its length

    def ring_size(self, spec: StateSpec) -> int:
        """Slots for what lies behind a base, two of the widest rounds, for one more, and for what they look back at."""
        return round_up(3 * self.widest + spec.taps - 1, 8)

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return sum(4 * math.prod(s.shape) + self.dtype.size * self.ring_size(s) * s.inputs for s in self.specs)

    # rows -------------------------------------------------------------------------------------------------------

    def join(self, held: Held | None) -> None:
        """Add a row, from its beginning or as it was held."""
        if not self.specs:
            return
        row = len(self._behind)
        self._resize(row)  # what a row that left has left behind goes
        self._resize(row + 1)
        self._behind.append((0, 0) if held is None else (0, held.behind))
        if held is not None:
            where = slice(row, row + 1)
            self._state = [put(x, where, y) for x, y in zip(self._state, held.states, strict=True)]
            self._ring = [put(x, where, y) for x, y in zip(self._ring, held.inputs, strict=True)]
            self._base, self._last = put(self._base, where, held.base), put(self._last, where, held.base)

    def hold(self, row: int) -> Held | None:
        """What it takes to continue a row from any position between its base and its length; copied, unevaluated."""
        if not self.specs:
            return None
        one = slice(row, row + 1)
        states, inputs = (tuple(copy(x[one]) for x in buffers) for buffers in (self._state, self._ring))
        return Held(states, inputs, copy(self._base[one]), sum(self._behind[row]))

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        if not self.specs:
            return
        last = len(self._behind) - 1
        if row != last:
            self._state, self._ring = ([put(x, row, x[last]) for x in xs] for xs in (self._state, self._ring))
            self._base, self._last = (put(x, row, x[last]) for x in (self._base, self._last))
        self._behind[row] = self._behind[last]
        self._behind.pop()
        self._resize(last)

    def _resize(self, rows: int) -> None:
        self._state, self._ring = ([fit_rows(x, rows) for x in xs] for xs in (self._state, self._ring))
        self._base, self._last = fit_rows(self._base, rows), fit_rows(self._last, rows)

    def state(self) -> Any:
        """All arrays, as `Cache.state` has them."""
        return list(self._state), list(self._ring), self._base, self._last, list(self._behind)

    def restore(self, state: Any) -> None:
        """As `Cache.restore`."""
        states, rings, self._base, self._last, behind = state
        self._state, self._ring, self._behind = list(states), list(rings), list(behind)


class Replay:
    """One pass over a slice of rows, which every recurrent layer takes part in. Making it moves the rows' bases."""

    def __init__(self, states: States, rows: slice, columns: int, start: mx.array) -> None:
        """start [B] int32: position of column 0, between the row's last and what was written."""
        self._states, self._rows, self._columns, self._start = states, rows, columns, start
        self._whole = columns > states.widest  # wider than any round: a prompt chunk, which is kept whole
        if not states.specs:
            return
        self._base, self._last = states._base[rows], states._last[rows]
        behind = states._behind[rows]
        self._folds, self._runs = (max(n) for n in zip(*behind, strict=True))
        base, last = (start + columns,) * 2 if self._whole else (self._last, start)
        states._base, states._last = put(states._base, rows, base), put(states._last, rows, last)
        states._behind[rows] = [(0, 0) if self._whole else (b, columns) for _, b in behind]

    def run(self, layer: int, inputs: mx.array, scan: Scan) -> mx.array:
        """inputs [B, L, F] of the pass's columns -> what `scan` makes of them [B, L, ...]."""
        states, spec = self._states, self._states.specs[layer]
        state, ring = states._state[layer], states._ring[layer]
        everyone = self._rows == slice(0, ring.shape[0])
        own = inputs.astype(states.dtype)
        state, slots = (state, ring) if everyone else (state[self._rows], ring[self._rows])
        state = self._again(state, slots, spec, scan, self._base, self._last, self._folds)
        kept = state
        state = self._again(state, slots, spec, scan, self._last, self._start, self._runs)
        before = _window(slots, self._start, 0, spec.taps)
        out, after = scan(state, mx.concatenate([before, own], axis=1), None)
        kept = after if self._whole else kept
        states._state[layer] = kept if everyone else put(states._state[layer], self._rows, kept)
        self._write(layer, own)
        return out

    def _again(self, state, slots, spec: StateSpec, scan: Scan, first: mx.array, end: mx.array, most: int) -> mx.array:
        """The state with positions first .. end - 1 [B] taken in, of which there are at most so many."""
        if not most:
            return state
        counts = first[:, None] + mx.arange(most) < end[:, None]
        return scan(state, _window(slots, first, most, spec.taps), counts)[1]

    def _write(self, layer: int, own: mx.array) -> None:
        ring = self._states._ring[layer]
        size, last = ring.shape[1], min(self._columns, ring.shape[1])
        at = self._start[:, None] + mx.arange(self._columns - last, self._columns)
        rows = mx.arange(self._rows.start, self._rows.stop)[:, None]
        self._states._ring[layer] = put(ring, (rows, at % size), own[:, self._columns - last :])


def _window(slots: mx.array, first: mx.array, count: int, taps: int) -> mx.array:
    """Inputs [B, taps - 1 + count, F] of the positions up to first + count - 1 [B]; before the text there are zeros."""
    at = first[:, None] + mx.arange(1 - taps, count)
    found = mx.take_along_axis(slots, (at % slots.shape[1])[..., None], axis=1)
    return mx.where((at >= 0)[..., None], found, mx.array(0, slots.dtype))
