"""Who runs: requests wait in order, join as rows, and feed their prompts in chunks beside the rows that decode.

Plain Python over live requests; no arrays.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from mlx_mtp.cache import Snapshot
from mlx_mtp.rows import Request, Stats
from mlx_mtp.sampling import RowSampler


@dataclass(frozen=True)
class Limits:
    """max_rows: requests that run at once. chunk_tok: prompt tokens in a pass while other rows decode.
    idle_chunk_tok: the same while none does."""

    max_rows: int = 8
    chunk_tok: int = 256
    idle_chunk_tok: int = 1024


@dataclass
class Row:
    """A live request. index: its place in the cache, -1 while it waits.

    prefilled: prompt tokens in the cache or on their way. tokens: what the host has read so far.
    pending: rounds dispatched or built whose verdict the host has not read.
    begin: the cached beginning of its prompt, if any, until it joins. keep: leave a snapshot behind.
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
    started_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt has been sent to the device, so that the row takes part in rounds."""
        return self.prefilled == len(self.request.prompt)

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

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []

    def submit(self, row: Row) -> None:
        self.waiting.append(row)

    def find(self, request: int) -> Row | None:
        """The waiting or live row of a request."""
        return next((r for r in (*self.rows, *self.waiting) if r.id == request), None)

    def admit(self) -> list[Row]:
        """Rows that join now, in order of arrival; each gets the next index."""
        joined = []
        while self.waiting and len(self.rows) < self.limits.max_rows:
            row = self.waiting.popleft()
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
        """Prompt tokens for the coming pass, oldest row first, within the chunk budget."""
        busy = any(r.decoding and not r.done for r in self.rows)
        budget = self.limits.chunk_tok if busy else self.limits.idle_chunk_tok
        out = []
        for row in self.rows:
            left = len(row.request.prompt) - row.prefilled
            if left and budget and not row.done:
                count = min(left, budget)
                out.append(Chunk(row, count, count == left))
                budget -= count
        return out
