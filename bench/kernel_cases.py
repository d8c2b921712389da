"""What bench/kernels.py measures: every kernel at the shapes of published sizes, with random weights.

Owns the tensors, what each side computes from them, and the least bytes a call must move. Knows no clock. Least bytes:
weights once; of `head` the clusters of every row; of `experts` the number of distinct ones to be expected.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_mtp.kernels import attend, delta, experts, gate_up, head, rows_qmv, verdict
from mlx_mtp.kernels.choice import Draw
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.models.config import LayerConfig, MoeConfig
from mlx_mtp.models.qwen3_5 import DeltaConfig, QwenConfig
from mlx_mtp.shapes import Shape

Layout = tuple[int, int, str] | None
Arrays = list[mx.array]
LAYOUTS: dict[str, Layout] = {"affine4": (64, 4, "affine"), "affine8": (64, 8, "affine"), "mxfp4": (32, 4, "mxfp4")}
LAYOUTS |= {"mxfp8": (32, 8, "mxfp8"), "nvfp4": (16, 4, "nvfp4"), "bf16": None}
MOST = 16  # columns
COLD_BYTES = 256e6  # moved between two uses of the same weights: more than the caches of a GPU hold
SLICE_VALUES = 2**27  # drawn at a time
MOST_COPIES = 64


@dataclass(frozen=True)
class Work:
    """One copy of a case's tensors. given: the input, 16 columns; the rest take it cut to some of them."""

    given: mx.array
    why_not: Callable[[mx.array], str | None]
    ours: Callable[[mx.array], Arrays]
    mlx: Callable[[mx.array], Arrays]
    exact: Callable[[mx.array], Arrays]


@dataclass(frozen=True)
class Case:
    """A kernel at one shape. moves: least bytes by columns; holds: bytes of a copy; axis: of columns, in and out."""

    kernel: str
    what: str
    moves: Callable[[int], int]
    holds: int
    make: Callable[[int], Work]
    axis: int = 0

    def copies(self, room_bytes: float) -> int:
        """How many sets of weights take turns."""
        return max(1, min(MOST_COPIES, math.ceil(COLD_BYTES / self.moves(1)), int(room_bytes / self.holds)))

    def cut(self, x: mx.array, columns: int) -> mx.array:
        """The first columns of an input or of a first output."""
        return mx.contiguous(mx.take(x, mx.arange(columns), axis=self.axis))


# tensors --------------------------------------------------------------------------------------------------


