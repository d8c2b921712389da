"""What the self-test tries of each kernel: values, bits and a chain to time, at the sizes of a loaded model.

Bits are compared on products whose exact value is 0: what is left of them is rounding, and shows in every bit in which
order it came about. Weights are the model's own in chains, since those of all layers together leave any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import copy
from mlx_mtp.kernels import attend, choice, delta, experts, gate_up, head, rows_qmv, verdict
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.kernels.self_test import Case

TOLERANCE = 0.02  # of the largest value: bfloat16 keeps 8 bits
CHAIN_BYTES = 160 * 2**20  # of different weights in a chain: more than any cache of a chip holds
LEAST_CALLS, MOST_CALLS = 8, 64  # of a chain
LOUD = 4096.0  # of inputs whose products cancel: what is left must not be too small for float16
SOME_ROWS = 40  # of a matrix, in checks


def layout_name(matrix: Matrix) -> str:
    """A layout as people read it; matrices with the same name run in the same kernels."""
    if not matrix.packed:
        return f"{matrix.weight.dtype} weights".removeprefix("mlx.core.")
    scales = f" {matrix.packing()[0].dtype}".replace("mlx.core.", "") if matrix.mode == "affine" else ""
    return f"{matrix.mode} {matrix.bits} bit, groups of {matrix.group_size}{scales}"


def products(shape: str, matrices: Sequence[Matrix], dtype: mx.Dtype) -> Case:
    """rows_qmv for all matrices of a layout."""

    @cache
    def chained() -> list[tuple[Matrix, ...]]:
        return _filling([(m,) for m in matrices])

    def check() -> Iterator[str | None]:
        k = matrices[0].columns
        x, matrix = _normal(0, 12, k).astype(dtype), _like(matrices[0], _normal(1, SOME_ROWS, k))
        yield _differs(rows_qmv.rows_qmv(x, matrix), rows_qmv.reference(x.astype(mx.float32), matrix))
        x, weights = _cancelling(matrices[0], k)
        yield _alone(lambda x: rows_qmv.rows_qmv(x, weights[0]), x.astype(dtype))

    def chain(rows: int, by_kernel: bool) -> mx.array:
        product = rows_qmv.rows_qmv if by_kernel else rows_qmv.reference
        return _chained(rows, dtype, [(m.columns, lambda x, m=m: product(x, m)) for (m,) in chained()])

    return Case("rows_qmv", shape, lambda: _first(check()), chain)


def gates(shape: str, pairs: Sequence[tuple[Matrix, Matrix]], dtype: mx.Dtype) -> Case:
    """gate_up for all pairs of a layout."""

    @cache
    def chained() -> list[tuple[Matrix, ...]]:
        return _filling(pairs)

    def check() -> Iterator[str | None]:
        k = pairs[0][0].columns
        gate, up = (_like(pairs[0][0], _normal(seed, SOME_ROWS, k)) for seed in (1, 2))
        x = (_normal(0, 12, k) * k**-0.5).astype(dtype)
        yield _differs(gate_up.gate_up(x, gate, up), gate_up.reference(x.astype(mx.float32), gate, up))
        x, weights = _cancelling(pairs[0][0], k)
        yield _alone(lambda x: gate_up.gate_up(x, *weights), x.astype(dtype))

    def chain(rows: int, by_kernel: bool) -> mx.array:
        both = gate_up.gate_up if by_kernel else gate_up.reference
        return _chained(rows, dtype, [(g.columns, lambda x, g=g, u=u: both(x, g, u)) for g, u in chained()])

    return Case("gate_up", shape, lambda: _first(check()), chain)


def routed(shape: str, layers: Sequence[experts.Experts], top: int, dtype: mx.Dtype) -> Case:
    """experts for all layers, each token with `top` of them."""
    count, hidden = layers[0].gate.weight.shape[0], layers[0].gate.columns

    def routing(seed: int, tokens: int) -> experts.Routing:
        order = mx.argsort(mx.random.uniform(shape=(tokens, count), key=mx.random.key(seed)), axis=-1)
        weights = mx.abs(_normal(seed + 1, tokens, top)).astype(dtype)
        return experts.Routing(order[:, :top].astype(mx.uint32), weights)

    def check() -> Iterator[str | None]:
        x, chosen = _normal(0, 9, hidden).astype(dtype), routing(1, 9)
        y = experts.experts(x, chosen, layers[0])
        yield _differs(y, experts.reference(x.astype(mx.float32), chosen, layers[0]))
        for rows in (slice(0, 1), slice(8, 9), slice(0, 4)):
            some = experts.Routing(chosen.indices[rows], chosen.weights[rows])
            yield _same(y[rows], experts.experts(x[rows], some, layers[0]))

    def chain(rows: int, by_kernel: bool) -> mx.array:
        run = experts.experts if by_kernel else experts.reference
        used = list(islice(cycle(layers), max(LEAST_CALLS, min(16, len(layers)))))
        chosen = [routing(2 * i, rows) for i in range(len(used))]
        mx.eval([(r.indices, r.weights) for r in chosen])
        steps = zip(chosen, used, strict=True)
        return _chained(rows, dtype, [(hidden, lambda x, r=r, w=w: run(x, r, w)) for r, w in steps])

    return Case("experts", shape, lambda: _first(check()), chain)


def attention(shape: str, heads: tuple[int, int], size: int, window: int | None, dtype: mx.Dtype) -> Case:
    """attend for layers with heads of so many queries and keys; window: None for full layers."""
    columns = max(2, attend.queries_at_once(size) * heads[1] // heads[0] + 1) | 1  # more than a threadgroup holds
    slots = (window or 290) + columns + 9 & ~1

    def given(seed: int, columns: int, slots: int, begin: int) -> attend.Attention:
        q = _normal(seed, 1, heads[0], columns, size) * size**-0.5
        keys, values = (_normal(seed + i, 1, heads[1], slots, size).astype(dtype) for i in (1, 2))
        start = mx.array([begin] * (8 if window else 1), mx.int32)
        return attend.Attention(q.astype(dtype), keys, values, start, window or attend.EVERYTHING)

    def check() -> Iterator[str | None]:
        begin = slots + 5 if window else 291  # a ring that has come round; odd
        one = given(0, columns, slots, begin)
        q, keys, values = (x.astype(mx.float32) for x in (one.q, one.keys, one.values))
        exact = attend.reference(attend.Attention(q, keys, values, one.start[:1], one.window))
        yield _differs(attend.attend(one), exact)
        signs = mx.array([LOUD, -LOUD] * (slots // 2))[:, None].astype(dtype)
        keys, values = (mx.repeat(x[:, :, ::2], 2, axis=2) for x in (one.keys, one.values))
        values = values * signs  # so that all values of an even number of slots cancel
        y = attend.attend(attend.Attention(one.q, keys, values, one.start, one.window))
        for at in (0, columns - 1):
            alone = attend.Attention(one.q[:, :, at : at + 1], keys, values, one.start + at, one.window)
            yield _same(y[:, :, at : at + 1], attend.attend(alone))

    def chain(rows: int, by_kernel: bool) -> mx.array:
        slots = (window or 2048) + 40
        layers = [given(3 * i, rows, slots, slots - rows) for i in range(2 * LEAST_CALLS)]
        q, seen = layers[0].q, attend.visible(layers[0])[:1]
        mx.eval(q, seen, [(g.keys, g.values, g.start) for g in layers])
        for g in layers:
            if by_kernel:
                q = attend.attend(attend.Attention(q, g.keys, g.values, g.start, g.window))
            else:
                q = mx.fast.scaled_dot_product_attention(q, g.keys, g.values, scale=1.0, mask=seen)
        return q

    return Case("attend", shape, lambda: _first(check()), chain)


def recurrence(shape: str, heads: tuple[int, int], sizes: tuple[int, int]) -> Case:
    """delta for nets with heads of so many keys and values, of these sizes."""
    (keys, values), (key, value) = heads, sizes

    def given(seed: int, rows: int, columns: int) -> tuple[mx.array, delta.Given]:
        qk = mx.fast.rms_norm(_normal(seed, rows, columns, 2 * keys, key), None, 1e-6) * key**-0.5
        mixed = _normal(seed + 1, rows, columns, 2 * keys * key + values * value)
        gates = mx.sigmoid(_normal(seed + 2, 2, rows, columns, values))
        return _normal(seed + 3, rows, values, value, key), delta.Given(qk, mixed, gates[0], gates[1])

    def check() -> Iterator[str | None]:
        for rows in (1, 8):
            state, brought = given(0, rows, 5)
            again = mx.array([2, 0] * 4, mx.int32)[:rows]
            for span in (delta.Span(again, 2, 2, None, True), delta.Span(again, 2, 2, None, False)):
                pairs = zip(delta.delta(state, brought, span), delta.reference(state, brought, span), strict=True)
                for got, wanted in pairs:
                    yield _differs(got, wanted)
        state, brought = given(4, 1, 5)
        together = delta.delta(state, brought, delta.Span(None, 0, 0, None, True))
        for t in range(5):
            parts = (brought.qk, brought.mixed, brought.decay, brought.beta)
            one = delta.Given(*(x[:, t : t + 1] for x in parts))
            y, state = delta.delta(state, one, delta.Span(None, 0, 0, None, True))
            yield _same(together[0][:, t : t + 1], y)
        yield _same(together[1], state)

    def chain(rows: int, by_kernel: bool) -> Any:
        run, layers = delta.delta if by_kernel else delta.reference, [given(4 * i, 1, rows) for i in range(16)]
        mx.eval([(state, *vars(brought).values()) for state, brought in layers])
        y, after = mx.zeros((1, 1, values, value)), []
        for state, g in layers:
            waits = delta.Given(g.qk, g.mixed, g.decay + 0 * y[:, :1, :, 0], g.beta)
            y, state = run(state, waits, delta.Span(None, 0, 0, None, True))
            after.append(state)
        return y, after

    return Case("delta", shape, lambda: _first(check()), chain)


def clustered(shape: str, clusters: head.Clusters, dtype: mx.Dtype) -> Case:
    """head for a drafter's vocabulary."""
    size = clusters.centroids.columns

    def check() -> Iterator[str | None]:
        for rows in (1, 9):
            y = _normal(rows, rows, size).astype(dtype)
            (logits, tokens), (exact, ids) = head.logits(y, clusters), head.reference(y, clusters)
            yield _tokens(mx.sort(tokens, axis=-1), mx.sort(ids, axis=-1))
            yield _differs(_ordered(logits, tokens), _ordered(exact, ids))

    def chain(rows: int, by_kernel: bool) -> mx.array:
        run = head.logits if by_kernel else head.reference
        states, logits = _normal(0, 2 * LEAST_CALLS, rows, size).astype(dtype), mx.zeros((rows, 1))
        mx.eval(states)
        for y in states:
            logits, _ = run(y + 0 * logits[:, :1].astype(dtype), clusters)
        return logits

    return Case("head", shape, lambda: _first(check()), chain)


