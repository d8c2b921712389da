"""Whether each kernel, on this device, computes what its reference computes: asked once, when a model is loaded.

Nobody has run these kernels on Metal, so a device that refuses one, or gives other numbers, must not use it. Waits
for the device. What it compares is small: every layout of weights, drawing and not, rings and full caches. References
compute in float32.
"""

import functools
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_mtp.kernels import attend, choice, delta, experts, gate_up, head, rows_qmv, verdict
from mlx_mtp.kernels.backend import why_not_here
from mlx_mtp.kernels.matrix import Matrix

KERNELS = {
    "rows_qmv": rows_qmv,
    "gate_up": gate_up,
    "experts": experts,
    "attend": attend,
    "delta": delta,
    "head": head,
    "verdict": verdict,
}
LAYOUTS = ((64, 4, "affine"), (64, 8, "affine"), (32, 4, "mxfp4"), (32, 8, "mxfp8"), (16, 4, "nvfp4"), None)
SLOWER = 1.3  # times MLX's own product at which a kernel is not worth its exactness
TOLERANCE = 0.02  # of the largest value: bfloat16 keeps 8 bits


def check() -> dict[str, str | None]:
    """Kernel -> None if it can be used on this device, else why not."""
    here = why_not_here()
    if here:
        return dict.fromkeys(KERNELS, here)
    return _outcomes(mx.fast.metal_kernel)


def usable(name: str) -> bool:
    """Whether a kernel may be used on this device. A call of it may still fall back, for its shapes."""
    return check()[name] is None


def report() -> tuple[tuple[str, str, str], ...]:
    """(kernel, "used" or "not used", what it takes or why not) for every kernel."""
    return tuple(
        (name, "not used" if reason else "used", reason or KERNELS[name].TAKES) for name, reason in check().items()
    )


@functools.lru_cache(maxsize=8)
def _outcomes(metal_kernel: object) -> dict[str, str | None]:
    """Once for a factory of kernels: the device's own, or one that tests put in its place."""
    trials: dict[str, Callable[[], str | None]] = {
        "rows_qmv": _rows_qmv,
        "gate_up": _gate_up,
        "experts": _experts,
        "attend": _attend,
        "delta": _delta,
        "head": _head,
        "verdict": _verdict,
    }
    return {name: _outcome(trial) for name, trial in trials.items()}


def _outcome(trial: Callable[[], str | None]) -> str | None:
    try:
        return trial()
    except Exception as error:  # whatever Metal's compiler or MLX says: the plain path is there
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it fails on this device: {first[:160]}"


def _differs(got: mx.array, expected: mx.array, what: str) -> str | None:
    """What is wrong with the result of a kernel, or None."""
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    apart, size = float(mx.abs(got - expected).max().item()), float(mx.abs(expected).max().item())  # pyright: ignore[reportArgumentType]
    if apart <= TOLERANCE * size:  # false for nan
        return None
    return f"its result differs from the reference by {apart:.3g} of {size:.3g} ({what})"


def _first(*found: str | None) -> str | None:
    return next((reason for reason in found if reason), None)


def _alone(together: mx.array, alone: mx.array) -> str | None:
    """A row computed beside others, and the same row computed alone, must agree to the bit."""
    return None if mx.array_equal(together, alone).item() else "a row's result depends on the rows beside it"


def _normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def _matrix(seed: int, layout: tuple[int, int, str] | None, *shape: int) -> Matrix:
    dense = _normal(seed, *shape)
    return Matrix.quantized(dense, *layout) if layout else Matrix(dense)


