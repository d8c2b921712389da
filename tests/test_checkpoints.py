"""The derived checkpoints are what they say: mlx-lm and the goldens are asked, not our own loader."""

import json
import struct
from pathlib import Path
from typing import Any

import checkpoints as ck
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import random_checkpoints as rc
from mlx.utils import tree_flatten

SHAPES = ("edge", "dense", "moe", "unified")
LAYOUTS = {
    "as_released": lambda c: c,
    "text_only": ck.text_only,
    "mlx_community": ck.mlx_community,
    "mlx_community_with_vision": lambda c: ck.mlx_community(c, vision=True),
    "mlx_text": ck.mlx_text,
}


def target(shape: str) -> ck.Checkpoint:
    """The target of a fixture."""
    return ck.read(ck.FIXTURES / shape / "target")


def goldens(shape: str) -> Any:
    """The reference numbers of a fixture."""
    return np.load(ck.FIXTURES / shape / "goldens.npz")


def mlx_lm_model(folder: Path, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """The folder loaded by mlx-lm, floating tensors in one dtype."""
    from mlx_lm.utils import load_model

    config = json.loads((folder / "config.json").read_text())
    # mlx-lm overwrites a nested vocabulary size with 262144 unless told
    model, _ = load_model(folder, model_config={"vocab_size": ck.text_of(config)["vocab_size"]})
    model.set_dtype(dtype)
    return model


def mlx_lm_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [P, V] of one prompt."""
    return np.array(mlx_lm_model(folder)(mx.array(ids)[None])[0])


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """Whether two sets of tensors have the same names, types and values."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bool(mx.all(a[k] == b[k])) for k in a
    )


