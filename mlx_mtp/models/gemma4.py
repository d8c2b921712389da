"""The Gemma 4 text stack as a target: E2B, E4B, 12B, 26B-A4B and 31B from one description.

Arrays in, arrays out; it knows a pass over a cache, and neither rows' requests nor samplers.
Ports transformers 5.22 `models/gemma4/modeling_gemma4.py` and `models/gemma4_unified`. Parameter names are those of
the Hugging Face release without `model.language_model.`, except that the experts' gate and up are two tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.kernels.gate_up import geglu
from mlx_mtp.models.config import TARGET_TYPES, LayerConfig, MoeConfig, TextConfig, read_target
from mlx_mtp.models.experts import Experts
from mlx_mtp.models.families import Family, Stored
from mlx_mtp.models.fused import Fused, Traces


class Norm(nn.Module):
    """RMSNorm with weight w (not 1 + w), in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class Rope:
    """Half-split rotation at absolute positions; `proportional` leaves the slower frequencies unturned.

    Not a module: it has no weights. Frequencies as in transformers `modeling_rope_utils.py`.
    """

    def __init__(self, config: LayerConfig) -> None:
        half = config.head_dim // 2
        turning = mx.arange(config.rotated, dtype=mx.float32) * (2.0 / config.head_dim)
        periods = config.rope_factor * mx.power(config.rope_theta, turning)
        self.freqs = mx.concatenate([periods, mx.full((half - config.rotated,), math.inf)])
        self.dims = config.head_dim

    def __call__(self, x: mx.array, start: mx.array) -> mx.array:
        """x [B, heads, L, D]; start [B] int32: position of column 0."""
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=start, freqs=self.freqs)


class Attention(nn.Module):
    """Queries of one layer, and keys and values where the layer owns them."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        c = self.config = config.layers[index]
        size, self.eps = config.hidden_size, config.eps
        self.q_proj = nn.Linear(size, c.heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, size, bias=False)
        self.q_norm = Norm(c.head_dim, config.eps)
        self._rope = Rope(c)
        if c.owner == index:
            self.k_proj = nn.Linear(size, c.kv_heads * c.head_dim, bias=False)
            self.k_norm = Norm(c.head_dim, config.eps)
            if not c.k_eq_v:
                self.v_proj = nn.Linear(size, c.kv_heads * c.head_dim, bias=False)

    def keys_values(self, x: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
        """x [B * L, H] -> keys (normed, rotated) and values (normed), [B, kv_heads, L, D] each; start [B]."""
        c, heads = self.config, (start.shape[0], -1, self.config.kv_heads, self.config.head_dim)
        raw = self.k_proj(x).reshape(heads)
        values = raw if c.k_eq_v else self.v_proj(x).reshape(heads)
        keys = self._rope(self.k_norm(raw).transpose(0, 2, 1, 3), start)
        return keys, mx.fast.rms_norm(values, None, self.eps).transpose(0, 2, 1, 3)

    def queries(self, x: mx.array, start: mx.array) -> mx.array:
        """x [B * L, H] -> queries (normed, rotated), [B, heads, L, D]; start [B]."""
        q = self.q_proj(x).reshape(start.shape[0], -1, self.config.heads, self.config.head_dim)
        return self._rope(self.q_norm(q).transpose(0, 2, 1, 3), start)


class Mlp(nn.Module):
    """down(gelu_tanh(gate x) * up x)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Which experts a token goes to, and with what weight."""

    def __init__(self, size: int, moe: MoeConfig, eps: float) -> None:
        super().__init__()
        self.proj = nn.Linear(size, moe.experts, bias=False)
        self.scale = mx.ones((size,))
        self.per_expert_scale = mx.ones((moe.experts,))
        self.top_k, self.eps = moe.top_k, eps

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., H], the un-normed residual stream -> expert indices and weights, [..., top_k] each.

        Weights are a softmax over the chosen logits (the same as renormalising the full softmax), times each
        expert's own scale; experts come in no particular order.
        """
        z = mx.fast.rms_norm(x, self.scale * x.shape[-1] ** -0.5, self.eps)
        scores = self.proj(z).astype(mx.float32)
        chosen = mx.argpartition(-scores, self.top_k - 1, axis=-1)[..., : self.top_k]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, (weights * self.per_expert_scale[chosen]).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer: attention, feed-forward (dense, or dense and routed), per-layer input."""

    def __init__(self, config: TextConfig, index: int, traces: Traces) -> None:
        super().__init__()
        size, eps, layer = config.hidden_size, config.eps, config.layers[index]
        self._owner = layer.owner == index
        self.self_attn = Attention(config, index)
        self.mlp = Mlp(size, layer.mlp_size)
        self.input_layernorm = Norm(size, eps)
        self.post_attention_layernorm = Norm(size, eps)
        self.pre_feedforward_layernorm = Norm(size, eps)
        self.post_feedforward_layernorm = Norm(size, eps)
        self.layer_scalar = mx.ones((1,))
        if config.moe:
            self.router = Router(size, config.moe, eps)
            self.experts = Experts(size, config.moe)
            self.post_feedforward_layernorm_1 = Norm(size, eps)
            self.post_feedforward_layernorm_2 = Norm(size, eps)
            self.pre_feedforward_layernorm_2 = Norm(size, eps)
        if config.ple_size:
            self.per_layer_input_gate = nn.Linear(size, config.ple_size, bias=False)
            self.per_layer_projection = nn.Linear(config.ple_size, size, bias=False)
            self.post_per_layer_input_norm = Norm(size, eps)

        kind = replace(layer, owner=0)  # whose keys it reads is no part of either half
        self._fused_project = Fused(self, self._project, traces, kind)
        self._fused_finish = Fused(self, self._finish, traces, kind)

    # Both halves work on N = B * L rows: a product of matrices is one operation, of anything else three.

    def project(self, h: mx.array, start: mx.array) -> tuple[mx.array, ...]:
        """The half before attention: residual stream h [N, H] at positions start [B] -> queries, and keys and
        values where the layer owns them."""
        return self._fused_project(h.shape[0] // start.shape[0], h, start)

    def finish(self, h: mx.array, a: mx.array, ple: mx.array | None, columns: int) -> tuple[mx.array, mx.array | None]:
        """The half after attention a [N, heads * D]: h [N, H] -> [N, H], and the experts chosen [N, k] if there are
        any; ple [N, d] is this layer's per-layer input, columns is L."""
        return self._fused_finish(columns, h, a, ple)

    def _project(self, h: mx.array, start: mx.array) -> tuple[mx.array, ...]:
        x = self.input_layernorm(h)
        q = self.self_attn.queries(x, start)
        return (q, *self.self_attn.keys_values(x, start)) if self._owner else (q,)

    def _finish(self, h: mx.array, a: mx.array, ple: mx.array | None) -> tuple[mx.array, mx.array | None]:
        h = h + self.post_attention_layernorm(self.self_attn.o_proj(a))
        fed, chosen = self.feed_forward(h)
        h = h + self.post_feedforward_layernorm(fed)
        if ple is not None:
            gated = geglu(self.per_layer_input_gate(h), ple)
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h * self.layer_scalar, chosen

    def feed_forward(self, h: mx.array) -> tuple[mx.array, mx.array | None]:
        """The dense branch, plus the routed experts where there are any: [N, H] -> [N, H], experts chosen [N, k]."""
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        if "experts" not in self:
            return dense, None
        chosen, weights = self.router(h)
        routed = self.experts(self.pre_feedforward_layernorm_2(h), chosen, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed), chosen


