"""The clustered vocabulary head: from a hidden state to few logits. Not run on Metal: tested in a CPU emulator.

y [M, h] scores C centroids; the best `top` clusters stand for (vocabulary / C) tokens each, which token_ordering lists;
only their rows of the embedding are read. No tensor of vocabulary size, no host read.
Ports the ordered embedding of transformers' gemma4_assistant, without its filler for tokens that are not candidates.

Three dispatches: scores of the centroids (each read once for as many rows of y as fit into threadgroup memory),
the top clusters, the logits of their tokens.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels import rows_qmv
from mlx_mtp.kernels.backend import Definition, Launch, run, why_not_here
from mlx_mtp.kernels.matrix import FLOATS, Matrix
from mlx_mtp.kernels.matrix import METAL as MATRIX_METAL

TAKES = "any number of rows; hidden sizes up to 4096"

TILE_VALUES = 4096  # of y in threadgroup memory: half of Metal's 32 KiB
SCORE_ROWS = 64  # centroids of a threadgroup: few reads of y for each centroid
SELECT_THREADS = 256

HEADER = (
    MATRIX_METAL
    + """
// Partial dot product of one lane: blocks lane, lane + 32, ... in this order, whatever else is computed beside it.
template <int FORMAT, int BITS, int GROUP, typename W, typename S, typename B>
METAL_FUNC float lane_dot(W w, S scales, B biases, size_t row, uint words, uint H, threadgroup const float* y,
                          uint lane) {
  float acc = 0.0f;
  const size_t groups = FORMAT == 0 ? 1 : H / GROUP;
  for (uint block = lane; block * 8 < H; block += 32) {
    float weights[8], dot = 0.0f, total = 0.0f;
    block_values<FORMAT, BITS>(w + row * words, block, H, weights);
    for (uint j = 0; j < 8; j++) {
      const float value = block * 8 + j < H ? y[block * 8 + j] : 0.0f;
      dot = fma(value, weights[j], dot);
      total += value;
    }
    acc = fma(scale_value<FORMAT>(scales, row * groups + block * 8 / GROUP), dot, acc);
    if (FORMAT == 1) acc = fma(bias_value<FORMAT>(biases, row * groups + block * 8 / GROUP), total, acc);
  }
  return acc;
}
"""
)

# Grid: centroids in sixty-fours, rows of y in tiles of TILE.
SCORES = Definition(
    "head_scores",
    ("y", "w", "scales", "biases"),
    ("score",),
    """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint index = thread_index_in_threadgroup;
    const uint M = y_shape[0], C = w_shape[0], words = w_shape[1];
    const uint m0 = threadgroup_position_in_grid.y * TILE;
    const uint rows = min(uint(TILE), M - m0);
    threadgroup float tile[TILE * H];
    for (uint i = index; i < rows * H; i += 256) tile[i] = float(y[size_t(m0) * H + i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = simdgroup; r < 64; r += 8) {
      const uint c = threadgroup_position_in_grid.x * 64 + r;
      if (c >= C) break;
      float acc[TILE] = {};
      for (uint block = lane; block * 8 < H; block += 32) {
        float weights[8];
        block_values<FORMAT, BITS>(w + size_t(c) * words, block, H, weights);
        const size_t group = size_t(c) * (FORMAT == 0 ? 1 : H / GROUP) + block * 8 / GROUP;
        const float scale = scale_value<FORMAT>(scales, group), bias = bias_value<FORMAT>(biases, group);
        for (uint m = 0; m < TILE; m++) {
          if (m < rows) {  // no break: the loop must unroll for the sums to stay in registers
            float dot = 0.0f, total = 0.0f;
            for (uint j = 0; j < 8; j++) {
              const float value = block * 8 + j < H ? tile[m * H + block * 8 + j] : 0.0f;
              dot = fma(value, weights[j], dot);
              total += value;
            }
            acc[m] = fma(scale, dot, acc[m]);
            if (FORMAT == 1) acc[m] = fma(bias, total, acc[m]);
          }
        }
      }
      for (uint m = 0; m < TILE; m++) {
        const float sum = simd_sum(acc[m]);
        if (lane == 0 && m < rows) score[size_t(m0 + m) * C + c] = sum;
      }
    }
""",
    HEADER,
)

# One threadgroup a row. The TOP-th largest score is found bit by bit, each thread holding its scores as integers of the
# same order; then clusters above it, and of those equal to it the first ones, take their slots in order of index.
SELECT = Definition(
    "head_select",
    ("score",),
    ("cluster",),
    """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint row = threadgroup_position_in_grid.x, first = thread_index_in_threadgroup * EACH;
    const uint C = score_shape[1];
    threadgroup uint part[2][8];
    uint keys[EACH];
    for (uint i = 0; i < EACH; i++) {
      const uint bits = first + i < C ? as_type<uint>(score[size_t(row) * C + first + i]) : 0u;
      keys[i] = bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
    }
    uint limit = 0;
    for (uint round = 0; round < 32; round++) {
      const uint candidate = limit | (0x80000000u >> round);
      uint count = 0;
      for (uint i = 0; i < EACH; i++) count += first + i < C && keys[i] >= candidate;
      const uint together = simd_sum(count);
      if (lane == 0) part[round & 1][simdgroup] = together;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint all = 0;
      for (uint s = 0; s < 8; s++) all += part[round & 1][s];
      if (all >= TOP) limit = candidate;
    }
    uint above = 0, equal = 0;
    for (uint i = 0; i < EACH; i++) {
      above += first + i < C && keys[i] > limit;
      equal += first + i < C && keys[i] == limit;
    }
    const uint above_upto = simd_prefix_inclusive_sum(above);
    const uint equal_upto = simd_prefix_inclusive_sum(equal);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 31) {
      part[0][simdgroup] = above_upto;
      part[1][simdgroup] = equal_upto;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint above_slot = above_upto - above, equal_slot = equal_upto - equal, all_above = 0;
    for (uint s = 0; s < 8; s++) {
      if (s < simdgroup) {
        above_slot += part[0][s];
        equal_slot += part[1][s];
      }
      all_above += part[0][s];
    }
    equal_slot += all_above;
    for (uint i = 0; i < EACH; i++) {
      if (first + i >= C) break;
      uint slot = TOP;
      if (keys[i] > limit) slot = above_slot++;
      if (keys[i] == limit) slot = equal_slot++;
      if (slot < TOP) cluster[row * TOP + slot] = first + i;
    }
""",
)


# Grid: slots of clusters, rows of y. A simdgroup takes a token at a time.
LOGITS = Definition(
    "head_logits",
    ("y", "cluster", "ordering", "w", "scales", "biases"),
    ("logits", "tokens"),
    """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint index = thread_index_in_threadgroup;
    const uint slot = threadgroup_position_in_grid.x, m = threadgroup_position_in_grid.y;
    const uint words = w_shape[1];
    threadgroup float hidden[H];
    for (uint i = index; i < H; i += 128) hidden[i] = float(y[size_t(m) * H + i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const size_t members = size_t(cluster[m * TOP + slot]) * SIZE;
    for (uint r = simdgroup; r < SIZE; r += 4) {
      const uint token = uint(ordering[members + r]);
      const float mine = lane_dot<FORMAT, BITS, GROUP>(w, scales, biases, token, words, H, hidden, lane);
      const float logit = simd_sum(mine);
      if (lane == 0) {
        logits[(size_t(m) * TOP + slot) * SIZE + r] = logit;
        tokens[(size_t(m) * TOP + slot) * SIZE + r] = int(token);
      }
    }
""",
    HEADER,
)


@dataclass(frozen=True)
class Clusters:
    """A clustered vocabulary: centroids [C, h]; cluster c owns tokens ordering[c * V / C : (c + 1) * V / C] (integers);
    embedding [V, h]; top: how many clusters compete."""

    centroids: Matrix
    ordering: mx.array
    embedding: Matrix
    top: int

    @property
    def size(self) -> int:
        """Tokens of a cluster."""
        return self.ordering.size // self.centroids.rows


def why_not(y: mx.array, clusters: Clusters) -> str | None:
    """Why the kernels do not take y [M, h] and this vocabulary, or None if they do."""
    count, hidden = clusters.centroids.rows, clusters.centroids.columns
    if y.ndim != 2 or y.shape[0] < 1 or y.shape[1] != hidden or y.dtype not in FLOATS:
        return f"y is {y.dtype} {y.shape}, not rows of {hidden} float values"
    if hidden > TILE_VALUES:
        return f"hidden size {hidden}; the kernel holds {TILE_VALUES} values"
    if clusters.embedding.columns != hidden:
        return f"centroids have {hidden} columns and the embedding {clusters.embedding.columns}"
    if count * clusters.size != clusters.ordering.size or clusters.ordering.size != clusters.embedding.rows:
        return (
            f"{clusters.ordering.size} tokens in {count} clusters over {clusters.embedding.rows} rows: not equal parts"
        )
    if not 1 <= clusters.top <= count:
        return f"{clusters.top} clusters of {count}"
    return clusters.centroids.why_not() or clusters.embedding.why_not() or why_not_here()


def logits(y: mx.array, clusters: Clusters) -> tuple[mx.array, mx.array]:
    """y [M, h] float -> logits [M, top * size] float32 of the tokens [M, top * size] int32 in its best clusters."""
    if why_not(y, clusters):
        return reference(y, clusters)
    chosen = _select(_scores(y, clusters.centroids), clusters.top)
    embedding, shape = clusters.embedding, (y.shape[0], clusters.top * clusters.size)
    launch = Launch(
        grid=(128 * clusters.top, y.shape[0], 1),
        threadgroup=(128, 1, 1),
        shapes=[shape] * 2,
        dtypes=[mx.float32, mx.int32],
        template=[("H", embedding.columns), ("SIZE", clusters.size), ("TOP", clusters.top), *embedding.template()],
    )
    found, tokens = run(LOGITS, [y, chosen, clusters.ordering, *embedding.kernel_inputs()], launch)
    return found, tokens


def _scores(y: mx.array, centroids: Matrix) -> mx.array:
    """y [M, h] -> scores of the centroids [M, C] float32."""
    m, hidden = y.shape
    tile = next(t for t in (16, 4, 1) if t * hidden <= TILE_VALUES)  # rows of y that are not there are skipped
    launch = Launch(
        grid=(256 * -(-centroids.rows // SCORE_ROWS), -(-m // tile), 1),
        threadgroup=(256, 1, 1),
        shapes=[(m, centroids.rows)],
        dtypes=[mx.float32],
        template=[("H", hidden), ("TILE", tile), *centroids.template()],
    )
    return run(SCORES, [y, *centroids.kernel_inputs()], launch)[0]


def _select(scores: mx.array, top: int) -> mx.array:
    """scores [M, C] -> indices of the largest `top` of each row [M, top] uint32, the lower index on ties, unordered."""
    m, count = scores.shape
    each = -(-count // SELECT_THREADS)
    launch = Launch(
        grid=(SELECT_THREADS * m, 1, 1),
        threadgroup=(SELECT_THREADS, 1, 1),
        shapes=[(m, top)],
        dtypes=[mx.uint32],
        template=[("EACH", each), ("TOP", top)],
    )
    return run(SELECT, [scores], launch)[0]


def reference(y: mx.array, clusters: Clusters) -> tuple[mx.array, mx.array]:
    """`logits` in plain mlx."""
    scores = rows_qmv.reference(y.astype(mx.float32), clusters.centroids)
    chosen = mx.argsort(-scores, axis=-1)[:, : clusters.top]
    tokens = clusters.ordering.reshape(clusters.centroids.rows, -1)[chosen].reshape(y.shape[0], -1)
    rows = clusters.embedding.take(tokens).dense()
    return (rows @ y.astype(mx.float32)[:, :, None])[..., 0], tokens.astype(mx.int32)
