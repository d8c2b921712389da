"""What the kernels read, over the least that can be read, beside what MLX's path reads. `pytest -s` prints the table.

rows_qmv and MLX's own kernels for it are run in the emulator and their bytes counted; for the other kernels MLX's path
is many kernels, and what it reads is added up from the shapes. None of this is a time.
"""

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.kernels import attend, experts, gate_up, head, rows_qmv
from mlx_mtp.kernels.attend import Attention
from mlx_mtp.kernels.experts import Experts, Routing
from mlx_mtp.kernels.head import Clusters
from mlx_mtp.kernels.matrix import Matrix

pytestmark = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

FOLDER = "mlx/backend/metal/kernels/"
QUANTIZED = "".join(f'#include "{FOLDER}{f}"\n' for f in ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"))
REST = (
    "0, nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr, "
    "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
)
WEIGHTS = ("w", "scales", "biases")
TABLES = ("_scales", "_biases")  # beside gate and up


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(mx.bfloat16)


def show(kernel: str, work: str, ours: float, mlx_s: float, how: str) -> None:
    print(f"{kernel:9} {work:44} ours {ours:5.2f}   MLX {mlx_s:5.2f}  ({how})")


def mlx_product_bytes(x: mx.array, matrix: Matrix, wide: bool) -> int:
    """Bytes of weights MLX's own kernel fetches: one row at a time, or the wide kernel with tiles of up to 5 rows."""
    (m, k), n = x.shape, matrix.rows
    tile = -(-m // -(-m // 5))
    body, groups = f"affine_qmv<T, 64, 4, false>(w, scales, biases, x, y, {k}, {n}, {REST});", m
    if wide:
        body = f"affine_qmv_wide<T, 64, 4, {tile}, 8, false>(w, scales, biases, x, y, {k}, {n}, {m}, {REST});"
        groups = -(-m // tile)
    options = emu.Options(count_fetches=True)
    kernel = emu.metal_kernel("mlx_product", [*WEIGHTS, "x"], ["y"], body, QUANTIZED, options=options)
    kernel(
        inputs=[*matrix.tensors, x],
        template=[("T", x.dtype)],
        grid=(groups * 32, -(-n // 8) * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(m, n)],
        output_dtypes=[x.dtype],
    )
    return emu.bytes_fetched([kernel], *WEIGHTS)


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
def test_products_of_few_rows(m):
    matrix, x = Matrix.quantized(normal(64, 1024), 64, 4), normal(m, 1024)
    with emu.patched(count_fetches=True) as launches:
        rows_qmv.rows_qmv(x, matrix)
    least = matrix.rows * matrix.row_bytes
    ours = emu.bytes_fetched(launches, *WEIGHTS) / least
    work = f"{m} rows x affine 4 bit"
    if m <= 8:  # M1 and M2 go on so up to 6 to 14 rows, by the size of the matrix
        show("rows_qmv", work, ours, mlx_product_bytes(x, matrix, wide=False) / least, "affine_qmv, emulated: M1, M2")
    else:
        show("rows_qmv", work, ours, 1.0, "qmm, tiles of 32 rows, another order of sums: formula")
    if 1 < m <= 12:
        show(
            "rows_qmv", work, ours, mlx_product_bytes(x, matrix, wide=True) / least, "affine_qmv_wide, emulated: M3 on"
        )
    assert ours == -(-m // 8)


@pytest.mark.parametrize("m", [1, 4, 16])
def test_gate_and_up(m):
    parts = [Matrix.quantized(normal(64, 1024), 64, 4) for _ in range(2)]
    with emu.patched(count_fetches=True) as launches:
        gate_up.gate_up(normal(m, 1024), *parts)
    least = sum(part.rows * part.row_bytes for part in parts)
    ours = emu.bytes_fetched(launches, *(f"{name}{part}" for name in ("gate", "up") for part in ("", *TABLES))) / least
    mlx_s = m if m <= 8 else 1.0
    show("gate_up", f"{m} rows x affine 4 bit", ours, mlx_s, "two products and geglu; affine_qmv: M1, M2: formula")
    assert ours == -(-m // 8)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 16, 32, 64])
def test_routed_experts(n):
    count, top, hidden, width = 128, 8, 64, 64
    rng = np.random.default_rng(n)
    indices = np.stack([rng.permutation(count)[:top] for _ in range(n)])
    routing = Routing(mx.array(indices), mx.ones((n, top)))
    parts = [Matrix.quantized(normal(count, width, hidden), 64, 4) for _ in range(3)]
    with emu.patched() as launches:
        experts.experts(normal(n, hidden), routing, Experts(*parts))
    one = sum(m.rows * m.row_bytes for m in parts)
    least = np.unique(indices).size * one
    names = [f"{m}{part}" for m in ("gate", "up", "down") for part in ("", "_scales", "_biases")]
    ours = emu.bytes_read(launches, *names) / least
    pairs = n * top * one / least if n < 64 else 1.0
    show("experts", f"{n} tokens, 8 of 128, independent routing", ours, pairs, "a read a pair below 64 tokens: formula")
    assert ours == 1


def test_the_clustered_head():
    hidden, count, size, top = 256, 512, 128, 32
    order = mx.array(np.random.default_rng(0).permutation(count * size).astype(np.int32))
    clusters = Clusters(Matrix(normal(count, hidden)), order, Matrix(normal(count * size, hidden)), top)
    with emu.patched(count_fetches=True) as launches:
        head.logits(normal(1, hidden), clusters)
    rows = top * size * hidden * 2
    least = count * hidden * 2 + rows + top * size * 4
    ours = emu.bytes_fetched(launches) / least
    show(
        "head",
        "one row, 32 clusters of 128",
        ours,
        (least + rows) / least,
        "gathered rows are copied, then read: formula",
    )
    assert ours <= 1.02


@pytest.mark.parametrize(("columns", "size"), [(1, 256), (4, 256), (4, 512)])
def test_attention(columns, size):
    heads, slots = 8, 260
    given = Attention(
        normal(1, heads, columns, size), normal(1, 1, slots, size), normal(1, 1, slots, size), mx.array([250])
    )
    with emu.patched() as launches:
        attend.attend(given)
    least = 2 * (250 + columns) * size * 2
    ours = emu.bytes_read(launches, "keys", "values") / least
    how, mlx_s = "sdpa_vector reads for each head and column: formula", float(heads * columns)
    if size > 256:  # no fused kernel: a product a head, and scores written and read
        how, mlx_s = "unfused, scores in memory: formula", heads + 4 * heads * columns * slots * 2 / least
    show("attend", f"{columns} columns, 8 heads of {size} a key head", ours, mlx_s, how)
    assert ours == -(-heads * columns // attend.queries_at_once(size))
