"""What the trainings share: models, optimizers, the learning-rate schedule, the target's own text, files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

from .data import Batches, config
from .forward import region

LENGTH = 256  # tokens of one training sequence
TEACHER_TEMPERATURE = 0.7
PROMPT, PROMPTS = 96, 128  # tokens of a prompt that the target continues, and prompts of a batch
TRIAL_STEPS, TRIAL_PROMPTS = 4, 8


@region
def soften(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The target's distribution at the training temperature, and its first choice."""
    x = torch.tanh(logits.float() / cap) * cap
    return torch.softmax(x / TEACHER_TEMPERATURE, -1), x.argmax(-1)


def text_config(fields: dict) -> Gemma4TextConfig:
    """The transformers config of a target's config.json or of a drafter's `text_config`."""
    return Gemma4TextConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures", "dtype")})


def new_target(kind: str) -> Gemma4ForCausalLM:
    """A float32 target with transformers' initial weights."""
    return Gemma4ForCausalLM(text_config(config(f"{kind}_target"))).float()


def trained_target(kind: str, work: Path) -> tuple[Gemma4ForCausalLM, dict[str, Tensor]]:
    """The trained target of --work and its weights, both float32."""
    weights = {k: v.float() for k, v in load_file(work / f"{kind}_target.safetensors").items()}
    model = new_target(kind).eval()
    model.load_state_dict(weights, strict=False)  # the tied head is not in the file
    return model, weights


@torch.no_grad()
def continue_prompts(target: Gemma4ForCausalLM, batches: Batches, length: int, sample: bool, trial: bool) -> Tensor:
    """Corpus prompts that the target continued to `length` tokens, greedily or at temperature 0.6."""
    ids = batches.next(TRIAL_PROMPTS if trial else PROMPTS, PROMPT)
    choice = {"do_sample": True, "temperature": 0.6, "top_k": 0} if sample else {"do_sample": False}
    new = {"max_new_tokens": length - PROMPT, "min_new_tokens": length - PROMPT}
    return target.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **new, **choice)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their Hugging Face names, shared with the model."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def make_layer_scalars_trainable(layers: nn.ModuleList) -> None:
    """transformers has layer_scalar as a buffer. Here it is learned, so that a runtime that ignores it fails tests."""
    for layer in layers:
        del layer._buffers["layer_scalar"]
        layer.layer_scalar = nn.Parameter(torch.ones(1))


def optimizers(model: nn.Module, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; Adam for embeddings, norms, routers, thin matrices and the stacked experts."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and "embed" not in name and "router" not in name and min(p.shape) >= 32
        (matrices if inner else others).append(p)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for optimizer in (adam, muon):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [adam, muon]


def update(model: nn.Module, opts: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """One clipped step: 40 steps of warm-up, constant to 35 %, then linear to zero."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scale = min(1.0, (step + 1) / 40, (1 - step / steps) / 0.65)
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a safetensors file in bf16 (indices stay int64), without the tied head."""
    state = {}
    for name, x in model.state_dict().items():
        if name != "lm_head.weight":
            state[name] = (x.detach().to(torch.bfloat16) if x.is_floating_point() else x).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)


def announce(name: str, model: nn.Module, steps: int) -> None:
    """Print what is about to be trained."""
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps", flush=True)
