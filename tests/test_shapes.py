"""The published sizes: counts and cache bytes agree with the independent tables, and unknown sizes are refused."""

import pytest

from mlx_mtp.pairs import KNOWN, NATIVE
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import ALL_SIZES, SIZES, shape


@pytest.fixture(scope="module")
def shapes():
    return {size: shape(size) for size in ALL_SIZES}


# Parameters that one pass over one token touches, of the target and of the drafter: active experts, one row of the
# per-layer table, the scored clusters, an output head that is the target's.
READ = {
    "E2B": (2.28e9, 11.7e6),
    "E4B": (4.64e9, 12.5e6),
    "12B": (11.91e9, 422.9e6),
    "26B-A4B": (3.82e9, 419.7e6),
    "31B": (30.70e9, 469.5e6),
    "Qwen3.5-0.8B": (0.752e9, 274.7e6),
    "Qwen3.5-2B": (1.882e9, 569.4e6),
    "Qwen3.5-4B": (4.206e9, 756.3e6),
    "Qwen3.5-9B": (7.937e9, 1260.4e6),
    "Qwen3.5-27B": (25.625e9, 1696.1e6),
}


@pytest.mark.parametrize("known", (*KNOWN, *NATIVE), ids=lambda known: known.size)
def test_parameters_and_reads_agree_with_the_known_pairs(shapes, known):
    target, drafter = shapes[known.size].target_counts, shapes[known.size].drafter_counts
    moe = shapes[known.size].moe
    assert shapes[known.size].target.hidden_size == known.hidden_size
    read = target.dense + target.slot * (moe.top_k if moe else 0)
    assert target.total == pytest.approx(known.params, rel=0.002)
    assert read == pytest.approx(READ[known.size][0], rel=0.002)
    assert drafter.total == pytest.approx(known.drafter_params, rel=0.002)
    assert drafter.dense == pytest.approx(READ[known.size][1], rel=0.01)


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


# Of transformers' Qwen3_5ForCausalLM with the same text_config.
COUNTED = {"0.8B": 752393024, "2B": 1881825088, "4B": 4205751296, "9B": 8953803264, "27B": 26895998464}


@pytest.mark.parametrize("name", COUNTED)
def test_a_hybrid_has_as_many_parameters_as_in_transformers(shapes, name):
    assert shapes[f"Qwen3.5-{name}"].target_counts.total == COUNTED[name]


# Layers with keys and values and key heads of 256, delta nets and their heads of 128 by 128: by hand from the configs.
HYBRID = {
    "0.8B": (6, 2, 18, 16),
    "2B": (6, 2, 18, 16),
    "4B": (8, 4, 24, 32),
    "9B": (8, 4, 24, 32),
    "27B": (16, 4, 48, 48),
}


@pytest.mark.parametrize("name", HYBRID)
def test_of_a_hybrid_a_quarter_of_the_layers_grows_and_the_states_do_not(shapes, name):
    full, heads, linear, values = HYBRID[name]
    found, position = shapes[f"Qwen3.5-{name}"], 2 * heads * 256 * 2
    assert found.kv_read_bytes(5000) == full * position * 5000
    assert found.draft_kv_read_bytes(5000) == position * 5000
    assert found.state_bytes == linear * values * 128 * 128 * 4
    assert found.kv_row_bytes(5000) - found.kv_row_bytes(4000) == (full + 1) * position * 1000
    assert found.kv_row_bytes(0) > found.state_bytes


def test_a_head_reads_the_targets_output_head_and_owns_none_of_it(shapes):
    for pair in NATIVE:
        counts = shapes[pair.size].drafter_counts
        assert counts.borrowed == 248320 * pair.hidden_size == counts.dense - counts.total
    assert shapes["Qwen3.5-4B"].target_counts.table == 0 and shapes["Qwen3.5-9B"].target_counts.table == 248320 * 4096


def test_an_unknown_size_is_refused_by_name():
    with pytest.raises(RequestError, match="size is '7B'; expected E2B, E4B, 12B, 26B-A4B, 31B, Qwen3.5-0.8B"):
        shape("7B")
