"""The Qwen 3.5 text stack as a target (dense sizes: 0.8B, 2B, 4B, 9B, 27B): gated delta nets and gated attention.

Arrays in, arrays out; it knows a pass over a cache, and neither rows' requests nor samplers. Positions of text are the
same on all three axes of its rotary embedding, which then is the plain one.
Ports transformers 5.22 `models/qwen3_5/modeling_qwen3_5.py`. The recurrence runs column by column, so that what a
column gives does not depend on how wide a round is; prompts take MLX's own update. Parameter names are those of the
Hugging Face release without `model.language_model.`; norms hold the whole weight, as MLX's files do (the release has it
less 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.kernels.delta import Given, Span, reference
from mlx_mtp.models.config import FULL, PassSize, Reader
from mlx_mtp.models.dflash import Mlp
from mlx_mtp.models.families import Family, Stored
from mlx_mtp.models.fused import Fused, Traces
from mlx_mtp.models.gemma4 import Norm
from mlx_mtp.rows import CheckpointError
from mlx_mtp.states import Columns, StateSpec

LINEAR = "linear_attention"
TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
L2_EPS = 1e-6
CHUNK_TOK = 32  # columns from which mx.fast.gated_delta_update is taken: 3 times as fast at 130 of the 4B's on a CPU

CENTRED = re.compile(
    r"(^|\.)(input_layernorm|post_attention_layernorm|q_norm|k_norm|pre_fc_norm_\w+|(?<!linear_attn\.)norm)\.weight$"
)


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes of a gated delta net. taps: of the convolution before it."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """What is convolved: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class QwenConfig:
    """A Qwen 3.5 text stack. layers: LINEAR or FULL. rotated: leading dimensions of a head that turn.

    mtp_layers: of the head for multi-token prediction that its checkpoint promises. softcap: none, ever.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    eps: float
    layers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    rope_theta: float
    delta: DeltaConfig
    tied: bool
    max_positions: int
    mtp_layers: int
    softcap: None = None

    @property
    def pass_size(self) -> PassSize:
        """As in `TextConfig`; a delta net's convolved channels come on top."""
        return PassSize(14 * self.hidden_size + 6 * self.mlp_size + 6 * self.delta.channels, self.heads)


def read_qwen(config: dict[str, Any], where: str) -> QwenConfig:
    """config.json -> QwenConfig. Raises CheckpointError naming `where` and the key."""
    if config.get("model_type") in MOE_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {config['model_type']!r}, a mixture of experts; of Qwen 3.5 only the dense models "
            "run here (0.8B, 2B, 4B, 9B, 27B)"
        )
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config is {type(text).__name__}; expected an object")
    r = Reader(text, where)
    _check_fixed(r)
    heads, kv_heads, head_dim = (
        r.integer("num_attention_heads"),
        r.integer("num_key_value_heads"),
        r.integer("head_dim"),
    )
    if heads % kv_heads:
        raise r.fail("num_attention_heads", f"a multiple of num_key_value_heads ({kv_heads})")
    rotated, theta = _rope(r, head_dim)
    tied = config.get("tie_word_embeddings", r.get("tie_word_embeddings", False))
    return QwenConfig(
        vocab_size=r.integer("vocab_size"),
        hidden_size=r.integer("hidden_size"),
        mlp_size=r.integer("intermediate_size"),
        eps=r.number("rms_norm_eps", 1e-6),
        layers=_layers(r),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotated=rotated,
        rope_theta=theta,
        delta=_delta(r),
        tied=bool(tied),
        max_positions=r.integer("max_position_embeddings", 32768),
        mtp_layers=r.integer("mtp_num_hidden_layers", 0, 0),
    )


def _check_fixed(r: Reader) -> None:
    """Raise unless what can be set otherwise is as all published models have it."""
    fixed = (("hidden_act", "silu"), ("attention_bias", False), ("attn_output_gate", True))
    for key, plain in fixed:
        if r.get(key, plain) != plain:
            raise r.fail(key, f"{plain!r}, as in the published models")
    if r.get("output_gate_type", "swish") not in ("swish", "silu"):
        raise r.fail("output_gate_type", "'swish', as in the published models")


