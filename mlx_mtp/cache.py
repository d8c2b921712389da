"""The position-addressed KV cache: what every layer has stored, for every row. Knows nothing of models or requests.

A row's state is one integer, its length. Position p lives at a place computed from p alone, what lies past a row's
length is masked and overwritten by the next write, so rejecting drafted columns is not advancing the length.

Sliding layers share one ring for all rows, [R, H, S, D] with slot = p mod S. Writing n .. n+K overwrites n-S .. n+K-S
while the drafter still sees n-1-W, so S >= W + K + 2 loses nothing. A row that has ended may have run one more pass,
and a snapshot of it must hold all the same: S leaves room for two of the widest rounds. A snapshot of a row that has
run past it by one round at most can be continued from up to one round earlier, too.
Full layers have one buffer a row, [1, H, T, D], grown in steps: lengths differ a hundredfold between rows.
Recurrent layers have two states a row, and what its last pass brought in (states.py).

MLX updates a buffer in place only while nothing in flight reads it, so a caller dispatches a pass only after the one
before it has finished (the engine does; measured there). Host code knows an upper bound of every length; the exact
lengths stay on the device until the engine has read a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from mlx_mtp.buffers import copy, fit_rows, fit_tokens, put, round_up
from mlx_mtp.kernels.attend import EVERYTHING
from mlx_mtp.kernels.backend import not_small
from mlx_mtp.states import Held, Replay, Scan, States, StateSpec, Still
from mlx_mtp.views import Part, View, Whole

GROW_TOK = 256  # full buffers grow in multiples of this many positions
VIEW_TOK = 64  # views are cut to a multiple of this, so that few different shapes occur


@dataclass(frozen=True)
class LayerSpec:
    """One layer that owns keys and values. window: positions a query sees, itself included; None = all. by_kernel:
    rounds attend to it with the kernel."""

    window: int | None
    kv_heads: int
    head_dim: int
    by_kernel: bool = False


class Trunk:
    """Full layers' keys and values that all snapshots of a row share: the row's own while it lives, here afterwards.

    MLX writes in place only into what nobody else refers to. So a snapshot of a live row refers to none of its
    buffers; whoever continues it copies what it needs, and a row that leaves hands its buffers over as they are.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[mx.array, mx.array]] = {}  # by layer, [1, H, T, D]; none while the row lives
        self.snapshots: WeakSet[Snapshot] = WeakSet()  # all begin with the same tokens

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.buffers.values())

    def trim(self) -> None:
        """Give back what no snapshot reaches any more, where that is half of it: what is left has to be copied."""
        reach = round_up(max((s.length for s in self.snapshots), default=0), GROW_TOK)
        if reach and any(2 * reach <= k.shape[2] for k, _ in self.buffers.values()):
            self.buffers = {i: (fit_tokens(k, reach), fit_tokens(v, reach)) for i, (k, v) in self.buffers.items()}
            mx.async_eval(self.buffers)


@dataclass(eq=False)
class Snapshot:
    """A row as it was at `length` positions: enough to begin another row there.

    ring: of sliding layers, the slots in use, [1, H, S', D] keys and values by layer. trunk: has the full layers.
    held: of recurrent layers.
    """

    length: int
    ring: dict[int, tuple[mx.array, mx.array]]
    trunk: Trunk
    held: Held | None = None

    def __post_init__(self) -> None:
        self.trunk.snapshots.add(self)

    @property
    def arrays(self) -> list[mx.array]:
        """What belongs to this snapshot alone."""
        return [*(a for pair in self.ring.values() for a in pair), *(self.held.arrays if self.held else ())]

    def move(self, trunk: Trunk) -> None:
        """Another trunk has the same first positions."""
        self.trunk.snapshots.discard(self)
        self.trunk = trunk
        trunk.snapshots.add(self)


