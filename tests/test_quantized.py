"""Quantised networks: recognised from their tensors, and computing what their unpacked weights do."""

from dataclasses import replace
from pathlib import Path

import checkpoints as ck
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FIXTURES
from passes import draft, logits
from random_checkpoints import KINDS, drafter_config, random_tensors, target_config

from mlx_mtp.load import load_drafter, load_pair, load_target
from mlx_mtp.models.experts import QuantizedExpertLinear
from mlx_mtp.quantized import Packing, Table, recognise
from mlx_mtp.rows import RequestError
from mlx_mtp.weights import parameters

F32 = mx.float32

QUANTS = (
    *(q for q in ck.AFFINE if q.group == 64 or q.bits == 4),
    ck.MXFP4,
    ck.MXFP8,
    ck.NVFP4,
    replace(ck.NVFP4, global_scale=True),
)
IDS = np.random.default_rng(0).integers(0, 512, 40)


def test_every_packing_of_mlx_is_recognised_and_no_other() -> None:
    for inputs in (128, 2816, 5376):
        for quant in (q for q in (*ck.AFFINE, ck.MXFP4, ck.MXFP8, ck.NVFP4) if inputs % q.group == 0):
            packed, groups = inputs * quant.bits // 32, inputs // quant.group
            expected = Packing(quant.mode, quant.bits, quant.group)
            assert recognise(inputs, packed, groups, quant.mode == "affine") == expected
    assert recognise(128, 28, 2, True) is None, "7 bits"
    assert recognise(128, 16, 8, True) is None, "groups of 16"
    assert recognise(128, 16, 2, False) is None, "scales of one byte for groups of 64"
    assert recognise(128, 16, 0, True) is None and recognise(128, 0, 2, True) is None


def _name(value: str | ck.Quant) -> str:
    return value if isinstance(value, str) else f"{value.mode}-{value.bits}-{value.group}-{value.global_scale}"


@pytest.mark.parametrize(
    "kind, quant",
    [
        *(("moe", quant) for quant in QUANTS),
        *(("edge", quant) for quant in (ck.Quant(4, 64), *QUANTS[-3:])),
        *(pytest.param("edge", q, marks=pytest.mark.slow) for q in QUANTS[:-3] if q != ck.Quant(4, 64)),
    ],
    ids=_name,
)
def test_a_packed_target_computes_what_its_unpacked_weights_do(kind: str, quant: ck.Quant, tmp_path: Path) -> None:
    packed = ck.quantised(ck.mlx_community(random_tensors(target_config(kind))), quant)
    loaded = load_target(str(ck.write(packed, tmp_path / "packed")), dtype=F32)
    plain = load_target(str(ck.write(ck.dequantised(packed), tmp_path / "plain")), dtype=F32)
    assert isinstance(loaded.model.embed_tokens, Table) and loaded.weight_bytes < plain.weight_bytes / 1.5
    assert not isinstance(plain.model.embed_tokens, nn.QuantizedEmbedding)
    assert np.abs(logits(loaded, IDS) - logits(plain, IDS)).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_per_module_are_recognised_whatever_config_json_says(kind: str, tmp_path: Path) -> None:
    source = ck.mlx_community(random_tensors(target_config(kind)))
    packed = ck.quantised(source, ck.Quant(4, 64), {**ck.MIXED_4_8, "*.q_proj": None, "*.o_proj": ck.NVFP4})
    plain = load_target(str(ck.write(ck.dequantised(packed), tmp_path / "plain")), dtype=F32)
    lying = ck.misdeclared(packed, ck.Quant(2, 32, "mxfp4"))
    for stored in (packed, lying):
        loaded = load_target(str(ck.write(stored, tmp_path / "packed", shards=2)), dtype=F32)
        layer = loaded.model.layers[0]
        assert (layer.mlp.up_proj.bits, layer.self_attn.k_proj.bits) == (8, 4)
        assert layer.self_attn.o_proj.mode == "nvfp4" and isinstance(layer.self_attn.q_proj, nn.Linear)
        if kind == "moe":
            assert layer.router.proj.bits == 8 and isinstance(layer.experts.up_proj, QuantizedExpertLinear)
        assert np.abs(logits(loaded, IDS) - logits(plain, IDS)).max() < 1e-3


@pytest.mark.parametrize("quant", [ck.Quant(4, 64), ck.Quant(8, 32), ck.MXFP4, ck.NVFP4], ids=str)
@pytest.mark.parametrize("clusters", [0, 32])
def test_a_packed_drafter_drafts_what_its_unpacked_weights_do(clusters: int, quant: ck.Quant, tmp_path: Path) -> None:
    config = target_config("edge")
    target = load_target(str(ck.write(random_tensors(config), tmp_path / "t")), dtype=F32)
    packed = ck.quantised(random_tensors(drafter_config(config, clusters=clusters)), quant)
    loaded = load_drafter(str(ck.write(packed, tmp_path / "packed")), target)
    plain = load_drafter(str(ck.write(ck.dequantised(packed), tmp_path / "plain")), target)
    assert isinstance(loaded.model.model.embed_tokens, Table)
    assert isinstance(loaded.model.pre_projection, nn.QuantizedLinear)
    (got, got_ids), (expected, ids) = draft(target, loaded, IDS), draft(target, plain, IDS)
    assert np.abs(got[np.argsort(got_ids)] - expected[np.argsort(ids)]).max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clusters", [0, 32])
def test_quantising_at_load_equals_loading_the_quantised_file(bits: int, clusters: int, tmp_path: Path) -> None:
    config = target_config("edge")
    target = load_target(str(ck.write(random_tensors(config), tmp_path / "t")), dtype=F32)
    source = ck.as_float32(random_tensors(drafter_config(config, clusters=clusters)))
    plain = ck.write(source, tmp_path / "plain")
    file = load_drafter(str(ck.write(ck.quantised(source, ck.Quant(bits, 64)), tmp_path / "packed")), target)
    made = load_drafter(str(plain), target, quantize=bits)
    for name, value in parameters(file.model).items():
        assert mx.array_equal(value, parameters(made.model)[name]).item(), name
    assert made.weight_bytes == file.weight_bytes < load_drafter(str(plain), target).weight_bytes


def test_quantising_at_load_takes_groups_of_32_and_leaves_rows_that_these_do_not_divide() -> None:
    pair = load_pair(str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant"), dtype=F32, quantize=4)
    model = pair.drafter.model
    assert model.model.embed_tokens.group_size == 32 and model.pre_projection.group_size == 64
    assert draft(pair.target, pair.drafter, np.arange(2, 12))[0].shape == (8 * 768 // 64,)


def test_a_quantised_drafter_is_quantised_again_only_to_what_it_is(tmp_path: Path) -> None:
    config = target_config("edge")
    target = ck.write(random_tensors(config), tmp_path / "t")
    drafter = ck.write(ck.quantised(random_tensors(drafter_config(config)), ck.Quant(4, 64)), tmp_path / "d")
    same = load_pair(str(target), str(drafter), quantize=4).drafter
    assert same.weight_bytes == load_pair(str(target), str(drafter)).drafter.weight_bytes
    with pytest.raises(RequestError, match="already quantised, to 4 bits"):
        load_pair(str(target), str(drafter), quantize=8)
    with pytest.raises(RequestError, match="quantize is 5; expected 4 or 8"):
        load_pair(str(target), str(drafter), quantize=5)
