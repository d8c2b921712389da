"""Trains one tiny target by next-token loss. Seeded, and driven by steps, not by time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

from .data import Batches, config, positions_with_gap
from .forward import FULL, Gemma4Forward
from .training import (
    LENGTH,
    TRIAL_STEPS,
    announce,
    make_layer_scalars_trainable,
    new_target,
    optimizers,
    save_weights,
    tensors,
    update,
)

STEPS = {"edge": 1300, "moe": 450}
ROWS = 8
MUON_LR = 1e-2
BALANCE = 0.01  # weight of the router's load-balancing loss
POST_NORM = 0.25  # each block starts small against the residual stream; twenty larger ones would hide the embedding


def build(kind: str) -> Gemma4ForCausalLM:
    """A new model whose signal neither grows nor fades over the depth."""
    model = new_target(kind).train()
    make_layer_scalars_trainable(model.model.layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed" not in name and "router" not in name:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            elif "layers." in name and "post_" in name:
                p.fill_(POST_NORM)
        model.model.embed_tokens.weight.normal_(std=model.config.hidden_size**-0.5)
        for layer in model.model.layers:  # Gemma 4 does not scale q.k: start at q.k / sqrt(d)
            layer.self_attn.q_norm.weight.fill_(layer.self_attn.head_dim**-0.5)
    return model


def balance_loss(router_log: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Load balancing of Switch Transformers (Fedus et al. 2021, eq. 4); without it two experts take every token."""
    total = torch.zeros(())
    for probs, index in router_log:
        experts = probs.shape[-1]
        load = F.one_hot(index, experts).float().mean((0, 1))
        total = total + experts * (load * probs.mean(0)).sum()
    return total


def train(kind: str, work: Path, trial: bool) -> None:
    """Write work/<kind>_target.safetensors."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    steps = TRIAL_STEPS if trial else STEPS[kind]
    model = build(kind)
    forward, opts = Gemma4Forward(config(f"{kind}_target"), tensors(model), LENGTH), optimizers(model, MUON_LR)
    batches, gaps, smooth = Batches(seed=0), np.random.default_rng(1), 0.0
    announce(f"{kind} target", model, steps)
    for step in range(steps):
        forward.set_positions(FULL, positions_with_gap(gaps, LENGTH))
        loss = forward.loss(batches.next(ROWS, LENGTH + 1))
        (loss + BALANCE * balance_loss(forward.router_log)).backward()
        update(model, opts, step, steps)
        smooth = 0.98 * smooth + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"{step + 1:5d} loss {smooth:.4f} nats per token", flush=True)
    save_weights(model, work / f"{kind}_target.safetensors")
