"""Which drafter belongs to which target, what they weigh, and whether two configs fit each other.

Reads no weights and asks no network. Parameter counts are of the text stacks alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.drafters.kinds import Network
from mlx_mtp.models.config import TextConfig
from mlx_mtp.models.families import TargetConfig

# Bytes a parameter takes: bf16, and affine quantisation in groups of 64 with a 16-bit scale and bias each.
BYTES_PER_PARAMETER = {16: 2.0, 8: 8.5 / 8, 4: 4.5 / 8}
# A drafter is doubted when, were this share of its first tokens right, as few as were would have been this unlikely.
POOR, CHANCE = 0.4, 0.005
SPARE = 0.25  # share of the memory left to keys and values, activations, and the system


@dataclass(frozen=True)
class KnownPair:
    """A published target and its drafter.

    params, drafter_params: all parameters. read, drafter_read: those one pass over one token touches (active
    experts, one row of the per-layer table, the scored clusters, an output head that is the target's), on which
    decoding speed depends.
    """

    size: str
    hidden_size: int
    params: float
    read: float
    drafter_params: float
    drafter_read: float

    @property
    def target(self) -> str:
        return f"google/gemma-4-{self.size}-it"

    @property
    def drafter(self) -> str:
        return f"{self.target}-assistant"

    @property
    def quantised(self) -> str:
        """A published 4-bit target."""
        return f"mlx-community/gemma-4-{self.size.lower()}-it-4bit"

    @property
    def kind(self) -> str:
        """Of the drafter."""
        return "mtp"

    def weight_bytes(self, bits: int) -> int:
        """Bytes of target and drafter at 16, 8 or 4 bits a weight."""
        return int((self.params + self.drafter_params) * BYTES_PER_PARAMETER[bits])

    def read_bytes(self, bits: int) -> int:
        """Bytes of the target's weights that one pass over one token reads, at 16, 8 or 4 bits."""
        return int(self.read * BYTES_PER_PARAMETER[bits])

    def drafter_read_bytes(self, bits: int) -> int:
        """Bytes of the drafter's weights that one step reads, at 16, 8 or 4 bits."""
        return int(self.drafter_read * BYTES_PER_PARAMETER[bits])


class NativePair(KnownPair):
    """A published target whose own files hold its drafter. Copies in MLX's format leave it out, so that they take it
    out of the whole repository."""

    @property
    def target(self) -> str:
        return f"Qwen/{self.size}"

    @property
    def drafter(self) -> str:
        return self.target

    @property
    def quantised(self) -> str:
        return f"mlx-community/{self.size}-4bit"

    @property
    def kind(self) -> str:
        return "qwen_mtp"


@dataclass(frozen=True)
class Offer:
    """A published target with a published drafter. bits: of the target's weights; drafters are listed at 16.

    drafter_params: None where nobody has written down how many.
    """

    target: str
    drafter: str
    kind: str
    bits: int
    target_params: float
    drafter_params: float | None

    @property
    def weight_bytes(self) -> int:
        """What both take in memory, as far as is known."""
        drafter = (self.drafter_params or 0.0) * BYTES_PER_PARAMETER[16]
        return int(self.target_params * BYTES_PER_PARAMETER[self.bits] + drafter)

    def fits(self, memory_bytes: int) -> bool:
        """Whether it runs in that much memory."""
        return self.weight_bytes <= memory_bytes * (1 - SPARE)


KNOWN = (
    KnownPair("E2B", 1536, 4.63e9, 2.28e9, 77.7e6, 11.7e6),
    KnownPair("E4B", 2560, 7.46e9, 4.64e9, 78.5e6, 12.5e6),
    KnownPair("12B", 3840, 11.91e9, 11.91e9, 422.9e6, 422.9e6),
    KnownPair("26B-A4B", 2816, 25.23e9, 3.82e9, 419.7e6, 419.7e6),
    KnownPair("31B", 5376, 30.70e9, 30.70e9, 469.5e6, 469.5e6),
)
NATIVE = (
    NativePair("Qwen3.5-0.8B", 1024, 0.752e9, 0.752e9, 20.45e6, 274.7e6),
    NativePair("Qwen3.5-2B", 2048, 1.882e9, 1.882e9, 60.8e6, 569.4e6),
    NativePair("Qwen3.5-4B", 2560, 4.206e9, 4.206e9, 120.6e6, 756.3e6),
    NativePair("Qwen3.5-9B", 4096, 8.954e9, 7.937e9, 243.3e6, 1260.4e6),
    NativePair("Qwen3.5-27B", 5120, 26.896e9, 25.625e9, 424.7e6, 1696.1e6),
)
# Block-diffusion drafters of z-lab, and their parameters where published.
DFLASH: dict[str, tuple[str, float | None]] = {
    "12B": ("z-lab/gemma4-12B-it-DFlash", None),
    "26B-A4B": ("z-lab/gemma-4-26B-A4B-it-DFlash", 0.4e9),
    "31B": ("z-lab/gemma-4-31B-it-DFlash", 1.54e9),
}
SIZE = re.compile(rf"gemma-4-({'|'.join(pair.size for pair in KNOWN)})(-it)?(-qat)?(?=-|$)(.*)", re.IGNORECASE)


def offers() -> list[Offer]:
    """Every published pair: the official drafter, DFlash where there is one, and a small model for the largest."""
    out = []
    for pair in (*KNOWN, *NATIVE):
        drafters: list[tuple[str, str, float | None]] = [(pair.drafter, pair.kind, pair.drafter_params)]
        if pair.size in DFLASH:
            name, params = DFLASH[pair.size]
            drafters.append((name, "dflash", params))
        if pair.size == "31B":
            drafters.append((KNOWN[0].target, "draft_model", KNOWN[0].params))
        for target, bits in ((pair.target, 16), (pair.quantised, 4)):
            out += [Offer(target, name, kind, bits, pair.params, params) for name, kind, params in drafters]
    return out


def find_drafter(target_name: str) -> str | None:
    """The drafter of a target by name: for a folder one beside or in it, for a hub id another, or None.

    Quantised copies take the drafter of what they were made from; those of a target with quantisation-aware
    training (qat) take the one that was trained along with it. Base models have none.
    """
    folder = Path(target_name).expanduser()
    if folder.is_dir():
        return _beside(folder.resolve())
    if target_name.count("/") != 1:
        return None
    found = SIZE.fullmatch(target_name.split("/")[1])
    if not found or not found[2] or "assistant" in found[4].lower():
        return None
    pair = next(p for p in KNOWN if p.size.lower() == found[1].lower())
    return f"{pair.target}-qat-q4_0-unquantized-assistant" if found[3] else pair.drafter


def whole_copy(target_name: str) -> str | None:
    """The repository that holds a target's drafter beside it, by the name of any of its copies, or None."""
    name = Path(target_name).name.lower()
    return next((pair.drafter for pair in NATIVE if re.match(rf"{re.escape(pair.size.lower())}(-|$)", name)), None)


def _beside(folder: Path) -> str | None:
    stem = re.sub(r"-(bf16|mxfp[48]|nvfp4|[2-8]bit)$", "", folder.name, flags=re.IGNORECASE)
    places = [
        folder.parent / f"{folder.name}-assistant",
        folder.parent / f"{stem}-assistant",
        folder.parent / f"{stem}-assistant-bf16",
        folder.parent / "drafter",
        folder.parent / "assistant",
        folder / "assistant",
    ]
    return next((str(place) for place in places if (place / "config.json").is_file()), None)


def check_pair(
    kind: Network, target: TargetConfig, config: Any, names: tuple[str, str], base_model: bool = False
) -> list[str]:
    """Raise PairingError unless a drafter of this kind and config can run on the target; returns warnings.

    names: (target, drafter) as the user wrote them. base_model: the target has no chat template.
    """
    notes = kind.check(target, config, _advice(target, names[0]))
    if base_model:
        notes.append(
            f"{names[0]} has no chat template, so it is a base model; drafters are made for instruction-tuned "
            "models, so few drafts may be kept"
        )
    return notes


def poor_acceptance(kept: int, judged: int, target: TargetConfig, names: tuple[str, str]) -> str | None:
    """A warning if so few of a drafter's first tokens were kept that it can hardly have been made for its target.

    judged: rounds with a draft; kept: those whose first token was kept. names: (target, drafter).
    """
    if judged == 0:
        return None
    as_few = sum(math.comb(judged, i) * POOR**i * (1 - POOR) ** (judged - i) for i in range(kept + 1))
    if as_few > CHANCE:
        return None
    return (
        f"{names[0]} keeps {kept / judged:.0%} of what {names[1]} drafts first ({kept} of {judged}), where one that "
        f"was made for it gets most of them right; {_advice(target, names[0])}; if that is it, one of the two is "
        "damaged or quantised too far; --drafter none decodes plainly"
    )


def _advice(target: TargetConfig, name: str) -> str:
    """Which drafter to use instead, by the target's name, or by its hidden size where that says nothing."""
    drafter = find_drafter(name)
    gemma = isinstance(target, TextConfig)
    pair = next((p for p in KNOWN if gemma and p.hidden_size == target.hidden_size), None)
    if drafter is None and pair is not None:
        name, drafter = pair.target, pair.drafter
    if drafter is None:
        return f"use the drafter that was trained for {name}"
    return f"the drafter of {name.split('/')[-1]} is {drafter.split('/')[-1]}"
