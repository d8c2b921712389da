"""The five published Gemma 4 sizes as networks without weights: configs, and what their passes read and multiply.

Knows no device. The configs in data/shapes hold the keys that matter of the published files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.models.config import AssistantConfig, LayerConfig, TextConfig, read_assistant, read_target
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.pairs import KNOWN
from mlx_mtp.rows import RequestError

SIZES = tuple(pair.size for pair in KNOWN)
CACHE_BYTES = 2  # of a stored number: keys and values are bfloat16


@dataclass(frozen=True)
class Counts:
    """Numbers (parameters) of a stack by when a pass reads them.

    dense: in every pass, output head included. slot: one routed expert in every layer, of which a token uses several.
    expert_total: all experts. table: of which a pass reads one row a token. norms are in dense.
    """

    dense: int
    slot: int
    expert_total: int
    table: int

    @property
    def total(self) -> int:
        return self.dense + self.expert_total + self.table


@dataclass(frozen=True)
class Shape:
    """A published pair: configs and counts of both networks."""

    size: str
    target: TextConfig
    drafter: AssistantConfig
    target_counts: Counts
    drafter_counts: Counts

    def kv_row_bytes(self, positions: int) -> int:
        """Bytes of keys and values that one row of so many positions keeps: windows end at their size."""
        owners = (self.target.layers[i] for i in self.target.owners)
        return sum(_seen(layer, positions) * _position_bytes(layer) for layer in owners)

    def kv_read_bytes(self, positions: int) -> int:
        """Bytes that one pass reads of one row's keys and values; layers that share them read them each."""
        return sum(_seen(layer, positions) * _position_bytes(layer) for layer in self.target.layers)

    def draft_kv_read_bytes(self, positions: int) -> int:
        """The same for one step of the drafter, which reads the target's."""
        owners = self.target.drafter_reads
        layers = (self.target.layers[owners[layer.window is None]] for layer in self.drafter.text.layers)
        return sum(_seen(layer, positions) * _position_bytes(layer) for layer in layers)


def _seen(layer: LayerConfig, positions: int) -> int:
    return positions if layer.window is None else min(positions, layer.window)


def _position_bytes(layer: LayerConfig) -> int:
    return 2 * layer.kv_heads * layer.head_dim * CACHE_BYTES


def read_configs(size: str) -> dict[str, dict]:
    """The configs {"target": ..., "drafter": ...} of a published size, as in its config.json. Raises RequestError."""
    found = next((known for known in SIZES if known.lower() == size.lower()), None)
    if found is None:
        raise RequestError(f"size is {size!r}; expected {', '.join(SIZES)}")
    return json.loads((resources.files("mlx_mtp") / "data" / "shapes" / f"{found}.json").read_text())


def shape(size: str) -> Shape:
    """A published pair by its size, such as "26B-A4B". Raises RequestError."""
    configs = read_configs(size)
    target = read_target(configs["target"], f"{size}, target")
    drafter = read_assistant(configs["drafter"], f"{size}, drafter")
    known = next(known for known in SIZES if known.lower() == size.lower())
    return Shape(known, target, drafter, target_counts(target), _drafter_counts(drafter))


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: value.size for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))}


def target_counts(config: TextConfig) -> Counts:
    """Of a target with this config."""
    sizes = _sizes(Gemma4(config))
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    table = sizes.get("embed_tokens_per_layer.weight", 0)
    slot = experts // config.moe.experts if config.moe else 0
    return Counts(sum(sizes.values()) - experts - table, slot, experts, table)


def _drafter_counts(config: AssistantConfig) -> Counts:
    """With a clustered head a step reads the tokens of the clusters it scores, and of the rest nothing."""
    sizes = _sizes(Assistant(config))
    sizes.pop("masked_embedding.token_ordering", None)
    table = 0
    if config.clusters:
        count, top = config.clusters
        head = sizes["model.embed_tokens.weight"]
        table = head - head * top // count
    return Counts(sum(sizes.values()) - table, 0, 0, table)
