"""What is measured, as frozen dataclasses. Imports nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mtp.pairs import BYTES_PER_PARAMETER, KNOWN
from mlx_mtp.rows import RequestError


@dataclass(frozen=True)
class Size:
    """A published size of Gemma 4. bits: of a weight. layers: how many of the target's are kept; None keeps all."""

    name: str
    bits: int
    drafter_bits: int
    layers: int | None = None

    def __post_init__(self) -> None:
        sizes = [pair.size for pair in KNOWN]
        if self.name.lower() not in (size.lower() for size in sizes):
            raise RequestError(
                f"size is {self.name!r}; expected {', '.join(sizes)}: weights are made up of Gemma 4 only"
            )
        for name, bits in (("bits", self.bits), ("drafter bits", self.drafter_bits)):
            if bits not in BYTES_PER_PARAMETER:
                raise RequestError(f"{name} is {bits}; expected {', '.join(map(str, BYTES_PER_PARAMETER))}")


@dataclass(frozen=True)
class Sweep:
    """Which settings are measured, and for how long.

    context: positions in the cache of every row. acceptance: probabilities with which a draft is kept.
    rounds: timed in every run; repeats: runs of every width, taking turns.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    acceptance: tuple[float, ...]
    rounds: int
    repeats: int

    def __post_init__(self) -> None:
        limits = {"batch": (self.batches, 1, 64), "context": (self.contexts, 1, 10**6), "width": (self.widths, 1, 15)}
        limits |= {"rounds": ((self.rounds,), 2, 10**6), "repeats": ((self.repeats,), 1, 10**4)}
        for name, (values, low, high) in limits.items():
            bad = next((value for value in values if not low <= value <= high), None)
            if bad is not None:
                raise RequestError(f"{name} is {bad}; expected {low} to {high}")
        odd = next((p for p in self.acceptance if not 0 <= p <= 1), None)
        if odd is not None:
            raise RequestError(f"synthetic acceptance is {odd:g}; expected 0 to 1")
