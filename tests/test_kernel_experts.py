"""experts: right for any routing, each distinct expert read once, and a token's result is its own."""

from dataclasses import replace

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import experts
from mlx_mtp.kernels.experts import Experts, Routing
from mlx_mtp.kernels.matrix import Matrix

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

KINDS = {"plain": None, "affine4": (64, 4, "affine"), "affine8": (32, 8, "affine"), "mxfp4": (32, 4, "mxfp4")}
WEIGHTS = tuple(f"{m}{part}" for m in ("gate", "up", "down") for part in ("", "_scales", "_biases"))
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 8e-3}


def make(kind="affine4", count=8, hidden=128, width=64, dtype=mx.bfloat16) -> Experts:
    def matrix(seed: int, rows: int, columns: int) -> Matrix:
        dense = (mx.random.normal((count, rows, columns), key=mx.random.key(seed)) * columns**-0.5).astype(dtype)
        return Matrix(dense) if KINDS[kind] is None else Matrix.quantized(dense, *KINDS[kind])

    return Experts(matrix(1, width, hidden), matrix(2, width, hidden), matrix(3, hidden, width))


def tokens(n: int, hidden: int = 128, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal((n, hidden), key=mx.random.key(n)).astype(dtype)


def routed(n: int, top: int = 3, count: int = 8, dtype: mx.Dtype = mx.bfloat16) -> Routing:
    rng = np.random.default_rng(n)
    indices = np.stack([rng.permutation(count)[:top] for _ in range(n)])
    return Routing(mx.array(indices.astype(np.uint32)), mx.array(rng.random((n, top)).astype(np.float32)).astype(dtype))


def by_hand(x: mx.array, routing: Routing, weights: Experts) -> mx.array:
    """The definition in numpy, a token and an expert at a time."""
    gate, up, down = (np.array(m.dense(), dtype=np.float64) for m in (weights.gate, weights.up, weights.down))
    hidden = np.array(x.astype(mx.float32), dtype=np.float64)
    factors = np.array(routing.weights.astype(mx.float32), dtype=np.float64)
    out = np.zeros_like(hidden)
    for n, chosen in enumerate(np.array(routing.indices)):
        for j, e in enumerate(chosen):
            g = gate[e] @ hidden[n]
            active = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
            out[n] += factors[n, j] * (down[e] @ (active * (up[e] @ hidden[n])))
    return mx.array(out.astype(np.float32))


def distinct_bytes(routing: Routing, weights: Experts) -> int:
    """The least that can be read: each distinct expert's rows once."""
    distinct = len(set(np.array(routing.indices).ravel().tolist()))
    return distinct * sum(m.rows * m.row_bytes for m in (weights.gate, weights.up, weights.down))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_definition_and_independent_of_other_tokens(kind):
    weights, x, routing = make(kind), tokens(9), routed(9)
    whole = experts.experts(x, routing, weights)
    assert whole.dtype == x.dtype
    assert checks.relative_error(whole, by_hand(x, routing, weights)) < TOLERANCE[mx.bfloat16]
    part = Routing(routing.indices[3:5], routing.weights[3:5])
    assert mx.array_equal(experts.experts(x[3:5], part, weights), whole[3:5])


def test_every_refusal_has_a_reason_and_an_answer():
    weights, x, routing = make(), tokens(3), routed(3)
    assert experts.why_not(x, routing, weights) == "this build of MLX has no Metal backend"
    assert "65 tokens" in experts.why_not(tokens(65), routed(65), weights)
    assert experts.experts(tokens(65), routed(65), weights).shape == (65, 128)
    assert "for x (3, 128)" in experts.why_not(x, routed(4), weights)
    mixed = replace(weights, up=make("affine8").up)
    assert experts.why_not(x, routing, mixed) == "gate and up have different layouts"
    assert experts.experts(x, routing, mixed).shape == (3, 128)
    wide = make("plain", 1, 8192, 8)
    assert "threadgroup memory" in experts.why_not(tokens(1, 8192), routed(1, 1, 1), wide)


@emulated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5, 64])
def test_the_kernels_are_right_and_read_each_distinct_expert_once(kind, n):
    weights, x, routing = make(kind), tokens(n), routed(n)
    with emu.patched() as launches:
        assert experts.why_not(x, routing, weights) is None
        y = experts.experts(x, routing, weights)
    assert y.dtype == x.dtype
    assert checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[mx.bfloat16]
    assert emu.bytes_read(launches, *WEIGHTS) == distinct_bytes(routing, weights)
    assert len(launches) == 4


