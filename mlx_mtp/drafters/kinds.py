"""Every kind of drafter there is: what the loader must know of each, and how one is made. Knows no files and no rows.

A kind is a module beside this one with a `KIND`, and a line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.nn as nn

from mlx_mtp.cache import Cache
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.lookup import NAME
from mlx_mtp.models.families import Stored, Target, TargetConfig
from mlx_mtp.rows import CheckpointError

KINDS = (
    "mtp",
    "dflash",
    "draft_model",
    "qwen_mtp",
)


@dataclass(frozen=True)
class Parts:
    """What a drafter is made of.

    cache: the target's, which drafters read and never write. network: the drafter's own.
    """

    target: Target
    cache: Cache
    network: Any


@dataclass(frozen=True)
class Network:
    """How a kind's checkpoints are told from others, read, and held against a target, before weights are.

    recognise: whether a config.json is one of its own. read: (config.json, its path) -> config; raises
    CheckpointError. build: config -> network, whose parameters are named as stored.
    check: (target, config, advice) -> warnings for the user; raises PairingError, whose line ends in the advice.
    stored: of a config. inside: config.json of the drafter that a target with such a config.json should hold in its own
    files; None where it holds none. prefix: what the tensors' names begin with there.
    """

    recognise: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any], str], Any]
    build: Callable[[Any], nn.Module]
    check: Callable[[TargetConfig, Any, str], list[str]]
    stored: Callable[[Any], Stored]
    inside: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda config: None
    prefix: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of drafter. catch_up: as of `CostProfile`."""

    name: str
    make: Callable[[Parts], Drafter]
    network: Network
    catch_up: float = 0.0


def kinds() -> tuple[Kind, ...]:
    """All kinds, in the order of KINDS."""
    return tuple(import_module(f"mlx_mtp.drafters.{name}").KIND for name in KINDS)


def kind_of(config: dict[str, Any], where: str) -> tuple[Kind, Network]:
    """The kind whose checkpoints have such a config.json, found at `where`. Raises CheckpointError."""
    for kind in kinds():
        if kind.network.recognise(config):
            return kind, kind.network
    known = ", ".join(KINDS)
    raise CheckpointError(
        f"{where}: model_type is {config.get('model_type')!r}, no drafter of a known kind; expected one of: {known}"
    )


def split_name(drafter: str) -> tuple[str | None, bool]:
    """What --drafter says: (a checkpoint, "auto" or None; whether prompt lookup goes before it)."""
    before, _, last = drafter.rpartition("+")
    name = before if last == NAME else drafter
    return None if name in ("", "none") else name, last == NAME
