"""Distils a DFlash drafter from the trained edge target. Seeded, and driven by steps.

Training as in the paper (Chen et al. 2026, arXiv 2602.06036, section 4.2): a sequence has many anchors. Each one's
block [anchor, mask, ...] is denoised in one pass that sees the target's features before the anchor and the block
itself, but no other block. Slot k is scored against the target's own distribution of token anchor + k, with a weight
that falls with k. Most of the text is the target's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import training
from .data import Batches, config, crop, positions_with_gap
from .forward import FULL, LOW, SLIDING, Gemma4Forward, heads, masked_softmax, norm, region, rms
from .training import LENGTH, TRIAL_STEPS

STEPS = 1500
MUON_LR = 8e-3
ROWS, ANCHORS = 4, 32  # sequences of a step; blocks of each, at the same places in all
FADE_SLOTS = 4.0  # the weight of slot k is exp(-(k - 1) / FADE_SLOTS); the paper's choice for blocks of 8
OWN_TEXT_SHARE = 0.7  # of the steps use text that the target wrote
OWN_TEXT_BATCHES = 4


@region
def weighted_cross_entropy(logits: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    x = logits.float()
    return ((torch.logsumexp(x, -1) - (p * x).sum(-1)) * weight).sum() / weight.sum()


@region
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up).to(LOW)


@region
def add_norm(h: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = h + y
    return h, rms(h, weight).to(LOW)


class Attention(nn.Module):
    """Parameters of one attention block, under their published names."""

    def __init__(self, c: dict):
        super().__init__()
        size, d = c["hidden_size"], c["head_dim"]
        self.q_proj = nn.Linear(size, c["num_attention_heads"] * d, bias=False)
        self.k_proj = nn.Linear(size, c["num_key_value_heads"] * d, bias=False)
        self.v_proj = nn.Linear(size, c["num_key_value_heads"] * d, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * d, size, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(d), nn.RMSNorm(d)


class Mlp(nn.Module):
    """Parameters of one gated MLP."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, width, bias=False), nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)


class Layer(nn.Module):
    """Parameters of one layer."""

    def __init__(self, c: dict):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(c["hidden_size"])
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"])


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(LOW))


class DFlash(nn.Module):
    """The drafter: parameters under their published names, and the forward over many blocks at once."""

    def __init__(self, c: dict):
        super().__init__()
        self.c, size = c, c["hidden_size"]
        self.fc = nn.Linear(len(c["dflash_config"]["target_layer_ids"]) * size, size, bias=False)
        self.hidden_norm, self.norm = nn.RMSNorm(size), nn.RMSNorm(size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)

    def forward(self, blocks: Tensor, features: Tensor, ropes: dict, biases: dict) -> Tensor:
        """blocks [B, Q, H] embedded, features [B, T, n * H] -> normed hidden states [B, Q, H].

        ropes and biases by kind of layer: tables of (context, block) positions; masks [Q, T + Q].
        """
        context = norm(product(features, self.fc).float(), self.hidden_norm.weight)
        h, y = blocks, torch.zeros_like(blocks)
        for layer, kind in zip(self.layers, self.c["layer_types"], strict=True):
            h, x = add_norm(h, y, layer.input_layernorm.weight)
            h, x = add_norm(
                h,
                self.attend(layer.self_attn, x, context, ropes[kind], biases[kind]),
                layer.post_attention_layernorm.weight,
            )
            mlp = layer.mlp
            y = product(swiglu(product(x, mlp.gate_proj), product(x, mlp.up_proj)), mlp.down_proj)
        return add_norm(h, y, self.norm.weight)[1]

    def attend(self, a: Attention, x: Tensor, context: Tensor, ropes: tuple, bias: Tensor) -> Tensor:
        """Queries of the blocks over context and blocks: x [B, Q, H], context [B, T, H] -> [B, Q, H]."""
        b, columns, d = x.shape[0], x.shape[1], self.c["head_dim"]
        groups, rope, block_rope = self.c["num_key_value_heads"], ropes[0], ropes[1]
        q = heads(product(x, a.q_proj).view(b, columns, -1, d), a.q_norm.weight * d**-0.5, *block_rope)
        keys, values = [], []
        for source, table in ((context, rope), (x, block_rope)):
            length = source.shape[1]
            keys.append(heads(product(source, a.k_proj).view(b, length, -1, d), a.k_norm.weight, *table))
            values.append(product(source, a.v_proj).view(b, length, -1, d).transpose(1, 2))
        k, v = torch.cat(keys, 2).flatten(0, 1), torch.cat(values, 2).flatten(0, 1)
        scores = torch.bmm(q.reshape(b * groups, -1, d), k.transpose(1, 2))
        out = torch.bmm(masked_softmax(scores, bias).view(b * groups, -1, bias.shape[1]), v)
        return product(out.view(b, -1, columns, d).transpose(1, 2).reshape(b, columns, -1), a.o_proj)


