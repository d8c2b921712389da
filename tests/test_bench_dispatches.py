"""Dispatches are counted from graphs that are never run, as the emulator counts the launches of ones that are."""

from collections import Counter

import dispatches
import mlx.core as mx
import pytest
from graph import FUSED

from mlx_mtp.drafters.mtp import KIND
from mlx_mtp.models.config import read_assistant, read_target
from mlx_mtp.pairs import KNOWN, check_pair
from mlx_mtp.shapes import read_configs

pytestmark = pytest.mark.kernels


def test_what_only_looks_at_memory_is_no_dispatch():
    x = mx.zeros((4, 6))
    mx.eval(x)
    y = mx.exp(x).reshape(6, 4).T[1:3]
    assert dispatches.primitives(y) == Counter(Exp=1)
    assert dispatches.primitives(y, mx.abs(y)) == Counter(Exp=1, Abs=1), "what two results share is counted once"


def test_the_sizes_are_those_of_the_published_pairs():
    for pair in KNOWN:
        configs = read_configs(pair.size)
        read = read_target(configs["target"], pair.target)
        assert read.hidden_size == pair.hidden_size
        found = read_assistant(configs["drafter"], pair.drafter)
        assert check_pair(KIND.network, read, found, (pair.target, pair.drafter)) == []


def test_a_step_of_kernels_is_what_the_code_launches():
    with dispatches.as_on_metal(kernels=True):
        made = dispatches.networks("26B-A4B", 4)
        step, draft = dispatches.round_of(made, 0), dispatches.counts("26B-A4B", 4, True, 1).draft
    # a layer: 7 products (6 in full layers, whose values are their keys), 4 launches of experts, 2 of attention, 13
    # norms and rotations; then the last norm and the output head, the verdict's two, the embedding's dequantising
    layers, full = 30, 5
    assert step[FUSED] == (7 + 4 + 2 + 13) * layers - full + 1 + 1 + 2 + 1
    assert draft[FUSED] == (2 + 6) * 4 + 1 + 1


def test_attention_over_heads_of_512_is_one_operation_of_mlx_for_up_to_32_queries_a_key_head():
    with dispatches.as_on_metal(kernels=False):
        made = dispatches.networks("E4B", 4)
        step, wide = dispatches.round_of(made, 0), dispatches.round_of(made, 15)
    assert step["Softmax"] == 0
    assert wide["Softmax"] == 42  # 4 heads a key head, 16 columns: in sliding layers too
    assert step["QuantizedMatmul"] == 24 * 2 + 42 * (2 + 3 + 2) + 2  # keys and values; every layer; two outside
