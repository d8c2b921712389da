"""What both trainings share: batches, optimizers, the learning-rate schedule, bf16 files. Knows no loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BOS = 2
ROWS, LENGTH = 8, 256  # tokens of one step
LONGEST_GAP = 768


class Stream:
    """Random crops of the corpus that all start with <bos>, as every prompt will."""

    def __init__(self, work: Path, seed: int):
        plain, chat = (np.load(work / "tokens" / f"{name}.npy") for name in ("train", "train_chat"))
        self.ids = torch.from_numpy(np.concatenate([plain, chat, chat]).astype(np.int64))
        self.rng = np.random.default_rng(seed)
        self.starts: list[int] = []

    def batch(self, rows: int, length: int) -> Tensor:
        """[rows, length + 1]: a shuffled tiling, its phase fresh each epoch, so all tokens are seen alike."""
        out = []
        for _ in range(rows):
            if not self.starts:
                starts = np.arange(self.rng.integers(0, length), len(self.ids) - length - 1, length)
                self.rng.shuffle(starts)
                self.starts = starts.tolist()
            start = self.starts.pop()
            out.append(self.ids[start : start + length + 1].clone())
            out[-1][0] = BOS
        return torch.stack(out)


def positions_with_a_gap(rng: np.random.Generator, length: int) -> Tensor:
    """[length]; half of the time with a hole, so that full attention meets distances near a thousand."""
    positions = torch.arange(length)
    if rng.random() < 0.5:
        positions[int(rng.integers(32, length - 32)) :] += int(rng.integers(1, LONGEST_GAP))
    return positions


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their Hugging Face names, shared with the model."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def trainable_layer_scalars(layers: nn.ModuleList) -> None:
    """transformers has layer_scalar as a buffer; here it is learned, so that leaving it out shows."""
    for layer in layers:
        del layer._buffers["layer_scalar"]
        layer.layer_scalar = nn.Parameter(torch.ones(1))


def optimizers(model: nn.Module, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; Adam for embeddings, norms, routers, thin matrices and the stacked experts."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and "embed" not in name and "router" not in name and min(p.shape) >= 32
        (matrices if inner else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for optimizer in (adam, muon):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [adam, muon]


def update(model: nn.Module, opts: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """One clipped step: 40 steps of warm-up, constant to 35 %, then a straight line to zero."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scale = min(1.0, (step + 1) / 40, (1 - step / steps) / 0.65)
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_weights(model: nn.Module, folder: Path) -> None:
    """model.safetensors in bf16 (indices stay int64); the tied head is not stored twice."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, x in model.state_dict().items():
        if name != "lm_head.weight":
            state[name] = (x.detach().to(torch.bfloat16) if x.is_floating_point() else x).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
