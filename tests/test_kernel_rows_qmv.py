"""rows_qmv: right in every layout, each weight read once, and a row's result is its own."""

from dataclasses import replace

import metal_emu as emu
import mlx.core as mx
import pytest
from layouts import LAYOUTS, make
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import rows_qmv
from mlx_mtp.kernels.matrix import Matrix

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def rows(m: int, k: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> mx.array:
    return mx.random.normal((m, k), key=mx.random.key(seed)).astype(dtype)


def exact(x: mx.array, matrix: Matrix) -> mx.array:
    return x.astype(mx.float32) @ matrix.dense().T


def reads_each_weight_once(launches, matrix: Matrix) -> bool:
    """Each packed word is loaded by one lane; a group's scale by the lanes that share it, in one instruction."""
    words = emu.bytes_read(launches, "w")
    fetched = emu.bytes_fetched(launches, "w", "scales", "biases")
    return words == matrix.weight.nbytes and fetched == matrix.rows * matrix.row_bytes


# ---- the reference, which runs everywhere -----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_right_and_independent_of_the_row_count(layout):
    matrix, x = make(layout, 37, 256), rows(16, 256)
    whole = rows_qmv.rows_qmv(x, matrix)
    assert whole.dtype == x.dtype
    assert checks.relative_error(whole, exact(x, matrix)) < TOLERANCE[mx.bfloat16]
    for count in (1, 2, 5, 15):
        assert mx.array_equal(rows_qmv.rows_qmv(x[:count], matrix), whole[:count])


def test_leading_axes_are_kept():
    matrix, x = make("affine4", 24, 128), rows(6, 128)
    together = rows_qmv.rows_qmv(x.reshape(2, 3, 128), matrix)
    assert together.shape == (2, 3, 24) and mx.array_equal(together.reshape(6, 24), rows_qmv.rows_qmv(x, matrix))


def test_every_refusal_has_a_reason_and_an_answer():
    matrix = make("affine4", 24, 128)
    cases = {
        "no Metal backend": (rows(2, 128), matrix),
        "65 rows": (rows(65, 128), matrix),
        "0 rows": (rows(0, 128), matrix),
        "of 2 bits": (rows(2, 128), Matrix.quantized(rows(24, 128), 64, 2)),
        "not a float type": (rows(2, 128).astype(mx.int32), matrix),
    }
    for reason, (x, weights) in cases.items():
        assert reason in rows_qmv.why_not(x, weights)
    for x, weights in list(cases.values())[:4]:
        assert rows_qmv.rows_qmv(x, weights).shape == (x.shape[0], 24)


# ---- the kernel, emulated ---------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_is_right_and_reads_each_weight_once(layout, m):
    matrix, x = make(layout, 43, 384), rows(m, 384)  # 43: the last threadgroup is ragged
    with emu.patched(count_fetches=True) as launches:
        assert rows_qmv.why_not(x, matrix) is None
        y = rows_qmv.rows_qmv(x, matrix)
    assert checks.relative_error(y, exact(x, matrix)) < TOLERANCE[mx.bfloat16]
    assert reads_each_weight_once(launches, matrix)
    assert len(launches) == 1


@emulated
@pytest.mark.parametrize(("layout", "counts"), [("affine4", (2, 3, 4, 5, 8, 9, 12, 16)), ("plain", (5, 16))])
def test_a_row_s_bits_do_not_depend_on_the_row_count(layout, counts):
    matrix, x = make(layout, 21, 256), rows(16, 256)
    with emu.patched():
        alone = mx.concatenate([rows_qmv.rows_qmv(x[i : i + 1], matrix) for i in range(16)])
        for count in counts:
            assert mx.array_equal(rows_qmv.rows_qmv(x[:count], matrix), alone[:count]), count


@emulated
def test_more_rows_than_a_tile_are_cut_in_one_launch_and_no_bit_changes():
    matrix, x = make("affine4", 21, 256), rows(37, 256)
    with emu.patched(count_fetches=True) as launches:
        together = rows_qmv.rows_qmv(x, matrix)
        assert len(launches) == 1
        assert emu.bytes_fetched(launches, "w", "scales", "biases") == 5 * matrix.rows * matrix.row_bytes
        alone = mx.concatenate([rows_qmv.rows_qmv(x[i : i + 8], matrix) for i in range(0, 37, 8)])
        assert mx.array_equal(rows_qmv.rows_qmv(x[36:], matrix), together[36:])
    assert mx.array_equal(together, alone)


@emulated
def test_two_libraries_serve_every_number_of_rows():
    matrix = make("affine4", 21, 256)
    with emu.patched(dry=True) as launches:
        for count in range(1, 65):
            rows_qmv.rows_qmv(rows(count, 256), matrix)
    assert len(launches) == 64 and len({emu.library(launch) for launch in launches}) == 2


@emulated
@pytest.mark.parametrize("layout", ["affine8", "mxfp4"])
def test_a_row_s_bits_do_not_depend_on_its_neighbours(layout):
    matrix, x = make(layout, 21, 256), rows(3, 256)
    with emu.patched():
        before = rows_qmv.rows_qmv(x, matrix)
        after = rows_qmv.rows_qmv(mx.stack([x[2], 1e4 * x[0], x[1]]), matrix)
    assert mx.array_equal(before[2], after[0]) and mx.array_equal(before[1], after[2])


@emulated
@pytest.mark.parametrize(
    ("n", "k", "layout"),
    [(1, 1, "plain"), (3, 7, "plain"), (5, 250, "plain"), (9, 1033, "plain"), (1, 32, "affine8"), (7, 64, "affine4")],
)
def test_the_smallest_and_the_ragged_shapes(n, k, layout):
    layout_groups = {"affine8": 32, "affine4": 64}
    matrix, x = make(layout, n, k, mx.float32), rows(2, k, mx.float32)
    assert k % layout_groups.get(layout, 1) == 0
    with emu.patched(count_fetches=True) as launches:
        y = rows_qmv.rows_qmv(x, matrix)
    assert checks.relative_error(y, exact(x, matrix)) < TOLERANCE[mx.float32]
    assert reads_each_weight_once(launches, matrix)


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("layout", ["affine4", "plain"])
def test_every_float_type(layout, dtype):
    matrix, x = make(layout, 20, 256, dtype), rows(3, 256, dtype)
    with emu.patched():
        y = rows_qmv.rows_qmv(x, matrix)
    assert y.dtype == dtype and checks.relative_error(y, exact(x, matrix)) < TOLERANCE[dtype]


@emulated
def test_scales_may_be_of_another_type_than_x():
    packed, x = make("affine4", 20, 256, mx.float16), rows(3, 256, mx.bfloat16)
    with emu.patched():
        y = rows_qmv.rows_qmv(x, packed)
    assert y.dtype == mx.bfloat16 and checks.relative_error(y, exact(x, packed)) < TOLERANCE[mx.bfloat16]


@emulated
def test_every_code_of_the_float_formats_has_its_value():
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        codes = list(range(16)) * 2 if bits == 4 else [c for c in range(256) if c & 127 != 127] + [0, 0]
        per_word = 32 // bits
        words = [
            sum(code << (bits * j) for j, code in enumerate(codes[i : i + per_word]))
            for i in range(0, len(codes), per_word)
        ]
        weight = mx.array([words], dtype=mx.uint32)
        k = len(codes)
        scale_codes = [[100 + 3 * i for i in range(k // group)]] if group == 32 else [[1, 0x38]]
        matrix = Matrix(weight, mx.array(scale_codes, dtype=mx.uint8), None, group, bits, mode)
        for start in range(0, k, 16):  # one-hot rows read the values out
            x = mx.eye(k)[start : start + 16]
            with emu.patched():
                y = rows_qmv.rows_qmv(x, matrix)
            assert mx.array_equal(y[:, 0], matrix.dense()[0, start : start + 16]), (mode, start)


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_the_result(order):
    matrix, x = make("affine4", 21, 256), rows(2, 256)
    with emu.patched():
        y = rows_qmv.rows_qmv(x, matrix)
    with emu.patched(order=order, seed=7):
        assert mx.array_equal(y, rows_qmv.rows_qmv(x, matrix))


@emulated
def test_real_sized_projections():
    matrix, x = make("affine4", 512, 2816), rows(5, 2816)
    with emu.patched(count_fetches=True) as launches:
        y = rows_qmv.rows_qmv(x, matrix)
    assert checks.relative_error(y, exact(x, matrix)) < TOLERANCE[mx.bfloat16]
    assert reads_each_weight_once(launches, matrix)


def smallest(layout: str) -> tuple[mx.array, Matrix]:
    """So small that every input MLX can put into constant memory is there."""
    k = 1 if LAYOUTS[layout] is None else max(32, LAYOUTS[layout][0])  # MLX packs no single group of 16
    return rows(1, k), make(layout, 1, k)


def launches_of(x: mx.array, matrix: Matrix):
    with emu.patched(dry=True) as launches:
        rows_qmv.rows_qmv(x, matrix)
    return launches


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(rows(3, 384), make("affine4", 43, 384)))
    checks.assert_text_is_mlx_s(launches_of(*smallest("plain")))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one(layout):
    checks.assert_lint_is_clean(launches_of(*smallest(layout)))
    checks.assert_lint_is_clean(launches_of(rows(3, 384), make(layout, 43, 384)))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    layouts = ("affine4", "mxfp8", "nvfp4", "plain")
    checks.assert_compiles_for_cuda([launches_of(rows(3, 384), make(layout, 43, 384))[0] for layout in layouts])


MUTANTS = [  # what is wrong, part, old, new
    ("the guard of the last rows is gone", "source", "if (first >= N) return;", ""),
    ("rows beyond the last are written", "source", "lane == 0 && r < rows", "lane == 0"),
    ("rows beyond the last are read", "source", "if (r < rows) {", "{"),
    ("a lane skips blocks", "source", "block += 32", "block += 64"),
    ("blocks are read twice", "source", "block += 32", "block += 31"),
    ("the bias is left out", "source", "if (FORMAT == 1) acc[m][r] = fma(bias[r], total, acc[m][r]);", ""),
    ("the scale of another group", "source", "scales, row * groups + block * 8 / GROUP", "scales, row * groups"),
    ("every row is the first", "source", "x + size_t(m0 + m) * K", "x"),
    ("nibbles are read backwards", "header", "(word >> (BITS * place))", "(word >> (32 - BITS - BITS * place))"),
    (
        "half the lanes are summed",
        "source",
        "const float sum = simd_sum(acc[m][r]);",
        "const float sum = acc[m][r] + simd_shuffle_xor(acc[m][r], 1);",
    ),
]


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, part, old, new = mutant
    matrix, x = make("affine4", 43, 384), rows(3, 384)
    with emu.patched(edit=checks.planted("rows_qmv", part, old, new), count_fetches=True) as launches:
        try:
            y = rows_qmv.rows_qmv(x, matrix)
        except emu.EmulationError:
            return
    wrong = checks.relative_error(y, exact(x, matrix)) > TOLERANCE[mx.bfloat16]
    assert wrong or not reads_each_weight_once(launches, matrix)


@emulated
def test_a_kernel_that_sums_in_an_order_of_its_row_count_is_caught():
    edit = checks.planted(
        "rows_qmv",
        "source",
        "fma(values[j], weights[r][j], dot)",
        "fma(values[M > 1 ? 7 - j : j], weights[r][M > 1 ? 7 - j : j], dot)",
    )
    matrix, x = make("plain", 21, 1000, mx.float32), rows(2, 1000, mx.float32)
    with emu.patched(edit=edit):
        together, alone = rows_qmv.rows_qmv(x, matrix), rows_qmv.rows_qmv(x[:1], matrix)
    assert checks.relative_error(together, exact(x, matrix)) < TOLERANCE[mx.float32]
    assert not mx.array_equal(together[:1], alone)


def test_a_matrix_is_a_value():
    matrix = make("affine4", 8, 128)
    assert matrix.columns == 128 and matrix.rows == 8 and matrix.row_bytes == 128 // 2 + 2 * 2 * 2
    assert mx.array_equal(matrix.take(mx.array([3, 1])).dense(), matrix.dense()[mx.array([3, 1])])
    assert (
        replace(matrix, mode="mxfp2").why_not()
        == "weights of mode mxfp2; the kernels read plain, affine, mxfp4, mxfp8, nvfp4"
    )
