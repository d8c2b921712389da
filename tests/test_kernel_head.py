"""head: the logits of a clustered vocabulary, reading only the clusters that compete."""

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks, cuda, lint

from mlx_mtp.kernels import head
from mlx_mtp.kernels.head import Clusters
from mlx_mtp.kernels.matrix import Matrix

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

KINDS = {"plain": None, "affine4": (64, 4, "affine"), "affine8": (32, 8, "affine"), "mxfp4": (32, 4, "mxfp4")}


def matrix(seed: int, n: int, k: int, kind: str, dtype: mx.Dtype = mx.bfloat16) -> Matrix:
    dense = mx.random.normal((n, k), key=mx.random.key(seed)).astype(dtype)
    return Matrix(dense) if KINDS[kind] is None else Matrix.quantized(dense, *KINDS[kind])


def vocabulary(kind="plain", hidden=64, count=40, size=24, top=5, ordering=mx.int32) -> Clusters:
    order = np.random.default_rng(0).permutation(count * size)
    return Clusters(
        matrix(1, count, hidden, "plain"),
        mx.array(order).astype(ordering),
        matrix(2, count * size, hidden, kind),
        top,
    )


def states(m: int, hidden: int = 64, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal((m, hidden), key=mx.random.key(3)).astype(dtype)


def scored_by_hand(y: mx.array, clusters: Clusters) -> list[dict[int, float]]:
    """Token -> logit of those in the best clusters of every row, in numpy."""
    hidden, centroids = np.array(y.astype(mx.float32)), np.array(clusters.centroids.dense())
    embedding = np.array(clusters.embedding.dense())
    ordering = np.array(clusters.ordering).reshape(len(centroids), -1)
    rows = []
    for state in hidden:
        best = np.argsort(-(centroids @ state), kind="stable")[: clusters.top]
        rows.append({int(token): float(embedding[token] @ state) for token in ordering[best].ravel()})
    return rows


def assert_scored(found: tuple[mx.array, mx.array], wanted: list[dict[int, float]]) -> None:
    logits, tokens = found
    assert logits.dtype == mx.float32 and tokens.dtype == mx.int32 and logits.shape == tokens.shape
    for row, (values, ids) in enumerate(zip(logits.tolist(), tokens.tolist(), strict=True)):
        assert sorted(ids) == sorted(wanted[row])
        assert values == pytest.approx([wanted[row][token] for token in ids], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_definition(kind):
    clusters, y = vocabulary(kind), states(9)
    assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


def test_every_refusal_has_a_reason():
    y, clusters = states(2), vocabulary()
    assert head.why_not(y, clusters) == "this build of MLX has no Metal backend"
    assert "41 clusters of 40" in head.why_not(y, vocabulary(top=41))
    assert "not rows of 64" in head.why_not(states(2, 32), clusters)
    assert "hidden size 8192" in head.why_not(states(1, 8192), vocabulary(hidden=8192, count=2, size=2, top=1))


@emulated
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_the_best_clusters_are_the_reference_s(kind):
    clusters, y = vocabulary(kind), states(5)
    with emu.patched() as launches:
        found = head.logits(y, clusters)
    assert_scored(found, scored_by_hand(y, clusters))
    assert [k.definition.name for k in launches] == ["head_scores", "head_select", "head_logits"]


@emulated
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_every_float_type(dtype):
    clusters, y = vocabulary(), states(2, dtype=dtype)
    with emu.patched():
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


@emulated
@pytest.mark.parametrize("ordering", [mx.int64, mx.uint32])
def test_the_ordering_may_be_of_any_integer_type(ordering):
    clusters, y = vocabulary(ordering=ordering), states(2)
    with emu.patched():
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


@emulated
@pytest.mark.parametrize(
    ("hidden", "count", "size", "top"),
    [(1, 1, 1, 1), (5, 2, 7, 1), (250, 33, 5, 33), (64, 300, 3, 7)],
)
def test_the_smallest_and_the_ragged_shapes(hidden, count, size, top):
    clusters, y = vocabulary("plain", hidden, count, size, top), states(3, hidden)
    with emu.patched():
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


@emulated
def test_more_rows_than_fit_into_threadgroup_memory_at_once():
    clusters, y = vocabulary(hidden=1024, count=9, size=4, top=2), states(9, 1024)
    with emu.patched():
        together = head.logits(y, clusters)
        alone = [
            mx.concatenate(parts)
            for parts in zip(*(head.logits(y[i : i + 1], clusters) for i in range(9)), strict=True)
        ]
    assert mx.array_equal(together[0], alone[0]) and mx.array_equal(together[1], alone[1])
    assert_scored(together, scored_by_hand(y, clusters))


@emulated
def test_of_clusters_that_tie_the_lower_ones_compete():
    ones = Matrix(mx.ones((40, 64), dtype=mx.bfloat16))
    order = mx.array(np.random.default_rng(1).permutation(40 * 4).astype(np.int32))
    clusters = Clusters(ones, order, Matrix(mx.ones((160, 64), dtype=mx.bfloat16)), 7)
    y = mx.ones((2, 64), dtype=mx.bfloat16)
    with emu.patched():
        _, tokens = head.logits(y, clusters)
    assert [sorted(row) for row in tokens.tolist()] == [sorted(order[:28].tolist())] * 2


@emulated
def test_without_any_finite_score_the_tokens_are_still_some():
    clusters, y = vocabulary(), mx.full((1, 64), -mx.inf, dtype=mx.bfloat16)
    with emu.patched():
        _, tokens = head.logits(y, clusters)
    assert all(0 <= token < 40 * 24 for token in tokens[0].tolist())


@emulated
@pytest.mark.parametrize("order", [1, 2])
def test_no_lane_order_changes_a_logit(order):
    clusters, y = vocabulary("affine4"), states(3)
    with emu.patched(order=order, seed=5):
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


@emulated
def test_at_the_real_size_it_reads_two_percent_more_than_it_must():
    # E2B and E4B: 262144 tokens in 2048 clusters, the best 32 of them, hidden size 256
    hidden, count, size, top = 256, 2048, 128, 32
    ordering = np.random.default_rng(0).permutation(count * size).astype(np.int32)
    halves = mx.random.normal(
        (2, 512, hidden), key=mx.random.key(5)
    )  # 262144 rows as sums of 512 and 512: quickly made
    embedding = (halves[0, :, None] + halves[1]).reshape(count * size, hidden).astype(mx.bfloat16)
    clusters = Clusters(matrix(1, count, hidden, "plain"), mx.array(ordering), Matrix(embedding), top)
    y = states(1, hidden)
    with emu.patched(count_fetches=True) as launches:
        head.logits(y, clusters)
    least = count * hidden * 2 + top * size * (hidden * 2 + 4)
    assert emu.bytes_read(launches, "w") == (count + top * size) * hidden * 2
    assert emu.bytes_fetched(launches) <= 1.02 * least
    largest = max(x.size for k in launches for x in k.statistics.buffers.values() if x.written)
    assert largest == 4 * top * size  # nothing of vocabulary size is written


def launches_of(m: int, clusters: Clusters):
    with emu.patched(dry=True) as launches:
        head.logits(states(m, clusters.centroids.columns), clusters)
    return launches


SMALLEST = {"hidden": 1, "count": 1, "size": 1, "top": 1}


@emulated
def test_the_text_is_mlx_s_own():
    checks.assert_text_is_mlx_s(launches_of(2, vocabulary("affine4")))
    checks.assert_text_is_mlx_s(launches_of(1, vocabulary(**SMALLEST)))


@emulated
@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_is_clean_at_the_smallest_shape_and_at_a_usual_one():
    checks.assert_lint_is_clean(launches_of(1, vocabulary(**SMALLEST)))
    checks.assert_lint_is_clean(launches_of(2, vocabulary("affine4")))
    checks.assert_lint_is_clean(launches_of(2, vocabulary("mxfp4")))


@emulated
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_it_compiles_for_cuda():
    checks.assert_compiles_for_cuda(launches_of(2, vocabulary("affine4")))


MUTANTS = [  # what is wrong, kernel, part, old, new
    (
        "no barrier after the tile is filled",
        "head_scores",
        "source",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
    ),
    ("a centroid too many", "head_scores", "source", "if (c >= C) break;", ""),
    ("every row scores the first", "head_scores", "source", "tile[m * H + block", "tile[block"),
    (
        "the sign of scores is ignored",
        "head_select",
        "source",
        "(bits >> 31) ? 0xffffffffu : 0x80000000u",
        "0x80000000u",
    ),
    (
        "counts are kept in one buffer",
        "head_select",
        "source",
        "if (lane == 0) part[round & 1][simdgroup]",
        "if (lane == 0) part[0][simdgroup]",
    ),
    (
        "equal scores all get in",
        "head_select",
        "source",
        "if (slot < TOP) cluster[row * TOP + slot]",
        "cluster[row * TOP + slot]",
    ),
    ("slots are not shifted", "head_select", "source", "equal_slot += all_above;", ""),
    (
        "a barrier before the slots is missing",
        "head_select",
        "source",
        "if (lane == 31) {\n      part[0][simdgroup] = above_upto;",
        "if (lane >= 30) {\n      part[0][simdgroup] = above_upto;",
    ),
    ("clusters are contiguous tokens", "head_logits", "source", "uint(ordering[members + r])", "uint(members + r)"),
    (
        "every row writes the first",
        "head_logits",
        "source",
        "(size_t(m) * TOP + slot) * SIZE + r] = logit",
        "slot * SIZE + r] = logit",
    ),
    ("tokens are places", "head_logits", "source", "= int(token)", "= int(members + r)"),
    (
        "one simdgroup of four",
        "head_logits",
        "source",
        "r = simdgroup; r < SIZE; r += 4",
        "r = simdgroup; r < SIZE / 4; r += 4",
    ),
]


def hard():
    return vocabulary(count=40, size=24, top=30), states(24)  # 30 of 40: some scores are negative


@emulated
def test_what_the_mutants_run_on_is_right_without_them():
    clusters, y = hard()
    with emu.patched():
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))


@emulated
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0].replace(" ", "-"))
def test_mutants_are_caught(mutant):
    _, kernel, part, old, new = mutant
    clusters, y = hard()
    with (
        pytest.raises((AssertionError, emu.EmulationError)),
        emu.patched(edit=checks.planted(kernel, part, old, new)),
    ):
        assert_scored(head.logits(y, clusters), scored_by_hand(y, clusters))