def _rope(r: Reader, head_dim: int) -> tuple[int, float]:
    """(dimensions that turn, theta)."""
    rope = Reader(r.table("rope_parameters", {}), f"{r.where}: rope_parameters")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise rope.fail("rope_type", "'default'")
    share = rope.number("partial_rotary_factor", r.number("partial_rotary_factor", 0.25))
    rotated = int(head_dim * share)
    if share > 1 or rotated % 2 or not rotated:
        raise rope.fail("partial_rotary_factor", f"a share of head_dim ({head_dim}) that is even")
    return rotated, rope.number("rope_theta", r.number("rope_theta", 1e4))


def _layers(r: Reader) -> tuple[str, ...]:
    count, every = r.integer("num_hidden_layers"), r.integer("full_attention_interval", 4)
    if count > 1000:
        raise r.fail("num_hidden_layers", "at most 1000")
    kinds = r.get("layer_types", [FULL if (i + 1) % every == 0 else LINEAR for i in range(count)])
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {LINEAR, FULL}:
        raise r.fail("layer_types", f"{count} entries of {LINEAR!r} or {FULL!r}")
    return tuple(kinds)


def _delta(r: Reader) -> DeltaConfig:
    c = DeltaConfig(
        key_heads=r.integer("linear_num_key_heads"),
        value_heads=r.integer("linear_num_value_heads"),
        key_dim=r.integer("linear_key_head_dim"),
        value_dim=r.integer("linear_value_head_dim"),
        taps=r.integer("linear_conv_kernel_dim"),
    )
    if c.value_heads % c.key_heads:
        raise r.fail("linear_num_value_heads", f"a multiple of linear_num_key_heads ({c.key_heads})")
    return c