def masks(c: dict, anchors: Tensor) -> dict[str, Tensor]:
    """Additive masks [Q, T + Q] by kind: a block sees the context before its anchor, and itself.

    A sliding layer sees its window only, and nothing after the query.
    """
    slots = torch.arange(c["block_size"])
    own, at = anchors.repeat_interleave(c["block_size"]), (anchors[:, None] + slots).flatten()
    context = torch.arange(LENGTH)
    before, mine = context < own[:, None], own[:, None] == own
    ahead, age = at > at[:, None], at[:, None] - context
    seen = {
        FULL: torch.cat((before, mine), 1),
        SLIDING: torch.cat((before & (age < c["sliding_window"]), mine & ~ahead), 1),
    }
    return {kind: torch.zeros(s.shape).masked_fill(~s, -1e9) for kind, s in seen.items()}


def rope_of(c: dict, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, 1, d] of plain rotation over whole heads."""
    d = c["head_dim"]
    angle = positions.float()[:, None] * c["rope_theta"] ** -(torch.arange(0, d, 2, dtype=torch.float) / d)
    angle = torch.cat((angle, angle), -1)[None, :, None]
    return angle.cos(), angle.sin()


class Distillation:
    """The frozen target, the drafter, and one step's loss."""

    def __init__(self, weights: dict[str, Tensor]):
        self.target_config, self.config = config("edge_target"), config("edge_dflash")
        self.embedding = weights["model.embed_tokens.weight"]
        self.teacher = Gemma4Forward(self.target_config, weights, LENGTH + self.config["block_size"])
        self.model = DFlash(self.config)
        slots = torch.arange(self.config["block_size"] - 1)
        self.weight = torch.exp(-slots / FADE_SLOTS).repeat(ROWS * ANCHORS)

    def loss(self, ids: Tensor, anchors: Tensor, positions: Tensor) -> tuple[Tensor, list[float]]:
        """ids [B, T + block], anchors [A], positions [T + block] of full layers.

        Also returns, for each slot, the share of blocks where all drafts so far are right.
        """
        c, slots = self.config, torch.arange(self.config["block_size"])
        self.teacher.set_positions(FULL, positions)
        window = (anchors[:, None] + slots[:-1]).flatten()  # the target's state there decides slots 1, 2, ...
        with torch.no_grad():
            hidden, _, aux = self.teacher(ids, tuple(c["dflash_config"]["target_layer_ids"]))
            features = torch.cat(aux, -1)
            logits = self.teacher.logits(hidden[:, window]).flatten(0, 1)
            p, best = training.soften(logits, self.target_config["final_logit_softcapping"])
            blocks = torch.full((len(ids), len(anchors), c["block_size"]), c["dflash_config"]["mask_token_id"])
            blocks[:, :, 0] = ids[:, anchors]
            embedded = F.embedding(blocks.flatten(1), self.embedding) * self.target_config["hidden_size"] ** 0.5
        plain = torch.arange(LENGTH)
        ropes = {
            kind: (rope_of(c, at[:LENGTH]), rope_of(c, (at[anchors][:, None] + slots).flatten()))
            for kind, at in ((SLIDING, plain), (FULL, positions))
        }
        out = self.model(embedded, features[:, :LENGTH], ropes, masks(c, anchors))
        out = out.view(len(ids), len(anchors), c["block_size"], -1)[:, :, 1:].flatten(0, 2)
        drafted = F.linear(out, self.embedding.to(LOW))
        cap = c["final_logit_softcapping"]
        loss = weighted_cross_entropy(torch.tanh(drafted.float() / cap) * cap, p, self.weight)
        hits = (drafted.argmax(-1) == best).view(-1, c["block_size"] - 1).cumprod(-1)
        return loss, hits.float().mean(0).tolist()


def sample(step: int, own: Tensor, corpus: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, length], anchors [A], positions [length]) of a step."""
    rng = np.random.default_rng([3, step])
    if rng.random() < OWN_TEXT_SHARE:
        ids = own[torch.from_numpy(rng.choice(len(own), ROWS, replace=False))]
    else:
        starts = rng.integers(0, len(corpus) - length, ROWS)
        ids = torch.stack([crop(corpus, start, length) for start in starts])
    anchors = np.sort(rng.choice(np.arange(4, LENGTH), ANCHORS, replace=False))
    return ids, torch.from_numpy(anchors), positions_with_gap(rng, length)


def train(kind: str, work: Path, trial: bool) -> None:
    """Write work/<kind>_dflash.safetensors."""
    steps = TRIAL_STEPS if trial else STEPS
    target, weights = training.trained_target(kind, work)
    batches, own, length = Batches(seed=17), [], LENGTH + config("edge_dflash")["block_size"]
    for i in range(OWN_TEXT_BATCHES):
        torch.manual_seed(i)
        own.append(training.continue_prompts(target, batches, length, i % 2 == 1, trial))
    own = torch.cat(own)
    torch.manual_seed(0)
    task = Distillation(weights)
    opts = training.optimizers(task.model, MUON_LR)
    training.announce(f"{kind} DFlash drafter", task.model, steps)
    for step in range(steps):
        loss, hits = task.loss(*sample(step, own, batches.ids, length))
        loss.backward()
        training.update(task.model, opts, step, steps)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"{step + 1:5d} loss {loss.item():.3f} accepted {np.round(hits, 2)}", flush=True)
    training.save_weights(task.model, work / f"{kind}_dflash.safetensors")
