"""Who runs: requests wait in order, join as rows, and feed their prompts in chunks beside the rows that decode.

Plain Python over live requests; nothing of the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_mtp.drafters.lookup import PromptLookup
from mlx_mtp.pace import Pace
from mlx_mtp.prefixes import Prefix, Prefixes, Spacing, shared
from mlx_mtp.rows import Follower, Request, RequestError, Stats
from mlx_mtp.sampling import RowSampler

CHUNK_STEP = 16  # prompt chunks beside running rows are multiples of this
VAIN = 0.2  # of a pass over the prompts of several rows, for the lengths they do not share
STALL_SHARE = 0.75  # of `stall_s`: what a chunk is sized to take, for its time is a forecast


@dataclass(frozen=True)
class Limits:
    """max_rows: requests that run at once.
    stall_s: how much longer than a round alone a round may take because a prompt chunk runs beside it.
    alone_tok: the prompt chunk while no row decodes; a request that comes then waits for the end of one. Fixed, so
    that a prompt alone is always computed in the same pieces; on a CPU 128 tokens took no longer a token than 512.
    Prompts with no more than that left go together, as many as the machine computes in `stall_s`, `chunk_tok` at most.
    chunk_tok: the widest prompt chunk beside running rows. first_chunk_tok: there, until the machine's speed is known.
    score_chunk: how long a chunk after so many tokens may be by the memory for its attention scores; None is no limit.
    kv_bytes: what all keys and values may take, the rows' with their drafter's own and those of kept prefixes; None is
    no limit. prefix_bytes: of these, what prefixes may take while no row needs them. Less than a row's windows take
    keeps nothing.
    """

    max_rows: int = 8
    stall_s: float = 0.25
    alone_tok: int = 128
    chunk_tok: int = 512
    first_chunk_tok: int = 64
    score_chunk: Callable[[int], int] | None = None
    kv_bytes: int | None = None
    prefix_bytes: int = 0
    spacing: Spacing = Spacing()


@dataclass(eq=False)
class Row:
    """A live request, equal to none but itself. index: its place in the cache, -1 while it waits.

    prefilled: prompt tokens in the cache or on their way. tokens: what the host has read so far.
    pending: rounds dispatched or built whose verdict the host has not read.
    begin: the kept beginning of its prompt, if any, until it joins. stops: lengths of the prompt at which a prefix
    will be kept, ascending; no chunk runs past the next. tail: how many last tokens of its prompt no chunk has with
    others before them. marked: the last length at which a prefix was kept. awaits: while it waits, how much of its
    prompt another row is about to compute. lookup: its text, where prompt lookup drafts.
    lag: rounds since the drafter was last asked for a draft.
    follower: where its text stands in the request's constraint, as far as the host has read it. arrived: passes that
    the engine had read when the request came, and the columns in them. resumed: how many first tokens of its text are
    computed again as the end of its prompt, because the engine that had computed them has failed.
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
    tail: int = 0
    marked: int = 0
    awaits: int = 0
    lookup: PromptLookup | None = None
    lag: int = 0
    follower: Follower | None = None
    arrived: tuple[int, int] = (0, 0)
    resumed: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = np.array([*self.request.prompt, *self.tokens[: self.resumed]], np.int32)

    def again(self) -> Row:
        """The same request as a new row, which goes on after the text that the host has read."""
        times = {"arrived": self.arrived, "started_s": self.started_s, "first_token_s": self.first_token_s}
        state = {"tokens": self.tokens, "stats": self.stats, "follower": self.follower}
        return Row(self.id, self.request, self.sampler, **state, **times, resumed=len(self.tokens))

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt has been sent to the device, so that the row takes part in rounds."""
        return self.prefilled == len(self.prompt)

    @property
    def left(self) -> int:
        """Prompt tokens that have not been sent."""
        return len(self.prompt) - self.prefilled

    @property
    def reach(self) -> int:
        """Of these, how many the next chunk may have."""
        most = self.left - self.tail if self.left > self.tail else self.left
        return min(most, self.stops[0] - self.prefilled) if self.stops else most

    @property
    def committed(self) -> int:
        """Positions in the cache that are part of the prompt or the text, once what is under way has ended."""
        return self.prefilled + max(0, len(self.tokens) - self.resumed - 1)

    @property
    def matched(self) -> bool:
        """Whether prompt lookup has found the last tokens that the host has read somewhere before."""
        return self.lookup is not None and self.lookup.matched

    @property
    def room(self) -> int:
        """The most tokens the row can still need once what is under way has brought one token each."""
        return self.request.max_tokens - len(self.tokens) - self.pending


@dataclass(frozen=True)
class Chunk:
    """The next `count` prompt tokens of a row, from position `start` on; `last` if they end the prompt."""

    row: Row
    count: int
    last: bool
    start: int = 0

    @staticmethod
    def of(row: Row, count: int) -> Chunk:
        return Chunk(row, count, count == row.left, row.prefilled)


class Scheduler:
    """The queue of waiting requests and the dense list of live rows."""

    def __init__(self, limits: Limits, row_bytes: Callable[[int], int], back: int = 0, tail: int = 0) -> None:
        """row_bytes: what a row of so many positions takes, its drafter's share included. back: how far before the
        length of a prefix inside a prompt a row may begin. tail: of prompts that are kept; see `Row`."""
        self.limits, self.back, self._tail = limits, back, tail
        self.prefixes = Prefixes(limits.prefix_bytes)
        self.waiting: list[Row] = []
        self.rows: list[Row] = []
        self._row_bytes = row_bytes
        self._pace = Pace()
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
        row.index = len(self.rows)
        self.rows.append(row)
        row.begin, row.prefilled, row.marked = prefix, known, known
        row.stats.cached_tokens = known
        if self.keeps:
            row.stops, row.tail = self.limits.spacing.stops(known, len(row.prompt)), self._tail

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

        The first in line gets half of them, so that every prompt ends; the rest goes to the shortest, so that a short
        request behind a long one waits for a pass and not for the whole prompt. Beside the end of another prompt the
        first in line gets no more than the others: their first token waits for twice their own columns at most.
        """
        feeding = sorted((r for r in self.rows if r.left and not r.done), key=_order)
        if not feeding:
            return []
        first, out = feeding[0], []
        budget = self._budget(first.prefilled)
        short, together = self._short(budget)
        share = self._reach(first) if first.left <= short else min(self._reach(first), -(-budget // 2))
        used = share
        for row in sorted(feeding[1:], key=lambda r: (-r.request.priority, r.left, r.id)):
            count = min(self._reach(row), (together if row.left <= short else budget) - used)
            if count > 0:
                out.append(Chunk.of(row, count))
                used += count
        if not any(c.last for c in out):  # nobody's first token waits for this pass
            share = max(share, min(self._reach(first), budget - used + share))
        elif share < first.left:
            share = min(share, max(CHUNK_STEP, used - share))
        return [Chunk.of(first, share), *out]

    def timed_round(self, seconds: float) -> None:
        """A round without prompt tokens took so long."""
        self._round_s = seconds if self._round_s is None else self._round_s + 0.3 * (seconds - self._round_s)

    def timed_chunks(self, seconds: float, chunks: Sequence[Chunk], beside: bool) -> None:
        """A pass with prompt chunks took so long; beside: a round was part of it."""
        if beside and self._round_s is None:
            return
        extra = seconds - self._round_s if beside and self._round_s else seconds
        self._pace.learn(max(extra, 0.05 * seconds), [(c.start, c.count) for c in chunks])

    def _reach(self, row: Row) -> int:
        """How many prompt tokens of a row the next chunk may have; always some."""
        if self.limits.score_chunk is None:
            return row.reach
        fits = self.limits.score_chunk(row.prefilled)
        return min(row.reach, max(CHUNK_STEP, fits // CHUNK_STEP * CHUNK_STEP))

    @property
    def _alone(self) -> bool:
        """Whether no row decodes."""
        return not any(r.decoding and not r.done for r in self.rows)

    def _short(self, budget: int) -> tuple[int, int]:
        """What a prompt may have left to go together with others as short, and how many tokens that may be in all: no
        more than the longest chunk, for which memory is counted."""
        if not self._alone:
            return 0, budget
        limits = self.limits
        fits = self._pace.fits(limits.stall_s, 0) if self._pace.known else 0
        return limits.alone_tok, max(budget, min(fits, limits.chunk_tok))

    def _budget(self, start: int) -> int:
        """Prompt tokens in the coming pass, if most of them come behind `start` others."""
        if self._alone:
            return self.limits.alone_tok
        if not self._pace.known:
            return min(self.limits.first_chunk_tok, self.limits.chunk_tok)
        fits = self._pace.fits(STALL_SHARE * self.limits.stall_s, start)
        return min(self.limits.chunk_tok, max(CHUNK_STEP, fits // CHUNK_STEP * CHUNK_STEP))

    def _bytes(self, row: Row) -> int:
        return self._row_bytes(len(row.request.prompt) + row.request.max_tokens)


def neighbours(chunks: list[Chunk], spare: Callable[[int, int], bool]) -> list[list[Chunk]]:
    """Chunks that go into one pass, which then reads the weights once for all: those of rows that lie side by side, as
    wide as the widest of them. So much of it as the others are shorter is computed in vain, a fifth at most.

    spare: whether a row can be given more columns than are its own.
    """
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda c: c.row.index):
        joined = [*groups[-1], chunk] if groups else [chunk]
        width = max(c.count for c in joined)
        useful = sum(c.count for c in joined) >= (1 - VAIN) * width * len(joined)
        beside = len(joined) > 1 and chunk.row.index == joined[-2].row.index + 1
        if beside and useful and all(c.count == width or spare(c.row.index, width) for c in joined):
            groups[-1] = joined
        else:
            groups.append([chunk])
    return groups


def feed(chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """Count chunks as sent: their tokens [B, L] int32, and the prompts' next ones [B], where they have any."""
    tokens = np.zeros((len(chunks), max(c.count for c in chunks)), np.int32)
    newest = np.zeros(len(chunks), np.int32)
    for b, chunk in enumerate(chunks):
        row, end = chunk.row, chunk.row.prefilled + chunk.count
        tokens[b, : chunk.count] = row.prompt[row.prefilled : end]
        newest[b] = 0 if chunk.last else row.prompt[end]
        row.prefilled, row.pending = end, row.pending + chunk.last
    return tokens, newest


def _order(row: Row) -> tuple[int, int]:
    return -row.request.priority, row.id