class Attention(nn.Module):
    """Attention whose output is gated by what else the query's projection gives."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.hidden_size, 2 * c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim, c.eps), Norm(c.head_dim, c.eps)

    def keys_values(self, x: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
        """x [B * L, H] at positions start [B] -> keys (normed, rotated) and values, [B, kv_heads, L, D] each."""
        shape = (start.shape[0], -1, self.config.kv_heads, self.config.head_dim)
        keys = self._rope(self.k_norm(self.k_proj(x).reshape(shape)).transpose(0, 2, 1, 3), start)
        return keys, self.v_proj(x).reshape(shape).transpose(0, 2, 1, 3)

    def queries(self, x: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
        """x [B * L, H] -> queries [B, heads, L, D] (normed, rotated, and scaled, since the cache attends with scale 1)
        and the gate [B * L, heads * D]."""
        c = self.config
        q, gate = mx.split(self.q_proj(x).reshape(start.shape[0], -1, c.heads, 2 * c.head_dim), 2, axis=-1)
        q = self._rope(self.q_norm(q).transpose(0, 2, 1, 3), start)
        return q * c.head_dim**-0.5, gate.reshape(x.shape[0], -1)

    def finish(self, a: mx.array, gate: mx.array) -> mx.array:
        """What the attention gave [N, heads * D] and its gate -> [N, H]."""
        return self.o_proj(a * mx.sigmoid(gate))

    def _rope(self, x: mx.array, start: mx.array) -> mx.array:
        c = self.config
        return mx.fast.rope(x, c.rotated, traditional=False, base=c.rope_theta, scale=1.0, offset=start)


class ShortConv(nn.Module):
    """One filter a channel, over its last `taps` values, and silu."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, taps))

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, taps - 1 + T, C] -> [B, T, C] float32, summed tap by tap in the same order for every T."""
        taps = self.weight.shape[1]
        columns = x.shape[1] + 1 - taps
        return silu_of_sum([x[:, i : i + columns] for i in range(taps)], [self.weight[:, i] for i in range(taps)])


@partial(mx.compile, shapeless=True)
def silu_of_sum(values: list[mx.array], weights: list[mx.array]) -> mx.array:
    """silu(v0 w0 + v1 w1 + ..) float32."""
    parts = [v.astype(mx.float32) * w.astype(mx.float32) for v, w in zip(values, weights, strict=True)]
    return nn.silu(sum(parts[1:], parts[0]))


class DeltaNet(nn.Module):
    """A layer whose memory of the text is a matrix a head: decayed, corrected towards v at k, and read at q.

    Gated delta rule (Yang et al. 2024, arXiv 2412.06464, equation 10): with S decayed by g,
    S <- S + beta (v - S k) k^T, y = S q. Queries here are K^1/2 times as long as there, and so is y; the norm that
    follows divides by its length.
    """

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        d = self.config = c.delta
        self.in_proj_qkv = nn.Linear(c.hidden_size, d.channels, bias=False)
        self.in_proj_z = nn.Linear(c.hidden_size, d.value_heads * d.value_dim, bias=False)
        self.in_proj_b = nn.Linear(c.hidden_size, d.value_heads, bias=False)
        self.in_proj_a = nn.Linear(c.hidden_size, d.value_heads, bias=False)
        self.conv1d = ShortConv(d.channels, d.taps)
        self.A_log, self.dt_bias = mx.zeros((d.value_heads,)), mx.ones((d.value_heads,))
        self.norm = Norm(d.value_dim, c.eps * d.key_dim)
        self.out_proj = nn.Linear(d.value_heads * d.value_dim, c.hidden_size, bias=False)
        self._length = mx.full((d.key_dim,), d.key_dim**-0.5)  # of a vector of ones

    @property
    def spec(self) -> StateSpec:
        d = self.config
        return StateSpec((d.value_heads, d.value_dim, d.key_dim), d.channels + 2 * d.value_heads, d.taps)

    def inputs(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [N, H] -> what the recurrence takes in [N, F], and the gate of what it gives [N, heads * D]."""
        packed = [self.in_proj_qkv(x), self.in_proj_b(x), self.in_proj_a(x)]
        return mx.concatenate(packed, axis=-1), self.in_proj_z(x)

    def scan(self, state: mx.array, again: Columns | None, own: Columns, takes: bool) -> tuple[mx.array, mx.array]:
        """A `states.Scan` over states [B, heads, V, K] and packed inputs; outputs [B, T, heads, V] float32."""
        if again is None:
            return self.run(state, self._given(own.inputs), Span(None, 0, 0, own.counts, takes))
        # What depends on no state is computed of all columns at once, and of those between, which are looked back at.
        inputs, begin = mx.concatenate([again.inputs, own.inputs], axis=1), again.inputs.shape[1]
        span = Span(again.counts, begin + 1 - self.config.taps, begin, own.counts, takes)
        return self.run(state, self._given(inputs), span)

    def run(self, state: mx.array, given: Given, span: Span) -> tuple[mx.array, mx.array]:
        """The recurrence itself, as `kernels.delta.delta`; of a prompt's columns, which all count, by MLX's own."""
        if span.again is not None or span.own is not None or not span.takes or given.qk.shape[1] < CHUNK_TOK:
            return reference(state, given, span)
        (_, heads, size, _), shape = state.shape, given.mixed.shape
        q, k = mx.split(given.qk, 2, axis=2)
        values = given.mixed[..., shape[2] - heads * size :].reshape(*shape[:2], heads, size)
        y, after = mx.fast.gated_delta_update(q, k, values, given.decay, given.beta, state)
        return y, after

    def _given(self, inputs: mx.array) -> Given:
        """Packed inputs [B, taps - 1 + T, F] -> what the delta rule takes of T columns."""
        d = self.config
        qkv, gates = mx.split(inputs, [d.channels], axis=-1)
        b, a = mx.split(gates[:, d.taps - 1 :], 2, axis=-1)
        decay, beta = gated(a, b, self.A_log, self.dt_bias)
        mixed = self.conv1d(qkv)
        qk = mixed[..., : 2 * d.key_heads * d.key_dim].reshape(*mixed.shape[:2], 2 * d.key_heads, d.key_dim)
        return Given(mx.fast.rms_norm(qk, self._length, L2_EPS / d.key_dim), mixed, decay, beta)

    def finish(self, y: mx.array, gate: mx.array) -> mx.array:
        """What the recurrence gave [B, L, heads, V] and its gate [N, heads * V] -> [N, H]."""
        normed = self.norm(y).astype(gate.dtype).reshape(gate.shape)
        return self.out_proj((normed * nn.silu(gate.astype(mx.float32))).astype(gate.dtype))


