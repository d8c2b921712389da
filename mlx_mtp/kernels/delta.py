"""The gated delta rule over a few columns of every row. Not run on Metal: tested in a CPU emulator.

With a head's state S [V, K] decayed by g: S <- S + beta (v - S k) k^T, and y = S q. Of every row some leading columns
run again and only change the state, as many as were kept; then its own columns run and give their outputs. The state is
read once and written once, either as it is between the two or as it is at the end.

A simdgroup holds rows of S in registers and nobody else's; a column's sums run over K in an order of their own. So what
a column gives depends neither on how many columns a launch has, to the bit, nor on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_mtp.kernels.backend import Definition, Launch, run, why_not_here

TAKES = "states in float32 with keys of up to 256 numbers; any number of columns"

MAX_KEY = 256  # numbers of a key: a lane holds a 32nd of them for each of its rows, in registers
ROWS, SIMDGROUPS = 4, 4  # rows of S that share a key in a simdgroup, and simdgroups of a threadgroup; both are guesses

# Grid: rows of S, value heads, sequences. `begin`: the first of the sequence's own columns.
KERNEL = Definition(
    "delta",
    ("state", "qk", "mixed", "decay", "beta", "again", "own", "begin"),
    ("y", "after"),
    """
    const uint lane = thread_index_in_simdgroup;
    const uint head = threadgroup_position_in_grid.y, row = threadgroup_position_in_grid.z;
    const uint T = qk_shape[1], KEYS = qk_shape[2] / 2, HEADS = state_shape[1], V = state_shape[2];
    const uint first = (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup) * ROWS;
    if (first >= V) return;
    const uint rows = min(uint(ROWS), V - first), key = head / (HEADS / KEYS);
    const uint kept = uint(again[row]), taken = uint(own[row]), own0 = uint(begin[0]), columns = T - own0;
    const size_t at = ((size_t(row) * HEADS + head) * V + first) * K;
    float s[ROWS][HELD];
    for (uint r = 0; r < ROWS; r++)
      for (uint i = 0; i < HELD; i++) {
        const uint d = i * 32 + lane;
        s[r][i] = r < rows && d < K ? state[at + r * K + d] : 0.0f;
      }
    for (uint n = 0; n < kept + columns; n++) {
      if (n == kept && !TAKES)
        for (uint r = 0; r < ROWS; r++)
          for (uint i = 0; i < HELD; i++) {
            const uint d = i * 32 + lane;
            if (r < rows && d < K) after[at + r * K + d] = s[r][i];
          }
      const bool mine = n >= kept;
      const uint column = mine ? n - kept : 0;
      const size_t t = size_t(row) * T + (mine ? own0 + column : n);
      const size_t to = ((size_t(row) * columns + column) * HEADS + head) * V + first;
      if (mine && column >= taken) {  // it does not count: nothing changes, and nobody looks at what it gives
        for (uint r = lane; r < rows; r += 32) y[to + r] = 0.0f;
        continue;
      }
      float q[HELD], k[HELD];
      for (uint i = 0; i < HELD; i++) {
        const uint d = i * 32 + lane;
        q[i] = d < K ? qk[(t * 2 * KEYS + key) * K + d] : 0.0f;
        k[i] = d < K ? qk[(t * 2 * KEYS + KEYS + key) * K + d] : 0.0f;
      }
      const float g = decay[t * HEADS + head], share = beta[t * HEADS + head];
      for (uint r = 0; r < ROWS; r++) {  // no break: the loops must unroll for the state to stay in registers
        float dot = 0.0f;
        for (uint i = 0; i < HELD; i++) dot = fma(s[r][i], k[i], dot);
        const float held = g * simd_sum(dot);
        const float v = r < rows ? mixed[t * C + (C - HEADS * V) + head * V + first + r] : 0.0f;
        const float change = share * (v - held);
        float read = 0.0f;
        for (uint i = 0; i < HELD; i++) {
          s[r][i] = fma(change, k[i], g * s[r][i]);
          read = fma(s[r][i], q[i], read);
        }
        const float whole = simd_sum(read);
        if (mine && lane == 0 && r < rows) y[to + r] = whole;
      }
    }
    if (TAKES)
      for (uint r = 0; r < ROWS; r++)
        for (uint i = 0; i < HELD; i++) {
          const uint d = i * 32 + lane;
          if (r < rows && d < K) after[at + r * K + d] = s[r][i];
        }
""",
)


@dataclass(frozen=True)
class Given:
    """What T columns bring in, float32: qk [B, T, 2 Hk, K], queries of all key heads, then keys; mixed [B, T, C], of
    which the last Hv * V are the values; decay and beta [B, T, Hv]. A value head uses key head h // (Hv / Hk)."""

    qk: mx.array
    mixed: mx.array
    decay: mx.array
    beta: mx.array


@dataclass(frozen=True)
class Span:
    """Which of them run. again [B] int32: so many from column 0 on, up to `most`, only change the state; None: none.
    begin: the first of those that give something, all the rest. own [B] int32: how many of these count; None: all.
    takes: whether the state that is given back has these in it too."""

    again: mx.array | None
    most: int
    begin: int
    own: mx.array | None
    takes: bool


