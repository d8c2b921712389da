"""The training forward of Gemma 4 text models: bf16 products, fp32 residual stream.

Ported from transformers `modeling_gemma4.py`, whose unfused norms, casts and rotations take two thirds of the time at
this size. Here each run of elementwise work is one compiled region. Parameters have their Hugging Face names.

Shapes: B sequences, T positions, H hidden size, n heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
LOW = torch.bfloat16
FULL, SLIDING = "full_attention", "sliding_attention"
region = torch.compile(dynamic=False)


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


@region
def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms(x, weight).to(LOW)


@region
def add_norm_norm(h: Tensor, y: Tensor, weight: Tensor, next_weight: Tensor) -> tuple[Tensor, Tensor]:
    h = h + rms(y, weight)
    return h, rms(h, next_weight).to(LOW)


@region
def add_norm_cast(h: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = h + rms(y, weight)
    return h, h.to(LOW)


@region
def add_norm_scale(h: Tensor, y: Tensor, weight: Tensor, scalar: Tensor) -> Tensor:
    return (h + rms(y, weight)) * scalar


@region
def heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, n, d] -> [B, n, T, d], normalised and rotated."""
    x = rms(x, weight)
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(LOW).transpose(1, 2)


@region
def value_heads(x: Tensor) -> Tensor:
    return rms(x).to(LOW).transpose(1, 2)


@region
def masked_softmax(scores: Tensor, bias: Tensor) -> Tensor:
    """`bias` [T, S] is 0 or a large negative number; `scores` is any stack of [T, S]."""
    return torch.softmax(scores.view(-1, *bias.shape).float() + bias, -1).to(LOW)


@region
def geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return (F.gelu(gate.float(), approximate="tanh") * up).to(LOW)