@emulated
@pytest.mark.parametrize("n", [17, 64])
def test_all_tokens_of_one_expert_meet_its_weights_in_one_reading(n):
    weights, x = make(), tokens(n)
    routing = Routing(mx.full((n, 1), 5, dtype=mx.int32), mx.ones((n, 1)))
    with emu.patched() as launches:
        y = experts.experts(x, routing, weights)
    assert checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[mx.bfloat16]
    assert emu.bytes_read(launches, *WEIGHTS) == distinct_bytes(routing, weights)


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_float_type(dtype):
    weights, x, routing = make("plain", dtype=dtype), tokens(4, dtype=dtype), routed(4, dtype=mx.float32)
    with emu.patched():
        y = experts.experts(x, routing, weights)
    assert y.dtype == dtype and checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[dtype]


@emulated
@pytest.mark.parametrize(
    ("n", "top", "count", "hidden", "width"),
    [(1, 1, 1, 1, 1), (3, 1, 40, 33, 11), (5, 8, 128, 20, 12)],
)
def test_the_smallest_and_the_ragged_shapes(n, top, count, hidden, width):
    weights = make("plain", count, hidden, width, mx.float32)
    x, routing = tokens(n, hidden, mx.float32), routed(n, top, count, mx.float32)
    with emu.patched() as launches:
        y = experts.experts(x, routing, weights)
    assert checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[mx.float32]
    assert emu.bytes_read(launches, *WEIGHTS) == distinct_bytes(routing, weights)


@emulated
def test_a_token_s_bits_do_not_depend_on_the_others():
    weights, x, routing = make(), tokens(16), routed(16)
    with emu.patched():
        whole = experts.experts(x, routing, weights)
        for low, high in ((0, 1), (3, 4), (2, 9), (7, 16)):
            part = Routing(routing.indices[low:high], routing.weights[low:high])
            assert mx.array_equal(experts.experts(x[low:high], part, weights), whole[low:high])
        crowd = mx.concatenate([x[:1], mx.broadcast_to(1e3 * x[1:2], (63, 128))])  # all with the first one's experts
        same = Routing(mx.broadcast_to(routing.indices[:1], (64, 3)), mx.broadcast_to(routing.weights[:1], (64, 3)))
        assert mx.array_equal(experts.experts(crowd, same, weights)[0], whole[0])


@emulated
def test_large_activations_stay_finite():
    weights, routing = make("plain", dtype=mx.float32), routed(2, dtype=mx.float32)
    x = 300 * tokens(2, dtype=mx.float32)
    with emu.patched():
        y = experts.experts(x, routing, weights)
    assert checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[mx.float32]


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_the_result(order):
    weights, x, routing = make(), tokens(5), routed(5)
    with emu.patched():
        y = experts.experts(x, routing, weights)
    with emu.patched(order=order, seed=11):
        assert mx.array_equal(experts.experts(x, routing, weights), y)


@emulated
def test_rows_of_the_real_size():
    # 26B-A4B: hidden 2816, width 704, 8 experts a token; here 4 experts exist and two are used
    weights, x = make("affine4", 4, 2816, 704), tokens(2, 2816)
    routing = routed(2, 2, 4)
    with emu.patched() as launches:
        y = experts.experts(x, routing, weights)
    assert checks.relative_error(y, by_hand(x, routing, weights)) < TOLERANCE[mx.bfloat16]
    assert emu.bytes_read(launches, *WEIGHTS) == distinct_bytes(routing, weights)
    assert max(k.statistics.threadgroup_bytes for k in launches) <= 32768


