"""Distil a DFlash drafter from a frozen tiny target. Driven by steps, seeded, and resumed where it was stopped.

Training as in the paper (Chen et al. 2026, arXiv 2602.06036, section 4.2): from a sequence many anchors are taken;
of each, the block [anchor, mask, ...] is denoised in one pass that sees the target's features before the anchor and
the block itself, and nothing of other blocks. Slot k is scored against the target's own distribution of token
anchor + k, less the further it is. Most of the text is the target's own.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import lean
import numpy as np
import shapes
import torch
import torch.nn.functional as F
import training
from lean import FULL, SLIDING, Lean, region
from safetensors.torch import load_file
from torch import Tensor, nn
from training import LENGTH
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

STEPS = 1500
MUON_LR = 8e-3
ROWS, ANCHORS = 4, 32  # a step: so many sequences, and so many blocks of each, at the same places in all
FADE_SLOTS = 4.0  # the weight of slot k is exp(-(k - 1) / FADE_SLOTS); the paper's choice for blocks of 8
TEACHER_TEMPERATURE = 0.7
SELF_SHARE = 0.7  # of the steps use text that the target wrote
SELF_BATCHES, SELF_ROWS, SELF_PROMPT = 4, 128, 96
CHECKPOINT_EVERY = 100


@region
def weighted_cross_entropy(logits: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    x = logits.float()
    return ((torch.logsumexp(x, -1) - (p * x).sum(-1)) * weight).sum() / weight.sum()


@region
def soften(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The target's distribution at the training temperature, and its first choice."""
    x = torch.tanh(logits.float() / cap) * cap
    return torch.softmax(x / TEACHER_TEMPERATURE, -1), x.argmax(-1)


@region
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up).to(lean.LOW)