# ---- fixtures and layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["target", "assistant", "assistant_fit"])
def test_the_fixtures_have_exactly_the_tensors_their_config_calls_for(shape: str, part: str) -> None:
    ckpt = ck.read(ck.FIXTURES / shape / part)
    prefix = "" if part != "target" else ck.HF_PREFIX
    assert rc.tensor_shapes(ckpt.config) == {
        name: value.shape for name, value in ckpt.tensors.items() if name.startswith(prefix)
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlx_lm_computes_the_golden_logits_from_every_layout(shape: str, layout: str, tmp_path: Path) -> None:
    if shape == "unified" and layout in ("text_only", "mlx_text"):
        pytest.skip("mlx-lm does not know gemma4_unified_text")
    folder = ck.write(LAYOUTS[layout](target(shape)), tmp_path / "t", shards=2)
    gold = goldens(shape)
    np.testing.assert_allclose(mlx_lm_logits(folder, gold["short/ids"]), gold["short/logits"], atol=2e-3)


def test_a_written_checkpoint_reads_back_equal_in_any_number_of_shards(tmp_path: Path) -> None:
    ckpt = target("edge")
    for shards in (1, 3):
        again = ck.read(ck.write(ckpt, tmp_path / str(shards), shards=shards))
        assert again.config == ckpt.config and again.files == ckpt.files and equal(again.tensors, ckpt.tensors)
    index = json.loads((tmp_path / "3" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ckpt.tensors) and len(set(index["weight_map"].values())) == 3
    assert not (tmp_path / "1" / "model.safetensors.index.json").exists()


def test_prefixes_and_configs_are_those_of_each_layout() -> None:
    moe = target("moe")
    assert ck.prefix_of(moe.tensors) == "model.language_model."
    assert ck.prefix_of(ck.text_only(moe).tensors) == "model."
    assert ck.prefix_of(ck.unprefixed(moe).tensors) == ""
    assert ck.prefix_of(ck.mlx_community(moe).tensors) == "language_model.model."
    assert ck.text_only(moe).config["model_type"] == "gemma4_text" and "text_config" not in ck.text_only(moe).config
    assert ck.text_only(target("unified")).config["model_type"] == "gemma4_unified_text"
    names = set(ck.mlx_community(moe).tensors)
    assert "language_model.model.layers.5.experts.switch_glu.gate_proj.weight" in names
    assert not any("gate_up" in name or "vision" in name for name in names)
    assert any(n.startswith("vision_tower.") for n in ck.mlx_community(moe, vision=True).tensors)


def test_split_experts_hold_the_rows_of_the_fused_tensor() -> None:
    fused, parts = ck.text_tensors(target("moe")), ck.text_tensors(ck.mlx_community(target("moe")))
    base = "layers.2.experts"
    rows = [parts[f"{base}.switch_glu.{half}_proj.weight"] for half in ("gate", "up")]
    assert bool(mx.all(mx.concatenate(rows, axis=1) == fused[f"{base}.gate_up_proj"]))


def test_a_dense_target_can_be_named_unified(tmp_path: Path) -> None:
    ckpt = ck.as_unified(target("dense"))
    assert (ckpt.config["model_type"], ckpt.config["text_config"]["model_type"]) == (
        "gemma4_unified",
        "gemma4_unified_text",
    )
    gold = goldens("dense")
    got = mlx_lm_logits(ck.write(ckpt, tmp_path / "u"), gold["short/ids"])
    np.testing.assert_allclose(got, gold["short/logits"], atol=2e-3)
    with pytest.raises(ValueError, match="neither experts nor per-layer inputs"):
        ck.as_unified(target("edge"))


@pytest.mark.parametrize("shape", ["edge", "dense"])
def test_ignorable_tensors_are_added_and_nothing_else_changes(shape: str, tmp_path: Path) -> None:
    plain, more = target(shape), ck.with_ignorable(target(shape))
    added = {name: value for name, value in more.tensors.items() if name not in plain.tensors}
    assert equal(plain.tensors, {k: v for k, v in more.tensors.items() if k not in added})
    assert ("model.language_model.layers.9.self_attn.k_proj.weight" in added) == (shape == "edge")
    assert "mtp.layers.0.norm.weight" in added and "model.audio_tower.conv.weight" in added
    # mlx-lm skips all of them but these
    tensors = {name: value for name, value in more.tensors.items() if not name.startswith("mtp.")}
    folder = ck.write(ck.Checkpoint(more.config, tensors), tmp_path / "t")
    gold = goldens(shape)
    np.testing.assert_allclose(mlx_lm_logits(folder, gold["short/ids"]), gold["short/logits"], atol=2e-3)


# What transformers 5.22.2 and 5.23.0 wrote when they saved these configs.
SAVED_TABLES = {
    "edge": {"4": {"head_dim": 32}, "9": {"head_dim": 32}},
    "dense": {i: {"head_dim": 32, "num_key_value_heads": 2} for i in ("05", "11")},
    "moe": {"5": {"head_dim": 32, "num_key_value_heads": 1}},
    "unified": {"5": {"head_dim": 32, "num_key_value_heads": 1}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_of_exceptions_is_what_transformers_writes(shape: str) -> None:
    for ckpt in (target(shape), ck.text_only(target(shape))):
        text = ck.text_of(ck.per_layer_config(ckpt).config)
        assert text["per_layer_config"] == SAVED_TABLES[shape]
        assert "global_head_dim" not in text and "num_global_key_value_heads" not in text


def test_an_exception_that_equals_the_common_value_is_left_out() -> None:
    config = rc.target_config("dense", global_head_dim=32, num_global_key_value_heads=4)
    assert ck.text_of(ck.per_layer_config(rc.random_tensors(config)).config)["per_layer_config"] == {}


# ---- quantisation --------------------------------------------------------------------------------


def converted(folder: Path, quant: ck.Quant) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and config as mlx-lm's converter makes them, with its own exceptions (the router at 8 bits)."""
    from mlx_lm.utils import quantize_model

    model = mlx_lm_model(folder, mx.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    model, config = quantize_model(
        model, config, quant.group, quant.bits, mode=quant.mode, global_scale=quant.global_scale
    )
    return dict(tree_flatten(model.parameters())), config


@pytest.mark.parametrize("kind", rc.KINDS)
@pytest.mark.parametrize("quant", [ck.Quant(4, 64), ck.Quant(3, 32), ck.Quant(6, 128), ck.MXFP4, ck.NVFP4])
def test_quantised_files_equal_those_of_mlx_lms_converter(kind: str, quant: ck.Quant, tmp_path: Path) -> None:
    source = rc.random_tensors(rc.target_config(kind), seed=1)
    tensors, config = converted(ck.write(source, tmp_path / "source"), quant)
    ours = ck.quantised(ck.mlx_community(source), quant, {"*.router.proj": ck.Quant(8, 64)})
    assert equal(ours.tensors, tensors)
    assert ours.config["quantization"] == ours.config["quantization_config"] == config["quantization"]


def test_experts_can_have_a_scale_each_as_in_mlx_lm(tmp_path: Path) -> None:
    quant = ck.Quant(4, 16, "nvfp4", global_scale=True)
    source = rc.random_tensors(rc.target_config("moe"), seed=2)
    tensors, config = converted(ck.write(source, tmp_path / "source"), quant)
    ours = ck.quantised(ck.mlx_community(source), quant, {"*.router.proj": ck.Quant(8, 64)})
    assert equal(ours.tensors, tensors)
    entry = config["quantization"]["language_model.model.layers.0.experts.switch_glu.up_proj"]
    assert ours.config["quantization"]["language_model.model.layers.0.experts.switch_glu.up_proj"] == entry


@pytest.mark.parametrize("quant", [*ck.AFFINE, ck.MXFP4, ck.MXFP8, ck.NVFP4])
def test_every_packing_unpacks_to_nearly_the_same_matrix(quant: ck.Quant) -> None:
    ckpt = ck.mlx_community(rc.random_tensors(rc.target_config("dense")))
    packed = ck.quantised(ckpt, quant)
    name = "language_model.model.layers.0.mlp.down_proj"
    assert packed.tensors[f"{name}.weight"].shape == (128, 256 * quant.bits // 32)
    assert packed.tensors[f"{name}.scales"].shape == (128, 256 // quant.group)
    exact, plain = ckpt.tensors[f"{name}.weight"].astype(mx.float32), ck.dequantised(packed)
    gap = mx.sqrt(mx.mean((plain.tensors[f"{name}.weight"] - exact) ** 2) / mx.mean(exact**2)).item()
    assert 0 < gap < {2: 0.5, 3: 0.25, 4: 0.17, 5: 0.06, 6: 0.03, 8: 0.03}[quant.bits], gap
    assert equal(ck.as_float32(plain).tensors, plain.tensors) and "quantization" not in plain.config


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant", [ck.Quant(4, 32), ck.Quant(8, 64), ck.MXFP8, ck.NVFP4])
def test_mlx_lm_agrees_on_packed_and_unpacked_weights(shape: str, quant: ck.Quant, tmp_path: Path) -> None:
    # MLX looks rows up in a table of a float mode in bfloat16, whatever the model's type, and sqrt(H) rounds
    whole = {"*.embed_tokens*": None} if quant.mode != "affine" else {}
    packed = ck.quantised(ck.mlx_community(target(shape)), quant, whole | ck.MIXED_4_8)
    ids = goldens(shape)["short/ids"]
    got = mlx_lm_logits(ck.write(packed, tmp_path / "packed", shards=2), ids)
    expected = mlx_lm_logits(ck.write(ck.dequantised(packed), tmp_path / "plain"), ids)
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_a_mixed_file_lists_its_exceptions_by_full_path_without_the_mode_of_the_others() -> None:
    packed = ck.quantised(ck.mlx_text(rc.random_tensors(rc.target_config("moe"))), ck.MXFP4, ck.MIXED_4_8)
    section = packed.config["quantization"]
    assert {k: section[k] for k in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
    }
    assert section["model.layers.3.mlp.down_proj"] == {"group_size": 64, "bits": 8}
    assert section["model.layers.3.router.proj"] == {"group_size": 64, "bits": 8}
    assert packed.tensors["model.layers.3.mlp.down_proj.scales"].dtype == mx.bfloat16
    assert packed.tensors["model.layers.3.experts.switch_glu.up_proj.scales"].dtype == mx.uint8
    kept = ck.quantised(packed_source := ck.mlx_text(target("dense")), ck.Quant(4, 32), {"*.o_proj": None})
    name = "model.layers.0.self_attn.o_proj.weight"
    assert equal({"": kept.tensors[name]}, {"": packed_source.tensors[name]})


def test_tables_are_packed_too_and_rows_that_the_group_does_not_divide_are_not() -> None:
    packed = ck.quantised(ck.mlx_community(target("edge")), ck.Quant(4, 64))
    for name in ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection"):
        assert packed.tensors[f"language_model.model.{name}.weight"].dtype == mx.uint32
    # 96 columns; the consumers' are twice as wide and divisible
    assert packed.tensors["language_model.model.layers.0.mlp.down_proj.weight"].dtype == mx.bfloat16
    assert packed.tensors["language_model.model.layers.9.mlp.down_proj.weight"].dtype == mx.uint32
    assert packed.tensors["language_model.model.layers.0.layer_scalar"].dtype == mx.bfloat16


def test_a_clustered_drafter_is_packed_with_its_table_and_keeps_its_ordering() -> None:
    source = ck.read(ck.FIXTURES / "edge" / "assistant_fit")
    packed = ck.quantised(ck.mlx_drafter(source), ck.Quant(4, 32), {"model.embed_tokens": ck.Quant(8, 32)})
    for path in ("model.embed_tokens", "masked_embedding.centroids", "pre_projection", "post_projection"):
        assert packed.tensors[f"{path}.weight"].dtype == mx.uint32, path
    assert packed.config["quantization"]["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    order = packed.tensors["masked_embedding.token_ordering"]
    assert order.dtype == mx.int32 and sorted(order.tolist()) == list(range(768))


def test_a_misdeclared_file_keeps_its_tensors() -> None:
    packed = ck.quantised(ck.mlx_community(target("dense")), ck.Quant(8, 32))
    lying = ck.misdeclared(packed, ck.Quant(4, 64))
    assert lying.tensors is packed.tensors and lying.config["quantization"]["bits"] == 4


# ---- random checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", rc.KINDS)
def test_mlx_lm_loads_a_random_target_and_its_text_varies(kind: str, tmp_path: Path) -> None:
    tokenizer = ck.FIXTURES / "moe" / "target"
    folder = rc.random_checkpoint(tmp_path / "t", rc.target_config(kind), 3, tokenizer)
    ids = np.random.default_rng(0).integers(128, 512, 24)
    logits = mlx_lm_logits(folder, ids)
    best = logits.argmax(-1)
    assert np.isfinite(logits).all() and len(set(best.tolist())) > 12
    assert not (best == ids).any(), "with a positive last norm a tied head favours its own input"
    assert (folder / "tokenizer.json").exists()


def test_a_random_checkpoint_depends_on_its_seed_only() -> None:
    config = rc.drafter_config(rc.target_config("edge"), clusters=32)
    a, b, c = (rc.random_tensors(config, seed).tensors for seed in (5, 5, 6))
    assert equal(a, b) and not equal(a, c)
    assert a["masked_embedding.token_ordering"].dtype == mx.int64


@pytest.mark.parametrize("what", rc.MISFITS)
def test_a_misfit_differs_from_the_right_drafter_in_its_dimensions(what: str, tmp_path: Path) -> None:
    source = ck.FIXTURES / "dense" / "target"
    config = ck.read(rc.misfit_drafter(source, tmp_path / what, what)).config
    right = rc.drafter_config(ck.read(source).config)
    assert config != right and config["model_type"] == right["model_type"]


# ---- broken folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", ck.DEFECTS)
def test_every_defect_changes_the_folder(defect: str, tmp_path: Path) -> None:
    source = ck.FIXTURES / "edge" / "target"
    good, bad = (
        ck.write(ck.read(source), tmp_path / "good", shards=3),
        ck.break_folder(defect, source, tmp_path / "bad"),
    )
    files = {folder: {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (good, bad)}
    changed = [n for n in files[good] if files[good][n] != files[bad].get(n)]
    assert changed, defect
    if defect in ck.TOKENIZER_DEFECTS:
        assert all("token" in n or "template" in n or "generation" in n for n in changed), changed


def test_the_defects_are_what_their_names_say(tmp_path: Path) -> None:
    source = ck.FIXTURES / "dense" / "target"

    def broken(defect: str) -> Path:
        return ck.break_folder(defect, source, tmp_path / defect)

    victim = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert victim not in ck.read(broken("missing_tensor")).tensors
    assert ck.read(broken("integer_weight")).tensors[victim].dtype == mx.int32
    assert ck.read(broken("wrong_shape")).tensors[victim].shape == (128, 63)
    assert ck.read(broken("packed_without_scales")).tensors[victim].shape == (128, 8)
    assert len(list(broken("missing_shard").glob("*.safetensors"))) == 2
    assert not list(broken("no_weights").glob("*.safetensors*"))
    with pytest.raises(RuntimeError):
        mx.eval(ck.read(broken("truncated_weights")).tensors)
    with pytest.raises(json.JSONDecodeError):
        ck.read(broken("bad_json_config"))
    folder = broken("index_names_wrong_file")
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert [name for name, file in where.items() if name not in header(folder / file)] == [min(where)]
    assert "chat_template" not in (broken("no_chat_template") / "tokenizer_config.json").read_text()


def header(path: Path) -> dict[str, Any]:
    """The table at the start of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def test_a_drafter_can_be_broken_like_a_target(tmp_path: Path) -> None:
    source = ck.FIXTURES / "edge" / "assistant"
    for defect in ck.DEFECTS.keys() - set(ck.TOKENIZER_DEFECTS):
        ck.break_folder(defect, source, tmp_path / defect)
    assert "phantom" in (tmp_path / "index_names_absent_tensor" / "model.safetensors.index.json").read_text()
