"""Attention of a few columns over a position-addressed cache. Not run on Metal: tested in a CPU emulator.

Queries [B, Hq, L, D] of rows with different lengths meet keys and values [B, Hk, T, D], where position p lies in slot
p mod T: a ring for sliding layers, T beyond every position for full ones. What a column sees is computed from the row's
start and the window; there is no mask tensor. A threadgroup reads every key and value that any column sees once, for as
many queries of a key head as it holds (queries_at_once); others are not read.

Two dispatches. A threadgroup takes CHUNK slots of one row and one key head, for one tile of queries: tiles of keys,
then of values, go through threadgroup memory, with a running softmax for each query; then partial results are added in
the order of the chunks. A query's result depends on its own keys alone, to the bit: tiles and chunks are cut by slot,
so neither the number of columns nor the other rows change an order. MLX's own fused attention for heads of 512 takes up
to 32 queries of a key head (with MLX_SDPA_D512_MIN_KL=0), and its sums depend on how many there are.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels.backend import Definition, Launch, on_cpu, run, why_not_here
from mlx_mtp.kernels.matrix import FLOATS

TAKES = "head sizes that are multiples of 32 up to 512"

CHUNK = 256  # slots of a threadgroup
TILE_BYTES = 16 * 1024  # keys or values in threadgroup memory
SIMDGROUPS = 8
LANE_SUMS = 32  # registers a lane may spend on sums; it holds D / 32 for each query of its simdgroup
EVERYTHING = 2**30  # the window of a full layer

# Grid: chunks, key heads, rows times tiles of queries. Query q is column q % L of head q / L of the group; of a tile,
# simdgroup s holds s, s + GROUPS, ..
PARTS = Definition(
    "attend_parts",
    ("q", "keys", "values", "start", "window"),
    ("part", "top", "total"),
    """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint chunk = threadgroup_position_in_grid.x, head = threadgroup_position_in_grid.y;
    const uint chunks = threadgroups_per_grid.x;
    const uint L = q_shape[2], HEADS = q_shape[1], SLOTS = keys_shape[2], Q = HEADS / keys_shape[1] * L;
    const uint tiles = (Q + HELD * GROUPS - 1) / (HELD * GROUPS), row = threadgroup_position_in_grid.z / tiles;
    const uint first = threadgroup_position_in_grid.z % tiles * HELD * GROUPS + simdgroup;
    const int WINDOW = window[0];
    const int begin = int(start[row]), last = begin + int(L) - 1;
    const size_t cache = (size_t(row) * keys_shape[1] + head) * SLOTS * D;
    const size_t query0 = (size_t(row) * HEADS + head * (HEADS / keys_shape[1])) * L;
    threadgroup T tile[TILE * D];
    float acc[HELD][D / 32] = {}, best[HELD], sum[HELD] = {}, score[HELD];
    for (uint i = 0; i < HELD; i++) best[i] = -INFINITY;
    for (uint slot0 = chunk * CHUNK; slot0 < min(SLOTS, (chunk + 1) * CHUNK); slot0 += TILE) {
      if (last < int(SLOTS) && int(slot0) > last) break;  // not filled so far
      const uint held = min(uint(TILE), SLOTS - slot0);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint k = simdgroup; k < TILE; k += GROUPS) {
        const int at = place(slot0 + k, last, SLOTS);
        const bool wanted = k < held && at >= 0 && at + WINDOW > begin;
        const size_t from = cache + size_t(slot0 + k) * D;
        for (uint d = lane; d < D; d += 32) tile[k * D + d] = wanted ? keys[from + d] : T(0.0f);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int mine = lane < held ? place(slot0 + lane, last, SLOTS) : -1;
      for (uint i = 0; i < HELD; i++) {  // no break: these loops must unroll for the sums to stay in registers
        const uint query = first + i * GROUPS;
        score[i] = -INFINITY;
        if (query < Q) {
          float own[D / 32];
          for (uint d = 0; d < D / 32; d++) own[d] = float(q[(query0 + query) * D + d * 32 + lane]);
          for (uint k = 0; k < TILE; k++) {
            float dot = 0.0f;
            for (uint d = 0; d < D / 32; d++) dot = fma(own[d], float(tile[k * D + d * 32 + lane]), dot);
            const float whole = simd_sum(dot);
            if (lane == k) score[i] = whole;
          }
        }
        const int column = begin + int(query % L);
        if (mine < 0 || mine > column || mine + WINDOW <= column) score[i] = -INFINITY;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint k = simdgroup; k < TILE; k += GROUPS) {
        const int at = place(slot0 + k, last, SLOTS);
        const bool wanted = k < held && at >= 0 && at + WINDOW > begin;
        const size_t from = cache + size_t(slot0 + k) * D;
        for (uint d = lane; d < D; d += 32) tile[k * D + d] = wanted ? values[from + d] : T(0.0f);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = 0; i < HELD; i++) {
        const float highest = simd_max(score[i]);
        if (highest > -INFINITY) {  // of a query beyond the last, nothing is
          const float now = max(best[i], highest);
          const float shrink = exp(best[i] - now), weight = exp(score[i] - now);
          sum[i] = fma(sum[i], shrink, simd_sum(weight));
          best[i] = now;
          for (uint d = 0; d < D / 32; d++) acc[i][d] *= shrink;
          for (uint k = 0; k < TILE; k++) {
            const float share = simd_shuffle(weight, ushort(k));
            for (uint d = 0; d < D / 32; d++) acc[i][d] = fma(share, float(tile[k * D + d * 32 + lane]), acc[i][d]);
          }
        }
      }
    }
    for (uint i = 0; i < HELD; i++) {
      const uint query = first + i * GROUPS;
      if (query < Q) {
        const size_t to = (query0 + query) * chunks + chunk;
        if (lane == 0) {
          top[to] = best[i];
          total[to] = sum[i];
        }
        for (uint d = 0; d < D / 32; d++) part[to * D + d * 32 + lane] = acc[i][d];
      }
    }
