"""z-lab's DFlash drafter: a few Qwen3-like layers that denoise a whole block of tokens in one pass.

Arrays in, arrays out; it knows a pass over its own cache, and neither rows' requests nor samplers. What it knows of
the text are the outputs of several target layers ("features"): projected to the keys and values of every layer of its
own, they are all that the cache holds. Embedding and head are the target's.
Ports z-lab/dflash `dflash/model.py` (Chen et al. 2026, arXiv 2602.06036), with the attention of sliding layers as vLLM
(`qwen3_dflash.py`) and SGLang have it: causal inside the block unless the config says otherwise. SGLang measured
5.62 tokens a round so, and 5.27 with every layer looking ahead, on gemma-4-31B-it-DFlash (its pull request 34524).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.models.config import FULL, SLIDING, Reader
from mlx_mtp.models.fused import Fused, Traces
from mlx_mtp.models.gemma4 import Norm

ARCHITECTURE = "DFlashDraftModel"


@dataclass(frozen=True)
class DFlashLayer:
    """window: positions a query sees, itself included; None = all. causal: it sees none ahead of it in the block."""

    window: int | None
    causal: bool


@dataclass(frozen=True)
class DFlashConfig:
    """A drafter. block: tokens a pass takes in, the known one included. mask: what stands in for the others.

    taps: target layers whose outputs it reads, in the order in which they are joined. target_layers: how many the
    target has. softcap: of its logits, None = no cap.
    """

    hidden_size: int
    vocab_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    layers: tuple[DFlashLayer, ...]
    taps: tuple[int, ...]
    target_layers: int
    block: int
    mask: int
    softcap: float | None


def is_dflash(config: dict) -> bool:
    """Whether a config.json is that of a DFlash drafter; its model_type says qwen3."""
    return ARCHITECTURE in (config.get("architectures") or ()) or "dflash_config" in config


def read_dflash(config: dict, where: str) -> DFlashConfig:
    """config.json -> DFlashConfig. Raises CheckpointError naming `where` and the key."""
    r = Reader(config, where)
    own = Reader(r.table("dflash_config"), f"{where}: dflash_config")
    for reader, key, plain in (
        (r, "attention_bias", False),
        (r, "hidden_act", "silu"),
        (r, "rope_scaling", None),
        (own, "use_swa", False),
        (own, "attention_sink_bias", False),
    ):
        if reader.get(key, plain) != plain:
            raise reader.fail(key, f"{plain!r}, as in the drafters of Gemma 4")
    taps = own.get("target_layer_ids")
    if not isinstance(taps, list) or not taps or not all(type(i) is int and i >= 0 for i in taps):
        raise own.fail("target_layer_ids", "a list of layer numbers")
    rope = Reader(r.table("rope_parameters", {}), f"{where}: rope_parameters")
    if rope.get("rope_type", "default") != "default":
        raise rope.fail("rope_type", "'default'")
    heads, kv_heads = r.integer("num_attention_heads"), r.integer("num_key_value_heads")
    if heads % kv_heads:
        raise r.fail("num_attention_heads", f"a multiple of num_key_value_heads ({kv_heads})")
    return DFlashConfig(
        hidden_size=r.integer("hidden_size"),
        vocab_size=r.integer("vocab_size"),
        mlp_size=r.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=r.integer("head_dim", r.integer("hidden_size") // heads),
        eps=r.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", r.number("rope_theta", 1e6)),
        layers=_layers(r, own),
        taps=tuple(taps),
        target_layers=r.integer("num_target_layers"),
        block=r.integer("block_size", least=2),
        mask=own.integer("mask_token_id", least=0),
        softcap=None if r.get("final_logit_softcapping") is None else r.number("final_logit_softcapping"),
    )


def _layers(r: Reader, own: Reader) -> tuple[DFlashLayer, ...]:
    """Kinds of layers; `is_causal`, or `causal` of the inner table, decides for all of them where it is given."""
    count = r.integer("num_hidden_layers")
    kinds = r.get("layer_types", [FULL] * count)
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise r.fail("layer_types", f"{count} entries of {SLIDING!r} or {FULL!r}")
    said = r.get("is_causal", own.get("causal"))
    return tuple(
        DFlashLayer(
            window=r.integer("sliding_window") if kind == SLIDING else None,
            causal=kind == SLIDING if said is None else bool(said),
        )
        for kind in kinds
    )


class Attention(nn.Module):
    """Queries, keys and values of one layer."""

    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden_size, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim, c.eps), Norm(c.head_dim, c.eps)
        self.dim, self.theta = c.head_dim, c.rope_theta

    def keys_values(self, x: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
        """x [B * L, H] at positions start [B] -> keys (normed, rotated) and values, [B, kv_heads, L, D] each."""
        keys = self._rope(self.k_norm(self._heads(self.k_proj(x), start)).transpose(0, 2, 1, 3), start)
        return keys, self._heads(self.v_proj(x), start).transpose(0, 2, 1, 3)

    def queries(self, x: mx.array, start: mx.array) -> mx.array:
        """x [B * L, H] -> queries (normed, rotated, and scaled, since the cache attends with scale 1)."""
        q = self._rope(self.q_norm(self._heads(self.q_proj(x), start)).transpose(0, 2, 1, 3), start)
        return q * self.dim**-0.5

    def _heads(self, x: mx.array, start: mx.array) -> mx.array:
        return x.reshape(start.shape[0], -1, x.shape[-1] // self.dim, self.dim)

    def _rope(self, x: mx.array, start: mx.array) -> mx.array:
        return mx.fast.rope(x, self.dim, traditional=False, base=self.theta, scale=1.0, offset=start)


class Mlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer, as two halves around the attention; compiled for passes as narrow as rounds are."""

    def __init__(self, c: DFlashConfig, traces: Traces) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c.hidden_size, c.mlp_size)
        self.input_layernorm = Norm(c.hidden_size, c.eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.eps)
        self._fused_project = Fused(self, self._project, traces)
        self._fused_finish = Fused(self, self._finish, traces)

    def project(self, h: mx.array, start: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """h [B, L, H] at positions start [B] -> queries, keys, values."""
        return self._fused_project(h.shape[1], h, start)

    def finish(self, h: mx.array, a: mx.array) -> mx.array:
        """h [B, L, H] and what the attention made of it [B * L, heads * D] -> [B, L, H]."""
        return self._fused_finish(h.shape[1], h, a)

    def _project(self, h: mx.array, start: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        x = self.input_layernorm(h.flatten(0, 1))
        return self.self_attn.queries(x, start), *self.self_attn.keys_values(x, start)

    def _finish(self, h: mx.array, a: mx.array) -> mx.array:
        flat = h.flatten(0, 1) + self.self_attn.o_proj(a)
        return (flat + self.mlp(self.post_attention_layernorm(flat))).reshape(h.shape)


class DFlash(nn.Module):
    """The drafter. Its cache holds one layer for every entry of `specs`."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Norm(config.hidden_size, config.eps)
        traces = Traces()
        self.layers = [Layer(config, traces) for _ in config.layers]
        self.norm = Norm(config.hidden_size, config.eps)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec a layer, in cache order."""
        c = self.config
        return tuple(LayerSpec(layer.window, c.kv_heads, c.head_dim) for layer in c.layers)

    def features(self, tapped: mx.array) -> mx.array:
        """Outputs of the tapped target layers side by side [B, L, n * H] -> features [B, L, H]."""
        return self.hidden_norm(self.fc(tapped))

    def remember(self, tapped: mx.array, pass_: Pass) -> None:
        """Store the features of a pass's columns as keys and values of every layer; tapped [B, L, n * H]."""
        flat = self.features(tapped).flatten(0, 1)
        for i, layer in enumerate(self.layers):
            pass_.write(i, *layer.self_attn.keys_values(flat, pass_.start))

    def denoise(self, h: mx.array, pass_: Pass) -> mx.array:
        """Embedded blocks h [B, L, H] -> hidden states [B, L, H] for the head; that of column k is of token k.

        The blocks are the columns of a pass, which stores them behind the features; they are not to be committed.
        """
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            queries, *stored = layer.project(h, pass_.start)
            h = layer.finish(h, pass_.store(i, *stored, causal=kind.causal).attend(queries))
        return self.norm(h)