def verdicts(shape: str, vocabulary: int, hidden: int, dtype: mx.Dtype) -> Case:
    """verdict over a vocabulary."""

    def judged(rows: int, columns: int, draw: choice.Draw | None, least: float | None) -> verdict.Round:
        logits = _normal(rows, rows, columns, vocabulary)
        threshold = None if least is None else mx.full((rows, columns), least)
        states, nothing = _normal(1, rows, columns, hidden).astype(dtype), mx.zeros((rows, columns - 1), mx.int32)
        right = verdict.reference(verdict.Round(logits, nothing, states, threshold, draw)).tokens[:, :-1]
        draft = mx.where(mx.arange(rows)[:, None] > mx.arange(columns - 1), right, 0)  # rows keep 1, 2, .. columns
        return verdict.Round(logits, draft, states, threshold, draw)

    def check() -> Iterator[str | None]:
        for rows, columns in ((1, 1), (1, 3), (3, 4)):
            for draw, least in ((None, None), (_draw(rows), None), (_draw(rows), 2.5)):
                case = judged(rows, columns, draw, least)
                got, want = verdict.verdict(case), verdict.reference(case)
                yield _tokens(got.tokens, want.tokens)
                yield _tokens(mx.stack([got.kept, got.bonus]), mx.stack([want.kept, want.bonus]))
                yield _differs(got.hidden, want.hidden)

    def chain(rows: int, by_kernel: bool) -> mx.array:
        run, one = verdict.verdict if by_kernel else verdict.reference, judged(1, rows, None, None)
        logits, states = [one.logits + i for i in range(LEAST_CALLS)], one.hidden
        mx.eval(logits, one.draft, states)
        for each in logits:
            states = states + 0 * run(verdict.Round(each, one.draft, states)).hidden[:, None]
        return states

    return Case("verdict", shape, lambda: _first(check()), chain)


