"""attend: columns of ragged rows over rings and full caches, each key and value read once, each column on its own."""

from dataclasses import replace

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import attend
from mlx_mtp.kernels.attend import EVERYTHING, Attention

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}


def make(starts=(5, 70), heads=(4, 2), columns=3, slots=96, size=64, window=EVERYTHING, dtype=mx.bfloat16) -> Attention:
    """Rows that start at the given positions; heads: of queries and of keys."""
    shapes = [(len(starts), heads[0], columns, size), *[(len(starts), heads[1], slots, size)] * 2]
    q, keys, values = (mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(shapes))
    return Attention(q * size**-0.25, keys, values, mx.array(starts), window)


def by_hand(given: Attention) -> mx.array:
    """The definition in numpy: positions, not slots."""
    q, keys, values = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (given.q, given.keys, given.values))
    slots, group = keys.shape[2], q.shape[1] // keys.shape[1]
    out = np.zeros_like(q)
    for row, start in enumerate(given.start.tolist()):
        for column in range(q.shape[2]):
            position = start + column
            seen = [p % slots for p in range(max(0, position - given.window + 1), position + 1)]
            for head in range(q.shape[1]):
                scores = keys[row, head // group, seen] @ q[row, head, column]
                weights = np.exp(scores - scores.max())
                out[row, head, column] = weights @ values[row, head // group, seen] / weights.sum()
    return mx.array(out.astype(np.float32))


def seen_keys(given: Attention) -> int:
    """How many positions any column of a row sees, over all rows and key heads."""
    columns, heads = given.q.shape[2], given.keys.shape[1]
    return heads * sum(min(start + columns, given.window + columns - 1) for start in given.start.tolist())


def is_right(given: Attention) -> bool:
    return checks.relative_error(attend.attend(given), by_hand(given)) < TOLERANCE[given.q.dtype]


RING = {"starts": (3, 41, 500), "slots": 48, "window": 40, "columns": 4}


@pytest.mark.parametrize("case", [{}, RING], ids=["full", "ring"])
def test_the_reference_is_the_definition_and_a_column_stands_alone(case):
    given = make(**case)
    whole = attend.attend(given)
    assert whole.dtype == given.q.dtype and is_right(given)
    # a narrower pass finds what it would have found: later keys are there but out of sight
    for width in range(1, given.q.shape[2]):
        assert mx.array_equal(attend.attend(replace(given, q=given.q[:, :, :width])), whole[:, :, :width])


def test_every_refusal_has_a_reason_and_an_answer():
    given = make()
    assert attend.why_not(given) == "this build of MLX has no Metal backend"
    assert "head size 40" in attend.why_not(make(size=40))
    assert "not one float type" in attend.why_not(replace(given, keys=given.keys.astype(mx.float32)))
    assert is_right(make(size=40))


@emulated
@pytest.mark.parametrize(
    "case",
    [
        {},
        RING,
        {"starts": (0,), "columns": 1, "slots": 1, "size": 32, "heads": (1, 1)},
        {"starts": (0, 300, 611), "slots": 620, "columns": 5, "heads": (8, 1), "size": 32},
        {"starts": (700,), "slots": 600, "window": 513, "columns": 8, "heads": (2, 1), "size": 32},
        {"starts": (9,), "columns": 8, "heads": (8, 1), "size": 32, "slots": 20},
        {"starts": (30,), "columns": 2, "heads": (4, 2), "size": 256, "slots": 40},
        {"starts": (21,), "columns": 2, "heads": (8, 1), "size": 512, "slots": 40},
    ],
    ids=lambda case: "-".join(f"{k}{v}".replace(" ", "") for k, v in case.items()) or "usual",
)
def test_the_kernels_are_right_and_read_each_key_and_value_once(case):
    given = make(**case)
    with emu.patched() as launches:
        assert attend.why_not(given) is None
        assert is_right(given)
    row_bytes = given.q.shape[3] * given.q.itemsize
    assert emu.bytes_read(launches, "keys") == emu.bytes_read(launches, "values") == seen_keys(given) * row_bytes
    assert len(launches) == 2


@emulated
@pytest.mark.parametrize("case", [{"slots": 90}, {"slots": 47, "window": 40}], ids=["full", "ring"])
def test_queries_that_do_not_fit_at_once_come_in_tiles(case):
    given = make(**{"starts": (3, 75), "heads": (16, 1), "columns": 7, "size": 32, **case})
    with emu.patched() as launches:
        whole = attend.attend(given)
        assert len(launches) == 2
        assert is_right(given)
    with emu.patched():
        for column in range(7):
            alone = replace(given, q=given.q[:, :, column : column + 1], start=given.start + column)
            assert mx.array_equal(attend.attend(alone), whole[:, :, column : column + 1])


@emulated
def test_one_library_a_head_size_serves_every_number_of_columns_heads_and_every_window():
    with emu.patched(dry=True) as launches:
        for columns in (1, 2, 5, 16):
            for heads, window in (((8, 8), 1024), ((16, 8), 1025), ((16, 1), EVERYTHING)):
                attend.attend(make(tuple(range(8)), heads=heads, columns=columns, size=256, slots=2048, window=window))
    assert len({emu.library(launch) for launch in launches}) == 2  # the parts, and what adds them


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_float_type(dtype):
    with emu.patched():
        assert is_right(make(dtype=dtype))


@emulated
@pytest.mark.parametrize("case", [{"slots": 300, "starts": (5, 280)}, RING], ids=["full", "ring"])
def test_a_column_s_bits_do_not_depend_on_the_width_or_the_other_rows(case):
    given = make(**{**case, "columns": 4})
    with emu.patched():
        whole = attend.attend(given)
        for width in (1, 2, 3):
            assert mx.array_equal(attend.attend(replace(given, q=given.q[:, :, :width])), whole[:, :, :width])
        row = slice(1, 2)
        alone = Attention(given.q[row], given.keys[row], given.values[row], given.start[row], given.window)
        assert mx.array_equal(attend.attend(alone), whole[row])
        # the last column alone, as plain decoding would come to it
        last = replace(given, q=given.q[:, :, 3:], start=given.start + 3)
        assert mx.array_equal(attend.attend(last), whole[:, :, 3:])


@emulated
def test_a_larger_buffer_does_not_change_a_bit():
    given = make(starts=(5, 70), slots=96)
    room = ((0, 0), (0, 0), (0, 500), (0, 0))
    larger = replace(given, keys=mx.pad(given.keys, room), values=mx.pad(given.values, room))
    with emu.patched():
        assert mx.array_equal(attend.attend(given), attend.attend(larger))


@emulated
def test_what_no_column_sees_may_be_anything():
    given = make(starts=(5,), slots=32)
    spoiled = mx.where(mx.arange(32)[:, None] > 7, mx.nan, given.keys.astype(mx.float32)).astype(mx.bfloat16)
    with emu.patched():
        assert mx.array_equal(attend.attend(given), attend.attend(replace(given, keys=spoiled, values=given.values)))


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_the_result(order):
    given = make(**RING)
    with emu.patched():
        y = attend.attend(given)
    with emu.patched(order=order, seed=5):
        assert mx.array_equal(attend.attend(given), y)


def launches_of(given: Attention):
    with emu.patched(dry=True) as launches:
        attend.attend(given)
    return launches


def smallest() -> Attention:
    return make(starts=(0,), columns=1, slots=1, size=32, heads=(1, 1))


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(make()))
    checks.assert_text_is_mlx_s(launches_of(smallest()))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one():
    checks.assert_lint_is_clean(launches_of(smallest()))
    checks.assert_lint_is_clean(launches_of(make(tuple(range(9)), size=512)))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    checks.assert_compiles_for_cuda(launches_of(make(size=256)))


MUTANTS = [  # what is wrong, kernel, part, old, new
    ("a column sees the next one", "attend_parts", "source", "mine > column", "mine > column + 1"),
    ("the window is one too wide", "attend_parts", "source", "mine + WINDOW <= column", "mine + WINDOW < column"),
    ("the ring is not a ring", "attend_parts", "header", "behind < 0 ? behind + int(slots) : behind", "behind"),
    (
        "no barrier before the keys are overwritten",
        "attend_parts",
        "source",
        "score[i] = -INFINITY;\n      }\n      threadgroup_barrier(mem_flags::mem_threadgroup);",
        "score[i] = -INFINITY;\n      }",
    ),
    (
        "no barrier after the values are there",
        "attend_parts",
        "source",
        f"values[from + d] : T(0.0f);\n      }}\n      {BARRIER}",
        "values[from + d] : T(0.0f);\n      }",
    ),
    ("old sums do not shrink", "attend_parts", "source", "acc[i][d] *= shrink;", "acc[i][d] *= 1.0f;"),
    (
        "the weights' sum does not shrink",
        "attend_parts",
        "source",
        "fma(sum[i], shrink, simd_sum(weight))",
        "sum[i] + simd_sum(weight)",
    ),
    (
        "heads of a group are swapped for columns",
        "attend_parts",
        "source",
        "begin + int(query % L)",
        "begin + int(query / L)",
    ),
    (
        "a tile reads past the last slot",
        "attend_parts",
        "source",
        "const uint held = min(uint(TILE), SLOTS - slot0);",
        "const uint held = TILE;",
    ),
    (
        "unseen keys are read",
        "attend_parts",
        "source",
        "tile[k * D + d] = wanted ? keys[",
        "tile[k * D + d] = k < held ? keys[",
    ),
    ("chunks are added unscaled", "attend_join", "source", "exp(top[query * chunks + c] - highest)", "1.0f"),
    ("the last chunk is left out", "attend_join", "source", "c < chunks; c++) {", "c + 1 < max(chunks, 2u); c++) {"),
]


def hard() -> list[Attention]:
    """A ring that went round, and a full cache of several chunks."""
    return [make(**RING), make(starts=(0, 290), slots=300, columns=3)]


@emulated
def test_what_the_mutants_run_on_is_right_without_them():
    with emu.patched():
        assert all(is_right(given) for given in hard())


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, kernel, part, old, new = mutant
    with emu.patched(edit=checks.planted(kernel, part, old, new)) as launches:
        try:
            right = all(is_right(given) for given in hard())
        except emu.EmulationError:
            return
    least = sum(seen_keys(given) * given.q.shape[3] * given.q.itemsize for given in hard())
    assert not right or emu.bytes_read(launches, "keys") != least
