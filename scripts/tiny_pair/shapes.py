"""The shapes of the tiny pairs, as the config.json files that ship with them. Knows nothing of training.

Written by hand and never `save_pretrained`: transformers folds `global_head_dim` into a `per_layer_config`,
and the MLX runtimes read the flat names. Both targets are deep and thin on purpose: a draft step must cost as
small a part of a target pass as in the real models (30 to 60 layers against 4), or speculation cannot gain.
"""

from __future__ import annotations

import json
from pathlib import Path

S, F = "sliding_attention", "full_attention"
EOS = [1, 106, 50]  # <eos>, <turn|>, <|tool_response>, as in the real generation_config.json
ROPE = {
    S: {"rope_type": "default", "rope_theta": 10000.0},
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
COMMON = {
    "model_type": "gemma4_text",
    "vocab_size": 2048,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rope_parameters": ROPE,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "use_bidirectional_attention": None,
    "sliding_window": 128,
    "vocab_size_per_layer_input": 2048,
    "final_logit_softcapping": 30.0,
}
# E2B and E4B: per-layer inputs, shared keys and values, double-wide MLP in layers that share, one KV head.
EDGE = COMMON | {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 20,
    "layer_types": [S, S, S, S, F] * 4,
    "num_kv_shared_layers": 10,
    "use_double_wide_mlp": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "head_dim": 64,
    "global_head_dim": 128,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 16,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
# 26B-A4B: a dense branch beside routed experts in every layer, keys = values in full layers, nothing shared.
MOE = COMMON | {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "layer_types": [S, S, S, S, S, F] * 2,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
TARGETS = {"edge": EDGE, "moe": MOE}
# A DFlash drafter for the edge target, in the layout of z-lab's Gemma 4 drafters: hidden size, embedding and head are
# the target's, features come from evenly spread layers, the last layer sees everything and the others a window.
DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "block_size": 8,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 5, 9, 13, 17]},
    "dtype": "bfloat16",
    "final_logit_softcapping": 30.0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": EDGE["hidden_size"],
    "intermediate_size": 256,
    "layer_types": [S, S, F],
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_target_layers": EDGE["num_hidden_layers"],
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "vocab_size": EDGE["vocab_size"],
}


def drafter(kind: str) -> dict:
    """Assistant config for a target: two layers, each reading the target's last KV owner of its kind."""
    target, hidden = TARGETS[kind], {"edge": 96, "moe": 64}[kind]
    text = target | {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "layer_types": [S, F],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": kind == "edge",
        "num_centroids": 64,
        "centroid_intermediate_top_k": 8,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "dtype": "bfloat16",
        "text_config": text,
    }


def write_target_config(kind: str, folder: Path) -> None:
    """config.json and generation_config.json of a target."""
    write_json(folder / "config.json", {"architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16"} | TARGETS[kind])
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": False},
    )


def write_drafter_config(kind: str, folder: Path) -> None:
    """config.json and generation_config.json of a drafter; transformers needs `num_assistant_tokens`."""
    write_json(folder / "config.json", drafter(kind))
    generation = {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": 0}
    generation |= {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}
    write_json(folder / "generation_config.json", generation)


def write_dflash_config(folder: Path) -> None:
    """config.json of the DFlash drafter."""
    write_json(folder / "config.json", DFLASH)


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1) + "\n")