# what checks are made of ------------------------------------------------------------------------------------


def _first(found: Iterator[str | None]) -> str | None:
    return next((reason for reason in found if reason), None)


def _differs(got: mx.array, expected: mx.array) -> str | None:
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    apart, size = float(mx.abs(got - expected).max().item()), float(mx.abs(expected).max().item())  # pyright: ignore[reportArgumentType]
    if apart <= TOLERANCE * size:  # false for nan
        return None
    return f"its result differs from the reference by {apart:.3g} of {size:.3g}"


def _same(together: mx.array, alone: mx.array) -> str | None:
    """A row computed among others, and the same row computed alone, must agree to the bit."""
    return None if mx.array_equal(together, alone).item() else "a row's result depends on the other rows"


def _tokens(got: mx.array, expected: mx.array) -> str | None:
    return None if mx.array_equal(got, expected).item() else "its tokens differ from the reference's"


def _ordered(logits: mx.array, tokens: mx.array) -> mx.array:
    """Logits by their tokens, which stand in any order."""
    return mx.take_along_axis(logits, mx.argsort(tokens, axis=-1), axis=-1)


def _alone(product: Callable[[mx.array], mx.array], x: mx.array) -> str | None:
    """Rows on both sides of the border between two tiles alone, and fewer of them than a tile has."""
    together = product(x)
    tile = rows_qmv.TILE
    parts = [slice(i, i + 1) for i in (0, tile - 1, tile, x.shape[0] - 1)] + [slice(0, 3), slice(0, tile)]
    return _first(_same(together[rows], product(x[rows])) for rows in parts)