@region
def geglu_experts(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, E, 2, w], weight [N, E] -> [N, E, w]."""
    return (F.gelu(x[:, :, 0].float(), approximate="tanh") * x[:, :, 1] * weight[..., None]).to(LOW)


@region
def gate_per_layer(x: Tensor, inputs: Tensor) -> Tensor:
    return (F.gelu(x.float(), approximate="tanh") * inputs).to(LOW)


@region
def mix_per_layer(context: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    return (rms(context, weight) + table) * 2.0**-0.5


@region
def add_two_norms(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor) -> Tensor:
    return rms(a, weight_a) + rms(b, weight_b)


@region
def router_input(h: Tensor, scale: Tensor) -> Tensor:
    return rms(h) * (scale * h.shape[-1] ** -0.5)


@region
def capped_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    x = torch.tanh(logits.float() / cap) * cap
    return torch.logsumexp(x, -1).sub(x.gather(-1, targets[:, None])[:, 0]).mean()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Grouped attention with softmax scale 1; q [B, n, T, d], k and v [B, g, T, d].

    Two batched products: torch's fused CPU kernel takes 1.6 times as long, forward and backward, here.
    """
    rows, n, t, d = q.shape
    groups = k.shape[1]
    q = q.reshape(rows * groups, n // groups * t, d)
    k, v = k.reshape(rows * groups, t, d), v.reshape(rows * groups, t, d)
    weights = masked_softmax(torch.bmm(q, k.transpose(1, 2)), bias)
    return torch.bmm(weights.view(rows * groups, -1, t), v).view(rows, n, t, d)


def mask_biases(length: int, window: int) -> dict[str, Tensor]:
    """Additive causal masks [T, T] by layer kind; a sliding query sees `window` keys, itself included."""
    i = torch.arange(length)
    causal = i[:, None] >= i[None, :]
    near = causal & (i[:, None] - i[None, :] < window)
    return {kind: torch.zeros(length, length).masked_fill(~m, -1e9) for kind, m in ((FULL, causal), (SLIDING, near))}


def rope_tables(config: dict, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, 1, d]; `proportional` leaves the tail of each half unrotated (frequency zero)."""
    rope = config["rope_parameters"][kind]
    d = config["global_head_dim"] if kind == FULL else config["head_dim"]
    rotated = int(rope.get("partial_rotary_factor", 1.0) * d // 2)
    frequency = torch.zeros(d // 2)
    frequency[:rotated] = rope["rope_theta"] ** -(torch.arange(0, 2 * rotated, 2, dtype=torch.float) / d)
    angle = positions.float()[:, None] * frequency
    angle = torch.cat((angle, angle), -1)[None, :, None]
    return angle.cos(), angle.sin()


class Gemma4Forward:
    """Forward over a dict of parameters. Call `begin` once per step, then the object on ids [B, T]."""

    def __init__(self, config: dict, parameters: dict[str, Tensor], length: int):
        self.config, self.parameters = config, parameters
        self.first_shared = config["num_hidden_layers"] - config["num_kv_shared_layers"]
        self.bias = mask_biases(length, config["sliding_window"])
        self.rope: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in (FULL, SLIDING):
            self.set_positions(kind, torch.arange(length))
        self.begin()

    def begin(self) -> None:
        """Drop the bf16 copies of the previous step's weights."""
        self.cast: dict[str, Tensor] = {}
        self.router_log: list[tuple[Tensor, Tensor]] = []

    def set_positions(self, kind: str, positions: Tensor) -> None:
        self.rope[kind] = rope_tables(self.config, kind, positions)

    def weight(self, name: str) -> Tensor:
        return self.parameters["model." + name]

    def linear(self, x: Tensor, *names: str) -> Tensor:
        """x times one matrix, or several side by side, each cast to bf16 once per step."""
        key = "|".join(names)
        if key not in self.cast:
            matrices = [self.weight(name + ".weight") for name in names]
            self.cast[key] = (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(LOW)
        return F.linear(x, self.cast[key])

    def attention(self, i: int, x: Tensor, kv: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """One attention block. A layer that owns keys and values writes them to `kv` under its kind."""
        kind, pre = self.config["layer_types"][i], f"layers.{i}.self_attn."
        d = self.config["global_head_dim"] if kind == FULL else self.config["head_dim"]
        b, t, _ = x.shape
        cos, sin = self.rope[kind]
        q = heads(self.linear(x, pre + "q_proj").view(b, t, -1, d), self.weight(pre + "q_norm.weight"), cos, sin)
        if i < self.first_shared:
            key = self.linear(x, pre + "k_proj").view(b, t, -1, d)
            same = kind == FULL and self.config["attention_k_eq_v"]
            value = key if same else self.linear(x, pre + "v_proj").view(b, t, -1, d)
            kv[kind] = heads(key, self.weight(pre + "k_norm.weight"), cos, sin), value_heads(value)
        out = attend(q, *kv[kind], self.bias[kind])
        return self.linear(out.transpose(1, 2).reshape(b, t, -1), pre + "o_proj")

    def mlp(self, i: int, x: Tensor) -> Tensor:
        pre = f"layers.{i}.mlp."
        return self.linear(geglu(self.linear(x, pre + "gate_proj", pre + "up_proj")), pre + "down_proj")

    def experts(self, i: int, h: Tensor) -> Tensor:
        """The routed branch: every expert on every token, with weight zero outside the top k."""
        config, pre = self.config, f"layers.{i}."
        e, w, hidden = config["num_experts"], config["moe_intermediate_size"], config["hidden_size"]
        flat = h.reshape(-1, hidden)
        scores = F.linear(
            router_input(flat, self.weight(pre + "router.scale")), self.weight(pre + "router.proj.weight")
        )
        probs = scores.softmax(-1)
        top, index = probs.topk(config["top_k_experts"], -1)
        top = top / top.sum(-1, keepdim=True) * self.weight(pre + "router.per_expert_scale")[index]
        self.router_log.append((probs, index))
        weight = torch.zeros_like(probs).scatter(-1, index, top)
        x = norm(flat, self.weight(pre + "pre_feedforward_layernorm_2.weight"))
        up = F.linear(x, self.weight(pre + "experts.gate_up_proj").to(LOW).reshape(e * 2 * w, hidden))
        act = geglu_experts(up.view(-1, e, 2, w), weight)
        down = self.weight(pre + "experts.down_proj").to(LOW).transpose(1, 2).reshape(e * w, hidden)
        return (act.reshape(-1, e * w) @ down).view(h.shape)

    def per_layer_inputs(self, ids: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """One [B, T, d] per layer: half the token's own table row, half a projection of its embedding."""
        d, layers = self.config["hidden_size_per_layer_input"], self.config["num_hidden_layers"]
        table = F.embedding(ids, self.weight("embed_tokens_per_layer.weight")) * d**0.5
        context = self.linear(h.to(LOW), "per_layer_model_projection") * self.config["hidden_size"] ** -0.5
        view = (*ids.shape, layers, d)
        return mix_per_layer(
            context.view(view), table.view(view), self.weight("per_layer_projection_norm.weight")
        ).unbind(2)

    def layer(self, i: int, h: Tensor, kv: dict, inputs: Tensor | None) -> Tensor:
        pre = f"layers.{i}."
        o = self.attention(i, norm(h, self.weight(pre + "input_layernorm.weight")), kv)
        after, before = (
            self.weight(pre + "post_attention_layernorm.weight"),
            self.weight(pre + "pre_feedforward_layernorm.weight"),
        )
        h, x = add_norm_norm(h, o, after, before)
        y, scalar = self.mlp(i, x), self.weight(pre + "layer_scalar")
        if self.config["enable_moe_block"]:
            dense, routed = (self.weight(pre + f"post_feedforward_layernorm_{k}.weight") for k in (1, 2))
            y = add_two_norms(y, dense, self.experts(i, h), routed)
        after = self.weight(pre + "post_feedforward_layernorm.weight")
        if inputs is None:
            return add_norm_scale(h, y, after, scalar)
        h, low = add_norm_cast(h, y, after)
        y = gate_per_layer(self.linear(low, pre + "per_layer_input_gate"), inputs)
        y = self.linear(y, pre + "per_layer_projection")
        return add_norm_scale(h, y, self.weight(pre + "post_per_layer_input_norm.weight"), scalar)

    def __call__(self, ids: Tensor, aux_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict, list[Tensor]]:
        """Hidden states after the final norm [B, T, H]; keys and values that a drafter reads, by kind; the outputs
        of `aux_layers`, each [B, T, H].
        """
        h = F.embedding(ids, self.weight("embed_tokens.weight")) * self.config["hidden_size"] ** 0.5
        layers = self.config["num_hidden_layers"]
        inputs = self.per_layer_inputs(ids, h) if self.config["hidden_size_per_layer_input"] else (None,) * layers
        kv: dict[str, tuple[Tensor, Tensor]] = {}
        aux = []
        for i in range(layers):
            h = self.layer(i, h, kv, inputs[i])
            if i in aux_layers:
                aux.append(h.to(LOW))
        return norm(h, self.weight("norm.weight")), kv, aux

    def logits(self, hidden: Tensor) -> Tensor:
        """Before the soft cap."""
        return self.linear(hidden, "embed_tokens")

    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token loss of ids [B, T + 1]."""
        self.begin()
        hidden, _, _ = self(ids[:, :-1])
        logits = self.logits(hidden).flatten(0, 1)
        return capped_cross_entropy(logits, ids[:, 1:].flatten(), self.config["final_logit_softcapping"])
