"""Routed experts for 1 to 64 tokens, each distinct expert read once. Not run on Metal: tested in a CPU emulator.

For x [N, H], indices [N, k] and weights [N, k]: the sum over a token's k experts, in the order of its indices, of
weight * down(gelu_tanh(gate(x)) * up(x)). MLX groups tokens by expert only from 64 tokens on; below that it reads an
expert once for every (token, expert) pair.

Four dispatches. Pairs are sorted by expert on the device. Then a threadgroup takes some rows of one expert: it copies
them into threadgroup memory, where every token of that expert meets them, however many there are. Once for gate and up
(with the activation), once for down. Last the weighted sum. A token's result depends on that token alone, to the bit:
lane sums run over blocks in a fixed order, and a token's experts are added in the order of its indices.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels.backend import Definition, Launch, on_cpu, run, why_not_here
from mlx_mtp.kernels.gate_up import GELU_METAL, geglu
from mlx_mtp.kernels.matrix import FLOATS, Matrix
from mlx_mtp.kernels.matrix import METAL as MATRIX_METAL

TAKES = "1 to 64 tokens; gate and up rows that fit into 24 KiB together"

MAX_TOKENS = 64
MAX_PAIRS = 1024
THREADS = 128
# Rows of an expert in threadgroup memory: of Metal's 32 KiB, so much that two rows of 2816 bfloat16 values fit twice.
TILE_BYTES = 24 * 1024

# One threadgroup. Pair p is (token p / k, its expert). order: pairs sorted by expert; group g is the pairs
# order[start[g] .. start[g + 1]) of expert[g]; groups beyond the last are empty.
GROUPS = Definition(
    "experts_groups",
    ("indices",),
    ("order", "start", "expert"),
    """
    const uint index = thread_index_in_threadgroup;
    const uint P = indices_shape[0] * indices_shape[1], G = min(P, uint(EXPERTS));
    threadgroup uint ids[1024];
    threadgroup uint leads[1024];
    for (uint p = index; p < P; p += 128) ids[p] = uint(indices[p]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint p = index; p < P; p += 128) {
      uint rank = 0, earlier = 0;
      for (uint q = 0; q < P; q++) {
        const bool twin = ids[q] == ids[p] && q < p;
        rank += ids[q] < ids[p] || twin;
        earlier += twin;
      }
      order[rank] = p;
      leads[p] = earlier == 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint groups = 0;
    for (uint q = 0; q < P; q++) groups += leads[q];
    for (uint p = index; p < P; p += 128) {
      if (leads[p]) {
        uint group = 0, rank = 0;
        for (uint q = 0; q < P; q++) {
          group += leads[q] && ids[q] < ids[p];
          rank += ids[q] < ids[p];
        }
        start[group] = rank;
        expert[group] = ids[p];
      }
    }
    for (uint g = index; g <= G; g += 128) {
      if (g >= groups) start[g] = P;
      if (g >= groups && g < G) expert[g] = 0;
    }
""",
)

HEADER = (
    MATRIX_METAL
    + GELU_METAL
    + """
// One row of weights times up to TOKENS inputs, the lane's part of it: acc[t] for x[from[t] .. from[t] + K).
template <int FORMAT, int BITS, int GROUP, int TOKENS, typename W, typename S, typename B, typename X>
METAL_FUNC void row_times(W row, S scales, B biases, X x, thread const uint* from, uint count, uint K, uint lane,
                          thread float* acc) {
  for (uint t = 0; t < TOKENS; t++) acc[t] = 0.0f;
  for (uint block = lane; block * 8 < K; block += 32) {
    float weights[8];
    block_values<FORMAT, BITS>(row, block, K, weights);
    const float scale = scale_value<FORMAT>(scales, block * 8 / GROUP);
    const float bias = bias_value<FORMAT>(biases, block * 8 / GROUP);
    for (uint t = 0; t < TOKENS; t++) {
      if (t < count) {  // no break: the loop must unroll for the sums to stay in registers
        float values[8], dot = 0.0f, total = 0.0f;
        block_values<0, 8>(x + from[t], block, K, values);
        for (uint j = 0; j < 8; j++) {
          dot = fma(values[j], weights[j], dot);
          total += values[j];
        }
        acc[t] = fma(scale, dot, acc[t]);
        if (FORMAT == 1) acc[t] = fma(bias, total, acc[t]);
      }
    }
  }
}
"""
)

# Common to the two products: the group's pairs, the tile's rows, and the copy of a matrix's rows to threadgroup memory.
_PLACE = """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint index = thread_index_in_threadgroup;
    const uint group = threadgroup_position_in_grid.y, row0 = threadgroup_position_in_grid.x * R;
    const uint low = start[group], high = start[group + 1];
    if (low == high) return;
    const uint rows = min(uint(R), uint(ROWS) - row0), count = high - low;
    const size_t base = size_t(expert[group]) * ROWS + row0;
"""


def _tile(name: str) -> str:
    """Copies the tile's rows of a matrix, with scales and biases where the layout has them."""
    return f"""
    threadgroup W {name}_rows[R * WORDS];
    threadgroup S {name}_s[R * GROUPS];
    threadgroup S {name}_b[R * GROUPS];
    for (uint i = index; i < rows * WORDS; i += 128) {name}_rows[i] = {name}[base * WORDS + i];
    if (FORMAT != 0)
      for (uint i = index; i < rows * GROUPS; i += 128) {name}_s[i] = {name}_scales[base * GROUPS + i];
    if (FORMAT == 1)
      for (uint i = index; i < rows * GROUPS; i += 128) {name}_b[i] = {name}_biases[base * GROUPS + i];
"""


# A simdgroup takes one row for four tokens at a time. `from` differs: pairs of a token share its x, not its activation.
def _items(input_row: str) -> str:
    return f"""
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint quads = (count + 3) / 4;
    for (uint item = simdgroup; item < rows * quads; item += 4) {{
      const uint r = item % rows, first = low + item / rows * 4, n = min(4u, high - first);
      uint pairs[4], from[4];
      for (uint t = 0; t < 4; t++) {{
        pairs[t] = order[first + min(t, n - 1)];
        from[t] = {input_row} * K;
      }}
"""


def _product(name: str) -> str:
    return (
        f"row_times<FORMAT, BITS, GROUP, 4>({name}_rows + r * WORDS, {name}_s + r * GROUPS, {name}_b + r * GROUPS, "
        f"x, from, n, K, lane, {name}_acc);"
    )


GATE_UP = Definition(
    "experts_gate_up",
    ("x", "order", "start", "expert", "gate", "gate_scales", "gate_biases", "up", "up_scales", "up_biases"),
    ("active",),
    f"""{_PLACE}{_tile("gate")}{_tile("up")}{_items("pairs[t] / TOP")}
      float gate_acc[4], up_acc[4];
      {_product("gate")}
      {_product("up")}
      for (uint t = 0; t < 4; t++) {{
        const float gate_sum = simd_sum(gate_acc[t]);
        const float up_sum = simd_sum(up_acc[t]);
        if (lane == 0 && t < n) active[pairs[t] * ROWS + row0 + r] = gelu_tanh(gate_sum) * up_sum;
      }}
    }}
""",
    HEADER,
)

DOWN = Definition(
    "experts_down",
    ("x", "order", "start", "expert", "down", "down_scales", "down_biases"),
    ("part",),
    f"""{_PLACE}{_tile("down")}{_items("pairs[t]")}
      float down_acc[4];
      {_product("down")}
      for (uint t = 0; t < 4; t++) {{
        const float sum = simd_sum(down_acc[t]);
        if (lane == 0 && t < n) part[pairs[t] * ROWS + row0 + r] = sum;
      }}
    }}
""",
    HEADER,
)

COMBINE = Definition(
    "experts_combine",
    ("part", "weights"),
    ("y",),
    """
    const uint h = thread_position_in_grid.x, token = thread_position_in_grid.y;
    const uint H = part_shape[1], TOP = weights_shape[1];
    if (h >= H) return;
    float sum = 0.0f;
    for (uint j = 0; j < TOP; j++) sum = fma(float(weights[token * TOP + j]), part[(token * TOP + j) * H + h], sum);
    y[token * H + h] = T(sum);
""",
)


@dataclass(frozen=True)
class Experts:
    """gate and up [E, w, H], down [E, H, w]; gate and up in the same layout."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Routing:
    """indices [N, k] integer, no expert twice in a row; weights [N, k] float."""

    indices: mx.array
    weights: mx.array


def why_not(x: mx.array, routing: Routing, experts: Experts) -> str | None:
    """Why the kernels do not take x [N, H], or None if they do."""
    if x.ndim != 2 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {x.shape}, not rows of float values"
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        return f"{x.shape[0]} tokens; the kernel takes 1 to {MAX_TOKENS}"
    pairs = math.prod(routing.indices.shape)
    if routing.indices.shape != routing.weights.shape or routing.indices.shape[:-1] != x.shape[:-1]:
        return f"indices {routing.indices.shape} and weights {routing.weights.shape} for x {x.shape}"
    if not 1 <= pairs <= MAX_PAIRS:
        return f"{pairs} pairs of tokens and experts; the kernel takes up to {MAX_PAIRS}"
    gate, up, down = experts.gate, experts.up, experts.down
    if gate.template() != up.template() or gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return "gate and up have different layouts"
    if x.shape[1] != gate.columns or (down.rows, down.columns) != (gate.columns, gate.rows):
        return f"x {x.shape}, gate {gate.rows} x {gate.columns}, down {down.rows} x {down.columns} do not fit together"
    if 2 * gate.row_bytes > TILE_BYTES or down.row_bytes > TILE_BYTES:
        return f"rows of {max(2 * gate.row_bytes, down.row_bytes)} bytes; {TILE_BYTES} fit into threadgroup memory"
    return gate.why_not() or down.why_not() or why_not_here()


def experts(x: mx.array, routing: Routing, weights: Experts) -> mx.array:
    """x [N, H] float -> [N, H] in x's dtype."""
    if why_not(x, routing, weights):
        return reference(x, routing, weights)
    groups = _group(routing.indices, weights.gate.weight.shape[0])
    top = routing.indices.shape[1]
    active = _product_launch(GATE_UP, x, groups, [weights.gate, weights.up], top)
    part = _product_launch(DOWN, active, groups, [weights.down], top)
    tokens, hidden = x.shape
    launch = Launch(
        grid=(256 * -(-hidden // 256), tokens, 1),
        threadgroup=(256, 1, 1),
        shapes=[(tokens, hidden)],
        dtypes=[x.dtype],
        template=[("T", x.dtype)],
    )
    return run(COMBINE, [part, routing.weights], launch)[0]


def _group(indices: mx.array, count: int) -> list[mx.array]:
    """indices [N, k] -> order [N k], start [G + 1], expert [G], for at most G groups, uint32."""
    pairs = indices.size
    groups = min(pairs, count)
    launch = Launch(
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[(pairs,), (groups + 1,), (groups,)],
        dtypes=[mx.uint32] * 3,
        template=[("EXPERTS", count)],
    )
    return run(GROUPS, [indices], launch)


def _product_launch(
    definition: Definition, x: mx.array, groups: list[mx.array], matrices: list[Matrix], top: int
) -> mx.array:
    """Every pair's row times the matrices of its expert: [N k, rows] float32."""
    matrix = matrices[0]
    per_row = sum(m.row_bytes for m in matrices)
    held = next(r for r in (8, 4, 2, 1) if r * per_row <= TILE_BYTES or r == 1)
    pairs, (order, start, expert) = groups[0].size, groups
    scales = matrix.packing()[0] if matrix.packed else None
    shape = [("R", held), ("ROWS", matrix.rows), ("K", matrix.columns), ("TOP", top)]
    words = [("WORDS", matrix.weight.shape[-1]), ("GROUPS", 1 if scales is None else scales.shape[-1])]
    types = [("W", matrix.weight.dtype), ("S", (matrix.weight if scales is None else scales).dtype)]
    launch = Launch(
        grid=(THREADS * -(-matrix.rows // held), expert.size, 1),
        threadgroup=(THREADS, 1, 1),
        shapes=[(pairs, matrix.rows)],
        dtypes=[mx.float32],
        template=[*shape, *words, *types, *matrix.template()],
    )
    tensors = [tensor for m in matrices for tensor in m.kernel_inputs()]
    return run(definition, [x, order, start, expert, *tensors], launch)[0]


def reference(x: mx.array, routing: Routing, weights: Experts) -> mx.array:
    """The same in plain mlx; one read of an expert for each pair."""
    each = x[:, None, None, :]
    gate = _gathered(each, weights.gate, routing.indices)
    up = _gathered(each, weights.up, routing.indices)
    part = _gathered(geglu(gate, up), weights.down, routing.indices)[..., 0, :]
    together = (part.astype(mx.float32) * routing.weights.astype(mx.float32)[..., None]).sum(axis=1)
    return together.astype(x.dtype)


def _gathered(x: mx.array, matrix: Matrix, indices: mx.array) -> mx.array:
    """x [N, 1 or k, 1, K] times the matrix of each index [N, k] -> [N, k, 1, rows]; on the CPU in float32."""
    if on_cpu():
        x = x.astype(mx.float32)
    if not matrix.packed:
        return mx.gather_mm(x, matrix.weight.astype(x.dtype).swapaxes(-1, -2), rhs_indices=indices)
    scales, biases = matrix.widened() if on_cpu() else matrix.packing()
    how = {"group_size": matrix.group_size, "bits": matrix.bits, "mode": matrix.mode}
    return mx.gather_qmm(x, matrix.weight, scales, biases, rhs_indices=indices, **how)