def launches_of(weights: Experts, x: mx.array, routing: Routing):
    with emu.patched(dry=True) as launches:
        experts.experts(x, routing, weights)
    return launches


def smallest():
    return make("plain", 1, 1, 1), tokens(1, 1), routed(1, 1, 1)


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(make(), tokens(5), routed(5)))
    checks.assert_text_is_mlx_s(launches_of(*smallest()))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one():
    checks.assert_lint_is_clean(launches_of(*smallest()))
    checks.assert_lint_is_clean(launches_of(make(), tokens(1), routed(1)))
    checks.assert_lint_is_clean(launches_of(make("mxfp4"), tokens(5), routed(5)))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    checks.assert_compiles_for_cuda(launches_of(make(), tokens(5), routed(5)))


MUTANTS = [  # what is wrong, kernel, part, old, new
    (
        "equal experts get one rank",
        "experts_groups",
        "source",
        "rank += ids[q] < ids[p] || twin;",
        "rank += ids[q] < ids[p];",
    ),
    (
        "no barrier before the leaders are counted",
        "experts_groups",
        "source",
        "leads[p] = earlier == 0;\n    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);",
        "leads[p] = earlier == 0;\n    }",
    ),
    (
        "empty groups are not marked",
        "experts_groups",
        "source",
        "if (g >= groups) start[g] = P;",
        "if (g == groups) start[g] = P;",
    ),
    (
        "no barrier after the copy",
        "experts_gate_up",
        "source",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    const uint quads",
        "const uint quads",
    ),
    (
        "the tile is read past the last row",
        "experts_gate_up",
        "source",
        "const uint rows = min(uint(R), uint(ROWS) - row0)",
        "const uint rows = R",
    ),
    (
        "only four tokens of an expert are served",
        "experts_gate_up",
        "source",
        "const uint quads = (count + 3) / 4;",
        "const uint quads = 1;",
    ),
    ("every token is the first", "experts_gate_up", "source", "from[t] = pairs[t] / TOP * K;", "from[t] = 0;"),
    (
        "gate and up are swapped",
        "experts_gate_up",
        "source",
        "gelu_tanh(gate_sum) * up_sum",
        "gelu_tanh(up_sum) * gate_sum",
    ),
    (
        "down takes a token's first activation",
        "experts_down",
        "source",
        "from[t] = pairs[t] * K;",
        "from[t] = pairs[t] / TOP * TOP * K;",
    ),
    ("biases are scales", "experts_down", "source", "down_b[i] = down_biases[base", "down_b[i] = down_scales[base"),
    ("the last expert is left out", "experts_combine", "source", "j < TOP", "j + 1 < TOP"),
    ("the guard of the last columns is gone", "experts_combine", "source", "if (h >= H) return;", ""),
    ("gelu is the sigmoid's", "experts_gate_up", "header", "0.7978845608f", "0.8510f"),
]


def hard():
    """Cases with more than four tokens an expert and experts nobody wants; one with biases, one with a ragged tile."""
    x, routing = tokens(24), routed(24, 3, 9)
    return [(x, routing, make("affine4", 12)), (x, routing, make("plain", 12, width=60))]


def is_right(case) -> bool:
    return checks.relative_error(experts.experts(*case), by_hand(*case)) < TOLERANCE[mx.bfloat16]


@emulated
def test_what_the_mutants_run_on_is_right_without_them():
    with emu.patched():
        assert all(is_right(case) for case in hard())


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, kernel, part, old, new = mutant
    with emu.patched(edit=checks.planted(kernel, part, old, new)):
        try:
            assert not all(is_right(case) for case in hard())
        except emu.EmulationError:
            return
