"""The kernels on an NVIDIA GPU, translated to CUDA, against the reference. Skips without MLX's CUDA backend.

This file has not run on a GPU so far: only compile checks of the same text have. The command, on a machine with one:
`pip install mlx[cuda13] pytest` and `python -m pytest tests/test_kernels_on_cuda.py`.
"""

import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks, cuda

from mlx_mtp.kernels import attend, delta, experts, gate_up, head, rows_qmv, verdict
from mlx_mtp.kernels.attend import Attention
from mlx_mtp.kernels.choice import Draw
from mlx_mtp.kernels.experts import Experts, Routing
from mlx_mtp.kernels.head import Clusters
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.kernels.verdict import Round

HERE = hasattr(mx, "cuda") and mx.cuda.is_available()
pytestmark = pytest.mark.skipif(not HERE, reason="this build of MLX has no CUDA backend, or there is no GPU")

BF16 = 1e-2


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(mx.bfloat16)


def draws(rows: int) -> Draw:
    rng = np.random.default_rng(rows)
    seeds = mx.array(rng.integers(0, 2**32, (rows, 2), dtype=np.uint32))
    return Draw(mx.array(rng.choice([0.0, 0.5, 2.0], rows).astype(np.float32)), seeds, mx.arange(rows))


@pytest.mark.parametrize("layout", [None, (64, 4, "affine"), (32, 8, "affine"), (32, 4, "mxfp4"), (32, 8, "mxfp8")])
def test_rows_qmv(layout):
    dense, x = normal(1000, 512), normal(16, 512)
    matrix = Matrix(dense) if layout is None else Matrix.quantized(dense, *layout)
    with cuda.on_cuda():
        y = rows_qmv.rows_qmv(x, matrix)
        alone = mx.concatenate([rows_qmv.rows_qmv(x[i : i + 1], matrix) for i in range(16)])
        assert mx.array_equal(y, alone)
    assert checks.relative_error(y, x.astype(mx.float32) @ matrix.dense().T) < BF16


@pytest.mark.parametrize("layout", [None, (64, 4, "affine"), (32, 4, "mxfp4")])
def test_gate_up(layout):
    x = normal(16, 512) / 16
    dense = normal(1000, 512), normal(1000, 512) + 1
    gate, up = (Matrix(w) if layout is None else Matrix.quantized(w, *layout) for w in dense)
    with cuda.on_cuda():
        y = gate_up.gate_up(x, gate, up)
        alone = mx.concatenate([gate_up.gate_up(x[i : i + 1], gate, up) for i in range(16)])
        assert mx.array_equal(y, alone)
    assert checks.relative_error(y, gate_up.reference(x.astype(mx.float32), gate, up)) < BF16


def test_head():
    order = mx.array(np.random.default_rng(0).permutation(4096).astype(np.int32))
    clusters = Clusters(Matrix(normal(64, 256)), order, Matrix(normal(4096, 256)), 8)
    y = normal(9, 256)
    with cuda.on_cuda():
        found = head.logits(y, clusters)
    (logits, tokens), (exact, ids) = found, head.reference(y, clusters)
    assert mx.array_equal(mx.sort(tokens), mx.sort(ids))
    assert checks.relative_error(mx.sort(logits), mx.sort(exact)) < BF16


def test_verdict():
    logits = 3 * normal(3, 4, 50_000)
    draft = mx.argmax(logits, axis=-1)[:, :-1].astype(mx.int32)
    judged = Round(logits, draft, normal(3, 4, 700), draw=draws(3))
    with cuda.on_cuda():
        got = verdict.verdict(judged)
    want = verdict.reference(judged)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.kept.tolist() == want.kept.tolist()
    assert mx.array_equal(got.hidden, want.hidden)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_experts(n):
    rng = np.random.default_rng(n)
    indices = mx.array(np.stack([rng.permutation(16)[:4] for _ in range(n)]))
    routing = Routing(indices, mx.array(rng.random((n, 4)).astype(np.float32)))
    shapes = [(16, 192, 256), (16, 192, 256), (16, 256, 192)]
    weights = Experts(*(Matrix.quantized(normal(*shape) * 0.06, 64, 4) for shape in shapes))
    x = normal(n, 256)
    with cuda.on_cuda():
        y = experts.experts(x, routing, weights)
    assert checks.relative_error(y, experts.reference(x.astype(mx.float32), routing, weights)) < BF16


@pytest.mark.parametrize("size", [256, 512])
def test_attend(size):
    shapes = [(2, 8, 4, size), (2, 1, 900, size), (2, 1, 900, size)]
    q, keys, values = (normal(*shape) for shape in shapes)
    given = Attention(q * size**-0.5, keys, values, mx.array([17, 850]))
    with cuda.on_cuda():
        y = attend.attend(given)
    assert checks.relative_error(y, attend.reference(given)) < BF16


def test_delta():
    qk, mixed = normal(2, 6, 32, 128).astype(mx.float32) / 128, normal(2, 6, 32 * 128 + 32 * 128).astype(mx.float32)
    gates = mx.sigmoid(normal(2, 2, 6, 32).astype(mx.float32))
    state, given = normal(2, 32, 128, 128).astype(mx.float32), delta.Given(qk, mixed, gates[0], gates[1])
    for takes in (False, True):
        span = delta.Span(mx.array([2, 0], mx.int32), 2, 3, None, takes)
        with cuda.on_cuda():
            got = delta.delta(state, given, span)
        for x, y in zip(got, delta.reference(state, given, span), strict=True):
            assert checks.relative_error(x, y) < BF16