def _rows_qmv() -> str | None:
    x = _normal(0, 3, 192)
    found = []
    for layout in LAYOUTS:
        matrix, what = _matrix(1, layout, 37, 192), "plain" if layout is None else f"{layout[2]}, {layout[1]} bit"
        y = rows_qmv.rows_qmv(x, matrix)
        found.append(_differs(y, rows_qmv.reference(x.astype(mx.float32), matrix), what))
        if layout in (LAYOUTS[0], None):  # in float32: rounding to bfloat16 hides other orders of summation
            wide = x.astype(mx.float32)
            found.append(_alone(rows_qmv.rows_qmv(wide, matrix)[2:], rows_qmv.rows_qmv(wide[2:], matrix)))
    return _first(*found) or _slower()


def _slower() -> str | None:
    """Whether a projection of usual size takes clearly longer than MLX's own. Both sides take turns; medians of five,
    eight products each. Not asked without a GPU: an emulator claims Metal, and its time says nothing."""
    if not mx.is_available(mx.gpu):
        return None
    matrix = _matrix(1, LAYOUTS[0], 4096, 4096)
    for rows in (1, 5):
        x, took = _normal(0, rows, 4096), {rows_qmv.rows_qmv: [], rows_qmv.reference: []}
        for _ in range(6):
            for product, times in took.items():
                before = time.perf_counter()
                mx.eval([product(x + i, matrix) for i in range(8)])
                times.append(time.perf_counter() - before)
        ours, mlx = (statistics.median(times[1:]) for times in took.values())  # the first builds the kernel
        if ours > SLOWER * mlx:
            return f"it takes {ours / mlx:.1f} times as long as MLX's own product at {rows} rows"
    return None


def _gate_up() -> str | None:
    x, found = _normal(0, 3, 192), []
    wide = x.astype(mx.float32) / 8
    for layout in LAYOUTS:
        gate, up = (_matrix(seed, layout, 37, 192) for seed in (1, 2))
        y = gate_up.gate_up(wide, gate, up)
        what = "plain" if layout is None else f"{layout[2]}, {layout[1]} bit"
        found.append(_differs(y, gate_up.reference(wide, gate, up), what))
        found.append(_alone(y[2:], gate_up.gate_up(wide[2:], gate, up)))
    return _first(*found)


def _experts() -> str | None:
    x, found = _normal(0, 5, 128), []
    routing = experts.Routing(mx.array([[3, 0], [1, 3], [3, 2], [0, 3], [3, 1]]), mx.abs(_normal(1, 5, 2)))
    alone = experts.Routing(routing.indices[4:], routing.weights[4:])
    for layout in ((64, 4, "affine"), None):
        gate, up = (_matrix(seed, layout, 4, 64, 128) for seed in (2, 3))
        weights = experts.Experts(gate, up, _matrix(4, layout, 4, 128, 64))
        y = experts.experts(x, routing, weights)
        exact = experts.reference(x.astype(mx.float32), routing, weights)
        found.append(_differs(y, exact, "plain" if layout is None else "affine"))
        found.append(_alone(y[4:], experts.experts(x[4:], alone, weights)))
    return _first(*found)


def _attend() -> str | None:
    found = []
    for size, slots, window in ((64, 48, 40), (64, 320, attend.EVERYTHING)):
        q, keys, values = _normal(0, 2, 4, 3, size), _normal(1, 2, 2, slots, size), _normal(2, 2, 2, slots, size)
        given = attend.Attention(q * size**-0.5, keys, values, mx.array([70 if slots < 70 else 270, 5]), window)
        y = attend.attend(given)
        wide = [t.astype(mx.float32) for t in (given.q, keys, values)]
        exact = attend.reference(attend.Attention(wide[0], wide[1], wide[2], given.start, window))
        found.append(_differs(y, exact, f"{slots} slots"))
        last = attend.Attention(given.q[:, :, 2:], keys, values, given.start + 2, window)
        found.append(_alone(y[:, :, 2:], attend.attend(last)))
    return _first(*found)