def why_not(state: mx.array, given: Given) -> str | None:
    """Why the kernel does not take this, or None if it does."""
    types = {x.dtype for x in (state, given.qk, given.mixed, given.decay, given.beta)}
    if types != {mx.float32}:
        return f"types {', '.join(sorted(map(str, types)))}; the kernel takes float32"
    if state.shape[3] > MAX_KEY:
        return f"keys of {state.shape[3]}; the kernel takes up to {MAX_KEY}"
    return why_not_here()


def delta(state: mx.array, given: Given, span: Span) -> tuple[mx.array, mx.array]:
    """state [B, Hv, V, K] -> outputs [B, T - begin, Hv, V] and the state, float32."""
    if why_not(state, given):
        return reference(state, given, span)
    b, heads, v, k = state.shape
    columns = given.qk.shape[1] - span.begin
    again = mx.array([0] * b, mx.int32) if span.again is None else span.again
    own = mx.array([columns] * b, mx.int32) if span.own is None else span.own
    launch = Launch(
        grid=(32 * SIMDGROUPS * -(-v // (ROWS * SIMDGROUPS)), heads, b),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        shapes=[(b, columns, heads, v), state.shape],
        dtypes=[mx.float32, mx.float32],
        template=[
            ("K", k),
            ("C", given.mixed.shape[2]),
            ("HELD", -(-k // 32)),
            ("ROWS", ROWS),
            ("SIMDGROUPS", SIMDGROUPS),
            ("TAKES", span.takes),
        ],
    )
    inputs = [state, given.qk, given.mixed, given.decay, given.beta, again, own, mx.array([span.begin], mx.int32)]
    out, after = run(KERNEL, inputs, launch)
    return out, state if span.again is None and not span.takes else after


def reference(state: mx.array, given: Given, span: Span) -> tuple[mx.array, mx.array]:
    """The same in plain mlx, a column by three operations over the state, two of which only read it."""
    b, heads, v, _ = state.shape
    columns, keys = given.qk.shape[1], given.qk.shape[2] // 2
    grouped = (keys, heads // keys)
    q, k = mx.split(given.qk, 2, axis=2)
    values = mx.unflatten(given.mixed[..., given.mixed.shape[2] - heads * v :], -1, (*grouped, v, 1))
    decay, beta = _counted(given, span)
    parts = [
        _columns(x)
        for x in (
            mx.expand_dims(k, (3, 5)),
            mx.expand_dims(k, (3, 4)),
            values,
            mx.unflatten(decay, -1, (*grouped, 1, 1)),
            mx.unflatten(beta, -1, (*grouped, 1, 1)),
        )
    ]
    queries, out = _columns(mx.expand_dims(q, (3, 5))), []
    state = after = mx.unflatten(state[:, None], 2, grouped)
    for t in range(span.most):
        state = after = _column(state, *(x[t] for x in parts))
    for t in range(span.begin, columns):
        state = _column(state, *(x[t] for x in parts))
        out.append(state @ queries[t])
    y = out[0] if len(out) == 1 else mx.concatenate(out, axis=1)
    after = state if span.takes else after
    return y.reshape(b, columns - span.begin, heads, v), after.flatten(1, 3)


def _counted(given: Given, span: Span) -> tuple[mx.array, mx.array]:
    """Decay and beta with which columns that do not count change nothing."""
    if span.again is None and span.own is None:
        return given.decay, given.beta
    b, columns = given.qk.shape[:2]
    every = mx.array([columns] * b, mx.int32)
    at = np.arange(columns, dtype=np.int32)[:, None]  # from the host: that is no operation
    limits = (
        (mx.array(np.where(at < span.begin, at, -1)), every if span.again is None else span.again),
        (mx.array(np.where(at < span.begin, -1, at - span.begin)), every if span.own is None else span.own),
    )
    return _limited(given.decay, given.beta, *((column, count[:, None, None]) for column, count in limits))


@partial(mx.compile, shapeless=True)
def _limited(decay: mx.array, beta: mx.array, *limits: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """decay and beta [B, T, Hv]; limits: columns [T, 1] that must be below [B, 1, 1] to count."""
    counts = limits[0][0] < limits[0][1]
    for column, count in limits[1:]:
        counts = counts & (column < count)
    return mx.where(counts, decay, 1.0), mx.where(counts, beta, 0.0)


def _columns(x: mx.array) -> list[mx.array]:
    """[B, T, ...] -> T times [B, 1, ...]."""
    return [x] if x.shape[1] == 1 else list(mx.split(x, x.shape[1], axis=1))


@mx.compile
def _column(state, k, along, v, decay, beta) -> mx.array:
    """state [B, 1, Hk, G, V, K]; k [.., K, 1] and along [.., 1, K], v [.., V, 1], decay and beta [.., 1, 1]."""
    return decay * state + (v - decay * (state @ k)) * beta * along