def weight_bytes(rows: int, columns: int, layout: Layout) -> int:
    if layout is None:
        return 2 * rows * columns
    group, bits, mode = layout
    return rows * (columns * bits // 8 + columns // group * (4 if mode == "affine" else 1))


def normal(seed: int, *sizes: int) -> mx.array:
    return mx.random.normal(sizes, key=mx.random.key(seed)).astype(mx.bfloat16)


def drawn(seed: int, layout: Layout, *sizes: int) -> Matrix:
    """Random weights, in parts: the largest would take eight times its packed size at once."""
    each, parts = max(1, SLICE_VALUES // math.prod(sizes[1:])), []
    for first in range(0, sizes[0], each):
        dense = normal(seed * 2**32 + first + 1, min(each, sizes[0] - first), *sizes[1:]) * sizes[-1] ** -0.5
        parts.append(Matrix.quantized(dense, *layout) if layout else Matrix(dense))
        mx.eval(parts[-1].tensors)
    names = ("weight", "scales", "biases")[: len(parts[0].tensors)]
    return replace(parts[0], **{name: mx.concatenate([vars(part)[name] for part in parts]) for name in names})


def exact_product(x: mx.array, matrix: Matrix) -> mx.array:
    """In float32 from dequantised weights, a part of the rows at a time."""
    each, parts = max(1, SLICE_VALUES // matrix.columns), []
    for first in range(0, matrix.rows, each):
        rows = matrix.take(mx.arange(first, min(first + each, matrix.rows)))
        parts.append(x.astype(mx.float32) @ rows.dense().T)
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=-1)


def attempt(compute: Callable[[], Arrays]) -> tuple[Arrays | None, str]:
    """The arrays, or the first line of what went wrong."""
    try:
        out = compute()
        mx.eval(out)
    except Exception as error:  # of MLX or a compiler: an operation without CUDA, a kernel that is refused
        return None, (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return out, ""


def difference(got: Arrays, want: Arrays) -> float:
    """The largest of all outputs."""
    return max(float(_difference(*pair).item()) for pair in zip(got, want, strict=True))  # pyright: ignore[reportArgumentType]


def _difference(got: mx.array, want: mx.array) -> mx.array:
    """The largest, over the largest value; of integers the share that differs."""
    if mx.issubdtype(got.dtype, mx.integer):
        return mx.mean(got != want)
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return mx.abs(got - want).max() / mx.abs(want).max()


# cases ----------------------------------------------------------------------------------------------------


def product(what: str, rows: int, columns: int, layout: Layout) -> Case:
    def make(seed: int) -> Work:
        matrix = drawn(seed, layout, rows, columns)
        return Work(
            normal(seed, MOST, columns),
            lambda x: rows_qmv.why_not(x, matrix),
            lambda x: [rows_qmv.rows_qmv(x, matrix)],
            lambda x: [rows_qmv.reference(x, matrix)],
            lambda x: [exact_product(x, matrix)],
        )

    held = weight_bytes(rows, columns, layout)
    return Case("rows_qmv", f"{what} {rows}x{columns}", lambda n: held + 2 * n * (rows + columns), held, make)


def gated(rows: int, columns: int, layout: Layout) -> Case:
    def make(seed: int) -> Work:
        gate, up = drawn(2 * seed, layout, rows, columns), drawn(2 * seed + 1, layout, rows, columns)
        return Work(
            normal(seed, MOST, columns),
            lambda x: gate_up.why_not(x, gate, up),
            lambda x: [gate_up.gate_up(x, gate, up)],
            lambda x: [gate_up.reference(x, gate, up)],
            lambda x: [gate_up.geglu(exact_product(x, gate), exact_product(x, up))],
        )

    held = 2 * weight_bytes(rows, columns, layout)
    return Case("gate_up", f"{rows}x{columns}", lambda n: held + 2 * n * (rows + columns), held, make)


def routed(moe: MoeConfig, hidden: int, layout: Layout) -> Case:
    count, top, width = moe.experts, moe.top_k, moe.width

    def make(seed: int) -> Work:
        rng = np.random.default_rng(seed)
        indices = mx.array(np.stack([rng.permutation(count)[:top] for _ in range(MOST)]))
        shares = mx.array(rng.random((MOST, top), np.float32))
        shapes = ((count, width, hidden), (count, width, hidden), (count, hidden, width))
        weights = experts.Experts(*(drawn(3 * seed + i, layout, *sizes) for i, sizes in enumerate(shapes)))
        routing = [experts.Routing(mx.contiguous(indices[:n]), mx.contiguous(shares[:n])) for n in range(MOST + 1)]
        mx.eval([(r.indices, r.weights) for r in routing])

        def exact(x: mx.array) -> Arrays:
            chosen = routing[len(x)]

            def times(matrix: Matrix, y: mx.array) -> mx.array:
                return (matrix.take(chosen.indices).dense() @ y[..., None])[..., 0]

            each = x.astype(mx.float32)[:, None]
            active = gate_up.geglu(times(weights.gate, each), times(weights.up, each))
            return [(times(weights.down, active) * chosen.weights[..., None]).sum(axis=1)]

        return Work(
            normal(seed, MOST, hidden),
            lambda x: experts.why_not(x, routing[len(x)], weights),
            lambda x: [experts.experts(x, routing[len(x)], weights)],
            lambda x: [experts.reference(x, routing[len(x)], weights)],
            exact,
        )

    one = 2 * weight_bytes(width, hidden, layout) + weight_bytes(hidden, width, layout)

    def moves(n: int) -> int:
        return round(count * (1 - (1 - top / count) ** n) * one) + 4 * n * hidden

    return Case("experts", f"{top} of {count}, {width}x{hidden}", moves, count * one, make)


def attention(layer: LayerConfig, context: int) -> Case:
    heads, kv, size = layer.heads, layer.kv_heads, layer.head_dim
    window = layer.window or attend.EVERYTHING
    slots = min(context + MOST, window + MOST - 1)

    def make(seed: int) -> Work:
        keys, values = (normal(3 * seed + i, 1, kv, slots, size) for i in range(2))
        start = mx.array([context])
        mx.eval(keys, values, start)

        def given(q: mx.array) -> attend.Attention:
            return attend.Attention(q, keys, values, start, window)

        q = normal(3 * seed + 2, 1, heads, MOST, size) * size**-0.5
        masks = [attend.visible(given(q[:, :, :n])) for n in range(1, MOST + 1)]  # the engine makes one a pass
        mx.eval(masks)

        def fused(q: mx.array) -> Arrays:
            mask = masks[q.shape[2] - 1]
            return [mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)]

        def exact(q: mx.array) -> Arrays:
            wide = [x.astype(mx.float32) for x in (q, keys, values)]
            return [attend.reference(attend.Attention(wide[0], wide[1], wide[2], start, window))]

        return Work(q, lambda q: attend.why_not(given(q)), lambda q: [attend.attend(given(q))], fused, exact)

    def moves(n: int) -> int:
        return 4 * kv * size * min(context + n, window + n - 1) + 4 * n * heads * size

    what = f"{'full' if layer.window is None else 'sliding'} {heads}/{kv} heads of {size}, {slots} slots"
    return Case("attend", what, moves, 4 * kv * size * slots, make, axis=2)


def clustered(found: Shape, clusters: tuple[int, int], layout: Layout) -> Case:
    (count, top), vocabulary = clusters, found.target.vocab_size
    hidden, size = found.drafter.text.hidden_size, vocabulary // count

    def make(seed: int) -> Work:
        order = mx.array(np.random.default_rng(seed).permutation(count * size).astype(np.int32))
        embedding = drawn(2 * seed + 1, layout, count * size, hidden)
        clusters = head.Clusters(drawn(2 * seed, layout, count, hidden), order, embedding, top)
        return Work(
            normal(seed, MOST, hidden),
            lambda y: head.why_not(y, clusters),
            lambda y: [in_order(*head.logits(y, clusters))],
            lambda y: [in_order(*head.reference(y, clusters))],
            lambda y: [in_order(*head.reference(y, clusters))],
        )

    one, scores = top * size * (4 + weight_bytes(1, hidden, layout)), weight_bytes(count, hidden, layout)
    held = weight_bytes(count * size, hidden, layout) + scores + 4 * count * size
    what = f"{top} of {count} clusters, {hidden} hidden"
    return Case("head", what, lambda n: scores + n * one, held, make)


def in_order(logits: mx.array, tokens: mx.array) -> mx.array:
    """Logits by their tokens, which stand in any order."""
    return mx.take_along_axis(logits, mx.argsort(tokens, axis=-1), axis=-1)


def judged(found: Shape, noisy: bool) -> Case:
    """Filtered by a threshold that everything passes: it ties the first of the two dispatches to the call before."""
    vocabulary, hidden = found.target.vocab_size, found.target.hidden_size

    def make(seed: int) -> Work:
        logits, states = normal(2 * seed, MOST, vocabulary), normal(2 * seed + 1, MOST, hidden)
        draft = mx.argmax(logits, axis=-1).astype(mx.int32)
        draw = Draw(mx.array([0.8]), mx.array([[seed, 1]], mx.uint32), mx.array([seed])) if noisy else None
        mx.eval(logits, states, draft, vars(draw) if draw else None)

        def round_of(least: mx.array) -> verdict.Round:
            n = least.shape[1]
            return verdict.Round(logits[:n][None], draft[: n - 1][None], states[:n][None], least, draw)

        def outputs(found: verdict.Verdict) -> Arrays:
            return [found.tokens, found.kept, found.bonus, found.hidden]

        return Work(
            mx.full((1, MOST), -1e30),
            lambda least: verdict.why_not(round_of(least)),
            lambda least: outputs(verdict.verdict(round_of(least))),
            lambda least: outputs(verdict.reference(round_of(least))),
            lambda least: outputs(verdict.reference(round_of(least))),
        )

    held = 2 * MOST * (vocabulary + hidden)
    what = f"{'drawn' if noisy else 'greedy'}, {vocabulary} tokens"
    return Case("verdict", what, lambda n: 2 * n * vocabulary + 4 * hidden, held, make, axis=1)


def recurrence(config: DeltaConfig) -> Case:
    """A round of one row, of which every column counts, in float32."""
    keys, heads, k, v = config.key_heads, config.value_heads, config.key_dim, config.value_dim

    def make(seed: int) -> Work:
        state, mixed, qk, decay, beta = (
            normal(5 * seed + i, 1, *sizes).astype(mx.float32)
            for i, sizes in enumerate(
                [(heads, v, k), (MOST, config.channels), (MOST, 2 * keys, k), (MOST, heads), (MOST, heads)]
            )
        )
        qk, decay, beta = mx.fast.rms_norm(qk, None, 1e-6) * k**-0.5, mx.sigmoid(decay + 2), mx.sigmoid(beta)
        parts = [[mx.contiguous(x[:, :n]) for x in (qk, decay, beta)] for n in range(MOST + 1)]
        mx.eval(state, parts)

        def given(x: mx.array) -> delta.Given:
            qk, decay, beta = parts[x.shape[1]]
            return delta.Given(qk, x, decay, beta)

        span = delta.Span(None, 0, 0, None, True)
        return Work(
            mixed,
            lambda x: delta.why_not(state, given(x)),
            lambda x: list(delta.delta(state, given(x), span)),
            lambda x: list(delta.reference(state, given(x), span)),
            lambda x: list(delta.reference(state, given(x), span)),
        )

    held = 4 * heads * v * k
    column = 4 * (2 * keys * k + 2 * heads * v + 2 * heads)
    what = f"{keys}/{heads} heads of {k}, values of {v}"
    return Case("delta", what, lambda n: 2 * held + n * column, held, make, axis=1)


def cases(found: Shape, layout: Layout, context: int) -> list[Case]:
    """What a target step and a drafter step of a size consist of; of Qwen 3.5 only what no other target has."""
    config = found.target
    if isinstance(config, QwenConfig):
        return [recurrence(config.delta)]
    hidden = config.hidden_size
    layers = [next(c for c in config.layers if (c.window is None) == full) for full in (False, True)]
    out = []
    for layer, kind in zip(layers, ("sliding", "full"), strict=True):
        out.append(product(f"q {kind}", layer.heads * layer.head_dim, hidden, layout))
        out.append(product(f"k {kind}", layer.kv_heads * layer.head_dim, hidden, layout))
        out.append(product(f"o {kind}", hidden, layer.heads * layer.head_dim, layout))
    out.append(product("down", hidden, layers[0].mlp_size, layout))
    out.append(product("vocabulary", config.vocab_size, hidden, layout))
    out.append(gated(layers[0].mlp_size, hidden, layout))
    if config.moe:
        out.append(routed(config.moe, hidden, layout))
    out += [attention(layer, context) for layer in layers]
    if found.drafter.clusters:
        out.append(clustered(found, found.drafter.clusters, layout))
    return [*out, judged(found, False), judged(found, True)]