def _delta() -> str | None:
    """Of the first row two columns run again, of the second none; then three more, together and one by one."""
    rows, columns, keys, heads, size = 2, 5, 2, 4, 48
    qk = mx.fast.rms_norm(_normal(0, rows, columns, 2 * keys, size).astype(mx.float32), None, 1e-6) * size**-0.5
    mixed = _normal(1, rows, columns, 2 * keys * size + heads * 20).astype(mx.float32)
    gates = mx.sigmoid(_normal(2, 2, rows, columns, heads).astype(mx.float32))
    state, given = _normal(3, rows, heads, 20, size).astype(mx.float32), delta.Given(qk, mixed, gates[0], gates[1])
    found, again = [], mx.array([2, 0], mx.int32)
    for span in (delta.Span(again, 2, 2, None, True), delta.Span(again, 2, 2, None, False)):
        pairs = zip(delta.delta(state, given, span), delta.reference(state, given, span), strict=True)
        found += [_differs(got, wanted, f"state after {'all' if span.takes else 'some'}") for got, wanted in pairs]
    together = delta.delta(state, given, delta.Span(None, 0, 0, None, True))
    for t in range(columns):
        column = delta.Given(*(x[:, t : t + 1] for x in (qk, mixed, gates[0], gates[1])))
        y, state = delta.delta(state, column, delta.Span(None, 0, 0, None, True))
        found.append(_alone(together[0][:, t : t + 1], y))
    return _first(*found, _alone(together[1], state))


def _tokens(got: mx.array, expected: mx.array, what: str) -> str | None:
    return None if mx.array_equal(got, expected).item() else f"its tokens differ from the reference's ({what})"


def _draw(rows: int) -> choice.Draw:
    """The first row is greedy, the others are not."""
    seed = mx.arange(1, 2 * rows + 1).astype(mx.uint32).reshape(rows, 2)
    return choice.Draw(mx.array([0.0] + [0.8] * (rows - 1)), seed, mx.arange(rows) + 40)


def _head() -> str | None:
    y, found = _normal(0, 3, 64), []
    ordering = mx.argsort(mx.random.uniform(shape=(512,), key=mx.random.key(1))).astype(mx.int32)
    for layout in ((64, 4, "affine"), None):
        clusters = head.Clusters(_matrix(2, layout, 32, 64), ordering, _matrix(3, layout, 512, 64), 4)
        for draw in (None, _draw(3)):
            what = f"{'plain' if layout is None else 'affine'}, {'greedy' if draw is None else 'drawn'}"
            found.append(_tokens(head.head(y, clusters, draw), head.reference(y, clusters, draw), what))
        got, want = (_in_order(*scored(y, clusters)) for scored in (head.logits, head.reference_logits))
        found.append(_differs(got, want, "logits"))
    return _first(*found)


def _in_order(logits: mx.array, tokens: mx.array) -> mx.array:
    """Logits by their tokens, which stand in any order."""
    return mx.take_along_axis(logits, mx.argsort(tokens, axis=-1), axis=-1)


def _verdict() -> str | None:
    logits, hidden, found = _normal(0, 3, 4, 9000).astype(mx.float32), _normal(1, 3, 4, 64), []
    least = mx.full((3, 4), 2.5)
    for draw, threshold in ((None, None), (_draw(3), None), (_draw(3), least)):
        judged = verdict.Round(logits, mx.zeros((3, 3), mx.int32), hidden, threshold, draw)
        right = mx.where(mx.arange(3)[:, None] > mx.arange(3), verdict.reference(judged).tokens[:, :3], 0)
        judged = verdict.Round(logits, right, hidden, threshold, draw)  # rows keep 1, 2 and 3 columns
        got, want = verdict.verdict(judged), verdict.reference(judged)
        what = f"{'greedy' if draw is None else 'drawn'}{'' if threshold is None else ', filtered'}"
        found.append(_tokens(got.tokens, want.tokens, what))
        found.append(_tokens(mx.stack([got.kept, got.bonus]), mx.stack([want.kept, want.bonus]), what))
        found.append(_differs(got.hidden, want.hidden, what))
    return _first(*found)
