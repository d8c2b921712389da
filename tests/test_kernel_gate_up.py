"""gate_up: both products and the activation in one launch, each weight read once, and a row's result its own."""

import metal_emu as emu
import mlx.core as mx
import pytest
from layouts import LAYOUTS, make
from metal_emu import checks, cuda, lint

from mlx_mtp.few_rows import FewRowsMlp
from mlx_mtp.kernels import gate_up
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.models.gemma4 import Mlp

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

TOLERANCE = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
WEIGHTS = [f"{name}{part}" for name in ("gate", "up") for part in ("", "_scales", "_biases")]


def pair(layout: str, n: int, k: int, dtype: mx.Dtype = mx.bfloat16) -> tuple[Matrix, Matrix]:
    return make(layout, n, k, dtype), make(layout, n, k, dtype, seed=1)


def rows(m: int, k: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Of a size that puts gate on both sides of the bend."""
    return (mx.random.normal((m, k), key=mx.random.key(m)) * k**-0.5).astype(dtype)


def exact(x: mx.array, gate: Matrix, up: Matrix) -> mx.array:
    """The definition in float32."""
    g, u = (x.astype(mx.float32) @ m.dense().T for m in (gate, up))
    return 0.5 * g * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (g + 0.044715 * g**3))) * u


def reads_each_weight_once(launches, gate: Matrix, up: Matrix) -> bool:
    words = emu.bytes_read(launches, "gate", "up")
    fetched = emu.bytes_fetched(launches, *WEIGHTS)
    return words == gate.weight.nbytes + up.weight.nbytes and fetched == 2 * gate.rows * gate.row_bytes


def test_without_the_kernel_it_is_two_products_and_the_activation():
    x, (gate, up) = rows(3, 128), pair("affine4", 24, 128)
    assert gate_up.why_not(x, gate, up) == "this build of MLX has no Metal backend"
    y = gate_up.gate_up(x.reshape(1, 3, 128), gate, up)
    assert y.dtype == x.dtype and y.shape == (1, 3, 24)
    assert checks.relative_error(y[0], exact(x, gate, up)) < 3 * TOLERANCE[mx.bfloat16]  # rounded on the way
    assert mx.array_equal(y[0], gate_up.reference(x, gate, up))


def test_every_refusal_has_a_reason_and_an_answer():
    x, (gate, up) = rows(2, 128), pair("affine4", 24, 128)
    for reason, given in {
        "different layouts": (x, gate, make("affine8", 24, 128)),
        "different layouts ": (x, gate, make("affine4", 25, 128)),
        "65 rows": (rows(65, 128), gate, up),
        "of 2 bits": (x, *[Matrix.quantized(rows(24, 128), 64, 2)] * 2),
    }.items():
        assert reason.strip() in gate_up.why_not(*given)
    assert gate_up.gate_up(x, gate, make("affine8", 24, 128)).shape == (2, 24)
    assert gate_up.gate_up(rows(65, 128), gate, up).shape == (65, 24)


@emulated
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_is_right_and_reads_each_weight_once(layout, m):
    x, (gate, up) = rows(m, 384), pair(layout, 43, 384)  # 43: the last threadgroup is ragged
    with emu.patched(count_fetches=True) as launches:
        assert gate_up.why_not(x, gate, up) is None
        y = gate_up.gate_up(x, gate, up)
    assert checks.relative_error(y, exact(x, gate, up)) < TOLERANCE[mx.bfloat16]
    assert reads_each_weight_once(launches, gate, up)
    assert len(launches) == 1


@emulated
@pytest.mark.parametrize(("layout", "counts"), [("affine4", (2, 5, 8, 9, 16)), ("plain", (3, 16))])
def test_a_row_s_bits_do_not_depend_on_the_row_count(layout, counts):
    x, (gate, up) = rows(37, 256, mx.float32), pair(layout, 21, 256)
    with emu.patched():
        alone = mx.concatenate([gate_up.gate_up(x[i : i + 1], gate, up) for i in range(16)])
        for count in counts:
            assert mx.array_equal(gate_up.gate_up(x[:count], gate, up), alone[:count]), count
        together = gate_up.gate_up(x, gate, up)
        assert mx.array_equal(together[:16], alone) and mx.array_equal(together[36:], gate_up.gate_up(x[36:], gate, up))


@emulated
@pytest.mark.parametrize(
    ("n", "k", "layout"), [(1, 1, "plain"), (3, 7, "plain"), (9, 1033, "plain"), (1, 32, "affine8"), (7, 64, "affine4")]
)
def test_the_smallest_and_the_ragged_shapes(n, k, layout):
    x, (gate, up) = rows(2, k, mx.float32), pair(layout, n, k, mx.float32)
    with emu.patched(count_fetches=True) as launches:
        y = gate_up.gate_up(x, gate, up)
    assert checks.relative_error(y, exact(x, gate, up)) < TOLERANCE[mx.float32]
    assert reads_each_weight_once(launches, gate, up)


@emulated
def test_a_projection_of_real_size():
    x, (gate, up) = rows(5, 2816), pair("affine4", 128, 2816)
    with emu.patched(count_fetches=True) as launches:
        y = gate_up.gate_up(x, gate, up)
    assert checks.relative_error(y, exact(x, gate, up)) < TOLERANCE[mx.bfloat16]
    assert reads_each_weight_once(launches, gate, up)


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_float_type(dtype):
    x, (gate, up) = rows(3, 256, dtype), pair("plain", 20, 256, dtype)
    with emu.patched():
        y = gate_up.gate_up(x, gate, up)
    assert y.dtype == dtype and checks.relative_error(y, exact(x, gate, up)) < TOLERANCE[dtype]


@emulated
def test_large_values_do_not_overflow():
    gate, up = pair("plain", 8, 64, mx.float32)
    for size in (1e3, 1e6):
        x = size * rows(2, 64, mx.float32)
        with emu.patched():
            y = gate_up.gate_up(x, gate, up)
        g, u = (x @ m.weight.T for m in (gate, up))
        assert mx.allclose(y, mx.maximum(g, 0) * u, rtol=1e-4, atol=1e-2 * size).item()


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_the_result(order):
    x, (gate, up) = rows(2, 256), pair("affine4", 21, 256)
    with emu.patched():
        y = gate_up.gate_up(x, gate, up)
    with emu.patched(order=order, seed=7):
        assert mx.array_equal(y, gate_up.gate_up(x, gate, up))


def launches_of(x: mx.array, gate: Matrix, up: Matrix):
    with emu.patched(dry=True) as launches:
        gate_up.gate_up(x, gate, up)
    return launches


def smallest(layout: str) -> tuple[mx.array, Matrix, Matrix]:
    """So small that every input MLX can put into constant memory is there."""
    k = 1 if LAYOUTS[layout] is None else max(32, LAYOUTS[layout][0])
    return rows(1, k), *pair(layout, 1, k)


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(rows(3, 384), *pair("affine4", 43, 384)))
    checks.assert_text_is_mlx_s(launches_of(*smallest("plain")))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one(layout):
    checks.assert_lint_is_clean(launches_of(*smallest(layout)))
    checks.assert_lint_is_clean(launches_of(rows(3, 384), *pair(layout, 43, 384)))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    layouts = ("affine4", "nvfp4", "plain")
    checks.assert_compiles_for_cuda([launches_of(rows(3, 384), *pair(layout, 43, 384))[0] for layout in layouts])


MUTANTS = [  # what is wrong, part, old, new
    ("the guard of the last rows is gone", "source", "if (first >= N) return;", ""),
    ("rows beyond the last are written", "source", "lane == 0 && r < rows", "lane == 0"),
    ("rows beyond the last are read", "source", "if (h < rows) {", "{"),
    ("up is gate", "source", "(r < HALF ? gate : up)", "gate"),
    ("the scales of gate serve both", "source", "r < HALF ? gate_scales : up_scales", "gate_scales"),
    ("the biases of gate serve both", "source", "r < HALF ? gate_biases : up_biases", "gate_biases"),
    ("gate and up change places", "source", "gelu_tanh(gate_sum) * up_sum", "gelu_tanh(up_sum) * gate_sum"),
    ("there is no activation", "source", "gelu_tanh(gate_sum) * up_sum", "gate_sum * up_sum"),
    ("the cube is left out", "header", "0.044715f * v * v * v", "0.044715f * v"),
    ("the rows of up lie elsewhere", "source", "const uint h = r % HALF;", "const uint h = r;"),
]


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, part, old, new = mutant
    x, (gate, up) = rows(3, 384), pair("affine4", 41, 384)  # 41: a simdgroup has no row, another one of two
    with emu.patched(edit=checks.planted("gate_up", part, old, new), count_fetches=True) as launches:
        try:
            y = gate_up.gate_up(x, gate, up)
        except emu.EmulationError:
            return
    wrong = checks.relative_error(y, exact(x, gate, up)) > TOLERANCE[mx.bfloat16]
    assert wrong or not reads_each_weight_once(launches, gate, up)


@emulated
def test_an_mlp_of_a_model_takes_it():
    mlp, x = Mlp(64, 96), rows(3, 64, mx.float32)
    plain = mlp(x)
    with emu.patched(check=False):
        object.__setattr__(mlp, "__class__", FewRowsMlp)
        with_kernels = mlp(x)
    assert checks.relative_error(with_kernels, plain) < 1e-5
