"""Who runs: requests wait in order, join as rows, and feed their prompts in chunks beside the rows that decode.

Plain Python over live requests; nothing of the device.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_mtp.prefixes import Prefix, Prefixes, Spacing, shared
from mlx_mtp.rows import USUAL, Follower, Request, RequestError, Stats
from mlx_mtp.sampling import RowSampler

CHUNK_STEP = 16  # prompt chunks beside running rows are multiples of this
STALL_SHARE = 0.75  # of `stall_s`, for a chunk is sized by those before it, which saw a shorter context


@dataclass(frozen=True)
class Limits:
    """max_rows: requests that run at once.
    stall_s: how much longer than a round alone a round may take because a prompt chunk runs beside it.
    alone_tok: the prompt chunk while no row decodes; a request that comes then waits for two of them at most. Fixed, so
    that a prompt alone is always computed in the same pieces; 128 tokens took no longer a token than 512.
    ahead_s: a pass over prompts alone is built while the one before it runs, unless it takes longer than this: building
    ahead hides a few milliseconds, and makes a request that comes meanwhile wait for a pass more.
    chunk_tok: the widest prompt chunk beside running rows. first_chunk_tok: there, until the machine's speed is known.
    kv_bytes: what all keys and values may take, the rows' and those of kept prefixes; None is no limit. prefix_bytes:
    of these, what prefixes may take while no row needs them. Less than a row's windows take keeps nothing.
    """

    max_rows: int = 8
    stall_s: float = 0.25
    alone_tok: int = 128
    ahead_s: float = 0.05
    chunk_tok: int = 512
    first_chunk_tok: int = 64
    kv_bytes: int | None = None
    prefix_bytes: int = 0
    spacing: Spacing = Spacing()


@dataclass
class Row:
    """A live request. index: its place in the cache, -1 while it waits.

    prefilled: prompt tokens in the cache or on their way. tokens: what the host has read so far.
    pending: rounds dispatched or built whose verdict the host has not read.
    begin: the kept beginning of its prompt, if any, until it joins. stops: lengths of the prompt at which a prefix
    will be kept, ascending; no chunk runs past the next. marked: the last length at which one was. awaits: while it
    waits, how much of its prompt another row is about to compute. outlook: the last that was read of its drafter's.
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
    begin: Prefix | None = None
    stops: list[int] = field(default_factory=list)
    marked: int = 0
    awaits: int = 0
    outlook: int = USUAL
    follower: Follower | None = None
    started_s: float = 0.0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = np.array(self.request.prompt, np.int32)

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt has been sent to the device, so that the row takes part in rounds."""
        return self.left == 0

    @property
    def left(self) -> int:
        """Prompt tokens that have not been sent."""
        return len(self.request.prompt) - self.prefilled

    @property
    def reach(self) -> int:
        """Of these, how many the next chunk may have."""
        return min(self.left, self.stops[0] - self.prefilled) if self.stops else self.left

    @property
    def committed(self) -> int:
        """Positions in the cache that are part of the prompt or the text, once what is under way has ended."""
        return self.prefilled + max(0, len(self.tokens) - 1)

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

    def __init__(self, limits: Limits, row_bytes: Callable[[int], int], back: int = 0) -> None:
        """row_bytes: what a row of so many positions takes in the cache. back: how far behind the length of a prefix
        inside a prompt a row may begin."""
        self.limits, self.back = limits, back
        self.prefixes = Prefixes(limits.prefix_bytes)
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
        """Rows that join now: by priority, then in order of arrival; nobody overtakes one that waits for memory.

        Behind a row that waits for another to compute what their prompts share, others may join, but its place and
        its memory are its own.
        """
        joined, sharing = [], []
        for row in sorted(self.waiting, key=_order):
            if len(self.rows) + len(sharing) >= self.limits.max_rows:
                break
            prefix, known = self.prefixes.find(row.prompt)
            if not self._make_room(row, sharing):
                break
            if self._shares(row, known):
                sharing.append(row)
                continue
            self._start(row, prefix, known)
            joined.append(row)
        return joined

    def _start(self, row: Row, prefix: Prefix | None, known: int) -> None:
        self.waiting.remove(row)
        row.index, row.started_s = len(self.rows), time.perf_counter()
        self.rows.append(row)
        row.begin, row.prefilled, row.marked = prefix, known, known
        row.stats.cached_tokens = known
        if self.keeps:
            row.stops = self.limits.spacing.stops(known, len(row.prompt))

    @property
    def keeps(self) -> bool:
        """Whether prefixes are kept at all."""
        return self.limits.prefix_bytes >= self._row_bytes(1)

    def _make_room(self, row: Row, promised: list[Row]) -> bool:
        """Whether there is memory for a row beside the live ones and those it is promised to; prefixes make way."""
        if self.limits.kv_bytes is None:
            return True
        left = self.limits.kv_bytes - sum(map(self._bytes, (*self.rows, *promised, row)))
        if left >= 0:
            self.prefixes.fit(left)  # the one that this row was found to begin with goes last
        return left >= 0

    def _shares(self, row: Row, known: int) -> bool:
        """Whether to wait for a live row that is about to compute much of this one's prompt, and keep it there.

        That row is being fed, so the wait ends when it comes to that place or goes, and the engine is not idle.
        """
        for other in self.rows if self.keeps else ():
            if not other.left or other.done or other.request.priority < row.request.priority:
                continue
            count = min(shared(row.prompt, other.prompt), len(row.prompt) - 1)
            stop = next((s for s in other.stops if count <= s <= count + self.back), count)
            enough = row.awaits or known + self.limits.spacing.share_tok
            if count < max(enough, known + 1) or stop <= other.prefilled:
                continue
            if stop not in other.stops:
                bisect.insort(other.stops, stop)
            row.awaits = count
            return True
        return False

    def keep(self, prefix: Prefix | None) -> None:
        """Keep a prefix, if one is given, within what rows leave and prefixes may take."""
        if prefix is not None:
            self.prefixes.add(prefix)
        limit = self.limits.kv_bytes
        left = None if limit is None else limit - sum(map(self._bytes, self.rows))
        self.prefixes.fit(self.limits.prefix_bytes if left is None else left)

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
        half = -(-budget // 2)
        spare = budget - min(first.reach, half)
        out = []
        for row in sorted(feeding[1:], key=lambda r: (-r.request.priority, r.left, r.id)):
            count = min(row.reach, spare)
            if count:
                out.append(Chunk(row, count, count == row.left))
                spare, budget = spare - count, budget - count
        most = half if any(c.last for c in out) else budget  # who gets its first token in this pass should not wait
        count = min(first.reach, most)
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
        fits = int(STALL_SHARE * self.limits.stall_s / self._seconds_per_token)
        return min(self.limits.chunk_tok, max(CHUNK_STEP, fits // CHUNK_STEP * CHUNK_STEP))

    def _bytes(self, row: Row) -> int:
        return self._row_bytes(len(row.request.prompt) + row.request.max_tokens)


def _order(row: Row) -> tuple[int, int]:
    return -row.request.priority, row.id


def _blend(mean: float | None, new: float) -> float:
    return new if mean is None else mean + 0.3 * (new - mean)