class Cache:
    """Keys and values of all rows. Rows 0 .. len(bounds)-1 are live and dense."""

    def __init__(self, specs: tuple[LayerSpec | StateSpec, ...], max_width: int, dtype: mx.Dtype) -> None:
        """specs: the layers that own keys and values, in order, and the recurrent ones, each kind numbered by itself.
        max_width: widest round that will be asked for."""
        self.specs = tuple(s for s in specs if isinstance(s, LayerSpec))
        self.dtype, self.max_width = dtype, max_width
        self.states = States(tuple(s for s in specs if isinstance(s, StateSpec)), max_width, dtype)
        self.lengths = mx.zeros((0,), dtype=mx.int32)  # [R], R >= live rows
        self.bounds: list[int] = []  # per live row: no position at or past this has been written
        self._unsettled: list[int] = []  # per live row: passes of which its bound counts all columns as kept so far
        self._trunks: list[Trunk] = []  # per live row
        self._most: list[int] = []  # per live row: a full buffer grows no further unless it has to
        self._ring: dict[int, tuple[mx.array, mx.array]] = {}
        self._full: dict[int, list[tuple[mx.array, mx.array]]] = {
            i: [] for i, s in enumerate(self.specs) if s.window is None
        }

    def ring_size(self, window: int) -> int:
        """Slots of a sliding layer's ring: the drafter's window (W + 1) and two of the widest rounds."""
        return round_up(window + 1 + 2 * (self.max_width + 1), 8)

    def back(self, columns: int) -> int:
        """How many positions before a snapshot's length a row may begin, if the row it was taken of had not run past
        that length by more than one of the widest rounds. columns: that count of the row's last pass; a recurrent
        layer's state is kept as it was before them, unless the pass was wider than a round."""
        if not self.states.specs:
            return self.max_width + 1
        return columns if columns <= self.states.widest else 0

    @property
    def tail(self) -> int:
        """How many last tokens of a prompt have to go in a pass of their own for `back` to be as many."""
        return self.states.widest if self.states.specs else 0

    def capacity(self, positions: int) -> int:
        """The most positions that the buffers of a row which ends at `positions` may hold: it may run two of the
        widest rounds further, as rings do."""
        return round_up(positions + 2 * (self.max_width + 1), GROW_TOK)

    def row_bytes(self, positions: int) -> int:
        """The most that a row which ends at `positions` takes: its rings, and its own buffers as they are allocated."""
        full = self.capacity(max(positions, 1))
        slots = (self.ring_size(s.window) if s.window else full for s in self.specs)
        sizes = (2 * n * s.kv_heads * s.head_dim for n, s in zip(slots, self.specs, strict=True))
        return sum(sizes) * self.dtype.size + self.states.row_bytes

    def most(self, row: int) -> int:
        """The most positions that a live row's buffers may hold; other caches that follow it need no more."""
        return self._most[row]

    # rows -------------------------------------------------------------------------------------------------------

    def join(
        self, reserve: int, snapshot: Snapshot | None = None, length: int | None = None, most: int | None = None
    ) -> int:
        """Add a row with room for `reserve` positions; returns its index, the last.

        snapshot: the row begins with it, or with its first `length` positions (`back` says how few those may be).
        most: positions that the row will end at; its buffers then grow to what `row_bytes` says and no further.
        """
        row = len(self.bounds)
        if row == self.lengths.shape[0]:
            self._resize(row + 1)
        start = 0 if snapshot is None else snapshot.length if length is None else length
        self.lengths = put(self.lengths, row, start)
        self.bounds.append(start)
        self._unsettled.append(0)
        self._most.append(2**31 if most is None else self.capacity(most))
        self.states.join(None if snapshot is None else snapshot.held)
        room = min(round_up(max(reserve, start, 1), GROW_TOK), self._most[row])
        if snapshot is None:
            self._trunks.append(Trunk())
            for i, buffers in self._full.items():
                shape = (1, self.specs[i].kv_heads, room, self.specs[i].head_dim)
                buffers.append((mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)))
        else:
            self._continue(snapshot, start, room)
        return row

    def _continue(self, snapshot: Snapshot, start: int, room: int) -> None:
        """Give the row that is joining what a snapshot has of its first `start` positions."""
        row, trunk = len(self.bounds) - 1, snapshot.trunk
        if trunk not in self._trunks and all(s.length <= start for s in trunk.snapshots):
            held, trunk.buffers = trunk.buffers, {}  # what they reach does not change if the row goes on in them
            room = min(max((room, *(k.shape[2] for k, _ in held.values()))), self._most[row])
        elif trunk in self._trunks:
            other = self._trunks.index(trunk)
            held = {i: _first_tokens(buffers[other], start) for i, buffers in self._full.items()}
            trunk = Trunk()
        else:
            held = {i: _first_tokens(pair, start) for i, pair in trunk.buffers.items()}
            own = Trunk()
            for one in [s for s in trunk.snapshots if s.length <= start]:
                one.move(own)  # the old trunk may go when its longer ones go
            trunk = own
        self._trunks.append(trunk)
        for i, buffers in self._full.items():
            k, v = held[i]
            buffers.append((fit_tokens(k, room), fit_tokens(v, room)))
        for i, (k, v) in snapshot.ring.items():
            where, (into_k, into_v) = (slice(row, row + 1), slice(None), slice(0, k.shape[2])), self._ring[i]
            self._ring[i] = (put(into_k, where, k), put(into_v, where, v))

    def snapshot(self, row: int, length: int) -> Snapshot:
        """Keep a row's first `length` positions, which it may have run past by two of the widest rounds. Copies the
        slots in use of its rings, unevaluated; the full layers stay where they are."""
        cut = (slice(row, row + 1), slice(None), slice(0, length))
        ring = {i: (copy(k[cut]), copy(v[cut])) for i, (k, v) in self._ring.items()}
        return Snapshot(length, ring, self._trunks[row], self.states.hold(row, length))

    def leave(self, row: int) -> None:
        """Free a row, except for what its snapshots need; the last live row moves into its place."""
        last = len(self.bounds) - 1
        self._trunks[row].buffers = {i: buffers[row] for i, buffers in self._full.items()}
        self.states.leave(row)
        if row != last:
            self.lengths = put(self.lengths, row, self.lengths[last])
            for i, (k, v) in self._ring.items():
                self._ring[i] = (put(k, row, k[last]), put(v, row, v[last]))
        tables: list[list[Any]] = [self.bounds, self._unsettled, self._most, self._trunks, *self._full.values()]
        for per_row in tables:
            per_row[row] = per_row[last]
            per_row.pop()
        self._resize(last)

    def _resize(self, rows: int) -> None:
        have = self.lengths.shape[0]
        self.lengths = fit_rows(self.lengths, rows) if rows else mx.zeros((0,), dtype=mx.int32)
        for i, spec in enumerate(self.specs):
            if spec.window is None:
                continue
            if i not in self._ring or not rows:  # not what is left of the old one: it would live until it is evaluated
                shape = (rows, spec.kv_heads, self.ring_size(spec.window), spec.head_dim)
                self._ring[i] = (mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype))
            elif have != rows:
                k, v = self._ring[i]
                self._ring[i] = (fit_rows(k, rows), fit_rows(v, rows))

    # passes -----------------------------------------------------------------------------------------------------

    def open(self, rows: slice, columns: int, still: Still = None, settles: bool = False) -> Pass:
        """Begin a pass of `columns` new columns over a dense slice of live rows. still: given for a round. settles:
        whether whoever asks settles every pass that is committed, so that bounds can be known to be lengths."""
        exact = settles and not any(self._unsettled[rows])
        return Pass(self, rows, columns, still, exact)

    def commit(self, rows: slice, kept: mx.array, columns: int) -> None:
        """Advance the rows by kept [B] int32 of the `columns` columns just written."""
        self.lengths = put(self.lengths, rows, self.lengths[rows] + kept)
        for row in range(rows.start, rows.stop):
            self.bounds[row] += columns
            self._unsettled[row] += 1

    def spare(self, row: int, columns: int) -> bool:
        """Whether a row may be given so many columns and keep any number of them: none would overwrite what it has,
        and its buffers would grow to no more than `row_bytes` says."""
        if self.states.specs and columns > self.states.widest:
            return False  # states take all of so wide a pass in
        slots = (self.ring_size(s.window) for s in self.specs if s.window)
        return self.bounds[row] + columns <= min((self._most[row], *slots))

    def settle(self, row: int, rejected: int) -> None:
        """The host has read a verdict: `rejected` columns of that pass did not count."""
        self.bounds[row] -= rejected
        self._unsettled[row] -= 1

    def committed(self, layer: int, rows: slice, window: int | None) -> View:
        """What a drafter may read: all committed positions of a layer, or the last `window` of them."""
        length = self.lengths[rows][:, None]  # [B, 1]
        if self.specs[layer].window is not None:
            keys, values, at = self._ring_view(layer, rows, 0, length - 1)
            seen = at >= 0
            if window is not None:
                seen = seen & (at >= length - window)
            whole = None
            if self.specs[layer].by_kernel:
                first = not_small(length[:, 0] - 1)
                whole = self.whole_ring(layer, rows, first, EVERYTHING if window is None else window)
            return View((Part(keys, values, seen[:, None, None], whole),))
        parts = []
        for row in range(rows.start, rows.stop):
            keys, values = self._full_view(layer, row, 0)
            seen = mx.arange(keys.shape[2]) < self.lengths[row]
            by_kernel = self.specs[layer].by_kernel
            whole = self.whole_full(layer, row, self.lengths[row : row + 1] - 1) if by_kernel else None
            parts.append(Part(keys, values, seen[None, None, None], whole))
        return View(tuple(parts))

    def state(self) -> tuple:
        """All arrays, to evaluate them, or to undo lazily built passes with `restore`. Holding the result across a
        dispatch makes MLX copy every buffer, so drop it first."""
        full = {i: list(buffers) for i, buffers in self._full.items()}
        return self.lengths, dict(self._ring), full, self.states.state()

    def restore(self, state: tuple) -> None:
        """Forget all passes opened since `state` was taken; they must not have been dispatched. Bounds are the
        caller's to settle."""
        self.lengths, self._ring, self._full, states = state
        self.states.restore(states)

    def whole_ring(self, layer: int, rows: slice, start: mx.array, window: int) -> Whole:
        """A sliding layer for the kernel, with the first query at start [B or more]."""
        keys, values = self._ring[layer]
        return Whole(keys[rows], values[rows], start, window)

    def whole_full(self, layer: int, row: int, start: mx.array) -> Whole:
        """A full layer's row for the kernel, with the first query at start [1]."""
        return Whole(*self._full[layer][row], start, EVERYTHING)

    def _ring_view(self, layer: int, rows: slice, columns: int, last: mx.array):
        """(keys, values, positions [B, S']) of the ring where `last` [B, 1] is the newest position stored."""
        keys, values = self._ring[layer]
        size = keys.shape[2]
        used = min(size, round_up(max(self.bounds[rows]) + columns, VIEW_TOK))
        slots = mx.arange(used)
        at = last - (last - slots) % size
        return keys[rows, :, :used], values[rows, :, :used], at

    def _full_view(self, layer: int, row: int, columns: int, exactly: bool = False) -> tuple[mx.array, mx.array]:
        """exactly: cut behind the pass's last column."""
        keys, values = self._full[layer][row]
        end = max(1, self.bounds[row] + columns)
        used = end if exactly else min(keys.shape[2], round_up(end, VIEW_TOK))
        return keys[:, :, :used], values[:, :, :used]