@partial(mx.compile, shapeless=True)
def gated(a: mx.array, b: mx.array, rate_log: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """What a state keeps of itself, and how far it goes towards v: [B, T, heads] float32 both."""
    a, b, rate_log, bias = (x.astype(mx.float32) for x in (a, b, rate_log, bias))
    return mx.exp(-mx.exp(rate_log) * nn.softplus(a + bias)), mx.sigmoid(b)


class Block(nn.Module):
    """One layer, as two halves around the cache; compiled for passes as narrow as rounds are."""

    def __init__(self, c: QwenConfig, kind: str, traces: Traces) -> None:
        super().__init__()
        self.linear = kind == LINEAR
        if self.linear:
            self.linear_attn = DeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mlp = Mlp(c.hidden_size, c.mlp_size)
        self.input_layernorm = Norm(c.hidden_size, c.eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.eps)
        self._fused_begin = Fused(self, self._begin, traces)
        self._fused_finish = Fused(self, self._finish, traces)

    def __call__(self, h: mx.array, pass_: Pass, slot: int) -> mx.array:
        """The residual stream h [N, H] of a pass's columns; slot: the layer in the cache, among those of its kind."""
        start = pass_.start
        columns = h.shape[0] // start.shape[0]
        if self.linear:
            inputs, gate = self._fused_begin(columns, h, start)
            mixed = pass_.recur(slot, inputs.reshape(start.shape[0], -1, inputs.shape[-1]), self.linear_attn.scan)
        else:
            queries, gate, keys, values = self._fused_begin(columns, h, start)
            mixed = pass_.store(slot, keys, values).attend(queries)
        return self._fused_finish(columns, h, mixed, gate)

    def _begin(self, h: mx.array, start: mx.array) -> tuple[mx.array, ...]:
        x = self.input_layernorm(h)
        if self.linear:
            return self.linear_attn.inputs(x)
        return *self.self_attn.queries(x, start), *self.self_attn.keys_values(x, start)

    def _finish(self, h: mx.array, mixed: mx.array, gate: mx.array) -> mx.array:
        h = h + (self.linear_attn if self.linear else self.self_attn).finish(mixed, gate)
        return h + self.mlp(self.post_attention_layernorm(h))


class Qwen(nn.Module):
    """The target. Its cache holds one layer for every entry of `specs`."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        traces = Traces()
        self.layers = [Block(config, kind, traces) for kind in config.layers]
        self.norm = Norm(config.hidden_size, config.eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._slots = [config.layers[:i].count(kind) for i, kind in enumerate(config.layers)]

    @property
    def specs(self) -> tuple[LayerSpec | StateSpec, ...]:
        """One spec a layer, in cache order."""
        c = self.config
        return tuple(
            block.linear_attn.spec if block.linear else LayerSpec(None, c.kv_heads, c.head_dim) for block in self.layers
        )

    @property
    def heads(self) -> int:
        """Heads of queries of an attention layer."""
        return self.config.heads

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens [...] int -> embeddings [..., H]."""
        return self.embed_tokens(tokens)

    def forward(
        self, tokens: mx.array, pass_: Pass, taps: tuple[int, ...] = (), last: mx.array | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """tokens [B, L] -> (hidden [B, C, H] after the final norm, outputs [B * L, H] of the layers in `taps`).

        last [B] int32: the only column of each row that is asked for; C then is 1.
        """
        h, tapped = self.embed(tokens.flatten()), {}
        for i, (block, slot) in enumerate(zip(self.layers, self._slots, strict=True)):
            h = block(h, pass_, slot)
            if i in taps:
                tapped[i] = h
        h = h.reshape(*tokens.shape, -1)
        if last is not None and tokens.shape[1] > 1:
            h = mx.take_along_axis(h, last[:, None, None], axis=1)
        return self.norm(h), tapped

    def logits(self, hidden: mx.array, capped: bool = True) -> mx.array:
        """hidden [..., H] -> [..., V] float32. There is no cap."""
        head = self.embed_tokens.as_linear if self.config.tied else self.lm_head
        return head(hidden).astype(mx.float32)


def centred(shapes: dict[str, tuple[int, ...]]) -> re.Pattern[str] | None:
    """The norms, if a checkpoint has them less 1; by the shapes of its tensors, for the release's convolutions are
    [C, 1, taps] and MLX's [C, taps, 1]."""
    convs = [shape for name, shape in shapes.items() if name.endswith("conv1d.weight")]
    return CENTRED if any(shape[-1] != 1 for shape in convs) else None


def stored(config: QwenConfig) -> Stored:
    """The tower and the MTP head stay on disk, and so does an output head where the embedding serves as that."""
    skipped = r"^(visual|vision_tower|mtp)\." + (r"|^lm_head\." if config.tied else "")
    return Stored(skipped=re.compile(skipped), centred=centred)


FAMILY = Family(name="qwen3_5", types=(*TYPES, *MOE_TYPES), read=read_qwen, build=Qwen, stored=stored)
