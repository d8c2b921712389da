"""What the engine dispatches: a pass as a whole, and the round in it. Nouns only; the engine builds and reads them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.accept import Verdict
from mlx_mtp.guide import Guide
from mlx_mtp.prefixes import Prefix
from mlx_mtp.scheduler import Chunk, Row


@dataclass(frozen=True)
class Pass:
    """What one dispatch computes, and for whom.

    decoded: the rows of the round, in cache order; `active` are those of them whose verdict counts.
    chunks: prompt chunks beside it. draft: evaluated first, so that the device starts on it while the rest is
    still being dispatched. guide: what constrains the round, None where nothing does. prefixes: to be kept when this
    has been dispatched. out: int32, everything the host will read: per decoded row its width + 1 tokens, then every
    decoded row's kept count, then one number per chunk (the first token, where the prompt ends here), then the round's
    distinct experts summed over layers, where there are any (`counted`), then per row of `scored` as many tokens'
    log-probabilities as it has columns, with the `most` best. outlook: of the active rows, what was known when the
    width was chosen; owed: columns that they had computed since a draft was asked for.
    """

    decoded: list[Row]
    active: list[Row]
    width: int
    chunks: list[Chunk]
    prefixes: list[Prefix]
    draft: mx.array | None
    guide: Guide | None
    out: mx.array
    outlook: tuple[int, ...]
    owed: int
    counted: bool
    scored: list[tuple[Row, int]]
    most: int

    @property
    def rows(self) -> list[Row]:
        return [*self.active, *(c.row for c in self.chunks)]

    def wanted(self) -> bool:
        """Whether it is still to run, now that what came before it has been read: constraints force nothing else, and
        some row needs it. Prompt chunks are not undone for a constraint."""
        fits = self.guide is None or self.guide.fits() or bool(self.chunks)
        return fits and any(not r.done for r in self.rows)

    @property
    def columns(self) -> int:
        return len(self.decoded) * (self.width + 1) + sum(c.count for c in self.chunks)


@dataclass(frozen=True)
class Heard:
    """What the host has read of a pass, for whoever decides about later ones.

    said: new tokens of rows that had any. kept: columns, by row of `decoded`. took_s: from the dispatch on. seconds:
    since the pass before was read; None where that says nothing of this one.
    """

    said: list[tuple[Row, tuple[int, ...]]]
    kept: list[int]
    took_s: float
    seconds: float | None


@dataclass(frozen=True)
class Round:
    """What a round brings. draft: tokens [B, K] (K may be less than was asked for), None where nothing was drafted.

    experts: one array [1], how many distinct ones; none where there are no experts. scores: one array with the packed
    log-probabilities of the rows that ask for them, in order, flat; none where no row asks.
    """

    draft: mx.array | None
    judged: Verdict
    experts: list[mx.array]
    scores: list[mx.array]
