"""What the engine dispatches: a pass, what the host reads of it, and when. It knows no graph."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.drafters.lookup import LookupDraft
from mlx_mtp.guide import Guide
from mlx_mtp.prefixes import Prefix
from mlx_mtp.scheduler import Chunk, Row

AWAY = 0.2  # share of a round for which the caller may keep the engine waiting; its time says nothing beyond that


@dataclass(frozen=True)
class PackedOutput:
    """Named int32 arrays as slices of one vector, so that one read brings them all."""

    vector: mx.array
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, parts: Mapping[str, mx.array]) -> PackedOutput:
        flat = [part.reshape(-1) for part in parts.values()]
        return cls(mx.concatenate(flat), {name: part.shape for name, part in parts.items()})

    def unpack(self, values: list[int]) -> dict[str, np.ndarray]:
        """The arrays, from the vector's values."""
        vector, out, start = np.array(values, np.int32), {}, 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            out[name], start = vector[start:end].reshape(shape), end
        return out


@dataclass(frozen=True)
class Pass:
    """What one dispatch computes, and for whom.

    decoded: the rows of the round, in cache order; `active` are those of them whose verdict counts.
    width: draft tokens of the round. chunks: prompt chunks next to it. draft: evaluated first, so that the device
    starts on it while the rest is still being dispatched. guide: what constrains the round, None where nothing does.
    copied: draft tokens from prompt lookup, None without it.
    prefixes: to be kept when this has been dispatched.
    output: of the round, "tokens" [B, width + 1], "kept" [B], and "experts" [], distinct ones summed over layers, where
    there are any; "first_tokens", one for every chunk, which counts where its prompt ends; and the log-probabilities of
    rows that ask for them. matched: of the active rows, what was known when the width was chosen.
    """

    decoded: list[Row]
    active: list[Row]
    width: int
    chunks: list[Chunk]
    prefixes: list[Prefix]
    draft: mx.array | None
    guide: Guide | None
    copied: LookupDraft | None
    output: PackedOutput
    matched: list[bool]

    def fill(self) -> None:
        """Write what the graph reads from the host, now that all before it has been read."""
        if self.copied is not None:
            self.copied.fill()
        if self.guide is not None:
            self.guide.hint()

    def wanted(self) -> bool:
        """Whether it is still to run, now that what came before it has been read: constraints force nothing else, and
        some row needs it. Prompt chunks are not undone for a constraint."""
        fits = self.guide is None or self.guide.fits() or bool(self.chunks)
        return fits and any(not r.done for r in (*self.active, *(c.row for c in self.chunks)))

    @property
    def columns(self) -> int:
        return len(self.decoded) * (self.width + 1) + sum(c.count for c in self.chunks)


@dataclass(frozen=True)
class PassTime:
    """Of a pass that was read at now_s: seconds since it was sent, and since the pass before was read, None where that
    is not the time of a round."""

    now_s: float
    device_s: float
    round_s: float | None


class RoundTimer:
    """When passes are sent and read, by one clock, in seconds."""

    def __init__(self) -> None:
        self.clock = time.perf_counter  # tests give another
        self._sent_s = self._left_s = self._away_s = 0.0
        self._read_s: float | None = None  # None: the device has been idle since

    def enter(self) -> None:
        """The caller is back in the engine."""
        self._away_s = self.clock() - self._left_s

    def leave(self) -> None:
        self._left_s = self.clock()

    def send(self) -> float:
        """A pass is sent. Returns how long the device has waited for it, 0 if it was idle anyhow."""
        self._sent_s = self.clock()
        return 0.0 if self._read_s is None else self._sent_s - self._read_s

    @property
    def since_sent_s(self) -> float:
        return self.clock() - self._sent_s

    def read(self) -> PassTime:
        """A pass has been read."""
        now_s, before_s = self.clock(), self._read_s
        self._read_s = now_s
        alone = before_s is not None and self._away_s <= AWAY * (now_s - before_s)
        return PassTime(now_s, now_s - self._sent_s, now_s - before_s if before_s is not None and alone else None)

    def idle(self) -> None:
        """Nothing is under way."""
        self._read_s = None
