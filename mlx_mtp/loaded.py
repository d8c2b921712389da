"""A target and its drafter as loading leaves them, and engines over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.accept import verdict_by_kernel
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, DraftLengthPolicy
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.kinds import Kind, Parts
from mlx_mtp.drafters.lookup import ALONE, NAME, OVER_NETWORK
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.few_rows import KernelTarget
from mlx_mtp.kernels.self_test import Outcome, uses
from mlx_mtp.memory_budget import PairSize
from mlx_mtp.models.families import Target
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.rows import Sampling
from mlx_mtp.scheduler import Limits


@dataclass(frozen=True)
class LoadedTarget:
    """A target ready to run.

    name: as the user wrote it. sampling: defaults from its generation_config.json. eos: its end tokens.
    base_model: it has no chat template, so it was not tuned for instructions. family: its name. notes: for the user.
    kernels: what came of trying them.
    """

    model: Target
    path: Path
    name: str
    sampling: Sampling
    eos: frozenset[int]
    dtype: mx.Dtype
    weight_bytes: int
    base_model: bool
    family: str
    notes: tuple[str, ...] = ()
    kernels: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class LoadedDrafter:
    """A drafter ready to run, by default in its target's dtype. model: its network. notes: for the user. kernels: what
    came of trying them."""

    kind: Kind
    model: Any
    path: Path
    name: str
    weight_bytes: int
    notes: tuple[str, ...] = ()
    kernels: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class LoadedPair:
    """A target and its drafter, None if it has no network. notes: of both, and why there is no drafter.

    lookup: prompt lookup drafts where it finds a match, and leaves the rest to the drafter. size: what it takes.
    """

    target: LoadedTarget
    drafter: LoadedDrafter | None
    notes: tuple[str, ...]
    lookup: bool
    size: PairSize

    @property
    def drafter_name(self) -> str | None:
        """As --drafter takes it; None decodes plainly."""
        names = [self.drafter.name] if self.drafter else []
        return "+".join([*names, NAME] if self.lookup else names) or None

    @property
    def kernels(self) -> tuple[Outcome, ...]:
        """What came of trying the kernels of both; none where no kernel can run."""
        return (*self.target.kernels, *(self.drafter.kernels if self.drafter else ()))

    @property
    def match_tokens(self) -> int:
        """The least match that prompt lookup looks for; 0 without it."""
        return 0 if not self.lookup else OVER_NETWORK if self.drafter else ALONE

    @property
    def catch_up(self) -> float:
        """As of `CostProfile`."""
        return self.drafter.kind.catch_up if self.drafter else 0.0

    def without_kernels(self, reason: str) -> LoadedPair:
        """The same pair on MLX's own operations. reason: why its kernels are given up."""

        def given_up(part: Any) -> tuple[Outcome, ...]:
            return tuple(replace(outcome, reason=outcome.reason or reason) for outcome in part.kernels)

        model = self.target.model.prompts if isinstance(self.target.model, KernelTarget) else self.target.model
        target, drafter = replace(self.target, model=model, kernels=given_up(self.target)), self.drafter
        if drafter is not None:
            if isinstance(drafter.model, Assistant):
                drafter.model.head_by_kernel = False
            drafter = replace(drafter, kernels=given_up(drafter))
        return replace(self, target=target, drafter=drafter)

    def new_engine(self, policy: DraftLengthPolicy, limits: Limits) -> Engine:
        """An engine with a cache of its own."""
        cache = Cache(self.target.model.specs, MAX_WIDTH, self.target.dtype)
        engine = Engine(self.target.model, cache, self.new_drafter(cache), policy, limits, self.match_tokens)
        if uses(self.kernels, "verdict"):
            engine.runner.judge = verdict_by_kernel
        return engine

    def new_drafter(self, cache: Cache) -> Drafter:
        """What drafts over a cache of the target."""
        network = (self.drafter.kind, self.drafter.model) if self.drafter else None
        return make_drafter(self.target.model, cache, network)


def make_drafter(target: Target, cache: Cache, network: tuple[Kind, Any] | None) -> Drafter:
    """What drafts over a cache of the target: (kind, its network); plain decoding if there is none."""
    return network[0].make(Parts(target, cache, network[1])) if network else PlainDrafter()
