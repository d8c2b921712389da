"""The published sizes: counts and cache bytes agree with the independent tables, and unknown sizes are refused."""

import pytest

from mlx_mtp.pairs import KNOWN
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import SIZES, shape


@pytest.fixture(scope="module")
def shapes():
    return {size: shape(size) for size in SIZES}


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.size)
def test_parameters_and_reads_agree_with_the_known_pairs(shapes, known):
    target, drafter = shapes[known.size].target_counts, shapes[known.size].drafter_counts
    moe = shapes[known.size].target.moe
    read = target.dense + target.slot * (moe.top_k if moe else 0)
    assert target.total == pytest.approx(known.params, rel=0.002)
    assert read == pytest.approx(known.read, rel=0.002)
    assert drafter.total == pytest.approx(known.drafter_params, rel=0.002)
    assert drafter.dense == pytest.approx(known.drafter_read, rel=0.01)


# Megabytes at 8192 positions in bfloat16, counted by hand from layers, key heads and head sizes.
READS = {"E2B": (132, 18), "E4B": (272, 37), "12B": (470, 42), "26B-A4B": (378, 59), "31B": (1510, 117)}


@pytest.mark.parametrize("size", SIZES)
def test_keys_and_values_are_read_once_a_layer_that_sees_them(shapes, size):
    found = shapes[size]
    megabytes = found.kv_read_bytes(8192) / 1e6, found.draft_kv_read_bytes(8192) / 1e6
    assert megabytes == pytest.approx(READS[size], abs=0.6)
    assert found.kv_row_bytes(8192) <= found.kv_read_bytes(8192)


def test_a_window_keeps_no_more_than_its_size(shapes):
    found = shapes["31B"]
    assert found.kv_row_bytes(3000) - found.kv_row_bytes(2000) == 1000 * 10 * 2 * 4 * 512 * 2


def test_an_unknown_size_is_refused_by_name():
    with pytest.raises(RequestError, match="size is '7B'; expected E2B, E4B, 12B, 26B-A4B, 31B"):
        shape("7B")