class Gemma4(nn.Module):
    """The target. Its cache holds one layer for every entry of `specs`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        traces = Traces()
        self.layers = [Block(config, i, traces) for i in range(len(config.layers))]
        self.norm = Norm(size, config.eps)
        if config.ple_size:
            width = len(config.layers) * config.ple_size
            self.embed_tokens_per_layer = nn.Embedding(config.ple_vocab_size, width)
            self.per_layer_model_projection = nn.Linear(size, width, bias=False)
            self.per_layer_projection_norm = Norm(config.ple_size, config.eps)
        self._slot = {owner: slot for slot, owner in enumerate(config.owners)}

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec for every layer that owns keys and values, in cache order."""
        layers = (self.config.layers[i] for i in self.config.owners)
        return tuple(LayerSpec(c.window, c.kv_heads, c.head_dim) for c in layers)

    @property
    def heads(self) -> int:
        """Heads of queries in a layer, the most of any."""
        return max(layer.heads for layer in self.config.layers)

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens [...] int -> scaled embeddings [..., H]; the scale is rounded to the weights' dtype."""
        h = self.embed_tokens(tokens)
        return h * mx.array(math.sqrt(self.config.hidden_size), h.dtype)

    def forward(
        self, tokens: mx.array, pass_: Pass, taps: tuple[int, ...] = (), last: mx.array | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """tokens [B, L] -> (hidden [B, C, H] after the final norm, outputs [B * L, H] of the layers in `taps`).

        last [B] int32: the only column of each row that is asked for. Layers behind the last one that owns keys and
        values then run over that column only, and C is 1. With taps every layer runs over every column.
        """
        rows, columns = tokens.shape
        h, start = self.embed(tokens.flatten()), pass_.start
        ple = self._per_layer_inputs(tokens.flatten(), h) if self.config.ple_size else None
        first_consumer = self.config.owners[-1] + 1
        views, tapped = {}, {}
        for i, (block, layer) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            if i == first_consumer and not taps and last is not None and columns > 1:
                start, at = start + last, mx.arange(rows) * columns + last
                h, ple, columns = h[at], None if ple is None else ple[at], 1
            queries, *owned = block.project(h, start)
            if owned:
                views[i] = pass_.store(self._slot[i], *owned)
            attended = views[layer.owner].attend(queries, last)
            h, chosen = block.finish(h, attended, None if ple is None else ple[:, i], columns)
            if chosen is not None:
                pass_.routed.append(chosen)
            if i in taps:
                tapped[i] = h
        h = h.reshape(rows, columns, -1)
        if last is not None and columns > 1:
            h = mx.take_along_axis(h, last[:, None, None], axis=1)
        return self.norm(h), tapped

    def _per_layer_inputs(self, tokens: mx.array, h: mx.array) -> mx.array:
        """Token table and a projection of the scaled embedding, mixed: tokens [N], h [N, H] -> [N, layers, d]."""
        shape = (*tokens.shape, len(self.config.layers), self.config.ple_size)
        table = self.embed_tokens_per_layer(tokens)
        table = table * mx.array(math.sqrt(self.config.ple_size), table.dtype)
        context = self.per_layer_model_projection(h) * self.config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.reshape(shape))
        return (context + table.reshape(shape)) * 2.0**-0.5

    def logits(self, hidden: mx.array, capped: bool = True) -> mx.array:
        """hidden [..., H] -> [..., V] float32. The cap keeps the order, so greedy decoding may leave it out."""
        logits = self.embed_tokens.as_linear(hidden).astype(mx.float32)
        cap = self.config.softcap
        return mx.tanh(logits / cap) * cap if cap and capped else logits


FAMILY = Family("gemma4", TARGET_TYPES, read_target, Gemma4, lambda config: Stored(layers=config.layers))