""",
    """
// The position that lies in a slot when `last` is the newest one; negative if none does.
METAL_FUNC int place(uint slot, int last, uint slots) {
  const int behind = (last - int(slot)) % int(slots);
  return last - (behind < 0 ? behind + int(slots) : behind);
}
""",
)

# One threadgroup a query.
JOIN = Definition(
    "attend_join",
    ("part", "top", "total"),
    ("y",),
    """
    const uint query = threadgroup_position_in_grid.x, index = thread_index_in_threadgroup;
    const uint chunks = top_shape[1], D = part_shape[2];
    float highest = -INFINITY;
    for (uint c = 0; c < chunks; c++) highest = max(highest, top[query * chunks + c]);
    for (uint d = index; d < D; d += 128) {
      float sum = 0.0f, weight = 0.0f;
      for (uint c = 0; c < chunks; c++) {
        if (top[query * chunks + c] == -INFINITY) continue;
        const float share = exp(top[query * chunks + c] - highest);
        weight = fma(share, total[query * chunks + c], weight);
        sum = fma(share, part[(size_t(query) * chunks + c) * D + d], sum);
      }
      y[size_t(query) * D + d] = T(weight > 0.0f ? sum / weight : 0.0f);
    }
""",
)


@dataclass(frozen=True)
class Attention:
    """q [B, Hq, L, D] (scaled), keys and values [B, Hk, T, D], start [B] integer: the position of column 0.

    The columns' own keys and values are in the cache already. window: a column at p sees p - window + 1 .. p; a ring
    needs T >= window + L - 1. Slots that hold no position must hold finite numbers.
    """

    q: mx.array
    keys: mx.array
    values: mx.array
    start: mx.array
    window: int = EVERYTHING


def why_not(given: Attention) -> str | None:
    """Why the kernels do not take this attention, or None if they do."""
    (rows, heads, columns, size), (cache_rows, key_heads, slots, _) = given.q.shape, given.keys.shape
    if given.q.dtype not in FLOATS or not given.q.dtype == given.keys.dtype == given.values.dtype:
        return f"q, keys and values are {given.q.dtype}, {given.keys.dtype}, {given.values.dtype}: not one float type"
    if given.keys.shape != given.values.shape or cache_rows != rows or given.keys.shape[3] != size or heads % key_heads:
        return f"q {given.q.shape}, keys {given.keys.shape}, values {given.values.shape} do not fit together"
    if not rows or not columns or not slots:
        return f"nothing to attend with q {given.q.shape} over keys {given.keys.shape}"
    if size % 32 or not 32 <= size <= 512:
        return f"head size {size}; the kernel takes multiples of 32 up to 512"
    return why_not_here()


def queries_at_once(size: int) -> int:
    """How many queries of a key head a threadgroup holds: 64 up to heads of 128, 32 at 256, 16 at 512."""
    return SIMDGROUPS * min(8, LANE_SUMS * 32 // size)


def attend(given: Attention) -> mx.array:
    """[B, Hq, L, D] in q's dtype."""
    if why_not(given):
        return reference(given)
    rows, heads, columns, _ = given.q.shape
    launch = Launch(
        grid=(128 * rows * heads * columns, 1, 1),
        threadgroup=(128, 1, 1),
        shapes=[given.q.shape],
        dtypes=[given.q.dtype],
        template=[("T", given.q.dtype)],
    )
    return run(JOIN, _parts(given), launch)[0]