def _normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _draw(rows: int) -> choice.Draw:
    """The first of several rows is greedy, the others are not."""
    seed = mx.arange(1, 2 * rows + 1).astype(mx.uint32).reshape(rows, 2)
    cold = [0.0] * (rows > 1)
    return choice.Draw(mx.array(cold + [0.8] * (rows - len(cold))), seed, mx.arange(rows).astype(mx.int32) + 40)


def _like(matrix: Matrix, dense: mx.array) -> Matrix:
    """A dense [N, K] in a matrix's layout."""
    if not matrix.packed:
        return Matrix(dense.astype(matrix.weight.dtype))
    scales = matrix.packing()[0].dtype
    if matrix.mode == "affine":
        dense = dense.astype(scales)
    return Matrix.quantized(dense, matrix.group_size, matrix.bits, matrix.mode)


def _cancelling(matrix: Matrix, k: int) -> tuple[mx.array, list[Matrix]]:
    """x [12, K] and two matrices in the same layout, of whose groups one half is the other in another order, so that
    all products are 0 but for rounding."""
    group = next(n for n in (64, 32, 16, 8, 2) if k % n == 0 and n >= 2) if not matrix.packed else matrix.group_size

    def doubled(half: mx.array, sign: int) -> mx.array:
        half = mx.unflatten(half, -1, (k // group, group // 2))
        return mx.concatenate([half, sign * half[..., 3:], sign * half[..., :3]], axis=-1).flatten(-2)

    x = doubled(_normal(5, 12, k // 2), -1) * LOUD
    return x, [_like(matrix, doubled(_normal(seed, SOME_ROWS, k // 2), 1)) for seed in (6, 7)]


def _filling(parts: Sequence[tuple[Matrix, ...]]) -> list[tuple[Matrix, ...]]:
    """Matrices, in the order given, until no cache holds them; those of a small model several times, each time in
    buffers of their own."""
    out, size = [], 0
    while len(out) < LEAST_CALLS or (size < CHAIN_BYTES and len(out) < MOST_CALLS):
        own = parts[len(out) % len(parts)]
        out.append(own if len(out) < len(parts) else tuple(_copied(m) for m in own))
        size += sum(t.nbytes for m in own for t in m.tensors)
    mx.eval([m.tensors for own in out for m in own])
    return out


def _copied(matrix: Matrix) -> Matrix:
    biases = None if matrix.biases is None else copy(matrix.biases)
    scales = None if matrix.scales is None else copy(matrix.scales)
    return Matrix(copy(matrix.weight), scales, biases, matrix.group_size, matrix.bits, matrix.mode)


def _chained(rows: int, dtype: mx.Dtype, steps: list[tuple[int, Callable[[mx.array], mx.array]]]) -> mx.array:
    """Products one after another, each with inputs of so many values."""
    inputs = {k: _normal(k, rows, k).astype(dtype) for k in {k for k, _ in steps}}
    mx.eval(list(inputs.values()))
    y = mx.zeros((rows, 1), dtype)
    for k, product in steps:
        y = product(inputs[k] + 0 * y[:, :1])
    return y
