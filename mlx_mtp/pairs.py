"""Which drafter belongs to which Gemma 4 target, what they weigh, and whether two configs fit each other.

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

# Bytes a parameter takes: bf16, and affine quantisation in groups of 64 with a 16-bit scale and bias each.
BYTES_PER_PARAMETER = {16: 2.0, 8: 8.5 / 8, 4: 4.5 / 8}
# A drafter is doubted when, were this share of its first tokens right, as few as were would have been this unlikely.
POOR, CHANCE = 0.4, 0.005
SPARE = 0.25  # share of the memory left to keys and values, activations, and the system


@dataclass(frozen=True)
class KnownPair:
    """A published target and its drafter.

    params, drafter_params: all parameters. read, drafter_read: those one pass over one token touches (active
    experts, one row of the per-layer table, the scored clusters), on which decoding speed depends.
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

    def weight_bytes(self, bits: int) -> int:
        """Bytes of target and drafter at 16, 8 or 4 bits a weight."""
        return int((self.params + self.drafter_params) * BYTES_PER_PARAMETER[bits])

    def read_bytes(self, bits: int) -> int:
        """Bytes of the target's weights that one pass over one token reads, at 16, 8 or 4 bits."""
        return int(self.read * BYTES_PER_PARAMETER[bits])

    def drafter_read_bytes(self, bits: int) -> int:
        """Bytes of the drafter's weights that one step reads, at 16, 8 or 4 bits."""
        return int(self.drafter_read * BYTES_PER_PARAMETER[bits])

    def fits(self, memory_bytes: int) -> int | None:
        """The most bits a weight (16, 8, 4) at which the pair runs in that much memory, or None."""
        room = memory_bytes * (1 - SPARE)
        return next((bits for bits in BYTES_PER_PARAMETER if self.weight_bytes(bits) <= room), None)


KNOWN = (
    KnownPair("E2B", 1536, 4.63e9, 2.28e9, 77.7e6, 11.7e6),
    KnownPair("E4B", 2560, 7.46e9, 4.64e9, 78.5e6, 12.5e6),
    KnownPair("12B", 3840, 11.91e9, 11.91e9, 422.9e6, 422.9e6),
    KnownPair("26B-A4B", 2816, 25.23e9, 3.82e9, 419.7e6, 419.7e6),
    KnownPair("31B", 5376, 30.70e9, 30.70e9, 469.5e6, 469.5e6),
)
SIZE = re.compile(rf"gemma-4-({'|'.join(pair.size for pair in KNOWN)})(-it)?(-qat)?(?=-|$)(.*)", re.IGNORECASE)


def fits(memory_bytes: int) -> list[tuple[KnownPair, int | None]]:
    """Every known pair with the most bits a weight (16, 8, 4) that run in that much memory, or None."""
    return [(pair, pair.fits(memory_bytes)) for pair in KNOWN]


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
    kind: Network, target: TextConfig, config: Any, names: tuple[str, str], base_model: bool = False
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


def poor_acceptance(kept: int, judged: int, target: TextConfig, names: tuple[str, str]) -> str | None:
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


def _advice(target: TextConfig, name: str) -> str:
    """Which drafter to use instead, by the target's name, or by its hidden size where that says nothing."""
    drafter = find_drafter(name)
    pair = next((p for p in KNOWN if p.hidden_size == target.hidden_size), None)
    if drafter is None and pair is not None:
        name, drafter = pair.target, pair.drafter
    if drafter is None:
        return f"use the drafter that was trained for {name}"
    return f"the drafter of {name.split('/')[-1]} is {drafter.split('/')[-1]}"
