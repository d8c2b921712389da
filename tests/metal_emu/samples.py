"""Small kernels to try the emulator on and plant bugs in: a two-stage reduction, a scan, a product with 4-bit weights.

They are written as kernels should be, so that every report about one of them, unchanged, is a false alarm.
"""

from __future__ import annotations

import mlx.core as mx

from .text import Definition

_BEST = """
struct Best { float value; uint index; };
METAL_FUNC Best better(Best a, Best b) {
  return (b.value > a.value || (b.value == a.value && b.index < a.index)) ? b : a;
}
METAL_FUNC Best simd_best(Best b) {
  for (ushort offset = 16; offset > 0; offset >>= 1) {
    Best other;
    other.value = simd_shuffle_xor(b.value, offset);
    other.index = simd_shuffle_xor(b.index, offset);
    b = better(b, other);
  }
  return b;
}
METAL_FUNC Best group_best(Best b, threadgroup Best* part, uint lane, uint simdgroup, uint simdgroups) {
  b = simd_best(b);
  if (lane == 0) part[simdgroup] = b;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Best all;
  all.value = -INFINITY;
  all.index = 0xffffffffu;
  if (lane < simdgroups) all = part[lane];
  return simd_best(all);
}
"""

ARGMAX = Definition(
    "row_argmax",
    ("logits",),
    ("out",),
    """
    const uint row = threadgroup_position_in_grid.x;
    const uint thread_index = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup;
    const uint simdgroup = simdgroup_index_in_threadgroup;
    const uint V = logits_shape[1];
    auto x = logits + size_t(row) * V;
    threadgroup Best part[32];
    Best best;
    best.value = -INFINITY;
    best.index = 0xffffffffu;
    for (uint i = thread_index; i < V; i += TG) {
      const float value = float(x[i]);
      if (value > best.value) { best.value = value; best.index = i; }
    }
    best = group_best(best, part, lane, simdgroup, TG / 32);
    if (thread_index == 0) out[row] = best.index;
""",
    _BEST,
)

# The first index whose running sum exceeds want[row]: per-thread slices, a scan over lanes, partial sums of simdgroups.
SEARCH = Definition(
    "prefix_search",
    ("p", "want"),
    ("found",),
    """
    const uint row = threadgroup_position_in_grid.x;
    const uint thread_index = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup;
    const uint simdgroup = simdgroup_index_in_threadgroup;
    constexpr uint SIMDGROUPS = TG / 32;
    threadgroup float part[SIMDGROUPS];
    threadgroup uint first[SIMDGROUPS];
    auto x = p + row * V;
    const uint each = (V + TG - 1) / TG;
    const uint low = min(thread_index * each, uint(V)), high = min(low + each, uint(V));
    float sum = 0;
    for (uint i = low; i < high; i++) sum += x[i];
    const float upto = simd_prefix_inclusive_sum(sum);
    if (lane == 31) part[simdgroup] = upto;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float running = upto - sum;
    for (uint i = 0; i < simdgroup; i++) running += part[i];
    uint mine = V;
    for (uint i = low; i < high; i++) {
      running += x[i];
      if (running > want[row]) { mine = i; break; }
    }
    const uint earliest = simd_min(mine);
    if (lane == 0) first[simdgroup] = earliest;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0) {
      const uint best = simd_min(lane < SIMDGROUPS ? first[lane] : uint(V));
      if (lane == 0) found[row] = best;
    }
""",
)

# y[M, N] = x[M, K] @ dequantised(w[N, K]).T for affine 4-bit weights in groups of 64, four output rows a simdgroup.
PRODUCT = Definition(
    "small_product",
    ("x", "w", "scales", "biases"),
    ("y",),
    """
    constexpr uint R = 4, PACK = 8;
    const uint lane = thread_index_in_simdgroup;
    const uint n0 = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * R;
    if (n0 >= N) return;
    const uint rows = min(R, uint(N) - n0);
    float acc[M][R] = {};
    for (uint p = lane; p < K / PACK; p += 32) {
      for (uint r = 0; r < rows; r++) {
        const uint q = w[size_t(n0 + r) * (K / PACK) + p];
        const float s = float(scales[size_t(n0 + r) * (K / 64) + p / 8]);
        const float z = float(biases[size_t(n0 + r) * (K / 64) + p / 8]);
        for (uint m = 0; m < M; m++) {
          float dot = 0, sum = 0;
          for (uint j = 0; j < PACK; j++) {
            const float v = float(x[m * K + p * PACK + j]);
            dot += v * float((q >> (4 * j)) & 15u);
            sum += v;
          }
          acc[m][r] += s * dot + z * sum;
        }
      }
    }
    for (uint m = 0; m < M; m++)
      for (uint r = 0; r < R; r++) {
        const float v = simd_sum(acc[m][r]);
        if (lane == 0 && r < rows) y[m * N + n0 + r] = T(v);
      }
""",
)


def make(metal_kernel, definition: Definition):
    d = definition
    return metal_kernel(
        name=d.name, input_names=d.input_names, output_names=d.output_names, source=d.source, header=d.header
    )


def argmax(kernel, x: mx.array, threads: int = 256) -> mx.array:
    """x [R, V] -> index of the largest value of each row [R] uint32, the lowest one on ties."""
    return kernel(
        inputs=[x],
        template=[("T", x.dtype), ("TG", threads)],
        grid=(threads * x.shape[0], 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(x.shape[0],)],
        output_dtypes=[mx.uint32],
    )[0]


def search(kernel, p: mx.array, want: mx.array, threads: int = 128) -> mx.array:
    """p [R, V], want [R] float32 -> first index whose running sum exceeds want [R] uint32."""
    rows, size = p.shape
    return kernel(
        inputs=[p, want],
        template=[("V", size), ("TG", threads)],
        grid=(threads * rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.uint32],
    )[0]


def product(kernel, x: mx.array, w: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """x [M, K], w [N, K/8] uint32, scales and biases [N, K/64] -> [M, N]."""
    (m, k), n = x.shape, w.shape[0]
    return kernel(
        inputs=[x, w, scales, biases],
        template=[("T", x.dtype), ("M", m), ("N", n), ("K", k)],
        grid=(64 * ((n + 7) // 8), 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(m, n)],
        output_dtypes=[x.dtype],
    )[0]
