"""delta: a state is read once and written once whatever runs over it, and columns give the same however they come."""

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from engines import Job, engine_of, prompts, qwen, request, run, texts
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import delta
from mlx_mtp.kernels.delta import Given, Span
from mlx_mtp.rows import GREEDY, Sampling

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

# sequences, columns, key heads, value heads, numbers of a value and of a key
SHAPES = [(2, 9, 2, 4, 24, 16), (1, 5, 1, 3, 7, 128), (3, 6, 2, 2, 18, 40), (1, 4, 1, 1, 1, 1)]
ALL = Span(None, 0, 0, None, True)


def counts(*of_rows: int) -> mx.array:
    return mx.array(of_rows, mx.int32)


def made(shape: tuple[int, ...], seed: int = 0) -> tuple[mx.array, Given]:
    b, t, keys, heads, v, k = shape
    draws = iter(mx.random.split(mx.random.key(seed), 5))

    def normal(*of: int) -> mx.array:
        return mx.random.normal(of, key=next(draws))

    qk = mx.fast.rms_norm(normal(b, t, 2 * keys, k), None, 1e-6) * k**-0.5
    mixed = normal(b, t, 2 * keys * k + heads * v)
    return normal(b, heads, v, k), Given(
        qk, mixed, mx.sigmoid(normal(b, t, heads) + 2), mx.sigmoid(normal(b, t, heads))
    )


def part(given: Given, rows: slice, columns: slice) -> Given:
    return Given(*(x[rows, columns] for x in (given.qk, given.mixed, given.decay, given.beta)))


