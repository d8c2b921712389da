"""gelu_tanh(gate x) * (up x) for 1 to 64 rows in one launch. Not run on Metal: tested in a CPU emulator.

Two products of rows_qmv side by side: a simdgroup holds rows of gate and the same rows of up, and applies the
activation to their sums in float32. Each weight is read once for eight rows, and a row's result depends on that row
alone, to the bit, for the reasons that rows_qmv gives. Plain, it is three dispatches, and gate and up are rounded on
the way.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.kernels import rows_qmv
from mlx_mtp.kernels.backend import Definition, run
from mlx_mtp.kernels.matrix import METAL, Matrix

TAKES = "1 to 64 rows, eight at a time; gate and up in the same layout, one that rows_qmv takes"

GELU_METAL = """
METAL_FUNC float gelu_tanh(float v) {
  const float inner = 0.7978845608f * (v + 0.044715f * v * v * v);
  return 0.5f * v * (1.0f + tanh(clamp(inner, -10.0f, 10.0f)));  // tanh(10) rounds to 1, and no device overflows
}
"""

# R sums: the first half of them rows of gate, the second half the same rows of up.
_READ = """
        const uint h = r % HALF;
        if (h < rows) {
          const size_t row = first + h;
          block_values<FORMAT, BITS>((r < HALF ? gate : up) + row * words, block, K, weights[r]);
          scale[r] = scale_value<FORMAT>(r < HALF ? gate_scales : up_scales, row * groups + block * 8 / GROUP);
          bias[r] = bias_value<FORMAT>(r < HALF ? gate_biases : up_biases, row * groups + block * 8 / GROUP);
        }"""

KERNEL = Definition(
    "gate_up",
    ("x", "gate", "gate_scales", "gate_biases", "up", "up_scales", "up_biases"),
    ("y",),
    f"""
    const uint lane = thread_index_in_simdgroup;
    constexpr uint HALF = R / 2;
    const uint K = x_shape[1], N = gate_shape[0];
    const uint first = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * HALF;
    if (first >= N) return;
    const uint rows = min(HALF, N - first);
    const uint words = gate_shape[1], groups = FORMAT == 0 ? 1 : K / GROUP;
    const uint m0 = threadgroup_position_in_grid.y * M, count = min(uint(M), uint(x_shape[0]) - m0);
{rows_qmv.SUMS.format(read=_READ)}
    for (uint m = 0; m < M; m++)
      for (uint r = 0; r < HALF; r++) {{
        const float gate_sum = simd_sum(acc[m][r]);
        const float up_sum = simd_sum(acc[m][r + HALF]);
        if (lane == 0 && r < rows && m < count) y[size_t(m0 + m) * N + first + r] = T(gelu_tanh(gate_sum) * up_sum);
      }}
""",
    METAL + GELU_METAL,
)


@mx.compile
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) * up, elementwise."""
    return nn.gelu_approx(gate) * up


def why_not(x: mx.array, gate: Matrix, up: Matrix) -> str | None:
    """Why the kernel does not take x [..., K] and these matrices, or None if it does."""
    if gate.template() != up.template() or gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return "gate and up have different layouts"
    return rows_qmv.why_not(x, gate)


def gate_up(x: mx.array, gate: Matrix, up: Matrix) -> mx.array:
    """x [..., K] float, gate and up [N, K] -> [..., N] in x's dtype."""
    if why_not(x, gate, up):
        return geglu(rows_qmv.rows_qmv(x, gate), rows_qmv.rows_qmv(x, up))
    flat = x.reshape(-1, x.shape[-1])
    launch = rows_qmv.launch_of(flat, gate, rows_qmv.WEIGHT_ROWS // 2)
    y = run(KERNEL, [flat, *gate.kernel_inputs(), *up.kernel_inputs()], launch)[0]
    return y.reshape(*x.shape[:-1], gate.rows)


def reference(x: mx.array, gate: Matrix, up: Matrix) -> mx.array:
    """The same in plain mlx."""
    return geglu(rows_qmv.reference(x, gate), rows_qmv.reference(x, up))
