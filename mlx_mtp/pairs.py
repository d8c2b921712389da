"""Which drafter belongs to which target, what they weigh, and whether two configs fit each other.

Reads no weights and asks no network. Parameter counts are of the text stacks alone.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_mtp.drafters.kinds import Network
from mlx_mtp.hub import DRAFTER_FOLDERS
from mlx_mtp.models.config import TextConfig
from mlx_mtp.models.families import TargetConfig

# Bytes a parameter takes: bf16, and affine quantisation in groups of 64 with a 16-bit scale and bias each.
BYTES_PER_PARAMETER = {16: 2.0, 8: 8.5 / 8, 4: 4.5 / 8}
# A drafter is doubted when, were this share of its first tokens right, as few as were would have been this unlikely.
POOR, CHANCE = 0.4, 0.005


@dataclass(frozen=True)
class Copy:
    """A published quantised target. bits: of its weights; mlp_bits: of the feed-forward matrices outside the experts.

    file_gb: of all its safetensors files, vision and audio included; None where nobody has written it down.
    """

    id: str
    size: str
    bits: int
    mlp_bits: int
    file_gb: float | None = None

    @property
    def uniform(self) -> bool:
        """Whether its name says what it weighs."""
        return self.mlp_bits == self.bits


def published_copies() -> list[Copy]:
    """Copies of Gemma 4 in MLX's format (data/published_copies.json says where the figures come from)."""
    data = json.loads((resources.files("mlx_mtp") / "data" / "published_copies.json").read_text())
    return [Copy(**copy) for copy in data["copies"]]


@dataclass(frozen=True)
class KnownPair:
    """A published target and its drafter.

    params, drafter_params: all parameters. mlp_params: of the feed-forward matrices outside the experts.
    """

    size: str
    hidden_size: int
    params: float
    drafter_params: float
    mlp_params: float = 0.0

    @property
    def target(self) -> str:
        return f"google/gemma-4-{self.size}-it"

    @property
    def drafter(self) -> str:
        return f"{self.target}-assistant"

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Published quantised targets, the smallest first."""
        return tuple(copy for copy in published_copies() if copy.size == self.size)

    @property
    def kind(self) -> str:
        """Of the drafter."""
        return "mtp"

    def target_bytes(self, bits: int, mlp_bits: int | None = None) -> int:
        """Bytes of the target's text stack at 16, 8 or 4 bits a weight; mlp_bits: of its feed-forward matrices, where
        they differ."""
        wider = BYTES_PER_PARAMETER[mlp_bits or bits] - BYTES_PER_PARAMETER[bits]
        return int(self.params * BYTES_PER_PARAMETER[bits] + self.mlp_params * wider)


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
    def copies(self) -> tuple[Copy, ...]:
        return (Copy(f"mlx-community/{self.size}-4bit", self.size, 4, 4),)

    @property
    def kind(self) -> str:
        return "qwen_mtp"


@dataclass(frozen=True)
class Offer:
    """A published target with a published drafter. bits, mlp_bits: of the target's weights; drafters are listed at 16.

    size: as `plan` takes it. target_bytes: its text stack in memory. drafter_params: None where nobody has written down
    how many. uniform: False for a copy that is larger than the bits in its name say.
    """

    size: str
    target: str
    drafter: str
    kind: str
    bits: int
    mlp_bits: int
    target_bytes: int
    drafter_params: float | None

    @property
    def uniform(self) -> bool:
        return self.mlp_bits == self.bits

    @property
    def drafter_bytes(self) -> int:
        return int((self.drafter_params or 0.0) * BYTES_PER_PARAMETER[16])

    @property
    def weight_bytes(self) -> int:
        """What both take in memory, as far as is known."""
        return self.target_bytes + self.drafter_bytes


KNOWN = (
    KnownPair("E2B", 1536, 4.63e9, 77.7e6, 1.557e9),
    KnownPair("E4B", 2560, 7.46e9, 78.5e6, 3.303e9),
    KnownPair("12B", 3840, 11.91e9, 422.9e6, 8.493e9),
    KnownPair("26B-A4B", 2816, 25.23e9, 419.7e6, 0.535e9),
    KnownPair("31B", 5376, 30.70e9, 469.5e6, 20.809e9),
)
NATIVE = (
    NativePair("Qwen3.5-0.8B", 1024, 0.752e9, 20.45e6),
    NativePair("Qwen3.5-2B", 2048, 1.882e9, 60.8e6),
    NativePair("Qwen3.5-4B", 2560, 4.206e9, 120.6e6),
    NativePair("Qwen3.5-9B", 4096, 8.954e9, 243.3e6),
    NativePair("Qwen3.5-27B", 5120, 26.896e9, 424.7e6),
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
        for copy in (Copy(pair.target, pair.size, 16, 16), *pair.copies):
            size = pair.target_bytes(copy.bits, copy.mlp_bits)
            for name, kind, params in drafters:
                own = find_drafter(copy.id) if kind == "mtp" else None
                out.append(
                    Offer(pair.size, copy.id, own or name, kind, copy.bits, copy.mlp_bits, size, params),
                )
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


def drafter_in(folder: Path) -> str | None:
    """The folder of a drafter in a target's own."""
    return next((str(folder / name) for name in DRAFTER_FOLDERS if (folder / name / "config.json").is_file()), None)


def _beside(folder: Path) -> str | None:
    stem = re.sub(r"-(bf16|mxfp[48]|nvfp4|[2-8]bit)$", "", folder.name, flags=re.IGNORECASE)
    names = (f"{folder.name}-assistant", f"{stem}-assistant", f"{stem}-assistant-bf16", "drafter", "assistant")
    places = (folder.parent / name for name in names)
    return next((str(place) for place in places if (place / "config.json").is_file()), drafter_in(folder))


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