def _parts(given: Attention) -> list[mx.array]:
    """Of each query and chunk: weighted values [.., D], highest score and sum of weights, [queries, chunks] float32."""
    (rows, heads, columns, size), (_, key_heads, slots, _) = given.q.shape, given.keys.shape
    tiles = -(-(heads // key_heads * columns) // queries_at_once(size))
    tile = min(32, TILE_BYTES // (size * given.q.dtype.size))
    chunks, total = -(-slots // CHUNK), rows * heads * columns
    launch = Launch(
        grid=(32 * SIMDGROUPS * chunks, key_heads, rows * tiles),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        shapes=[(total, chunks, size), (total, chunks), (total, chunks)],
        dtypes=[mx.float32] * 3,
        template=[
            *(("T", given.q.dtype), ("D", size), ("TILE", tile), ("CHUNK", CHUNK)),
            *(("GROUPS", SIMDGROUPS), ("HELD", queries_at_once(size) // SIMDGROUPS)),
        ],
    )
    inputs = [given.q, given.keys, given.values, given.start, mx.array([given.window], mx.int32)]
    return run(PARTS, inputs, launch)


def visible(given: Attention) -> mx.array:
    """Which slots each column sees: [B, 1, L, T] bool."""
    columns, slots = given.q.shape[2], given.keys.shape[2]
    begin = given.start.astype(mx.int32)[:, None, None, None]
    last = begin + columns - 1
    at = last - mx.remainder(last - mx.arange(slots), slots)
    column = begin + mx.arange(columns)[:, None]
    return (at >= 0) & (at <= column) & (at > column - given.window)


def reference(given: Attention) -> mx.array:
    """The same in plain mlx, with a mask. On the CPU each column is a product of its own, in float32: a column's result
    is then independent of how many there are."""
    mask, columns = visible(given), given.q.shape[2]
    if not on_cpu():
        return mx.fast.scaled_dot_product_attention(given.q, given.keys, given.values, scale=1.0, mask=mask)
    q, keys, values = (x.astype(mx.float32) for x in (given.q, given.keys, given.values))
    alone = [
        mx.fast.scaled_dot_product_attention(q[:, :, i : i + 1], keys, values, scale=1.0, mask=mask[:, :, i : i + 1])
        for i in range(columns)
    ]
    return mx.concatenate(alone, axis=2).astype(given.q.dtype)
