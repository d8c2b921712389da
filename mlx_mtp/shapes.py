"""The published sizes of Gemma 4 and of dense Qwen 3.5 as networks without weights: what their passes read and keep.

Knows no device. The configs in data/shapes hold the keys that matter of the published files. Those of Qwen 3.5 were
not at hand; their values are as others have written them down: 27B in full (its text_config) and 9B in tests of
projects that load them, 0.8B in NVIDIA's Model-Optimizer (examples/puzzletron), 4B in a fine-tuned copy's config
(huggingface.co/halen214/st01), 2B by awesomeagents.ai/models/qwen-3-5-2b; that 0.8B to 4B tie their embeddings and 9B
and 27B do not agrees with their parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from math import prod
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.cache import Cache, LayerSpec
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters import mtp, qwen_mtp
from mlx_mtp.drafters.kinds import Kind, Parts
from mlx_mtp.memory_budget import PairSize, size_of
from mlx_mtp.models.config import (
    AssistantConfig,
    LayerConfig,
    MoeConfig,
    TextConfig,
    read_assistant,
    read_target,
)
from mlx_mtp.models.families import family_of
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.models.qwen3_5 import Qwen, QwenConfig, read_qwen
from mlx_mtp.models.qwen3_5_mtp import QwenMtp
from mlx_mtp.pairs import KNOWN, NATIVE
from mlx_mtp.rows import RequestError
from mlx_mtp.states import States, StateSpec

SIZES = tuple(pair.size for pair in KNOWN)
ALL_SIZES = (*SIZES, *(pair.size for pair in NATIVE))
CACHE_BYTES = 2  # of a stored number: keys and values are bfloat16


@dataclass(frozen=True)
class Counts:
    """Numbers (parameters) of a stack by when a pass reads them.

    dense: in every pass, output head included. slot: one routed expert in every layer, of which a token uses several.
    expert_total: all experts. table: of which a pass reads one row a token. norms are in dense. borrowed: of dense,
    what belongs to another stack.
    """

    dense: int
    slot: int
    expert_total: int
    table: int
    borrowed: int = 0

    @property
    def total(self) -> int:
        """All that are its own."""
        return self.dense - self.borrowed + self.expert_total + self.table


@dataclass(frozen=True)
class Kept:
    """What one layer keeps of a row. window: positions; None: all. position_bytes: keys and values of one.

    state_bytes: of a recurrent layer's state. row_bytes: all that does not grow with the row, the state included.
    own: False where another layer's keys and values are read.
    """

    window: int | None
    position_bytes: int
    state_bytes: int = 0
    row_bytes: int = 0
    own: bool = True

    def bytes(self, positions: int) -> int:
        """Keys and values of a row of so many positions that the layer sees."""
        return self.position_bytes * (positions if self.window is None else min(positions, self.window))


@dataclass(frozen=True)
class Shape:
    """A published pair: configs and counts of both networks, and what their layers keep. mlp_size: the widest.

    seq_bytes: tokens -> bytes that the caches of one sequence take, in bfloat16, as they are allocated.
    """

    size: str
    target: Any
    drafter: Any
    target_counts: Counts
    drafter_counts: Counts
    kept: tuple[Kept, ...]
    draft_kept: tuple[Kept, ...]
    mlp_size: int
    seq_bytes: Callable[[int], int]
    moe: MoeConfig | None = None

    def pair_size(self, target_bytes: int, drafter_bytes: int, drafter_saves: int = 0) -> PairSize:
        """What the memory budget has to know on a GPU, with weights of so many bytes; caches are bfloat16."""
        size = size_of(self.target, target_bytes, drafter_bytes, self.seq_bytes)
        return replace(size, drafter_saves=drafter_saves)

    def kv_row_bytes(self, positions: int) -> int:
        """Bytes that one row of so many positions keeps, in both networks: windows end at their size."""
        return sum(k.bytes(positions) + k.row_bytes for k in (*self.kept, *self.draft_kept) if k.own)

    def kv_read_bytes(self, positions: int) -> int:
        """Bytes that one pass reads of one row's keys and values; layers that share them read them each."""
        return sum(k.bytes(positions) for k in self.kept)

    def draft_kv_read_bytes(self, positions: int) -> int:
        """The same for one step of the drafter, which may read the target's."""
        return sum(k.bytes(positions) for k in self.draft_kept)

    @property
    def state_bytes(self) -> int:
        """Of one row's recurrent states, which do not grow."""
        return sum(k.state_bytes for k in self.kept)


