"""Who runs: requests wait in order, join as rows, and feed their prompts in chunks beside the rows that decode.

Plain Python over live requests; no arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_mtp.cache import Snapshot
from mlx_mtp.rows import Follower, Request, RequestError, Stats
from mlx_mtp.sampling import RowSampler

CHUNK_STEP = 16  # prompt chunks beside running rows are multiples of this


@dataclass(frozen=True)
class Limits:
    """max_rows: requests that run at once.
    stall_s: how much longer than a round alone a round may take because a prompt chunk runs beside it.
    alone_tok: the prompt chunk while no row decodes; a request that comes then waits for two of them at most. Fixed, so
    that a prompt alone is always computed in the same pieces; 128 tokens took no longer a token than 512.
    chunk_tok: the widest prompt chunk beside running rows. first_chunk_tok: there, until the machine's speed is known.
    kv_bytes: what all rows' keys and values may take; None is no limit.
    """

    max_rows: int = 8
    stall_s: float = 0.25
    alone_tok: int = 128
    chunk_tok: int = 512
    first_chunk_tok: int = 64
    kv_bytes: int | None = None


@dataclass
class Row:
    """A live request. index: its place in the cache, -1 while it waits.

    prefilled: prompt tokens in the cache or on their way. tokens: what the host has read so far.
    pending: rounds dispatched or built whose verdict the host has not read.
    begin: the cached beginning of its prompt, if any, until it joins. keep: leave a snapshot behind.
    follower: where its text stands in the request's constraint, as far as the host has read it.
    """

    id: int
    request: Request
    sampler: RowSampler
    index: int = -1
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    pending: int = 0
    done: bool = False
    begin: Snapshot | None = None
    keep: bool = False
    follower: Follower | None = None
    started_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt has been sent to the device, so that the row takes part in rounds."""
        return self.left == 0

    @property
    def left(self) -> int:
        """Prompt tokens that have not been sent."""
        return len(self.request.prompt) - self.prefilled

    @property
    def room(self) -> int:
        """The most tokens the row can still need once what is under way has brought one token each."""
        return self.request.max_tokens - len(self.tokens) - self.pending


@dataclass(frozen=True)
class Chunk:
    """The next `count` prompt tokens of a row; `last` if they end the prompt."""

    row: Row
    count: int
    last: bool


class Scheduler:
    """The queue of waiting requests and the dense list of live rows."""

    def __init__(self, limits: Limits, row_bytes: Callable[[int], int]) -> None:
        """row_bytes: what a row of so many positions takes in the cache."""
        self.limits = limits
        self.waiting: list[Row] = []
        self.rows: list[Row] = []
        self._row_bytes = row_bytes
        self._seconds_per_token: float | None = None  # of prompt, beside running rows
        self._round_s: float | None = None  # of a round without a prompt chunk

    def submit(self, row: Row) -> None:
        """Queue a row. Raises RequestError if it could not even run alone."""
        need, limit = self._bytes(row), self.limits.kv_bytes
        if limit is not None and need > limit:
            raise RequestError(
                f"prompt and max_tokens ({len(row.request.prompt)} + {row.request.max_tokens}) need "
                f"{need / 1e9:.2f} GB of cache, and {limit / 1e9:.2f} GB is all there is; lower max_tokens"
            )
        self.waiting.append(row)

    def find(self, request: int) -> Row | None:
        """The waiting or live row of a request."""
        return next((r for r in (*self.rows, *self.waiting) if r.id == request), None)

    def admit(self) -> list[Row]:
        """Rows that join now: by priority, then in order of arrival; nobody overtakes one that waits for memory."""
        joined = []
        while self.waiting and len(self.rows) < self.limits.max_rows:
            row = min(self.waiting, key=_order)
            used = sum(map(self._bytes, self.rows))
            if self.limits.kv_bytes is not None and used + self._bytes(row) > self.limits.kv_bytes:
                break
            self.waiting.remove(row)
            row.index, row.started_s = len(self.rows), time.perf_counter()
            self.rows.append(row)
            joined.append(row)
        return joined

    def leave(self, row: Row) -> int:
        """Take a row out; the last live row gets its index. Returns the index that is free now: the former last."""
        last = self.rows.pop()
        if last is not row:
            self.rows[row.index] = last
            last.index = row.index
        row.index = -1
        return len(self.rows)

    def decoding(self) -> list[Row]:
        """The dense rows a round runs over: up to the last one that decodes. Some may still be feeding their prompt."""
        ends = [r.index for r in self.rows if r.decoding and not r.done]
        return self.rows[: ends[-1] + 1] if ends else []

    def chunks(self) -> list[Chunk]:
        """Prompt tokens for the coming pass.

        The first in line gets half of them at least, so that every prompt ends; the rest goes to the shortest, so
        that a short request behind a long one waits for a pass and not for the whole prompt.
        """
        feeding = sorted((r for r in self.rows if r.left and not r.done), key=_order)
        if not feeding:
            return []
        budget, first = self._budget(), feeding[0]
        spare = budget - min(first.left, -(-budget // 2))
        out = []
        for row in sorted(feeding[1:], key=lambda r: (-r.request.priority, r.left, r.id)):
            count = min(row.left, spare)
            if count:
                out.append(Chunk(row, count, count == row.left))
                spare, budget = spare - count, budget - count
        count = min(first.left, budget)
        return [Chunk(first, count, count == first.left), *out]

    def timed(self, seconds: float, chunk_tok: int, rows: int) -> None:
        """A pass over `rows` decoding rows and so many prompt tokens took so long."""
        if rows and not chunk_tok:
            self._round_s = _blend(self._round_s, seconds)
        elif rows and chunk_tok and self._round_s is not None:
            extra = max(seconds - self._round_s, 0.05 * seconds)
            self._seconds_per_token = _blend(self._seconds_per_token, extra / chunk_tok)

    def _budget(self) -> int:
        """Prompt tokens in the coming pass."""
        if not any(r.decoding and not r.done for r in self.rows):
            return self.limits.alone_tok
        if self._seconds_per_token is None:
            return min(self.limits.first_chunk_tok, self.limits.chunk_tok)
        fits = int(self.limits.stall_s / self._seconds_per_token)
        return min(self.limits.chunk_tok, max(CHUNK_STEP, fits // CHUNK_STEP * CHUNK_STEP))

    def _bytes(self, row: Row) -> int:
        return self._row_bytes(len(row.request.prompt) + row.request.max_tokens)


def _order(row: Row) -> tuple[int, int]:
    return -row.request.priority, row.id


def _blend(mean: float | None, new: float) -> float:
    return new if mean is None else mean + 0.3 * (new - mean)
