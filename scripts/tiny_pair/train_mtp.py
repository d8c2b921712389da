"""Distils an MTP drafter from a trained tiny target, unrolled as it is used. Seeded, and driven by steps.

For every position t of a sequence (all of them in parallel) the drafter runs UNROLL times:
    step 1 sees [E(x[t+1]), h[t]]         h = the target's hidden state after its final norm
    step k sees [E(x[t+k]), own projected hidden state of step k-1]
    every step: the position of x[t+1], and the target's keys and values of positions 0..t.
Step k is scored against the target's distribution at t+k. More than half of the text is the target's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma4_assistant.configuration_gemma4_assistant import Gemma4AssistantConfig
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

from . import training
from .data import Batches, config, positions_with_gap
from .forward import FULL, LOW, SLIDING, Gemma4Forward, norm, region
from .training import LENGTH, TRIAL_STEPS

STEPS = {"edge": 1200, "moe": 700}
MUON_LR = 8e-3
ROWS = 4  # half of the target's: soft targets have little noise, so more and smaller steps
UNROLL = 4
FADE = 0.85  # weight of a draft step relative to the one before it
SCORED_SHARE = 0.5  # of the positions; the vocabulary is the expensive part
CENTROID_WEIGHT = 0.3
OWN_TEXT_SHARE = 0.6  # of the steps use text that the target wrote
OWN_TEXT_BATCHES = 6


@region
def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    x = logits.float()
    return (torch.logsumexp(x, -1) - (p * x).sum(-1)).mean()


class DrafterForward(Gemma4Forward):
    """The assistant's forward for all positions of a sequence at once."""

    def __init__(self, config: dict, parameters: dict[str, Tensor]):
        super().__init__(config["text_config"], parameters, LENGTH)
        self.set_positions(SLIDING, torch.arange(1, LENGTH + 1))

    def top(self, x: Tensor, name: str) -> Tensor:
        """A matrix outside the text stack."""
        return F.linear(x, self.parameters[name + ".weight"].to(LOW))

    def draft(self, embedded: Tensor, state: Tensor, kv: dict) -> tuple[Tensor, Tensor]:
        """One draft step: [B, T, H] twice -> normed hidden for the head, and the state of the next step."""
        h = self.top(torch.cat((embedded, state), -1), "pre_projection").float()
        for i in range(self.config["num_hidden_layers"]):
            h = self.layer(i, h, kv, None)
        out = norm(h, self.weight("norm.weight"))
        return out, self.top(out, "post_projection")


class Clusters:
    """Which cluster owns each token, for the ordered head."""

    def __init__(self, ordering: Tensor, count: int, top: int):
        self.count, self.top = count, top
        self.of = torch.empty(len(ordering), dtype=torch.long)
        self.of[ordering] = torch.arange(len(ordering)) // (len(ordering) // count)
        self.member = F.one_hot(self.of, count).float()

    def found(self, scores: Tensor, token: Tensor) -> Tensor:
        """Whether the token's cluster is among the top ones."""
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