@region
def add_norm(h: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = h + y
    return h, lean._rms(h, weight).to(lean.LOW)


class Teacher(Lean):
    """The frozen target, which also hands out the outputs of some layers."""

    def features(self, ids: Tensor, layers: list[int]) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> (hidden after the final norm [B, T, H], outputs of the layers side by side [B, T, n * H])."""
        h = F.embedding(ids, self.v("embed_tokens.weight")) * self.s["hidden_size"] ** 0.5
        inputs, kv, taps = self.per_layer_inputs(ids, h), {}, []
        for i in range(self.s["num_hidden_layers"]):
            h = self.layer(i, h, kv, inputs[i])
            if i in layers:
                taps.append(h.to(lean.LOW))
        return lean.norm(h, self.v("norm.weight")), torch.cat(taps, -1)


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
    return F.linear(x, linear.weight.to(lean.LOW))


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
        context = lean.norm(product(features, self.fc).float(), self.hidden_norm.weight)
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
        q = lean.heads(product(x, a.q_proj).view(b, columns, -1, d), a.q_norm.weight * d**-0.5, *block_rope)
        keys, values = [], []
        for source, table in ((context, rope), (x, block_rope)):
            length = source.shape[1]
            keys.append(lean.heads(product(source, a.k_proj).view(b, length, -1, d), a.k_norm.weight, *table))
            values.append(product(source, a.v_proj).view(b, length, -1, d).transpose(1, 2))
        k, v = torch.cat(keys, 2).flatten(0, 1), torch.cat(values, 2).flatten(0, 1)
        scores = torch.bmm(q.reshape(b * groups, -1, d), k.transpose(1, 2))
        out = torch.bmm(lean.masked_softmax(scores, bias).view(b * groups, -1, bias.shape[1]), v)
        return product(out.view(b, -1, columns, d).transpose(1, 2).reshape(b, columns, -1), a.o_proj)


def masks(c: dict, anchors: Tensor) -> dict[str, Tensor]:
    """Additive masks [Q, T + Q] by kind: a block sees what lies before its anchor, and itself; a sliding layer no
    further than its window, and nothing ahead of the query."""
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


@torch.no_grad()
def self_written(shape: dict, weights: dict[str, Tensor], work: Path) -> Tensor:
    """Rows the target wrote from corpus prefixes, alternately greedy and at temperature 0.6; kept in work/dflash."""
    target = Gemma4ForCausalLM(Gemma4TextConfig(**{k: v for k, v in shape.items() if k != "model_type"})).float().eval()
    target.load_state_dict(weights, strict=False)
    data, out = training.Stream(work, seed=17), []
    new = LENGTH + shapes.DFLASH["block_size"] - SELF_PROMPT
    for batch in range(SELF_BATCHES):
        ids, kept = data.batch(SELF_ROWS, SELF_PROMPT - 1), work / "dflash" / f"written{batch}.npy"
        if not kept.exists():
            torch.manual_seed(batch)
            choice = {"do_sample": True, "temperature": 0.6, "top_k": 0} if batch % 2 else {"do_sample": False}
            length = {"max_new_tokens": new, "min_new_tokens": new}
            text = target.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **length, **choice)
            np.save(kept, text.numpy())
            print(f"self-written: batch {batch}", flush=True)
        out.append(torch.from_numpy(np.load(kept)))
    return torch.cat(out)


class Distillation:
    """The frozen target, the drafter, and one step's loss."""

    def __init__(self, weights: dict[str, Tensor]):
        self.shape, self.config = shapes.TARGETS["edge"], shapes.DFLASH
        self.embedding = weights["model.embed_tokens.weight"]
        self.teacher = Teacher(self.shape, weights, LENGTH + self.config["block_size"])
        self.model = DFlash(self.config)
        slots = torch.arange(self.config["block_size"] - 1)
        self.weight = torch.exp(-slots / FADE_SLOTS).repeat(ROWS * ANCHORS)

    def loss(self, ids: Tensor, anchors: Tensor, positions: Tensor) -> tuple[Tensor, list[float]]:
        """ids [B, T + block], anchors [A], positions [T + block] of full layers; also the hits by slot."""
        c, slots = self.config, torch.arange(self.config["block_size"])
        self.teacher.set_positions(FULL, positions)
        window = (anchors[:, None] + slots[:-1]).flatten()  # the target's state there decides slots 1, 2, ...
        with torch.no_grad():
            hidden, features = self.teacher.features(ids, c["dflash_config"]["target_layer_ids"])
            logits = self.teacher.logits(hidden[:, window]).flatten(0, 1)
            p, best = soften(logits, self.shape["final_logit_softcapping"])
            blocks = torch.full((len(ids), len(anchors), c["block_size"]), c["dflash_config"]["mask_token_id"])
            blocks[:, :, 0] = ids[:, anchors]
            embedded = F.embedding(blocks.flatten(1), self.embedding) * self.shape["hidden_size"] ** 0.5
        plain = torch.arange(LENGTH)
        ropes = {
            kind: (rope_of(c, at[:LENGTH]), rope_of(c, (at[anchors][:, None] + slots).flatten()))
            for kind, at in ((SLIDING, plain), (FULL, positions))
        }
        out = self.model(embedded, features[:, :LENGTH], ropes, masks(c, anchors))
        out = out.view(len(ids), len(anchors), c["block_size"], -1)[:, :, 1:].flatten(0, 2)
        drafted = F.linear(out, self.embedding.to(lean.LOW))
        cap = c["final_logit_softcapping"]
        loss = weighted_cross_entropy(torch.tanh(drafted.float() / cap) * cap, p, self.weight)
        hits = (drafted.argmax(-1) == best).view(-1, c["block_size"] - 1).cumprod(-1)
        return loss, hits.float().mean(0).tolist()


def sample(step: int, own: Tensor, corpus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, anchors, positions) of a step, a function of its number alone, so that a run can be resumed."""
    rng, length = np.random.default_rng([3, step]), LENGTH + shapes.DFLASH["block_size"]
    if rng.random() < SELF_SHARE:
        ids = own[torch.from_numpy(rng.choice(len(own), ROWS, replace=False))]
    else:
        starts = rng.integers(0, len(corpus) - length, ROWS)
        ids = torch.stack([corpus[s : s + length] for s in starts])
        ids[:, 0] = training.BOS
    anchors = np.sort(rng.choice(np.arange(4, LENGTH), ANCHORS, replace=False))
    return ids, torch.from_numpy(anchors), training.positions_with_a_gap(rng, length)


def train(work: Path, steps: int) -> dict:
    """Trains, leaving a checkpoint every few minutes and the result in work/dflash/drafter."""
    folder, kept = work / "dflash" / "drafter", work / "dflash" / "checkpoint.pt"
    weights = {k: v.float() for k, v in load_file(work / "edge" / "target" / "model.safetensors").items()}
    own, corpus = self_written(shapes.TARGETS["edge"], weights, work), training.Stream(work, seed=0).ids
    torch.manual_seed(0)
    task = Distillation(weights)
    opts = training.optimizers(task.model, MUON_LR)
    first, smooth, cpu_s = 0, None, 0.0
    if kept.exists():
        saved = torch.load(kept)
        task.model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        first, smooth, cpu_s = saved["step"], np.array(saved["smooth"]), saved["cpu_s"]
    parameters = sum(p.numel() for p in task.model.parameters())
    print(f"{parameters} parameters, steps {first} to {steps}", flush=True)
    began = time.process_time()
    for step in range(first, steps):
        loss, hits = task.loss(*sample(step, own, corpus))
        loss.backward()
        training.update(task.model, opts, step, steps)
        smooth = np.array(hits) if smooth is None else 0.95 * smooth + 0.05 * np.array(hits)
        if (step + 1) % 50 == 0:
            spent = (cpu_s + time.process_time() - began) / 60
            print(f"{step + 1:5d} loss {loss.item():.3f} alive {smooth.round(2)} cpu {spent:.2f} min", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "smooth": smooth.tolist(), "cpu_s": cpu_s + time.process_time() - began}
            state |= {"model": task.model.state_dict(), "opts": [opt.state_dict() for opt in opts]}
            torch.save(state, kept)
            training.save_weights(task.model, folder)
    minutes = round((cpu_s + time.process_time() - began) / 60, 1)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    done = {"parameters": parameters, "steps": steps, "cpu_minutes": minutes, "libraries": libraries}
    return done | {"alive": smooth.round(3).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that holds tokens and the trained target")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: the number that made the shipped weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.work / "dflash" / "drafter").mkdir(parents=True, exist_ok=True)
    shapes.write_dflash_config(args.work / "dflash" / "drafter")
    report = train(args.work, args.steps)
    shapes.write_json(args.work / "dflash" / "report.json", report)
    print(report)


if __name__ == "__main__":
    main()
