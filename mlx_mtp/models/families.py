"""Every family of targets there is, how its checkpoints are told from others, and what all have in common. Reads none.

A family is a module beside this one with a `FAMILY`, and a line in FAMILIES.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.models.config import DRAFTER_TYPES, LayerConfig, PassSize, read_target
from mlx_mtp.rows import CheckpointError
from mlx_mtp.states import StateSpec

FAMILIES = (
    "gemma4",
    "qwen3_5",
)
SKIPPED = re.compile(
    r"^(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector|mtp|lm_head)\."
    r"|\brotary_emb\.|\.(input|output)_(min|max)$"
)


class TargetConfig(Protocol):
    """What is asked of every target's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def layers(self) -> tuple[Any, ...]: ...
    @property
    def pass_size(self) -> PassSize: ...


class Target(Protocol):
    """A network that decodes. Its cache holds one layer for every entry of `specs`."""

    config: Any  # a TargetConfig, with what else its family's own drafters read
    layers: list[Any]

    @property
    def specs(self) -> tuple[LayerSpec | StateSpec, ...]: ...
    @property
    def heads(self) -> int:
        """Heads of queries in a layer, the most of any."""
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens [...] int -> [..., H], as the first layer takes them in."""
        ...

    def forward(
        self, tokens: mx.array, pass_: Pass, taps: tuple[int, ...] = (), last: mx.array | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """tokens [B, L] -> (hidden [B, C, H] after the final norm, outputs [B * L, H] of the layers in `taps`).

        last [B] int32: the only column of each row that is asked for; C then is 1, and L otherwise.
        """
        ...

    def logits(self, hidden: mx.array, capped: bool = True) -> mx.array:
        """hidden [..., H] -> [..., V] float32; without a cap they may be larger, in the same order."""
        ...


def bare(name: str) -> str:
    """A stored name without the prefixes of the Hugging Face, text-only and MLX layouts."""
    for prefix in ("model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return name


@dataclass(frozen=True)
class Stored:
    """How a network's tensors stand in checkpoints.

    nested: names may carry the prefixes of a whole model (`model.language_model.`). skipped: matches the names, without
    those, of tensors that have no use here. layers: those that may borrow another's keys and values, so that their own
    stored tensors have no use. centred: by the shapes of all tensors, which parameters are stored less 1, if any are.
    prefix: what the network's names begin with in the file, after those of a whole model, where it is not alone there.
    """

    nested: bool = True
    skipped: re.Pattern[str] = SKIPPED
    layers: tuple[LayerConfig, ...] = ()
    centred: Callable[[dict[str, tuple[int, ...]]], re.Pattern[str] | None] = lambda shapes: None
    prefix: str = ""

    def holds(self, name: str) -> bool:
        """Whether a tensor of this name is the network's."""
        if self.nested:
            name = bare(name)
        return name.startswith(self.prefix) and not self.skipped.search(name.removeprefix(self.prefix))


@dataclass(frozen=True)
class Family:
    """Targets of one architecture.

    name: for people. types: their model_types. read: (config.json, its path) -> config; raises CheckpointError.
    build: config -> network, a Target. stored: of a config.
    """

    name: str
    types: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Any]
    build: Callable[[Any], nn.Module]
    stored: Callable[[Any], Stored]


def families() -> tuple[Family, ...]:
    """All families, in the order of FAMILIES."""
    return tuple(import_module(f"mlx_mtp.models.{name}").FAMILY for name in FAMILIES)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a target with such a config.json, found at `where`. Raises CheckpointError."""
    kind = config.get("model_type")
    for family in families():
        if kind in family.types:
            return family
    if kind in DRAFTER_TYPES:
        read_target(config, where)  # says what it is
    known = ", ".join(name for family in families() for name in family.types)
    raise CheckpointError(f"{where}: model_type is {kind!r}; supported targets: {known}")