def build(fields: dict, embedding: Tensor) -> Gemma4AssistantForCausalLM:
    """A new drafter whose head starts from the target's own output directions [V, H]."""
    text = training.text_config(fields["text_config"])
    own = ("backbone_hidden_size", "use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k")
    model = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text, **{k: fields[k] for k in own})).float()
    training.make_layer_scalars_trainable(model.model.layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(layer.self_attn.head_dim**-0.5)
        directions = torch.linalg.svd(embedding, full_matrices=False)[2][: text.hidden_size]
        head = model.model.embed_tokens.weight.copy_(embedding @ directions.T)
        if fields["use_ordered_embeddings"]:
            ordering = torch.from_numpy(balanced_clusters(embedding.numpy(), fields["num_centroids"]))
            model.masked_embedding.token_ordering.copy_(ordering)
            groups = head[ordering].view(fields["num_centroids"], -1, text.hidden_size)
            model.masked_embedding.centroids.weight.copy_(groups.mean(1))
    return model


class Distillation:
    """The frozen target, the drafter, and one step's loss."""

    def __init__(self, kind: str, weights: dict[str, Tensor]):
        self.target_config, fields = config(f"{kind}_target"), config(f"{kind}_drafter")
        self.embedding = weights["model.embed_tokens.weight"]
        self.teacher = Gemma4Forward(self.target_config, weights, LENGTH + UNROLL)
        self.model = build(fields, self.embedding)
        self.student = DrafterForward(fields, training.tensors(self.model))
        self.clusters = None
        if fields["use_ordered_embeddings"]:
            ordering = self.model.masked_embedding.token_ordering
            self.clusters = Clusters(ordering, fields["num_centroids"], fields["centroid_intermediate_top_k"])

    def loss(self, ids: Tensor, positions: Tensor, scored: Tensor) -> tuple[Tensor, list[float]]:
        """ids [B, T + UNROLL], positions [T + UNROLL], scored: flat indices [N].

        Also returns, for each step, the share of scored positions where all drafts so far are right.
        """
        self.teacher.set_positions(FULL, positions)
        self.student.set_positions(FULL, positions[1 : LENGTH + 1])
        with torch.no_grad():
            hidden, kv, _ = self.teacher(ids)
            p, best = training.soften(self.teacher.logits(hidden), self.target_config["final_logit_softcapping"])
            embedded = (F.embedding(ids, self.embedding) * self.target_config["hidden_size"] ** 0.5).to(LOW)
            kv = {kind: tuple(x[:, :, :LENGTH] for x in pair) for kind, pair in kv.items()}
        self.student.begin()
        state, total, accepted, hits = hidden[:, :LENGTH], torch.zeros(()), True, []
        for k in range(1, UNROLL + 1):
            out, state = self.student.draft(embedded[:, k : k + LENGTH], state, kv)
            window = slice(k, k + LENGTH)
            truth, wanted = (x[:, window].flatten(0, 1)[scored] for x in (best, p))
            flat = out.flatten(0, 1)[scored]
            logits = self.student.linear(flat, "embed_tokens")
            loss, hit = soft_cross_entropy(logits, wanted), logits.argmax(-1) == truth
            if self.clusters:
                scores = self.student.top(flat, "masked_embedding.centroids")
                loss = loss + CENTROID_WEIGHT * soft_cross_entropy(scores, wanted @ self.clusters.member)
                hit = hit & self.clusters.found(scores, truth)
            accepted = hit & accepted
            hits.append(accepted.float().mean().item())
            total = total + FADE ** (k - 1) * loss
        return total, hits


def train(kind: str, work: Path, trial: bool) -> None:
    """Write work/<kind>_drafter.safetensors."""
    steps = TRIAL_STEPS if trial else STEPS[kind]
    torch.manual_seed(0)
    target, weights = training.trained_target(kind, work)
    prompts, length = Batches(seed=7), LENGTH + UNROLL + 1
    own = torch.cat(
        [training.continue_prompts(target, prompts, length, i % 2 == 1, trial) for i in range(OWN_TEXT_BATCHES)]
    )
    task = Distillation(kind, weights)
    opts = training.optimizers(task.model, MUON_LR)
    batches, rng = Batches(seed=11), np.random.default_rng(0)
    training.announce(f"{kind} drafter", task.model, steps)
    for step in range(steps):
        if rng.random() < OWN_TEXT_SHARE:
            ids = own[torch.from_numpy(rng.choice(len(own), ROWS, replace=False))][:, :-1]
        else:
            ids = batches.next(ROWS, LENGTH + UNROLL)
        scored = rng.choice(ROWS * LENGTH, int(ROWS * LENGTH * SCORED_SHARE), replace=False)
        positions = positions_with_gap(rng, LENGTH + UNROLL)
        loss, hits = task.loss(ids, positions, torch.from_numpy(np.sort(scored)))
        loss.backward()
        training.update(task.model, opts, step, steps)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"{step + 1:5d} loss {loss.item():.3f} accepted {np.round(hits, 2)}", flush=True)
    training.save_weights(task.model, work / f"{kind}_drafter.safetensors")
