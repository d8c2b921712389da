"""Gemma 4's MTP drafter: four query-only layers over the target's keys and values, and a small output head.

Arrays in, arrays out; which keys it may see and where its query stands is the caller's choice.
Ports transformers 5.22 `models/gemma4_assistant/modeling_gemma4_assistant.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import View
from mlx_mtp.kernels.head import Clusters
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.models.config import AssistantConfig, TextConfig
from mlx_mtp.models.fused import Traces
from mlx_mtp.models.gemma4 import Block, Norm


class Stack(nn.Module):
    """The drafter's layers, final norm, and its own embedding table, which serves as output head only."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        traces = Traces()
        self.layers = [Block(config, i, traces) for i in range(len(config.layers))]
        self.norm = Norm(config.hidden_size, config.eps)


class ClusteredHead(nn.Module):
    """Centroids of the vocabulary: cluster j owns the tokens token_ordering[j * V / C : (j + 1) * V / C]."""

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        assert config.clusters is not None
        count, self.top = config.clusters
        self.centroids = nn.Linear(config.text.hidden_size, count, bias=False)
        self.token_ordering = mx.arange(config.text.vocab_size)

    def __call__(self, y: mx.array, table: nn.Embedding) -> tuple[mx.array, mx.array]:
        """y [B, h] -> (logits [B, C'], token ids [B, C']) of the tokens in the best clusters."""
        scores = self.centroids(y)
        best = mx.argpartition(-scores, self.top - 1, axis=-1)[:, : self.top]
        clusters = self.token_ordering.reshape(scores.shape[-1], -1)
        ids = clusters[best].reshape(y.shape[0], -1)
        return (table(ids) @ y[:, :, None])[..., 0].astype(mx.float32), ids


class Assistant(nn.Module):
    """The drafter. One step turns the newest token and a hidden state into the next token's logits."""

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.config = config
        size, backbone = config.text.hidden_size, config.backbone_size
        self.model = Stack(config.text)
        self.pre_projection = nn.Linear(2 * backbone, size, bias=False)
        self.post_projection = nn.Linear(size, backbone, bias=False)
        self.head_by_kernel = False  # whether tokens are chosen by the clusters' kernel
        if config.clusters:
            self.masked_embedding = ClusteredHead(config)

    @property
    def clusters(self) -> Clusters | None:
        """The clustered head as the kernel takes it; None if the vocabulary has no clusters."""
        if not self.config.clusters:
            return None
        masked = self.masked_embedding
        table = Matrix.of(self.model.embed_tokens)
        return Clusters(Matrix.of(masked.centroids), masked.token_ordering, table, masked.top)

    def step(
        self, embedded: mx.array, hidden: mx.array, position: mx.array, views: tuple[View, View]
    ) -> tuple[mx.array, mx.array]:
        """One draft step.

        embedded [B, 1, T]: the target's scaled embedding of the newest token, T = target's hidden size.
        hidden [B, 1, T]: the target's hidden state after its final norm, or the last step's second result.
        position [B] int32: the same in all steps of a round. views: (sliding, full) keys and values.
        Returns (y [B, h] for `logits`, hidden [B, 1, T] for the next step).
        """
        h = self.pre_projection(mx.concatenate([embedded, hidden], axis=-1)[:, 0])
        for block, layer in zip(self.model.layers, self.config.text.layers, strict=True):
            (queries,) = block.project(h, position)
            h, _ = block.finish(h, views[layer.window is None].attend(queries), None, 1)
        y = self.model.norm(h)
        return y, self.post_projection(y)[:, None]

    def logits(self, y: mx.array) -> tuple[mx.array, mx.array | None]:
        """y [B, h] -> (logits [B, C] float32, token ids [B, C], or None where column c is token c). No soft cap."""
        if self.config.clusters:
            return self.masked_embedding(y, self.model.embed_tokens)
        return self.model.embed_tokens.as_linear(y).astype(mx.float32), None
