"""verdict: what the target chooses in every column, and how much of the draft that keeps."""

from dataclasses import replace

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import noise, verdict
from mlx_mtp.kernels.choice import Draw
from mlx_mtp.kernels.verdict import Round

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

INVERSE = (0.0, 0.5, 2.0)  # greedy, hot, cold


def judged(rows=3, columns=4, vocabulary=1000, width=40, dtype=mx.bfloat16, **options) -> Round:
    """A round whose drafts agree with the choice here and there."""
    rng = np.random.default_rng(rows + columns + vocabulary)
    logits = mx.array(rng.normal(0, 3, (rows, columns, vocabulary)).astype(np.float32)).astype(dtype)
    hidden = mx.array(rng.normal(0, 1, (rows, columns, width)).astype(np.float32)).astype(dtype)
    threshold = draw = None
    if options.get("filtered"):
        threshold = mx.sort(logits.astype(mx.float32), axis=-1)[..., -min(vocabulary, 20)]
    if options.get("sampled"):
        seeds = mx.array(rng.integers(0, 2**32, (rows, 2), dtype=np.uint32))
        inverse = mx.array([INVERSE[i % 3] for i in range(rows)])
        draw = Draw(inverse, seeds, mx.array(rng.integers(0, 9000, rows)))
    made = Round(logits, mx.zeros((rows, columns - 1), dtype=mx.int32), hidden, threshold, draw)
    choice = by_hand(made)["tokens"]
    draft = np.array([tokens[:-1] for tokens in choice]).reshape(rows, columns - 1).astype(np.int32)
    if columns > 1:
        for row in range(rows):  # row r disagrees first in column r, the last rows nowhere
            if row < columns - 1:
                draft[row, row] = (draft[row, row] + 1) % vocabulary if vocabulary > 1 else 0
    return replace(made, draft=mx.array(draft))


def by_hand(made: Round) -> dict[str, list]:
    """The definition in numpy, a row and a column at a time."""
    logits = np.array(made.logits.astype(mx.float32))
    rows, columns, vocabulary = logits.shape
    answer = {"tokens": [], "kept": [], "bonus": [], "place": []}
    for row in range(rows):
        tokens = []
        for column in range(columns):
            values = logits[row, column].copy()
            if made.draw is not None and made.draw.inv_temperature[row].item() > 0:
                place = mx.array(made.draw.position[row].item() + column)
                gumbel = np.array(noise.gumbel(made.draw.seed[row], place, mx.arange(vocabulary)))
                values = values * np.float32(made.draw.inv_temperature[row].item()) + gumbel
            if made.threshold is not None:
                values[logits[row, column] < made.threshold[row, column].item()] = -np.inf
            tokens.append(int(np.argmax(values)))
        draft = made.draft[row].tolist()
        kept = 1
        while kept < columns and draft[kept - 1] == tokens[kept - 1]:
            kept += 1
        for name, value in zip(answer, (tokens, kept, tokens[kept - 1], kept - 1), strict=True):
            answer[name].append(value)
    return answer


def is_right(got: verdict.Verdict, made: Round) -> bool:
    want = by_hand(made)
    picked = mx.stack([made.hidden[row, place] for row, place in enumerate(want["place"])])
    return (
        got.tokens.tolist() == want["tokens"]
        and got.kept.tolist() == want["kept"]
        and got.bonus.tolist() == want["bonus"]
        and mx.array_equal(got.hidden, picked).item()
    )


CASES = [
    {},
    {"filtered": True},
    {"sampled": True},
    {"filtered": True, "sampled": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "greedy")
def test_the_reference_is_the_definition(case):
    made = judged(rows=5, **case)
    got = verdict.verdict(made)
    assert is_right(got, made)
    assert got.kept.tolist() == [1, 2, 3, 4, 4]
    assert {x.dtype for x in (got.tokens, got.kept, got.bonus)} == {mx.int32} and got.hidden.dtype == mx.bfloat16


def test_every_refusal_has_a_reason():
    made = judged()
    assert verdict.why_not(made) == "this build of MLX has no Metal backend"
    assert "65 columns" in verdict.why_not(judged(1, 65, 3))
    assert "beside logits" in verdict.why_not(replace(made, draft=mx.zeros((3, 4), dtype=mx.int32)))
    assert "not a float type" in verdict.why_not(replace(made, logits=mx.zeros((3, 4, 9), dtype=mx.int32)))
    assert is_right(verdict.verdict(judged(1, 65, 3)), judged(1, 65, 3))


@emulated
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "greedy")
def test_the_kernels_agree_with_the_definition_in_two_dispatches(case):
    made = judged(rows=5, **case)
    with emu.patched() as launches:
        assert verdict.why_not(made) is None
        got = verdict.verdict(made)
    assert is_right(got, made)
    assert len(launches) == 2
    assert emu.bytes_read(launches, "logits") == made.logits.nbytes
    assert emu.bytes_read(launches, "hidden") == got.hidden.nbytes


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_float_type(dtype):
    made = judged(dtype=dtype)
    with emu.patched():
        assert is_right(verdict.verdict(made), made)


@emulated
@pytest.mark.parametrize("draft_type", [mx.int64, mx.uint32])
def test_the_draft_may_be_of_any_integer_type(draft_type):
    made = judged()
    with emu.patched():
        assert is_right(verdict.verdict(replace(made, draft=made.draft.astype(draft_type))), made)