def defined(state: mx.array, given: Given, columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the rule says of one row that runs these columns, in double precision: outputs [n, Hv, V] and the state."""
    s = np.array(state, np.float64)
    (heads, v, _), keys = s.shape, given.qk.shape[2] // 2
    qk, mixed, decay, beta = (np.array(x[0], np.float64) for x in (given.qk, given.mixed, given.decay, given.beta))
    out = np.zeros((len(columns), heads, v))
    for i, t in enumerate(columns):
        for h in range(heads):
            q, k = qk[t, h // (heads // keys)], qk[t, keys + h // (heads // keys)]
            value = mixed[t, len(mixed[t]) - heads * v :].reshape(heads, v)[h]
            s[h] *= decay[t, h]
            s[h] += beta[t, h] * np.outer(value - s[h] @ k, k)
            out[i, h] = s[h] @ q
    return out, s


def assert_is_as_defined(
    state: mx.array, given: Given, span: Span, got: tuple[mx.array, mx.array], rtol: float = 2e-6
) -> None:
    columns = given.qk.shape[1]
    for b in range(state.shape[0]):
        again = 0 if span.again is None else span.again[b].item()
        own = columns - span.begin if span.own is None else span.own[b].item()
        ran = [*range(again), *range(span.begin, span.begin + own)]
        out, after = defined(state[b], part(given, slice(b, b + 1), slice(None)), ran)
        if not span.takes:
            after = defined(state[b], part(given, slice(b, b + 1), slice(None)), ran[:again])[1]
        size = np.abs(out).max(initial=1.0)
        np.testing.assert_allclose(np.array(got[0][b, :own]), out[again:], rtol=0, atol=rtol * size)
        np.testing.assert_allclose(np.array(got[1][b]), after, rtol=0, atol=rtol * np.abs(after).max())


def spans(rows: int, columns: int) -> list[Span]:
    """All of a pass, a part of it again, and rows of which nothing counts."""
    again, own = counts(*(b % 3 for b in range(rows))), counts(*(1 - b % 2 for b in range(rows)))
    return [
        ALL,
        Span(None, 0, 0, None, False),
        Span(again, 2, 3, None, False),
        Span(again, 2, columns - 1, own, True),
        Span(None, 0, columns - 1, own, True),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_rule(shape):
    state, given = made(shape)
    for span in spans(shape[0], shape[1]):
        assert_is_as_defined(state, given, span, delta.reference(state, given, span))


def test_every_refusal_has_a_reason_and_an_answer():
    state, given = made((1, 2, 1, 1, 4, 32))
    assert delta.why_not(state, given) == "this build of MLX has no Metal backend"
    got, wanted = delta.delta(state, given, ALL), delta.reference(state, given, ALL)
    assert mx.array_equal(got[0], wanted[0]) and mx.array_equal(got[1], wanted[1])
    assert "takes float32" in delta.why_not(state.astype(mx.bfloat16), given)
    wide = made((1, 2, 1, 1, 4, 288))
    assert "keys of 288" in delta.why_not(*wide) and delta.delta(*wide, ALL)[0].shape == (1, 2, 1, 4)


@emulated
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_right_and_reads_every_state_once(shape):
    state, given = made(shape)
    for span in spans(shape[0], shape[1]):
        with emu.patched(count_fetches=True) as launches:
            got = delta.delta(state, given, span)
            mx.eval(got)
        assert_is_as_defined(state, given, span, got)
        assert emu.bytes_fetched(launches, "state") == state.nbytes and len(launches) == 1


@emulated
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_together_one_by_one_or_in_parts_give_the_same_bits(shape):
    state, given = made(shape)
    columns = shape[1]
    with emu.patched():
        y, after = delta.delta(state, given, ALL)
        for cuts in ([1] * columns, [columns - 1, 1], [2, columns - 2]):
            at, now, out = 0, state, []
            for count in cuts:
                part_y, now = delta.delta(now, part(given, slice(None), slice(at, at + count)), ALL)
                out.append(part_y)
                at += count
            assert mx.array_equal(mx.concatenate(out, axis=1), y) and mx.array_equal(now, after)


@emulated
def test_columns_that_run_again_leave_the_bits_of_the_first_time_and_those_that_do_not_count_leave_none():
    state, given = made((3, 8, 2, 4, 24, 16))
    again = counts(0, 3, 2)
    with emu.patched():
        y, kept = delta.delta(state, given, Span(again, 3, 5, None, False))
        _, taken = delta.delta(state, given, Span(again, 3, 7, counts(1, 0, 1), True))
        for b in range(3):
            row, now = slice(b, b + 1), state[b : b + 1]
            count = again[b].item()
            if count:
                now = delta.delta(now, part(given, row, slice(0, count)), ALL)[1]
            assert mx.array_equal(kept[row], now)
            assert mx.array_equal(y[row], delta.delta(now, part(given, row, slice(5, 8)), ALL)[0])
            last = delta.delta(now, part(given, row, slice(7, 8)), ALL)[1]
            assert mx.array_equal(taken[row], now if b == 1 else last)


@emulated
def test_no_lane_order_changes_the_result():
    state, given = made(SHAPES[0])
    span = Span(counts(2, 1), 2, 5, None, False)
    with emu.patched():
        first = delta.delta(state, given, span)
    for order in (1, 2):
        with emu.patched(order=order, seed=7):
            again = delta.delta(state, given, span)
            assert all(mx.array_equal(x, y) for x, y in zip(first, again, strict=True))


def launches_of(shape: tuple[int, ...]):
    state, given = made(shape)
    with emu.patched(dry=True) as launches:
        delta.delta(state, given, ALL)
        delta.delta(state, given, Span(counts(*[1] * shape[0]), 1, 2, None, False))
    return launches


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of((2, 9, 16, 32, 128, 128)))
    checks.assert_text_is_mlx_s(launches_of(SHAPES[-1]))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1], (2, 9, 16, 32, 128, 128)])
def test_the_lint_is_clean(shape):
    checks.assert_lint_is_clean(launches_of(shape))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    checks.assert_compiles_for_cuda(launches_of((2, 9, 16, 32, 128, 128)))


MUTANTS = [  # what is wrong, old, new
    ("the guard of the last rows is gone", "if (first >= V) return;", ""),
    ("rows beyond the last are written", "mine && lane == 0 && r < rows", "mine && lane == 0"),
    ("rows beyond the last are read", "r < rows && d < K ? state", "d < K ? state"),
    ("keys beyond the last are read", "r < rows && d < K ? state", "r < rows ? state"),
    ("value heads have keys of their own", "head / (HEADS / KEYS)", "head % KEYS"),
    ("queries are keys", "2 * KEYS + key) * K", "2 * KEYS + KEYS + key) * K"),
    ("values begin elsewhere", "(C - HEADS * V) + head * V", "head * V"),
    ("what is held is not decayed", "g * simd_sum(dot)", "simd_sum(dot)"),
    ("the state is not decayed", "change, k[i], g * s[r][i]", "change, k[i], s[r][i]"),
    ("beta is one", "share * (v - held)", "(v - held)"),
    ("what is read is of before", "fma(s[r][i], q[i], read)", "fma(s[r][i] - change * k[i], q[i], read)"),
    ("nothing runs again", "mine ? n - kept : 0", "mine ? n : 0"),
    ("the columns between count", "mine ? own0 + column : n", "n"),
    ("the state of before is that of after", "n == kept && !TAKES", "n + 1 == kept + columns && !TAKES"),
    ("columns that do not count are taken in", "mine && column >= taken", "false"),
]


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, old, new = mutant
    state, given = made((3, 6, 2, 4, 18, 40))
    for span in spans(3, 6):
        with emu.patched(edit=checks.planted("delta", "source", old, new)):
            try:
                got = delta.delta(state, given, span)
                mx.eval(got)
                assert_is_as_defined(state, given, span, got)
            except (emu.EmulationError, AssertionError):
                return
    raise AssertionError("nobody noticed")


@emulated
@pytest.mark.parametrize("width", [1, 3])
def test_texts_with_the_kernel_do_not_depend_on_drafts_or_rows(width):
    """All kernels are used. Rows join one after another, and a prompt is taken in beside them."""
    mx.disable_compile()
    try:
        with emu.patched(check=False) as launches:
            models = qwen(f"with kernels, width {width}")
            settings = (GREEDY, Sampling(temperature=0.8, top_k=40, seed=7), GREEDY)
            wanted = [request(p * 2, 7, s) for p, s in zip(prompts(models, (3, 9, 5)), settings, strict=True)]
            alone = [run(engine_of(models, "plain", 0), [r])[0].tokens for r in wanted]
            jobs = [Job(r, i) for i, r in enumerate(wanted)]
            assert texts(run(engine_of(models, "head+lookup", width), jobs)) == alone
    finally:
        mx.enable_compile()
    assert any(launch.definition.name == "delta" for launch in launches)
