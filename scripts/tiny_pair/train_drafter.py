"""Distil a drafter from a frozen tiny target, unrolled as it is used. Driven by steps and seeded.

For every position t of a sequence (all of them in parallel) the drafter runs UNROLL times:
    step 1 sees [E(x[t+1]), h[t]]         h = the target's hidden state after its final norm
    step k sees [E(x[t+k]), own projected hidden state of step k-1]
    every step: the position of x[t+1], and the target's keys and values of positions 0..t.
Step k is scored against the target's distribution at t+k. More than half of the text is the target's own.
"""

from __future__ import annotations

import argparse
import time
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
from transformers.models.gemma4_assistant.configuration_gemma4_assistant import Gemma4AssistantConfig
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

STEPS = {"edge": 1200, "moe": 700}
MUON_LR = 8e-3
ROWS = 4  # half of the target's: soft targets are little noise, so more and smaller steps
UNROLL = 4
FADE = 0.85  # weight of a draft step against the one before it
SCORED_SHARE = 0.5  # of the positions; the vocabulary is the dear part
TEACHER_TEMPERATURE = 0.7
CENTROID_WEIGHT = 0.3
SELF_SHARE = 0.6  # of the steps use text that the target wrote
SELF_BATCHES, SELF_ROWS, SELF_PROMPT = 6, 128, 96
CHECKPOINT_EVERY = 300


@region
def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    x = logits.float()
    return (torch.logsumexp(x, -1) - (p * x).sum(-1)).mean()


@region
def soften(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The target's distribution at the training temperature, and its first choice."""
    x = torch.tanh(logits.float() / cap) * cap
    return torch.softmax(x / TEACHER_TEMPERATURE, -1), x.argmax(-1)


class LeanDrafter(Lean):
    """The assistant's forward for all positions of a sequence at once."""

    def __init__(self, config: dict, parameters: dict[str, Tensor]):
        super().__init__(config["text_config"], parameters, LENGTH)
        self.set_positions(SLIDING, torch.arange(1, LENGTH + 1))

    def top(self, x: Tensor, name: str) -> Tensor:
        """A matrix outside the text stack."""
        return F.linear(x, self.p[name + ".weight"].to(lean.LOW))

    def draft(self, embedded: Tensor, state: Tensor, kv: dict) -> tuple[Tensor, Tensor]:
        """One draft step: [B, T, H] twice -> normed hidden for the head, and the state of the next step."""
        h = self.top(torch.cat((embedded, state), -1), "pre_projection").float()
        for i in range(self.s["num_hidden_layers"]):
            h = self.layer(i, h, kv, None)
        out = lean.norm(h, self.v("norm.weight"))
        return out, self.top(out, "post_projection")


class Clusters:
    """Which cluster owns each token, for the ordered head."""

    def __init__(self, ordering: Tensor, count: int, top: int):
        self.count, self.top = count, top
        self.of = torch.empty(len(ordering), dtype=torch.long)
        self.of[ordering] = torch.arange(len(ordering)) // (len(ordering) // count)
        self.member = F.one_hot(self.of, count).float()

    def found(self, scores: Tensor, token: Tensor) -> Tensor:
        """Whether the token's cluster is among the best."""
        return (scores.topk(self.top, -1).indices == self.of[token][:, None]).any(-1)


def balanced_clusters(rows: np.ndarray, k: int) -> np.ndarray:
    """token_ordering [V]: k-means on unit rows with clusters of equal size, best matches first."""
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)
    rng = np.random.default_rng(0)
    centre = x[rng.choice(len(x), k, replace=False)]
    for _ in range(12):
        owner, room = np.full(len(x), -1), np.full(k, len(x) // k)
        for flat in np.argsort(-(x @ centre.T), axis=None, kind="stable"):
            token, cluster = divmod(int(flat), k)
            if owner[token] < 0 and room[cluster]:
                owner[token], room[cluster] = cluster, room[cluster] - 1
        centre = np.stack([x[owner == c].mean(0) for c in range(k)])
        centre /= np.linalg.norm(centre, axis=1, keepdims=True).clip(1e-6)
    return np.concatenate([np.flatnonzero(owner == c) for c in range(k)])


def build(config: dict, embedding: Tensor) -> Gemma4AssistantForCausalLM:
    """A fresh drafter whose head starts from the target's own output directions [V, H]."""
    text = Gemma4TextConfig(**{k: v for k, v in config["text_config"].items() if k != "model_type"})
    own = ("backbone_hidden_size", "use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k")
    model = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text, **{k: config[k] for k in own})).float()
    training.trainable_layer_scalars(model.model.layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(layer.self_attn.head_dim**-0.5)
        directions = torch.linalg.svd(embedding, full_matrices=False)[2][: text.hidden_size]
        head = model.model.embed_tokens.weight.copy_(embedding @ directions.T)
        if config["use_ordered_embeddings"]:
            ordering = torch.from_numpy(balanced_clusters(embedding.numpy(), config["num_centroids"]))
            model.masked_embedding.token_ordering.copy_(ordering)
            groups = head[ordering].view(config["num_centroids"], -1, text.hidden_size)
            model.masked_embedding.centroids.weight.copy_(groups.mean(1))
    return model


@torch.no_grad()
def self_written(shape: dict, weights: dict[str, Tensor], work: Path) -> Tensor:
    """Rows the target wrote from corpus prefixes, alternately greedy and at temperature 0.6."""
    target = Gemma4ForCausalLM(Gemma4TextConfig(**{k: v for k, v in shape.items() if k != "model_type"})).float().eval()
    target.load_state_dict(weights, strict=False)
    data, out = training.Stream(work, seed=7), []
    new = LENGTH + UNROLL + 1 - SELF_PROMPT
    for batch in range(SELF_BATCHES):
        ids = data.batch(SELF_ROWS, SELF_PROMPT - 1)
        choice = {"do_sample": True, "temperature": 0.6, "top_k": 0} if batch % 2 else {"do_sample": False}
        length = {"max_new_tokens": new, "min_new_tokens": new}
        out.append(target.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **length, **choice))
    return torch.cat(out)