@emulated
@pytest.mark.parametrize(
    ("rows", "columns", "vocabulary", "width"),
    [(1, 1, 1, 1), (1, 2, 7, 3), (2, 1, 300, 700), (3, 9, 257, 256), (1, 3, 20000, 5)],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_smallest_and_the_ragged_shapes(rows, columns, vocabulary, width, sampled):
    made = judged(rows, columns, vocabulary, width, sampled=sampled)
    with emu.patched():
        assert is_right(verdict.verdict(made), made)


@emulated
def test_the_real_vocabulary():
    made = judged(1, 2, 262144, 1536)
    with emu.patched():
        assert is_right(verdict.verdict(made), made)


@emulated
def test_a_row_s_verdict_does_not_depend_on_its_neighbours_or_its_width():
    made = judged(rows=3, sampled=True, filtered=True)
    with emu.patched():
        whole = verdict.verdict(made)
        row, draw = slice(1, 2), made.draw
        alone = Round(
            made.logits[row, :2],
            made.draft[row, :1],
            made.hidden[row, :2],
            made.threshold[row, :2],
            Draw(draw.inv_temperature[row], draw.seed[row], draw.position[row]),
        )
        assert verdict.verdict(alone).tokens.tolist()[0] == whole.tokens[1, :2].tolist()


@emulated
def test_ties_go_to_the_lowest_token_and_nothing_finite_to_token_zero():
    made = judged(2, 2, 20000)
    logits = mx.zeros((2, 2, 20000)).at[:, :, 9000:].add(5.0)
    logits[1] = -mx.inf
    made = replace(made, logits=logits.astype(mx.bfloat16))
    for judge in (verdict.reference, verdict.verdict):
        with emu.patched():
            assert judge(made).tokens.tolist() == [[9000, 9000], [0, 0]]


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_the_verdict(order):
    made = judged(sampled=True)
    with emu.patched(order=order, seed=3):
        assert is_right(verdict.verdict(made), made)


def launches_of(made: Round):
    with emu.patched(dry=True) as launches:
        verdict.verdict(made)
    return launches


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(judged(sampled=True, filtered=True)))
    checks.assert_text_is_mlx_s(launches_of(judged(1, 1, 1, 1)))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one():
    checks.assert_lint_is_clean(launches_of(judged(1, 1, 1, 1, sampled=True, filtered=True)))
    checks.assert_lint_is_clean(launches_of(judged(1, 2, 7, 3)))
    checks.assert_lint_is_clean(launches_of(judged(8, 4, 100, sampled=True, filtered=True)))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    checks.assert_compiles_for_cuda(launches_of(judged(sampled=True, filtered=True)))


MUTANTS = [  # what is wrong, kernel, part, old, new
    (
        "the vocabulary is read past its end",
        "verdict_scan",
        "source",
        "min(V, (chunk + 1) * CHUNK)",
        "(chunk + 1) * CHUNK",
    ),
    (
        "the last chunk is left out",
        "verdict_scan",
        "source",
        "const uint end = min(V, (chunk + 1) * CHUNK);",
        "const uint end = min(V, (chunk + 1) * CHUNK) - 9;",
    ),
    ("the threshold is exclusive", "verdict_scan", "source", "logit >= least", "logit > least"),
    (
        "the threshold of the first column serves all",
        "verdict_scan",
        "source",
        "float(threshold[column])",
        "float(threshold[row * L])",
    ),
    (
        "every column has the noise of the first",
        "verdict_scan",
        "source",
        "uint(position[row]) + column % L",
        "uint(position[row])",
    ),
    (
        "greedy rows are drawn too",
        "verdict_scan",
        "header",
        "return inv_temperature > 0.0f ? ",
        "return inv_temperature >= 0.0f ? ",
    ),
    ("later tokens win ties", "verdict_scan", "header", "b.token < a.token", "b.token > a.token"),
    ("one column too few is compared", "verdict_judge", "source", "matches + 1 < L", "matches + 2 < L"),
    ("the draft is shifted", "verdict_judge", "source", "draft[row * (L - 1) + matches]", "draft[row * L + matches]"),
    ("kept does not count the bonus", "verdict_judge", "source", "int(matches) + 1", "int(matches)"),
    (
        "the hidden state is the last column's",
        "verdict_judge",
        "source",
        "(size_t(row) * L + matches) * E",
        "(size_t(row) * L + L - 1) * E",
    ),
    (
        "no barrier before the comparison",
        "verdict_judge",
        "source",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    uint matches",
        "uint matches",
    ),
    ("the hidden state is half copied", "verdict_judge", "source", "e < E; e += 256", "e < E / 2; e += 256"),
]


def hard() -> Round:
    """Sampled and filtered; a tie and a winner at the very end in greedy rows, a threshold that one token meets."""
    made = judged(rows=6, sampled=True, filtered=True)
    logits = np.array(made.logits.astype(mx.float32))
    logits[0, 0, [5, 990]] = 50
    logits[3, 1, 999] = 50
    threshold = np.array(made.threshold)
    threshold[5] = logits[5].max(axis=-1)
    return replace(made, logits=mx.array(logits).astype(mx.bfloat16), threshold=mx.array(threshold))


@emulated
def test_what_the_mutants_run_on_is_right_without_them():
    made = hard()
    with emu.patched():
        assert is_right(verdict.verdict(made), made)


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, kernel, part, old, new = mutant
    made = hard()
    with emu.patched(edit=checks.planted(kernel, part, old, new)):
        try:
            got = verdict.verdict(made)
        except emu.EmulationError:
            return
    assert not is_right(got, made)
