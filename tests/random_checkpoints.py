"""Writes valid Gemma 4 targets and drafters of any small size with random weights; knows no model, no loader.

    folder = random_checkpoint(tmp_path / "target", target_config("moe", num_experts=16), seed=3)
    folder = random_checkpoint(tmp_path / "drafter", drafter_config(target_config("edge"), clusters=32))

The numbers of the fixtures come from transformers; these checkpoints have no reference but each other.
"""

import fnmatch
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import FULL, HF_PREFIX, SLIDING, TEXT_PREFIX, Checkpoint, Config, is_drafter, text_of, write

KINDS: dict[str, Config] = {
    "edge": {"hidden_size_per_layer_input": 64, "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    "dense": {"num_key_value_heads": 4, "num_global_key_value_heads": 2, "attention_k_eq_v": True},
    "moe": {
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "unified": {
        "model_type": "gemma4_unified_text",
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
}


def target_config(kind: str = "dense", **changes: Any) -> Config:
    """A small config.json of a kind out of KINDS; changes are keys of its text config.

    Widths are multiples of 128, except the expert's and the per-layer input's (64): every group size occurs.
    """
    text: Config = {
        "model_type": "gemma4_text",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": False,
        "sliding_window": 16,
        "num_kv_shared_layers": 0,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "dtype": "bfloat16",
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }
    text |= KINDS[kind] | changes
    text.setdefault("vocab_size_per_layer_input", text["vocab_size"])
    text["num_hidden_layers"] = len(text["layer_types"])
    unified = text["model_type"].startswith("gemma4_unified")
    arch = "Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"
    return {
        "model_type": text["model_type"].removesuffix("_text"),
        "architectures": [arch],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
    }


def drafter_config(target: Config, clusters: int = 0, **changes: Any) -> Config:
    """The config.json of a drafter for this target; with `clusters` it has the ordered head.

    Changes are keys of the text config, or `backbone_hidden_size` and `centroid_intermediate_top_k`.
    """
    text = text_of(target)
    unified = "unified" in text["model_type"]
    top: Config = {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "architectures": ["Gemma4UnifiedAssistantForCausalLM" if unified else "Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": text["hidden_size"],
        "use_ordered_embeddings": clusters > 0,
        "num_centroids": clusters or 2048,
        "centroid_intermediate_top_k": 4 if clusters else 32,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
    }
    small = text | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "final_logit_softcapping": None,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
    top |= {k: changes.pop(k) for k in list(changes) if k in top}
    return top | {"text_config": small | changes}


Shapes = dict[str, tuple[int, ...]]


def attention_shapes(text: Config, i: int) -> Shapes:
    """Attention tensors of layer i; consumers of shared keys have no k and v, `k_eq_v` full layers no v."""
    full = text["layer_types"][i] == FULL
    dim = text["global_head_dim"] if full else text["head_dim"]
    k_eq_v = full and text["attention_k_eq_v"]
    kv = text["num_global_key_value_heads"] if k_eq_v else None
    rows = dim * (kv or text["num_key_value_heads"])
    hidden, q_rows = text["hidden_size"], text["num_attention_heads"] * dim
    shapes: Shapes = {"q_proj": (q_rows, hidden), "o_proj": (hidden, q_rows), "q_norm": (dim,)}
    if i < text["num_hidden_layers"] - text["num_kv_shared_layers"]:
        shapes |= {"k_proj": (rows, hidden), "k_norm": (dim,)}
        if not k_eq_v:
            shapes["v_proj"] = (rows, hidden)
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def layer_shapes(text: Config, i: int) -> Shapes:
    """All tensors of layer i, names relative to the layer."""
    hidden, inter = text["hidden_size"], text["intermediate_size"]
    if text["use_double_wide_mlp"] and i >= text["num_hidden_layers"] - text["num_kv_shared_layers"]:
        inter *= 2
    shapes = attention_shapes(text, i) | {
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
        "layer_scalar": (1,),
    }
    norms = [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]
    if text.get("enable_moe_block"):
        n, width = text["num_experts"], text["moe_intermediate_size"]
        norms += [
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ]
        shapes |= {
            "router.proj.weight": (n, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (n,),
            "experts.gate_up_proj": (n, 2 * width, hidden),
            "experts.down_proj": (n, hidden, width),
        }
    per_layer = text.get("hidden_size_per_layer_input") or 0
    if per_layer:
        norms.append("post_per_layer_input_norm")
        shapes |= {
            "per_layer_input_gate.weight": (per_layer, hidden),
            "per_layer_projection.weight": (hidden, per_layer),
        }
    return shapes | {f"{norm}.weight": (hidden,) for norm in norms}


def tensor_shapes(config: Config) -> Shapes:
    """Every tensor of the text part of a target (HF names and prefix) or of a drafter."""
    text = text_of(config)
    layers, hidden, vocab = text["num_hidden_layers"], text["hidden_size"], text["vocab_size"]
    body: Shapes = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
    per_layer = text.get("hidden_size_per_layer_input") or 0
    if per_layer:
        body |= {
            "embed_tokens_per_layer.weight": (vocab, layers * per_layer),
            "per_layer_model_projection.weight": (layers * per_layer, hidden),
            "per_layer_projection_norm.weight": (per_layer,),
        }
    for i in range(layers):
        body |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(text, i).items()}
    drafter = is_drafter(config)
    prefix = HF_PREFIX if "text_config" in config and not drafter else TEXT_PREFIX
    shapes = {prefix + name: shape for name, shape in body.items()}
    if drafter:
        target = config["backbone_hidden_size"]
        shapes |= {"pre_projection.weight": (hidden, 2 * target), "post_projection.weight": (target, hidden)}
        if config["use_ordered_embeddings"]:
            shapes |= {
                "masked_embedding.centroids.weight": (config["num_centroids"], hidden),
                "masked_embedding.token_ordering": (vocab,),
            }
    return shapes


# (pattern of the name, mean, standard deviation); first match wins, else matrices get in^-0.5. Chosen so that
# attention is neither flat nor one-hot and logits spread over the soft cap.
STATISTICS = (
    ("*q_norm.weight", 0.55, 0.15),
    ("*layer_scalar", 0.9, 0.1),
    ("*post_*norm*", 0.8, 0.2),
    ("*norm*", 1.0, 0.2),
    ("*router.scale", 1.0, 0.25),
    ("*per_expert_scale", 1.0, 0.25),
    ("*router.proj.weight", 0.0, 2.0),
)


def spread_of(name: str, shape: tuple[int, ...], text: Config) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's random values."""
    width = text.get("hidden_size_per_layer_input") or 1 if "embed_tokens_per_layer" in name else shape[-1]
    rules = [(mean, std) for pattern, mean, std in STATISTICS if fnmatch.fnmatch(name, pattern)]
    return rules[0] if rules else (0.0, width**-0.5)


def random_tensors(config: Config, seed: int = 0) -> Checkpoint:
    """Random bfloat16 weights (`token_ordering` int64) for a config, the same for the same seed."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        if name.endswith("token_ordering"):
            tensors[name] = mx.array(rng.permutation(shape[0]))
            continue
        mean, std = spread_of(name, shape, text_of(config))
        value = rng.standard_normal(shape) * std + mean
        if re.search(r"model\.norm\.weight$", name):
            # with positive gains a tied head favours its own input token
            value *= 7.0 * rng.choice([-1.0, 1.0], shape)
        tensors[name] = mx.array(value.astype(np.float32)).astype(mx.bfloat16)
    return Checkpoint(config, tensors)


def random_checkpoint(folder: Path, config: Config, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """Write an HF-layout target or drafter with random weights, and the tokenizer files of another folder."""
    ckpt = random_tensors(config, seed)
    generation: Config = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0}
    generation |= {"num_assistant_tokens": 4} if is_drafter(config) else {"do_sample": True, "top_k": 64, "top_p": 0.95}
    files = {"generation_config.json": json.dumps(generation).encode()}
    if tokenizer is not None:
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files |= {name: (tokenizer / name).read_bytes() for name in names}
    return write(replace(ckpt, files=files), folder)


# A drafter that does not fit its target: what differs -> changed keys of its config.
MISFITS: dict[str, Callable[[Config], Config]] = {
    "hidden": lambda text: {"backbone_hidden_size": text["hidden_size"] + 32},
    "vocab": lambda text: {"vocab_size": text["vocab_size"] + 64},
    "head_dim": lambda text: {"head_dim": text["head_dim"] * 2},
    "full_head_dim": lambda text: {"global_head_dim": text["global_head_dim"] * 2},
    "kv_heads": lambda text: {
        "num_key_value_heads": text["num_key_value_heads"] + 3,
        "num_attention_heads": 20,
    },
    "window": lambda text: {"sliding_window": text["sliding_window"] * 2},
}


def misfit_drafter(target: Path, folder: Path, what: str) -> Path:
    """Write a valid random drafter that differs from what the target needs in one respect out of MISFITS."""
    config = json.loads((target / "config.json").read_text())
    return random_checkpoint(folder, drafter_config(config, **MISFITS[what](text_of(config))))