def read_configs(size: str) -> dict[str, dict]:
    """The configs {"target": ..., "drafter": ...} of a published size, as in its config.json; "drafter" is missing
    where the target's own files hold it. Raises RequestError."""
    return json.loads((resources.files("mlx_mtp") / "data" / "shapes" / f"{_known(size)}.json").read_text())


def shape(size: str) -> Shape:
    """A published pair by its size, such as "26B-A4B" or "Qwen3.5-4B". Raises RequestError."""
    configs, known = read_configs(size), _known(size)
    return SHAPES[family_of(configs["target"], known).name](known, configs)


def _known(size: str) -> str:
    found = next((known for known in ALL_SIZES if known.lower() == size.lower()), None)
    if found is None:
        raise RequestError(f"size is {size!r}; expected {', '.join(ALL_SIZES)}")
    return found


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: value.size for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))}


def _seq_bytes(target: Any, drafter: nn.Module, kind: Kind) -> Callable[[int], int]:
    cache = Cache(target.specs, MAX_WIDTH, mx.bfloat16)
    made = kind.make(Parts(target, cache, drafter))
    return lambda tokens: cache.row_bytes(tokens) + made.row_bytes(tokens)


# Gemma 4 ----------------------------------------------------------------------------------------------------------


def _gemma(size: str, configs: dict[str, dict]) -> Shape:
    """The drafter's layers read the target's keys and values."""
    target = read_target(configs["target"], f"{size}, target")
    drafter = read_assistant(configs["drafter"], f"{size}, drafter")
    owners = target.drafter_reads
    read = (target.layers[owners[layer.window is None]] for layer in drafter.text.layers)
    return Shape(
        size=size,
        target=target,
        drafter=drafter,
        target_counts=target_counts(target),
        drafter_counts=_drafter_counts(drafter),
        kept=tuple(_keys(layer, own=i in target.owners) for i, layer in enumerate(target.layers)),
        draft_kept=tuple(_keys(layer, own=False) for layer in read),
        mlp_size=max(layer.mlp_size for layer in target.layers),
        seq_bytes=_seq_bytes(Gemma4(target), Assistant(drafter), mtp.KIND),
        moe=target.moe,
    )


def _keys(layer: LayerConfig, own: bool) -> Kept:
    return Kept(layer.window, 2 * layer.kv_heads * layer.head_dim * CACHE_BYTES, own=own)


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


# Qwen 3.5 ---------------------------------------------------------------------------------------------------------


def _qwen(size: str, configs: dict[str, dict]) -> Shape:
    """The drafter is the head in the target's own files; it has a cache of its own and the target's output head."""
    config = read_qwen(configs["target"], size)
    target, head = Qwen(config), QwenMtp(config)
    counts, borrowed = _qwen_counts(config, target), config.vocab_size * config.hidden_size
    own = sum(_sizes(head).values())
    return Shape(
        size=size,
        target=config,
        drafter=config,
        target_counts=counts,
        drafter_counts=Counts(own + borrowed, 0, 0, 0, borrowed),
        kept=tuple(_kept(spec) for spec in target.specs),
        draft_kept=tuple(_kept(spec) for spec in head.specs),
        mlp_size=config.mlp_size,
        seq_bytes=_seq_bytes(target, head, qwen_mtp.KIND),
    )


def _qwen_counts(config: QwenConfig, model: Qwen) -> Counts:
    """An embedding that is no output head is a table."""
    sizes = _sizes(model)
    table = 0 if config.tied else sizes["embed_tokens.weight"]
    return Counts(sum(sizes.values()) - table, 0, 0, table)


def _kept(spec: LayerSpec | StateSpec) -> Kept:
    if isinstance(spec, LayerSpec):
        return Kept(spec.window, 2 * spec.kv_heads * spec.head_dim * CACHE_BYTES)
    rows = States((spec,), MAX_WIDTH, mx.bfloat16)
    return Kept(0, 0, 4 * prod(spec.shape), rows.row_bytes)


SHAPES: dict[str, Callable[[str, dict[str, dict]], Shape]] = {"gemma4": _gemma, "qwen3_5": _qwen}
