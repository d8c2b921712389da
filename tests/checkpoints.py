"""Derives checkpoint folders for tests from a small one or from a seed; knows neither models nor loaders.

    source = read(FIXTURES / "edge" / "target")
    folder = write(quantised(mlx_community(source), Quant(4, 32)), tmp_path / "q4", shards=3)
    folder = break_folder("missing_shard", FIXTURES / "edge" / "target", tmp_path / "broken")

A step is a pure function Checkpoint -> Checkpoint; only `read`, `write` and what takes a folder touch files.
Tensors are mlx arrays, because numpy has no bfloat16. For other dimensions see random_checkpoints.py.
"""

import fnmatch
import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "oracle" / "seed0"
SLIDING, FULL = "sliding_attention", "full_attention"
HF_PREFIX, MLX_PREFIX, TEXT_PREFIX = "model.language_model.", "language_model.model.", "model."

Config = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """config.json, tensors by name, and the folder's other files (tokenizer, generation config) as bytes."""

    config: Config
    tensors: dict[str, mx.array]
    files: dict[str, bytes] = field(default_factory=dict)


# ---- files ---------------------------------------------------------------------------------------


def read(folder: Path) -> Checkpoint:
    """Read a folder written by `write` or by Hugging Face, sharded or not."""
    config, tensors, files = {}, {}, {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors.update(mx.load(str(path)))
        elif path.name == "config.json":
            config = json.loads(path.read_text())
        elif path.name != "model.safetensors.index.json":
            files[path.name] = path.read_bytes()
    return Checkpoint(config, tensors, files)


def write(ckpt: Checkpoint, folder: Path, shards: int = 1, index: bool | None = None) -> Path:
    """Write the folder, replacing what is there; an index is written for several shards, or when asked for.

    mlx-lm writes one even for a single file (`index=True`).
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ckpt.config, indent=2))
    for name, content in ckpt.files.items():
        (folder / name).write_bytes(content)
    names = np.array_split(np.array(sorted(ckpt.tensors)), shards)
    where = {}
    for i, part in enumerate(names):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), {str(n): ckpt.tensors[n] for n in part}, metadata={"format": "pt"})
        where.update({str(n): file for n in part})
    if index or (index is None and shards > 1):
        total = sum(t.nbytes for t in ckpt.tensors.values())
        table = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=2))
    return folder


# ---- layouts -------------------------------------------------------------------------------------


def is_drafter(config: Config) -> bool:
    """Whether the config describes an assistant."""
    return config["model_type"].endswith("_assistant")


def text_of(config: Config) -> Config:
    """The text config, nested or the whole of a text-only one."""
    return config.get("text_config", config)


def with_text(config: Config, **changes: Any) -> Config:
    """A copy with changed keys of the text config, nested or flat."""
    if "text_config" not in config:
        return config | changes
    return config | {"text_config": config["text_config"] | changes}


def prefix_of(tensors: Mapping[str, Any]) -> str:
    """What stands before `embed_tokens.weight`."""
    names = [name for name in tensors if re.search(r"(^|\.)embed_tokens\.weight$", name)]
    return names[0].removesuffix("embed_tokens.weight")


def text_tensors(ckpt: Checkpoint) -> dict[str, mx.array]:
    """The tensors of a target's text part, without prefix."""
    prefix = prefix_of(ckpt.tensors)
    return {k.removeprefix(prefix): v for k, v in ckpt.tensors.items() if k.startswith(prefix)}


def with_prefix(ckpt: Checkpoint, prefix: str) -> Checkpoint:
    """A target with its text part only, under another prefix."""
    return replace(ckpt, tensors={prefix + name: value for name, value in text_tensors(ckpt).items()})


def with_text_config_only(ckpt: Checkpoint) -> Checkpoint:
    """A target with the flat config of a text model: `gemma4_text` or `gemma4_unified_text`."""
    arch = {"gemma4_text": "Gemma4ForCausalLM", "gemma4_unified_text": "Gemma4UnifiedForCausalLM"}
    text = dict(text_of(ckpt.config))
    return replace(ckpt, config=text | {"architectures": [arch[text["model_type"]]]})


def text_only(ckpt: Checkpoint) -> Checkpoint:
    """A target as transformers saves the text model alone: flat config, prefix `model.`, fused experts."""
    return with_prefix(with_text_config_only(ckpt), TEXT_PREFIX)


def unprefixed(ckpt: Checkpoint) -> Checkpoint:
    """A target with a flat config and no prefix at all."""
    return with_prefix(with_text_config_only(ckpt), "")


def split_experts(ckpt: Checkpoint) -> Checkpoint:
    """Experts as in MLX files: `experts.switch_glu.{gate,up,down}_proj.weight` [E, out, in]."""
    tensors = {}
    for name, value in ckpt.tensors.items():
        base = name.rsplit(".", 1)[0] + ".switch_glu"
        if name.endswith(".experts.gate_up_proj"):
            gate, up = mx.split(value, 2, axis=-2)
            tensors[f"{base}.gate_proj.weight"], tensors[f"{base}.up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            tensors[f"{base}.down_proj.weight"] = value
        else:
            tensors[name] = value
    return replace(ckpt, tensors=tensors)


def mlx_community(ckpt: Checkpoint, vision: bool = False) -> Checkpoint:
    """A target as mlx-lm converts it; `vision` keeps the towers as mlx-vlm does, without `model.`."""
    text = split_experts(with_prefix(ckpt, MLX_PREFIX))
    if not vision:
        return replace(text, config={k: v for k, v in ckpt.config.items() if k != "vision_config"})
    old = prefix_of(ckpt.tensors)
    towers = {k.removeprefix("model."): v for k, v in ckpt.tensors.items() if not k.startswith(old)}
    return replace(text, tensors=towers | text.tensors)


def mlx_text(ckpt: Checkpoint) -> Checkpoint:
    """A text-only target as mlx-lm converts it: flat config, prefix `model.`, split experts."""
    return split_experts(text_only(ckpt))


def mlx_drafter(ckpt: Checkpoint) -> Checkpoint:
    """A drafter as mlx-vlm converts it: the same names, `token_ordering` as int32."""
    narrow = {k: v.astype(mx.int32) for k, v in ckpt.tensors.items() if k.endswith("token_ordering")}
    return replace(ckpt, tensors=ckpt.tensors | narrow)


def merged(target: Checkpoint, drafter: Checkpoint) -> Checkpoint:
    """A target in MLX's layout with its drafter among its own tensors, as oMLX merges the two."""
    own = {f"language_model.mtp.{name}": value for name, value in drafter.tensors.items()}
    layers = text_of(drafter.config)["num_hidden_layers"]
    config = with_text(target.config, mtp_assistant_config=drafter.config, mtp_num_hidden_layers=layers)
    return replace(target, config=config, tensors=target.tensors | own)


def as_unified(ckpt: Checkpoint) -> Checkpoint:
    """A dense target or its drafter under the names of the 12B family; the arithmetic is the same."""
    text = text_of(ckpt.config)
    if text.get("enable_moe_block") or text.get("hidden_size_per_layer_input"):
        raise ValueError("gemma4_unified has neither experts nor per-layer inputs")
    config = with_text(ckpt.config, model_type="gemma4_unified_text")
    kind = "gemma4_unified_assistant" if is_drafter(config) else "gemma4_unified"
    return replace(ckpt, config=config | ({"model_type": kind} if "text_config" in config else {}))


def per_layer_config(ckpt: Checkpoint) -> Checkpoint:
    """Head sizes of full layers as transformers >= 5.22 writes them, in a table of exceptions per layer.

    Keys are layer numbers padded with zeros to the width of the largest; an exception that equals the common
    value is left out, and the table may be empty. `global_head_dim`, `num_global_key_value_heads` disappear.
    """
    text = dict(text_of(ckpt.config))
    special = {"head_dim": text.pop("global_head_dim")}
    heads = text.pop("num_global_key_value_heads", None)
    if heads is not None and text.get("attention_k_eq_v"):
        special["num_key_value_heads"] = heads
    special = {key: value for key, value in special.items() if value != text[key]}
    layers = [i for i, kind in enumerate(text["layer_types"]) if kind == FULL and special]
    width = len(str(max(layers, default=0)))
    text["per_layer_config"] = {str(i).zfill(width): dict(special) for i in layers}
    return replace(ckpt, config=ckpt.config | {"text_config": text} if "text_config" in ckpt.config else text)


def with_ignorable(ckpt: Checkpoint) -> Checkpoint:
    """A target or drafter with tensors that real files may contain and that a text engine must skip."""
    text, prefix = text_of(ckpt.config), prefix_of(ckpt.tensors)
    junk = {}
    for i in range(text["num_hidden_layers"] - text["num_kv_shared_layers"], text["num_hidden_layers"]):
        dim = text["head_dim"] if text["layer_types"][i] == SLIDING else text["global_head_dim"]
        for name, shape in (
            ("k_proj", (dim, text["hidden_size"])),
            ("v_proj", (dim, text["hidden_size"])),
            ("k_norm", (dim,)),
        ):
            junk[f"{prefix}layers.{i}.self_attn.{name}.weight"] = mx.full(shape, 9.0, mx.bfloat16)
    last = f"{prefix}layers.0"
    junk[f"{last}.self_attn.rotary_emb.inv_freq"] = mx.full((4,), 9.0)
    junk[f"{last}.mlp.gate_proj.input_max"] = mx.array(9.0)
    junk[f"{last}.mlp.gate_proj.output_min"] = mx.array(-9.0)
    junk["mtp.layers.0.norm.weight"] = mx.full((4,), 9.0)
    if not is_drafter(ckpt.config):
        junk["model.audio_tower.conv.weight"] = mx.full((4, 3, 3), 9.0)
    return replace(ckpt, tensors=junk | ckpt.tensors)


def as_float32(ckpt: Checkpoint) -> Checkpoint:
    """Floating tensors that are not part of a quantised module, in float32."""
    packed = {name.removesuffix(".scales") for name in ckpt.tensors if name.endswith(".scales")}
    return replace(
        ckpt,
        tensors={
            k: v if k.rsplit(".", 1)[0] in packed or not mx.issubdtype(v.dtype, mx.floating) else v.astype(mx.float32)
            for k, v in ckpt.tensors.items()
        },
    )


def base_target(ckpt: Checkpoint) -> Checkpoint:
    """A target without instruction tuning: no chat template, one end token."""
    files = {k: v for k, v in ckpt.files.items() if k != "chat_template.jinja"}
    tokenizer = json.loads(files["tokenizer_config.json"])
    tokenizer.pop("chat_template", None)
    files["tokenizer_config.json"] = json.dumps(tokenizer).encode()
    files["generation_config.json"] = json.dumps({"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}).encode()
    return replace(ckpt, files=files)


# ---- quantisation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quant:
    """One way to pack a matrix; mxfp4, mxfp8 and nvfp4 allow one size each, see the constants below.

    `global_scale` (nvfp4) adds one scale per expert, and concerns experts only, as in mlx-lm.
    """

    bits: int = 4
    group: int = 64
    mode: str = "affine"
    global_scale: bool = False

    @property
    def entry(self) -> Config:
        """The entry of config.json; an exception without `mode` is affine."""
        entry: Config = {"group_size": self.group, "bits": self.bits}
        if self.mode != "affine":
            entry["mode"] = self.mode
        return entry | ({"global_scale": True} if self.global_scale else {})


MXFP4, MXFP8, NVFP4 = Quant(4, 32, "mxfp4"), Quant(8, 32, "mxfp8"), Quant(4, 16, "nvfp4")
AFFINE = tuple(Quant(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128))
MIXED_4_8 = {"*.mlp.*_proj": Quant(8, 64), "*.router.proj": Quant(8, 64)}  # gemma-4-26b-a4b-it-4bit
OTHER_PARTS = ("vision", "audio")


def packable(name: str, value: mx.array, quant: Quant) -> bool:
    """Whether converters pack this tensor: a matrix, or a stack of them, whose rows the group divides."""
    matrix = name.endswith(".weight") and value.ndim >= 2 and not any(part in name for part in OTHER_PARTS)
    return matrix and value.shape[-1] % quant.group == 0


def pack(value: mx.array, quant: Quant, global_scale: bool) -> dict[str, mx.array]:
    """One tensor [..., out, in] as `weight` uint32, `scales`, affine `biases`, maybe `global_scale` [E]."""
    if not global_scale:
        parts = mx.quantize(value, quant.group, quant.bits, mode=quant.mode)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))
    scale = mx.max(mx.abs(value), axis=(-2, -1)).astype(mx.float32)
    parts = [
        mx.quantize(v, quant.group, quant.bits, mode=quant.mode, global_scale=s)
        for v, s in zip(value, scale, strict=True)
    ]
    return {
        "weight": mx.stack([p[0] for p in parts]),
        "scales": mx.stack([p[1] for p in parts]),
        "global_scale": scale,
    }


def quantised(ckpt: Checkpoint, quant: Quant, overrides: Mapping[str, Quant | None] | None = None) -> Checkpoint:
    """Every matrix packed as mlx-lm's converter does, and `quantization` in config.json, under both names.

    Use it on an MLX layout: module paths are the tensor names without `.weight`. `overrides` maps patterns of
    module paths to another packing, which config.json lists by full path, or to None for a module left in
    floating point; the first match counts. As by the converter, matrices whose rows the default group size
    does not divide stay unquantised; so do those that the override's does not, where the converter fails.
    """
    default = quant.entry | {"mode": quant.mode}
    default.pop("global_scale", None)
    tensors, table = {}, {}
    for name, value in ckpt.tensors.items():
        path = name.removesuffix(".weight")
        hits = [q for pattern, q in (overrides or {}).items() if fnmatch.fnmatch(path, pattern)]
        chosen = hits[0] if hits else quant
        if chosen is None or not packable(name, value, quant) or not packable(name, value, chosen):
            tensors[name] = value
            continue
        scaled = chosen.global_scale and ".switch_glu." in path
        if scaled or chosen != quant:
            table[path] = (chosen if scaled else replace(chosen, global_scale=False)).entry
        tensors.update({f"{path}.{part}": v for part, v in pack(value, chosen, scaled).items()})
    section = default | table
    return replace(
        ckpt, tensors=tensors, config=ckpt.config | {"quantization": section, "quantization_config": section}
    )


def misdeclared(ckpt: Checkpoint, quant: Quant) -> Checkpoint:
    """A quantised checkpoint whose config.json claims another packing than the tensors have."""
    section = quant.entry | {"mode": quant.mode}
    return replace(ckpt, config=ckpt.config | {"quantization": section, "quantization_config": section})


def unpack(ckpt: Checkpoint, path: str) -> mx.array:
    """The exact float32 matrix that a quantised module stands for; its packing is read from config.json.

    `mx.dequantize` rounds to the type of the scales (bfloat16 in most files), a quantised product does not.
    """
    section = ckpt.config["quantization"]
    how = section.get(path, section)
    weight, scales = ckpt.tensors[f"{path}.weight"], ckpt.tensors[f"{path}.scales"]
    biases, scale = (ckpt.tensors.get(f"{path}.{part}") for part in ("biases", "global_scale"))
    kwargs = {"group_size": how["group_size"], "bits": how["bits"], "mode": how.get("mode", "affine")}
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    kwargs["dtype"] = mx.float32
    if scale is None:
        return mx.dequantize(weight, scales, biases, **kwargs)
    rows = [mx.dequantize(w, s, global_scale=g, **kwargs) for w, s, g in zip(weight, scales, scale, strict=True)]
    return mx.stack(rows)


def dequantised(ckpt: Checkpoint) -> Checkpoint:
    """The float32 checkpoint that a quantised one stands for: compare an engine's numbers with it."""
    paths = [name.removesuffix(".scales") for name in ckpt.tensors if name.endswith(".scales")]
    tensors = {f"{path}.weight": unpack(ckpt, path) for path in paths}
    plain = {k: v for k, v in ckpt.tensors.items() if k.rsplit(".", 1)[0] not in set(paths)}
    config = {k: v for k, v in ckpt.config.items() if k not in ("quantization", "quantization_config")}
    return as_float32(Checkpoint(config, plain | tensors, ckpt.files))


# ---- broken folders ------------------------------------------------------------------------------


def edit_config(folder: Path, change: Callable[[Config], Any]) -> None:
    """Rewrite config.json by a function that changes it in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Rewrite the weight map of the index by a function that changes it in place."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_victim(folder: Path, change: Callable[[mx.array], dict[str, mx.array]]) -> None:
    """Replace the query projection of layer 0 by what `change` returns for the ending of its name."""
    ckpt = read(folder)
    name = next(n for n in sorted(ckpt.tensors) if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors = dict(ckpt.tensors)
    value = tensors.pop(name)
    tensors.update({name + ending: new for ending, new in change(value).items()})
    write(replace(ckpt, tensors=tensors), folder, shards=3)


def shard(folder: Path, i: int = 1) -> Path:
    """The path of one weight file, the second of three by default."""
    return sorted(folder.glob("model*.safetensors"))[i]


def name_wrong_file(weight_map: dict[str, str]) -> None:
    """Say of the first tensor of the first file that it is in the last."""
    names = sorted(weight_map)
    weight_map[names[0]] = weight_map[names[-1]]


def unlink(*patterns: str) -> Callable[[Path], None]:
    """A defect that removes files."""

    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


# What is wrong -> how to bring it about in a folder of three shards with an index.
DEFECTS: dict[str, Callable[[Path], Any]] = {
    "missing_config": unlink("config.json"),
    "bad_json_config": lambda d: (d / "config.json").write_text((d / "config.json").read_text()[:-40]),
    "config_not_an_object": lambda d: (d / "config.json").write_text("[]"),
    "unknown_model_type": lambda d: edit_config(d, lambda c: c.update(model_type="gemma9")),
    "no_model_type": lambda d: edit_config(d, lambda c: c.pop("model_type")),
    "missing_config_key": lambda d: edit_config(d, lambda c: text_of(c).pop("hidden_size")),
    "no_weights": unlink("*.safetensors", "*.index.json"),
    "missing_shard": lambda d: shard(d).unlink(),
    "truncated_weights": lambda d: shard(d).write_bytes(shard(d).read_bytes()[:-100]),
    "bad_weights_header": lambda d: shard(d).write_bytes(struct.pack("<Q", 1 << 40) + shard(d).read_bytes()[8:]),
    "empty_weights": lambda d: shard(d).write_bytes(b""),
    "bad_json_index": lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": '),
    "index_names_wrong_file": lambda d: edit_index(d, name_wrong_file),
    "index_names_absent_tensor": lambda d: edit_index(d, lambda m: m.update(phantom=shard(d).name)),
    "missing_tensor": lambda d: edit_victim(d, lambda v: {}),
    "unexpected_tensor": lambda d: edit_victim(d, lambda v: {"": v, "_surprise": v}),
    "wrong_shape": lambda d: edit_victim(d, lambda v: {"": v[:, :-1]}),
    "wrong_rank": lambda d: edit_victim(d, lambda v: {"": v.reshape(-1)}),
    "integer_weight": lambda d: edit_victim(d, lambda v: {"": v.astype(mx.int32)}),
    "packed_without_scales": lambda d: edit_victim(d, lambda v: {"": mx.quantize(v, 32, 4)[0]}),
    "missing_tokenizer": unlink("tokenizer.json", "tokenizer_config.json"),
    "bad_json_tokenizer": lambda d: (d / "tokenizer.json").write_text('{"model": '),
    "no_chat_template": lambda d: write(base_target(read(d)), d, shards=3),
}
TOKENIZER_DEFECTS = ("missing_tokenizer", "bad_json_tokenizer", "no_chat_template")  # for targets only


def break_folder(defect: str, source: Path, folder: Path) -> Path:
    """Copy a good folder as three shards with an index and damage the copy; `defect` is a key of DEFECTS."""
    write(read(source), folder, shards=3)
    DEFECTS[defect](folder)
    return folder