class Distillation:
    """The frozen target, the drafter, and one step's loss."""

    def __init__(self, kind: str, weights: dict[str, Tensor]):
        self.shape, config = shapes.TARGETS[kind], shapes.drafter(kind)
        self.embedding = weights["model.embed_tokens.weight"]
        self.teacher = Lean(self.shape, weights, LENGTH + UNROLL)
        self.model = build(config, self.embedding)
        self.student = LeanDrafter(config, training.tensors(self.model))
        self.clusters = None
        if config["use_ordered_embeddings"]:
            ordering = self.model.masked_embedding.token_ordering
            self.clusters = Clusters(ordering, config["num_centroids"], config["centroid_intermediate_top_k"])

    def loss(self, ids: Tensor, positions: Tensor, keep: Tensor) -> tuple[Tensor, list[float]]:
        """ids [B, T + UNROLL], positions [T + UNROLL], keep: scored flat indices; also the hits by step."""
        self.teacher.set_positions(FULL, positions)
        self.student.set_positions(FULL, positions[1 : LENGTH + 1])
        with torch.no_grad():
            hidden, kv = self.teacher(ids)
            p, best = soften(self.teacher.logits(hidden), self.shape["final_logit_softcapping"])
            embedded = (F.embedding(ids, self.embedding) * self.shape["hidden_size"] ** 0.5).to(lean.LOW)
            kv = {kind: tuple(x[:, :, :LENGTH] for x in pair) for kind, pair in kv.items()}
        self.student.begin()
        state, total, alive, hits = hidden[:, :LENGTH], torch.zeros(()), True, []
        for k in range(1, UNROLL + 1):
            out, state = self.student.draft(embedded[:, k : k + LENGTH], state, kv)
            window = slice(k, k + LENGTH)
            truth, wanted = (x[:, window].flatten(0, 1)[keep] for x in (best, p))
            flat = out.flatten(0, 1)[keep]
            logits = self.student.linear(flat, "embed_tokens")
            loss, hit = soft_cross_entropy(logits, wanted), logits.argmax(-1) == truth
            if self.clusters:
                scores = self.student.top(flat, "masked_embedding.centroids")
                loss = loss + CENTROID_WEIGHT * soft_cross_entropy(scores, wanted @ self.clusters.member)
                hit = hit & self.clusters.found(scores, truth)
            alive = hit & alive
            hits.append(alive.float().mean().item())
            total = total + FADE ** (k - 1) * loss
        return total, hits


def train(kind: str, work: Path, steps: int) -> dict:
    """Trains, leaving a checkpoint every few minutes and the result in work/<kind>/drafter."""
    folder, weights = work / kind / "drafter", load_file(work / kind / "target" / "model.safetensors")
    weights = {k: v.float() for k, v in weights.items()}
    torch.manual_seed(0)
    wall, cpu = time.time(), time.process_time()
    own = self_written(shapes.TARGETS[kind], weights, work)
    print(f"self-written: {tuple(own.shape)} in {(time.time() - wall) / 60:.2f} min", flush=True)
    task = Distillation(kind, weights)
    opts = training.optimizers(task.model, MUON_LR)
    parameters = sum(p.numel() for p in task.model.parameters())
    print(f"{kind} drafter: {parameters} parameters, {steps} steps", flush=True)
    data, rng, smooth = training.Stream(work, seed=11), np.random.default_rng(0), None
    for step in range(steps):
        if rng.random() < SELF_SHARE:
            ids = own[torch.from_numpy(rng.choice(len(own), ROWS, replace=False))][:, :-1]
        else:
            ids = data.batch(ROWS, LENGTH + UNROLL - 1)
        keep = rng.choice(ROWS * LENGTH, int(ROWS * LENGTH * SCORED_SHARE), replace=False)
        positions = training.positions_with_a_gap(rng, LENGTH + UNROLL)
        loss, hits = task.loss(ids, positions, torch.from_numpy(np.sort(keep)))
        loss.backward()
        training.update(task.model, opts, step, steps)
        smooth = 0.95 * smooth + 0.05 * np.array(hits) if step else np.array(hits)
        if (step + 1) % 50 == 0:
            minutes = (time.time() - wall) / 60
            print(
                f"{step + 1:5d} loss {loss.item():.3f} alive {smooth.round(3)} wall {minutes:.2f} min",
                flush=True,
            )
        if (step + 1) % CHECKPOINT_EVERY == 0:
            training.save_weights(task.model, folder)
    training.save_weights(task.model, folder)
    minutes = {"wall": round((time.time() - wall) / 60, 1), "cpu": round((time.process_time() - cpu) / 60, 1)}
    return {"parameters": parameters, "steps": steps, "minutes": minutes, "alive": smooth.round(3).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=shapes.TARGETS)
    parser.add_argument("--work", type=Path, required=True, help="folder that holds tokens and the trained target")
    parser.add_argument("--steps", type=int, help="default: the number that made the shipped weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.work / args.kind / "drafter").mkdir(parents=True, exist_ok=True)
    shapes.write_drafter_config(args.kind, args.work / args.kind / "drafter")
    report = train(args.kind, args.work, args.steps or STEPS[args.kind])
    shapes.write_json(args.work / args.kind / "drafter_report.json", report)
    print(report)


if __name__ == "__main__":
    main()