class Pass:
    """One forward over a slice of rows: where its columns go, and what its queries see."""

    def __init__(self, cache: Cache, rows: slice, columns: int, still: Still, exact: bool) -> None:
        """exact: no row's bound is above its length."""
        self.cache, self.rows, self.columns = cache, rows, columns
        self._causal = exact and columns > 1 and still is None  # a prompt's keys can be cut where its columns end
        self.start = cache.lengths[rows]  # [B] int32, position of column 0
        self._at = self.start[:, None] + mx.arange(columns)  # [B, L] positions of the new columns
        self._chunk = columns > cache.max_width + 1  # too wide for the ring's slack: a prompt chunk
        self.is_round = still is not None  # kernels are for rounds only
        self.routed: list[mx.array] = []  # the model leaves its expert choices here, [N, k] a layer, to be counted
        self._masks: dict[tuple, mx.array] = {}
        self._slots: dict[int | tuple, tuple] = {}
        self._replay = Replay(cache.states, rows, columns, self.start, still)

    def recur(self, layer: int, inputs: mx.array, scan: Scan) -> mx.array:
        """Run the new columns' inputs [B, L, F] through a recurrent layer; all of a cache take part in a pass."""
        return self._replay.run(layer, inputs, scan)

    def store(self, layer: int, keys: mx.array, values: mx.array, *, causal: bool = True) -> View:
        """Write [B, H, L, D] keys and values of the new columns; returns what the queries of this pass see.

        causal: False shows every query all columns of the pass, those ahead of it too; not for prompt chunks.
        """
        window = self.cache.specs[layer].window
        if window is None:
            self._write_full(layer, keys, values)
            return self._view_full(layer, causal)
        if self._chunk:
            assert causal
            return self._store_chunk(layer, keys, values, window)
        self._write_ring(layer, keys, values)
        last = self.start[:, None] + (self.columns - 1)
        k, v, at = self.cache._ring_view(layer, self.rows, self.columns, last)
        by_kernel = causal and self._by_kernel(layer)
        whole = self.cache.whole_ring(layer, self.rows, self._first, window) if by_kernel else None
        return View((Part(k, v, self._mask(("ring", window), at, window, causal), whole),))

    def _by_kernel(self, layer: int) -> bool:
        return self.is_round and self.cache.specs[layer].by_kernel

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """`store` for a pass that asks nothing: no view is built."""
        write = self._write_full if self.cache.specs[layer].window is None else self._write_ring
        write(layer, keys, values)

    def _store_chunk(self, layer: int, keys: mx.array, values: mx.array, window: int) -> View:
        """A chunk wider than the ring's slack attends over the ring and itself, and leaves its last columns there."""
        fresh = max(self.cache.bounds[self.rows]) == 0
        if fresh:
            seen, k, v = self._mask(("chunk", window), self._at, window), keys, values
        else:
            ring_k, ring_v, at = self.cache._ring_view(layer, self.rows, 0, self.start[:, None] - 1)
            k, v = mx.concatenate([ring_k, keys], axis=2), mx.concatenate([ring_v, values], axis=2)
            seen = self._mask(("ring+chunk", window), mx.concatenate([at, self._at], axis=1), window)
        self._write_ring(layer, keys, values)
        return View((Part(k, v, seen, causal=fresh and self.columns <= window),))

    def _write_ring(self, layer: int, keys: mx.array, values: mx.array) -> None:
        k, v = self.cache._ring[layer]
        size = k.shape[2]
        last = min(self.columns, size)  # of the columns, which it has room for
        if last == self.columns and self.rows == slice(0, k.shape[0]):
            # Every row has a place in it: one operation, where indexing rows and slots takes MLX fifteen.
            self.cache._ring[layer] = (self._put_all(k, keys), self._put_all(v, values))
            return
        if size not in self._slots:
            rows = mx.arange(self.rows.start, self.rows.stop)[:, None]
            self._slots[size] = (rows, self._at[:, self.columns - last :] % size)
        rows, slots = self._slots[size]
        where = (rows, slice(None), slots)
        self.cache._ring[layer] = (
            put(k, where, keys[:, :, self.columns - last :].transpose(0, 2, 1, 3)),
            put(v, where, values[:, :, self.columns - last :].transpose(0, 2, 1, 3)),
        )

    def _put_all(self, ring: mx.array, new: mx.array) -> mx.array:
        """ring [R, H, S, D] with the pass's columns [R, H, L, D] in their slots."""
        size, key = ring.shape[2], (ring.shape[2], *new.shape)
        if key not in self._slots:
            self._slots[key] = (mx.broadcast_to((self._at % size)[:, None, :, None], new.shape),)
        return mx.put_along_axis(ring, self._slots[key][0], new, axis=2)

    @cached_property
    def _first(self) -> mx.array:
        """Positions of column 0 as the kernel takes them."""
        return not_small(self.start)

    @cached_property
    def _starts(self) -> list[mx.array]:
        """Position of column 0 of every row, [1] int32."""
        return [self.start[b : b + 1] for b in range(self.rows.stop - self.rows.start)]

    def _write_full(self, layer: int, keys: mx.array, values: mx.array) -> None:
        buffers = self.cache._full[layer]
        for b, row in enumerate(range(self.rows.start, self.rows.stop)):
            k, v = buffers[row]
            need = self.cache.bounds[row] + self.columns
            if need > k.shape[2]:
                grown = min(k.shape[2] + k.shape[2] // 4, self.cache._most[row])
                room = round_up(max(need, grown), GROW_TOK)
                k, v = fit_tokens(k, room), fit_tokens(v, room)
            k = mx.slice_update(k, keys[b : b + 1], self._starts[b], axes=(2,))
            v = mx.slice_update(v, values[b : b + 1], self._starts[b], axes=(2,))
            buffers[row] = (k, v)

    def _view_full(self, layer: int, causal: bool) -> View:
        parts, upto = [], self._at if causal else self._at[:, -1:]  # [B, L or 1]
        for b, row in enumerate(range(self.rows.start, self.rows.stop)):
            k, v = self.cache._full_view(layer, row, self.columns, exactly=causal and self._causal)
            used = k.shape[2]
            key = row, used, causal
            if key not in self._masks:
                seen = mx.arange(used) <= upto[b][:, None]
                self._masks[key] = mx.broadcast_to(seen, (self.columns, used))[None, None]
            by_kernel = causal and self._by_kernel(layer)
            whole = self.cache.whole_full(layer, row, self._starts[b]) if by_kernel else None
            parts.append(Part(k, v, self._masks[key], whole, causal and self._causal))
        return View(tuple(parts))

    def _mask(self, key: tuple, at: mx.array, window: int, causal: bool = True) -> mx.array:
        """[B, 1, L, T]: key positions at [B, T] a query sees: stored, not ahead of it (or in this pass), inside the
        window."""
        key = *key, causal
        if key not in self._masks:
            at, query = at[:, None, :], self._at[:, :, None]
            upto = query if causal else self._at[:, -1:, None]
            self._masks[key] = ((at >= 0) & (at <= upto) & (at > query - window))[:, None]
        return self._masks[key]


def _first_tokens(pair: tuple[mx.array, mx.array], count: int) -> tuple[mx.array, mx.array]:
    """The first `count` positions of keys and values [1, H, T, D]; to be copied before they are used."""
    return pair[0][:, :, :count], pair[1][:, :, :count]
