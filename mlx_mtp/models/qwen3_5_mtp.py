"""Qwen 3.5's head for multi-token prediction: one attention layer over what the target made of every position.

Arrays in, arrays out; it knows passes over its own cache, and neither rows' requests nor samplers. Position p brings in
the target's hidden state there, after the final norm, and the embedding of the token at p + 1; what comes out there is
for the token at p + 2, and takes the hidden state's place at p + 1 where the head goes on by itself. Embedding and
output head are the target's. Ports vLLM `qwen3_5_mtp.py`. Before the final norm is what others first fed it; with the
one after it, LightLLM measured 2.74 tokens a round instead of 1.80 on Qwen3.5-0.8B (its pull request 1402).
"""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.models.config import FULL
from mlx_mtp.models.families import Stored
from mlx_mtp.models.fused import Traces
from mlx_mtp.models.gemma4 import Norm
from mlx_mtp.models.qwen3_5 import Block, QwenConfig, centred


class Stack(nn.Module):
    """All that the head has of its own."""

    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.pre_fc_norm_embedding = Norm(c.hidden_size, c.eps)
        self.pre_fc_norm_hidden = Norm(c.hidden_size, c.eps)
        self.layers = [Block(c, FULL, Traces())]
        self.norm = Norm(c.hidden_size, c.eps)


class QwenMtp(nn.Module):
    """The head. Its cache holds one layer for every entry of `specs`."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.mtp = Stack(config)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """One LayerSpec a layer, in cache order."""
        return (LayerSpec(None, self.config.kv_heads, self.config.head_dim),)

    def features(self, embedded: mx.array, hidden: mx.array) -> mx.array:
        """Embeddings of the tokens at p + 1 and hidden states at p, [B, L, H] each -> what p brings in [B, L, H]."""
        m = self.mtp
        return m.fc(mx.concatenate([m.pre_fc_norm_embedding(embedded), m.pre_fc_norm_hidden(hidden)], axis=-1))

    def remember(self, features: mx.array, pass_: Pass) -> None:
        """Store the features [B, L, H] of a pass's columns as keys and values."""
        layer = self.mtp.layers[0]
        x = layer.input_layernorm(features.flatten(0, 1))
        pass_.write(0, *layer.self_attn.keys_values(x, pass_.start))

    def step(self, features: mx.array, pass_: Pass) -> mx.array:
        """Features [B, L, H] of a pass's columns, which it stores -> hidden states [B, L, H] for the output head."""
        h = self.mtp.layers[0](features.flatten(0, 1), pass_, 0)
        return self.mtp.norm(h).reshape(features.shape)


def stored(config: QwenConfig) -> Stored:
    """The head lies among its target's tensors."""
    return Stored(skipped=re.compile(r"^(?!mtp\.)"), centred=centred)
