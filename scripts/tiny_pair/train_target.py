"""Train one tiny target on the CPU. Driven by steps and seeded: the clock has no say in the weights."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from lean import FULL, Lean
from torch import Tensor, nn
from training import (
    BOS,
    LENGTH,
    ROWS,
    Stream,
    optimizers,
    positions_with_a_gap,
    save_weights,
    tensors,
    trainable_layer_scalars,
    update,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

STEPS = {"edge": 1300, "moe": 450}
MUON_LR = 1e-2
BALANCE = 0.01  # weight of the router's load-balancing loss
# Every block starts small against the residual stream, or twenty of them drown the embedding.
POST_NORM = 0.25
CHECKPOINT_EVERY = 250


def build(shape: dict) -> Gemma4ForCausalLM:
    """A fresh model whose signal neither grows nor fades over the depth."""
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{k: v for k, v in shape.items() if k != "model_type"})).float()
    trainable_layer_scalars(model.model.layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed" not in name and "router" not in name:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            elif "layers." in name and "post_" in name:
                p.fill_(POST_NORM)
        model.model.embed_tokens.weight.normal_(std=shape["hidden_size"] ** -0.5)
        for layer in model.model.layers:  # softmax scale is 1: start at q.k / sqrt(d), not at q.k
            layer.self_attn.q_norm.weight.fill_(layer.self_attn.head_dim**-0.5)
    return model


def balance_loss(router_log: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Load balancing of Switch Transformers (Fedus et al. 2021, eq. 4), else two experts take everything."""
    total = torch.zeros(())
    for probs, index in router_log:
        experts = probs.shape[-1]
        load = F.one_hot(index, experts).float().mean((0, 1))
        total = total + experts * (load * probs.mean(0)).sum()
    return total


@torch.no_grad()
def held_out_loss(shape: dict, weights: dict[str, Tensor], work: Path, length: int) -> float:
    """Nats per token over the held-out files, in crops of `length`."""
    ids = torch.from_numpy(np.load(work / "tokens" / "held.npy").astype(np.int64))
    crops = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1).clone()
    crops[:, 0] = BOS
    crops = crops[: len(crops) // 8 * 8]
    net, losses = Lean(shape, weights, length), []
    for rows in crops.split(8):
        losses.append(net.loss(rows).item())
    return sum(losses) / len(losses)


def train(kind: str, work: Path, steps: int) -> dict:
    """Trains, leaving a checkpoint every few minutes and the result in work/<kind>/target."""
    shape, folder = shapes.TARGETS[kind], work / kind / "target"
    torch.manual_seed(0)
    model = build(shape).train()
    net, opts = Lean(shape, tensors(model), LENGTH), optimizers(model, MUON_LR)
    data, gaps = Stream(work, seed=0), np.random.default_rng(1)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{kind} target: {parameters} parameters, {steps} steps", flush=True)
    smooth, wall, cpu = 0.0, time.time(), time.process_time()
    for step in range(steps):
        net.set_positions(FULL, positions_with_a_gap(gaps, LENGTH))
        loss = net.loss(data.batch(ROWS, LENGTH))
        (loss + BALANCE * balance_loss(net.router_log)).backward()
        update(model, opts, step, steps)
        smooth = 0.98 * smooth + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 50 == 0:
            print(f"{step + 1:5d} loss {smooth:.4f} wall {(time.time() - wall) / 60:.2f} min", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_weights(model, folder)
    save_weights(model, folder)
    minutes = {"wall": round((time.time() - wall) / 60, 1), "cpu": round((time.process_time() - cpu) / 60, 1)}
    shipped = {k: v.to(torch.bfloat16).float() for k, v in tensors(model).items()}  # measure what ships
    held = {length: round(held_out_loss(shape, shipped, work, length), 4) for length in (256, 768)}
    report = {"parameters": parameters, "steps": steps, "tokens": steps * ROWS * LENGTH, "minutes": minutes}
    return report | {"train_loss": round(smooth, 4), "held_out_loss": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=shapes.TARGETS)
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and training output")
    parser.add_argument("--steps", type=int, help="default: the number that made the shipped weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = args.work / args.kind / "target"
    folder.mkdir(parents=True, exist_ok=True)
    shapes.write_target_config(args.kind, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(args.work / "tokens" / name, folder / name)
    report = train(args.kind, args.work, args.steps or STEPS[args.kind])
    shapes.write_json(args.work / args.kind / "target_report.json", report)
    print(report)


if __name__ == "__main__":
    main()
