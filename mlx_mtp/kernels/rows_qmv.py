"""A weight matrix times 1 to 64 rows in one launch. Not run on Metal: tested in a CPU emulator.

y[M, N] = x[M, K] @ W.T for W [N, K] in any layout of matrix.py. It serves decoding one token and verifying several
alike: a row's result depends on that row alone, to the bit, whatever M is and whatever the other rows hold. What makes
it so: a lane sums blocks lane, lane + 32, ... of the row in that order, with explicit fma; lanes are summed by
simd_sum; M and the number of weight rows a simdgroup holds only change how many such sums run side by side.

MLX builds a library for every value of a template argument. So M is 1 or TILE: fewer rows than a tile skip the others'
work, and more come in several tiles, each with a reading of the weights.

MLX's own affine_qmv (one row) and affine_qmv_wide (2 to 12 rows, GPU generation 15 on) do not agree to the bit.
"""

import math

import mlx.core as mx

from mlx_mtp.kernels.backend import Definition, Launch, on_cpu, run, why_not_here
from mlx_mtp.kernels.matrix import FLOATS, METAL, Matrix

TAKES = "1 to 64 rows, eight at a time; float, affine 4 and 8 bit, mxfp4, mxfp8, nvfp4 weights"

MAX_ROWS = 64
TILE = 8  # rows of x a launch of several rows holds at once
SIMDGROUPS = 2  # of a threadgroup
WEIGHT_ROWS = 4  # a simdgroup holds: TILE x WEIGHT_ROWS sums must fit into registers

# What a simdgroup sums: R weight rows times `count` rows of x from row m0 on. {read} sets weights[r], scale[r] and
# bias[r] of a block.
SUMS = """
    float acc[M][R] = {{}};
    for (uint block = lane; block * 8 < K; block += 32) {{
      float weights[R][8] = {{}}, scale[R] = {{}}, bias[R] = {{}};
      for (uint r = 0; r < R; r++) {{
{read}
      }}
      for (uint m = 0; m < M; m++) {{
        if (m < count) {{  // no break: the loop must unroll for the sums to stay in registers
          float values[8], total = 0.0f;
          block_values<0, 8>(x + size_t(m0 + m) * K, block, K, values);
          for (uint j = 0; j < 8; j++) total += values[j];
          for (uint r = 0; r < R; r++) {{
            float dot = 0.0f;
            for (uint j = 0; j < 8; j++) dot = fma(values[j], weights[r][j], dot);
            acc[m][r] = fma(scale[r], dot, acc[m][r]);
            if (FORMAT == 1) acc[m][r] = fma(bias[r], total, acc[m][r]);
          }}
        }}
      }}
    }}
"""

_READ = """
        if (r < rows) {
          const size_t row = first + r;
          block_values<FORMAT, BITS>(w + row * words, block, K, weights[r]);
          scale[r] = scale_value<FORMAT>(scales, row * groups + block * 8 / GROUP);
          bias[r] = bias_value<FORMAT>(biases, row * groups + block * 8 / GROUP);
        }"""

# Grid: weight rows, tiles of rows of x.
SOURCE = f"""
    const uint lane = thread_index_in_simdgroup;
    const uint K = x_shape[1], N = w_shape[0];
    const uint first = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * R;
    if (first >= N) return;
    const uint rows = min(uint(R), N - first);
    const uint words = w_shape[1], groups = FORMAT == 0 ? 1 : K / GROUP;
    const uint m0 = threadgroup_position_in_grid.y * M, count = min(uint(M), uint(x_shape[0]) - m0);
{SUMS.format(read=_READ)}
    for (uint m = 0; m < M; m++)
      for (uint r = 0; r < R; r++) {{
        const float sum = simd_sum(acc[m][r]);
        if (lane == 0 && r < rows && m < count) y[size_t(m0 + m) * N + first + r] = T(sum);
      }}
"""

KERNEL = Definition("rows_qmv", ("x", "w", "scales", "biases"), ("y",), SOURCE, METAL)


def why_not(x: mx.array, matrix: Matrix) -> str | None:
    """Why the kernel does not take x [..., K] times this matrix, or None if it does."""
    rows = math.prod(x.shape[:-1])
    if x.shape[-1] != matrix.columns:
        return f"x has {x.shape[-1]} columns and the weights {matrix.columns}"
    if not 1 <= rows <= MAX_ROWS:
        return f"{rows} rows; the kernel takes 1 to {MAX_ROWS}"
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not a float type"
    if matrix.weight.ndim != 2:
        return f"weights have {matrix.weight.ndim} axes, not 2"
    return matrix.why_not() or why_not_here()


def rows_qmv(x: mx.array, matrix: Matrix) -> mx.array:
    """x [..., K] float times matrix [N, K] -> [..., N] in x's dtype."""
    if why_not(x, matrix):
        return reference(x, matrix)
    flat = x.reshape(-1, x.shape[-1])
    launch = launch_of(flat, matrix, WEIGHT_ROWS)
    return run(KERNEL, [flat, *matrix.kernel_inputs()], launch)[0].reshape(*x.shape[:-1], matrix.rows)


def launch_of(x: mx.array, matrix: Matrix, held: int) -> Launch:
    """A launch for x [M, K] and every row of a matrix, of which a simdgroup takes `held`."""
    m, n = x.shape[0], matrix.rows
    tile = 1 if m == 1 else TILE
    return Launch(
        grid=(32 * SIMDGROUPS * -(-n // (SIMDGROUPS * held)), -(-m // tile), 1),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        shapes=[(m, n)],
        dtypes=[x.dtype],
        template=[("T", x.dtype), ("M", tile), ("R", WEIGHT_ROWS), *matrix.template()],
    )


def reference(x: mx.array, matrix: Matrix) -> mx.array:
    """The same product in plain mlx; on the CPU it too is independent of the number of rows, up to 64 of them."""
    if not matrix.packed:
        flat = x.reshape(-1, x.shape[-1])
        if on_cpu() and flat.shape[0] <= MAX_ROWS:  # one product a row: BLAS sums differently for several
            y = (flat[:, None, :] @ matrix.weight.astype(x.dtype).T)[:, 0, :]
            return y.reshape(*x.shape[:-1], matrix.rows)
        return x @ matrix.weight.astype(x.dtype).T
    how = {"group_size": matrix.group_size, "bits": matrix.bits, "mode": matrix.mode}
    if not on_cpu():
        return mx.quantized_matmul(x, matrix.weight, *matrix.packing(), **how)
    y = mx.quantized_matmul(x.astype(mx.float32), matrix.weight, *matrix.widened(), **how)
    return y.astype(x.dtype)
