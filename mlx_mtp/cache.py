"""The position-addressed KV cache: what every layer has stored, for every row. Knows nothing of models or requests.

A row's state is one integer, its length. Position p lives at a place computed from p alone, what lies past a row's
length is masked and overwritten by the next write, so rejecting drafted columns is not advancing the length.

Sliding layers share one ring for all rows, [R, H, S, D] with slot = p mod S. Writing n .. n+K overwrites n-S .. n+K-S
while the drafter still sees n-1-W, so S >= W + K + 2 loses nothing. A row that has ended may have run one more pass,
and a snapshot of it must hold all the same: S leaves room for two of the widest rounds.
Full layers have one buffer a row, [1, H, T, D], grown in steps: lengths differ a hundredfold between rows.

MLX updates a buffer in place only while nothing in flight reads it, so a caller dispatches a pass only after the one
before it has finished (the engine does; measured there). Host code knows an upper bound of every length; the exact
lengths stay on the device until the engine has read a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp import kernels
from mlx_mtp.kernels import attend
from mlx_mtp.kernels.attend import EVERYTHING, Attention

GROW_TOK = 256  # full buffers grow in multiples of this many positions
VIEW_TOK = 64  # views are cut to a multiple of this, so that few different shapes occur


@dataclass(frozen=True)
class LayerSpec:
    """One layer that owns keys and values. window: positions a query sees, itself included; None = all."""

    window: int | None
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Whole:
    """A part as the kernel takes it: whole buffers [B', H, T, D] with position p in slot p mod T, not cut, since a cut
    would be copied. start [B'] int32: position of the first query; a query at p sees p - window + 1 .. p."""

    keys: mx.array
    values: mx.array
    start: mx.array
    window: int


@dataclass(frozen=True)
class Part:
    """Keys and values [B', H, T, D] of a slice of the pass's rows, and who may see what: mask [B', 1, L, T] bool.

    whole: the same for the kernel; None where it is not usable, or where the slots do not follow from positions.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array
    whole: Whole | None = None

    def attend(self, queries: mx.array) -> mx.array:
        """queries [B', heads, L, D], the last L of those that the mask is for -> the same shape."""
        columns, known = queries.shape[2], self.mask.shape[2]
        if self.whole is not None:
            w = self.whole
            start = w.start if known == columns else w.start + (known - columns)
            given = Attention(queries, w.keys, w.values, start, w.window)
            if not attend.why_not(given):
                return attend.attend(given)
        mask = self.mask if known == columns else self.mask[:, :, -columns:]
        return mx.fast.scaled_dot_product_attention(queries, self.keys, self.values, scale=1.0, mask=mask)


@dataclass(frozen=True)
class Snapshot:
    """A row as it was at `length` positions: enough to begin another row there.

    ring: sliding layers, [1, H, S, D]; full: full layers, [1, H, T, D]; keys and values, by layer.
    """

    length: int
    ring: dict[int, tuple[mx.array, mx.array]]
    full: dict[int, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class View:
    """What the queries of a pass may see in one layer: one part for all rows, or one part a row."""

    parts: tuple[Part, ...]

    def attend(self, queries: mx.array) -> mx.array:
        """Attention with scale 1 (Gemma 4 scales inside q_norm): [B, heads, L, D] -> [B, L, heads * D]."""
        b, heads, columns, dim = queries.shape
        outs, row = [], 0
        for part in self.parts:
            q = queries if len(self.parts) == 1 else queries[row : row + part.keys.shape[0]]
            outs.append(part.attend(q))
            row += part.keys.shape[0]
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
        return out.transpose(0, 2, 1, 3).reshape(b, columns, heads * dim)


class Cache:
    """Keys and values of all rows. Rows 0 .. len(bounds)-1 are live and dense."""

    def __init__(self, specs: tuple[LayerSpec, ...], max_width: int, dtype: mx.Dtype) -> None:
        """specs: the layers that own keys and values, in order. max_width: widest round that will be asked for."""
        self.specs, self.dtype, self.max_width = specs, dtype, max_width
        self.lengths = mx.zeros((0,), dtype=mx.int32)  # [R], R >= live rows
        self.bounds: list[int] = []  # per live row: no position at or past this has been written
        self._whole = kernels.usable("attend")  # whether parts carry what the kernel needs
        self._ring: dict[int, tuple[mx.array, mx.array]] = {}
        self._full: dict[int, list[tuple[mx.array, mx.array]]] = {
            i: [] for i, s in enumerate(specs) if s.window is None
        }

    def ring_size(self, window: int) -> int:
        """Slots of a sliding layer's ring: the drafter's window (W + 1) and two of the widest rounds."""
        return _round_up(window + 1 + 2 * (self.max_width + 1), 8)

    def row_bytes(self, positions: int) -> int:
        """What a row of so many positions takes: its rings, and its own buffers as they are allocated."""
        full = _round_up(max(positions, 1), GROW_TOK)
        slots = (self.ring_size(s.window) if s.window else full for s in self.specs)
        sizes = (2 * n * s.kv_heads * s.head_dim for n, s in zip(slots, self.specs, strict=True))
        return sum(sizes) * self.dtype.size

    def positions_in(self, budget_bytes: int) -> int:
        """How many positions one row may have within a budget; 0 if not even its rings fit."""
        rings, per_step = self.row_bytes(1), self.row_bytes(GROW_TOK + 1) - self.row_bytes(1)
        if budget_bytes < rings:
            return 0
        return GROW_TOK * (1 + (budget_bytes - rings) // per_step) if per_step else 2**31 - 1

    # rows -------------------------------------------------------------------------------------------------------

    def join(self, reserve: int, snapshot: Snapshot | None = None) -> int:
        """Add a row, empty or as in a snapshot, with room for `reserve` positions; returns its index, the last."""
        row = len(self.bounds)
        if row == self.lengths.shape[0]:
            self._resize(row + 1)
        start = snapshot.length if snapshot else 0
        self.lengths = _put(self.lengths, row, start)
        self.bounds.append(start)
        for i, buffers in self._full.items():
            spec, room = self.specs[i], _round_up(max(reserve, 1), GROW_TOK)
            if snapshot:
                k, v = snapshot.full[i]
                room = max(room, k.shape[2])
                buffers.append((_fit_tokens(k, room), _fit_tokens(v, room)))
            else:
                shape = (1, spec.kv_heads, room, spec.head_dim)
                buffers.append((mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)))
        if snapshot:
            here = slice(row, row + 1)
            for i, (k, v) in snapshot.ring.items():
                into_k, into_v = self._ring[i]
                self._ring[i] = (_put(into_k, here, k), _put(into_v, here, v))
        return row

    def snapshot(self, row: int, length: int) -> Snapshot:
        """Keep a row's first `length` positions; at most one pass may have run past them. Copies its rings."""
        cut = slice(row, row + 1)
        ring = {i: (mx.contiguous(k[cut]), mx.contiguous(v[cut])) for i, (k, v) in self._ring.items()}
        full = {i: buffers[row] for i, buffers in self._full.items()}
        mx.async_eval(ring)
        return Snapshot(length, ring, full)

    def leave(self, row: int) -> None:
        """Free a row; the last live row moves into its place."""
        last = len(self.bounds) - 1
        if row != last:
            self.lengths = _put(self.lengths, row, self.lengths[last])
            for i, (k, v) in self._ring.items():
                self._ring[i] = (_put(k, row, k[last]), _put(v, row, v[last]))
        self.bounds[row] = self.bounds[last]
        self.bounds.pop()
        for buffers in self._full.values():
            buffers[row] = buffers[last]
            buffers.pop()
        if len(self.bounds) <= self.lengths.shape[0] // 2:
            self._resize(len(self.bounds))

    def _resize(self, rows: int) -> None:
        have = self.lengths.shape[0]
        self.lengths = _fit_rows(self.lengths, rows)
        for i, spec in enumerate(self.specs):
            if spec.window is None:
                continue
            if i not in self._ring:
                shape = (rows, spec.kv_heads, self.ring_size(spec.window), spec.head_dim)
                self._ring[i] = (mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype))
            elif have != rows:
                k, v = self._ring[i]
                self._ring[i] = (_fit_rows(k, rows), _fit_rows(v, rows))

    # passes -----------------------------------------------------------------------------------------------------

    def open(self, rows: slice, columns: int) -> Pass:
        """Begin a pass of `columns` new columns over a dense slice of live rows."""
        return Pass(self, rows, columns)

    def commit(self, rows: slice, kept: mx.array, columns: int) -> None:
        """Advance the rows by kept [B] int32 of the `columns` columns just written."""
        self.lengths = _put(self.lengths, rows, self.lengths[rows] + kept)
        for row in range(rows.start, rows.stop):
            self.bounds[row] += columns

    def settle(self, row: int, rejected: int) -> None:
        """The host has read a verdict: `rejected` columns of that pass did not count."""
        self.bounds[row] -= rejected

    def committed(self, layer: int, rows: slice, window: int | None) -> View:
        """What a drafter may read: all committed positions of a layer, or the last `window` of them."""
        length = self.lengths[rows][:, None]  # [B, 1]
        if self.specs[layer].window is not None:
            keys, values, at = self._ring_view(layer, rows, 0, length - 1)
            seen = at >= 0
            if window is not None:
                seen = seen & (at >= length - window)
            whole = self.whole_ring(layer, rows, length[:, 0] - 1, EVERYTHING if window is None else window)
            return View((Part(keys, values, seen[:, None, None], whole),))
        parts = []
        for row in range(rows.start, rows.stop):
            keys, values = self._full_view(layer, row, 0)
            seen = mx.arange(keys.shape[2]) < self.lengths[row]
            whole = self.whole_full(layer, row, self.lengths[row : row + 1] - 1)
            parts.append(Part(keys, values, seen[None, None, None], whole))
        return View(tuple(parts))

    def state(self) -> tuple:
        """All arrays, to evaluate them, or to undo lazily built passes with `restore`. Holding the result across a
        dispatch makes MLX copy every buffer, so drop it first."""
        return self.lengths, dict(self._ring), {i: list(buffers) for i, buffers in self._full.items()}

    def restore(self, state: tuple) -> None:
        """Forget all passes opened since `state` was taken; they must not have been dispatched. Bounds are the
        caller's to settle."""
        self.lengths, self._ring, self._full = state

    def whole_ring(self, layer: int, rows: slice, start: mx.array, window: int) -> Whole | None:
        """A sliding layer for the kernel, with the first query at start [B]."""
        if not self._whole:
            return None
        keys, values = self._ring[layer]
        return Whole(keys[rows], values[rows], start, window)

    def whole_full(self, layer: int, row: int, start: mx.array) -> Whole | None:
        """A full layer's row for the kernel, with the first query at start [1]."""
        return Whole(*self._full[layer][row], start, EVERYTHING) if self._whole else None

    def _ring_view(self, layer: int, rows: slice, columns: int, last: mx.array):
        """(keys, values, positions [B, S']) of the ring where `last` [B, 1] is the newest position stored."""
        keys, values = self._ring[layer]
        size = keys.shape[2]
        used = min(size, _round_up(max(self.bounds[rows]) + columns, VIEW_TOK))
        slots = mx.arange(used)
        at = last - (last - slots) % size
        return keys[rows, :, :used], values[rows, :, :used], at

    def _full_view(self, layer: int, row: int, columns: int) -> tuple[mx.array, mx.array]:
        keys, values = self._full[layer][row]
        used = min(keys.shape[2], _round_up(max(1, self.bounds[row] + columns), VIEW_TOK))
        return keys[:, :, :used], values[:, :, :used]


class Pass:
    """One forward over a slice of rows: where its columns go, and what its queries see."""

    def __init__(self, cache: Cache, rows: slice, columns: int) -> None:
        self.cache, self.rows, self.columns = cache, rows, columns
        self.start = cache.lengths[rows]  # [B] int32, position of column 0
        self._at = self.start[:, None] + mx.arange(columns)  # [B, L] positions of the new columns
        self._chunk = columns > cache.max_width + 1  # too wide for the ring's slack: a prompt chunk
        self.routed: list[mx.array] = []  # the model leaves its expert choices here, [N, k] a layer, to be counted
        self._masks: dict[tuple, mx.array] = {}
        self._slots: dict[int, tuple] = {}

    def store(self, layer: int, keys: mx.array, values: mx.array) -> View:
        """Write [B, H, L, D] keys and values of the new columns; returns what the queries of this pass see."""
        window = self.cache.specs[layer].window
        if window is None:
            return self._store_full(layer, keys, values)
        if self._chunk:
            return self._store_chunk(layer, keys, values, window)
        self._write_ring(layer, keys, values, self.columns)
        last = self.start[:, None] + (self.columns - 1)
        k, v, at = self.cache._ring_view(layer, self.rows, self.columns, last)
        whole = self.cache.whole_ring(layer, self.rows, self.start, window)
        return View((Part(k, v, self._mask(("ring", window), at, window), whole),))

    def _store_chunk(self, layer: int, keys: mx.array, values: mx.array, window: int) -> View:
        """A chunk wider than the ring's slack attends over the ring and itself, and leaves its last columns there."""
        if max(self.cache.bounds[self.rows]) == 0:
            seen, k, v = self._mask(("chunk", window), self._at, window), keys, values
        else:
            ring_k, ring_v, at = self.cache._ring_view(layer, self.rows, 0, self.start[:, None] - 1)
            k, v = mx.concatenate([ring_k, keys], axis=2), mx.concatenate([ring_v, values], axis=2)
            seen = self._mask(("ring+chunk", window), mx.concatenate([at, self._at], axis=1), window)
        self._write_ring(layer, keys, values, min(self.columns, window + 1))
        return View((Part(k, v, seen),))

    def _write_ring(self, layer: int, keys: mx.array, values: mx.array, last: int) -> None:
        k, v = self.cache._ring[layer]
        size = k.shape[2]
        if size not in self._slots:
            rows = mx.arange(self.rows.start, self.rows.stop)[:, None]
            self._slots[size] = (rows, self._at[:, self.columns - last :] % size)
        rows, slots = self._slots[size]
        where = (rows, slice(None), slots)
        self.cache._ring[layer] = (
            _put(k, where, keys[:, :, self.columns - last :].transpose(0, 2, 1, 3)),
            _put(v, where, values[:, :, self.columns - last :].transpose(0, 2, 1, 3)),
        )

    def _store_full(self, layer: int, keys: mx.array, values: mx.array) -> View:
        buffers, parts = self.cache._full[layer], []
        for b, row in enumerate(range(self.rows.start, self.rows.stop)):
            k, v = buffers[row]
            need = self.cache.bounds[row] + self.columns
            if need > k.shape[2]:
                room = _round_up(max(need, k.shape[2] + k.shape[2] // 4), GROW_TOK)
                k, v = _fit_tokens(k, room), _fit_tokens(v, room)
            at = self.start[b : b + 1]
            k = mx.slice_update(k, keys[b : b + 1], at, axes=(2,))
            v = mx.slice_update(v, values[b : b + 1], at, axes=(2,))
            buffers[row] = (k, v)
            k, v = self.cache._full_view(layer, row, self.columns)
            used = k.shape[2]
            if (row, used) not in self._masks:
                self._masks[row, used] = (mx.arange(used) <= self._at[b][:, None])[None, None]
            whole = None if self._chunk else self.cache.whole_full(layer, row, at)
            parts.append(Part(k, v, self._masks[row, used], whole))
        return View(tuple(parts))

    def _mask(self, key: tuple, at: mx.array, window: int) -> mx.array:
        """[B, 1, L, T]: key positions at [B, T] a query sees: stored, not ahead of it, inside the window."""
        if key not in self._masks:
            at, query = at[:, None, :], self._at[:, :, None]
            self._masks[key] = ((at >= 0) & (at <= query) & (at > query - window))[:, None]
        return self._masks[key]


def _put(x: mx.array, where, value) -> mx.array:
    """x with x[where] = value. Indexed assignment changes the handle it is called on; handles here are shared with
    `state`, so it gets one of its own (no copy: the buffer is written in place when nothing else refers to it)."""
    x = mx.array(x)
    x[where] = value
    return x


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _fit_rows(x: mx.array, rows: int) -> mx.array:
    """x with its first axis cut or zero-padded to `rows`."""
    if x.shape[0] >= rows:
        return mx.contiguous(x[:rows])
    return mx.concatenate([x, mx.zeros((rows - x.shape[0], *x.shape[1:]), x.dtype)])


def _fit_tokens(x: mx.array, room: int) -> mx.array:
    """x [1, H, T, D] with T zero-padded to `room`."""
    if x.shape[2] == room:
        return x
    pad = mx.zeros((*x.shape[:2], room - x.shape[2], x.shape[3]), x.dtype)
    return mx.concatenate([x, pad], axis=2)
