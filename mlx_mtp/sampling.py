"""From logits to a row's distribution, and from a distribution to a token. Knows rows' settings, not rows.

All randomness is noise keyed by (seed, position, token id), see `kernels/noise.py`: a token drawn at a position never
depends on batch order, width, or on how often the position was visited.
Shapes: B rows, L columns, V vocabulary, C candidate tokens.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels.choice import Draw
from mlx_mtp.kernels.noise import gumbel
from mlx_mtp.processors import Processors
from mlx_mtp.rows import Candidates, Draft, Sampling

# Streams of noise for unseeded rows, whose draft, acceptance test and correction must be independent.
DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0x6A09E667, 0xBB67AE85, 0x3C6EF372


@dataclass(frozen=True)
class RowSampler:
    """One row's settings with its seed resolved: the request's own, or a fresh one.

    coupled: the drafter and the target use the same noise, so the text is a function of the seed; otherwise drafts
    are drawn independently and rejection sampling decides.
    """

    sampling: Sampling
    seed: int
    coupled: bool

    @staticmethod
    def of(sampling: Sampling) -> RowSampler:
        if sampling.seed is not None or sampling.greedy:
            return RowSampler(sampling, sampling.seed or 0, True)
        return RowSampler(sampling, secrets.randbits(64), False)


@dataclass(frozen=True)
class Drawn:
    """Drafts of one step [B], or of several [B, L].

    tokens int32; logits [.., C]: the filtered ones they came from, where rejection sampling will ask; ids [.., C]: what
    their columns stand for, None where column c is token c.
    """

    tokens: mx.array
    logits: mx.array | None = None
    ids: mx.array | None = None

    @staticmethod
    def draft(steps: Sequence[Drawn]) -> Draft:
        """Steps that were drawn one after the other, as one draft."""

        def joined(parts: list[mx.array | None]) -> mx.array | None:
            return mx.stack(known, axis=1) if (known := [p for p in parts if p is not None]) else None

        logits, ids = joined([s.logits for s in steps]), joined([s.ids for s in steps])
        source = None if logits is None else Candidates(logits, ids)
        return Draft(mx.stack([s.tokens for s in steps], axis=1), source)


class Sampler:
    """The settings of the B rows of a pass, as arrays."""

    def __init__(self, rows: list[RowSampler], keep_logits: bool = False) -> None:
        """keep_logits: `draw` returns its logits even where no row needs them (to inspect a drafter)."""
        self._rows = rows
        self.greedy = all(r.sampling.greedy for r in rows)
        self.rejecting = any(not r.coupled for r in rows)
        self.keep_logits = keep_logits or self.rejecting
        self.processors: Processors | None = None
        if self.greedy:
            return
        column = [1.0 if r.sampling.greedy else 1.0 / r.sampling.temperature for r in rows]
        self._scale = mx.array(column)[:, None, None]
        self._certain = mx.array([r.sampling.greedy for r in rows])[:, None, None]
        self.coupled = mx.array([r.coupled for r in rows])[:, None]
        self._seed = mx.array([[r.seed & 0xFFFFFFFF, r.seed >> 32] for r in rows], dtype=mx.uint32)
        drawn = [r.sampling for r in rows if not r.sampling.greedy]
        self._filtered = any(s.top_k or s.top_p < 1 or s.min_p for s in drawn)
        self._need_all = any(s.top_p < 1 and not s.top_k for s in drawn)
        self._most = max(s.top_k for s in drawn)
        if self._filtered:
            self._filters = _Filters([r.sampling for r in rows])

    def steered(self, processors: Processors | None) -> Sampler:
        """The same settings with what the rows' texts do to the logits of one round."""
        if processors is None:
            return self
        out = copy.copy(self)
        out.processors = processors
        return out

    @property
    def order_decides(self) -> bool:
        """Whether the order of the logits is all that matters, so that a soft cap may be left out."""
        return self.greedy and self.processors is None

    def filter(self, logits: mx.array) -> mx.array:
        """logits [B, L, C] float32 -> the same over temperature, with what the filters drop at -inf."""
        z = self.scaled(logits)
        least = self.least(z)
        return z if least is None else mx.where(z >= least, z, -mx.inf)

    def scaled(self, logits: mx.array) -> mx.array:
        """logits [B, L, C] float32 over temperature."""
        return logits * self._scale

    def least(self, z: mx.array) -> mx.array | None:
        """z [B, L, C], scaled -> [B, L, 1] the least value that the filters keep; None if no row filters."""
        if not self._filtered:
            return None
        count = z.shape[-1]
        take = count if self._need_all else min(max(self._most, 1), count)  # min_p alone needs only the maximum
        top = z if take == count else mx.topk(z, take, axis=-1)
        top = -mx.sort(-top, axis=-1)
        return self._filters.threshold(top)

    def noise(self, position: mx.array, ids: mx.array | None, count: int, stream: mx.array) -> mx.array:
        """Gumbel noise [B, L, C] at position [B, L] for tokens `ids` [B, 1, C], or 0 .. count-1.

        stream [B, 1] or scalar uint32 is mixed into the seed; rows whose token is certain get none.
        """
        seed = self._seed[:, None]
        seed = mx.stack([seed[..., 0], seed[..., 1] ^ stream], axis=-1)
        tokens = mx.arange(count, dtype=mx.uint32) if ids is None else ids
        return mx.where(self._certain, 0.0, gumbel(seed, position, tokens))

    @property
    def drafts_by_kernel(self) -> bool:
        """Whether `drafting` says all there is to know of a draft: nothing is processed or filtered (the kernel takes
        the head's logits as they come), no logits are kept."""
        return self.processors is None and not self.keep_logits and (self.greedy or not self._filtered)

    def drafting(self, position: mx.array) -> Draw | None:
        """`draw`'s noise as kernels take it, with logits as they come, at position [B]; None: all rows are greedy."""
        if self.greedy:
            return None
        inverse = mx.where(self._certain, 0.0, self._scale)[:, 0, 0]
        return Draw(inverse, self._stream_seed(DRAFT_STREAM), position)

    def choosing(self, position: mx.array) -> Draw | None:
        """`choose`'s noise as kernels take it, with scaled logits; position [B] is that of the first column."""
        if self.greedy:
            return None
        inverse = mx.where(self._certain, 0.0, 1.0)[:, 0, 0]
        return Draw(inverse, self._stream_seed(RESIDUAL_STREAM), position)

    def _stream_seed(self, value: int) -> mx.array:
        """[B, 2] uint32: every row's seed with `value` mixed in where it draws independently."""
        return mx.stack([self._seed[:, 0], self._seed[:, 1] ^ self._stream(value)[:, 0]], axis=-1)

    def _stream(self, value: int) -> mx.array:
        """[B, 1] uint32: 0 where the row is coupled, `value` where it draws independently."""
        return mx.where(self.coupled, mx.array(0, mx.uint32), mx.array(value, mx.uint32))

    def draw(
        self, logits: mx.array, ids: mx.array | None, position: mx.array, drafted: Sequence[mx.array] = ()
    ) -> Drawn:
        """A draft: logits [B, C] of tokens `ids` [B, C] (None: column c is token c), position [B] int32.

        drafted: the tokens [B] drafted before it in this round. They steer it as they will the target's choice; without
        them fewer drafts of requests with penalties are kept, and nothing else changes.
        """
        if self.processors is not None:
            logits = self.processors.step(logits, ids, drafted)
        shown = None if ids is None else ids[:, None]
        all_ = self._drawn(logits[:, None], shown, position[:, None])
        return Drawn(all_.tokens[:, 0], None if all_.logits is None else all_.logits[:, 0], ids)

    def draw_all(self, logits: mx.array, position: mx.array) -> Draft:
        """As `draw`, for drafts that were computed together: logits [B, L, V], position [B, L]. Penalties still see
        the tokens drawn before."""
        if self.processors is None:
            drawn = self._drawn(logits, None, position)
            source = None if drawn.logits is None else Candidates(drawn.logits, None)
            return Draft(drawn.tokens, source)
        steps: list[Drawn] = []
        for i in range(logits.shape[1]):
            steps.append(self.draw(logits[:, i], None, position[:, i], [s.tokens for s in steps]))
        return Drawn.draft(steps)

    def _drawn(self, logits: mx.array, ids: mx.array | None, position: mx.array) -> Drawn:
        """logits [B, L, C] of tokens `ids` [B, 1, C], position [B, L] -> tokens [B, L], logits [B, L, C]."""
        z = competing = logits
        if not self.greedy:
            z = self.filter(logits)
            competing = z + self.noise(position, ids, z.shape[-1], self._stream(DRAFT_STREAM))
        column = mx.argmax(competing, axis=-1)
        if ids is not None:
            column = mx.take_along_axis(ids[:, 0], column, axis=-1)
        return Drawn(column.astype(mx.int32), z if self.keep_logits else None)

    def offer(
        self, logits: mx.array, ids: mx.array | None, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """What `draw` is to choose from: a drafter's logits [B, C] of tokens `ids` [B, C] (None: column c is token c),
        or, in rows whose token after the ones in `drafted` is known beforehand, that token alone."""
        steering = self.processors.steering if self.processors is not None else None
        return (logits, ids) if steering is None else steering.force(logits, ids, len(drafted))

    def choose(self, filtered: mx.array, position: mx.array) -> mx.array:
        """The target's own choices [B, L] int32: filtered [B, L, V] from `filter`, position [B, L]."""
        noise = self.noise(position, None, filtered.shape[-1], self._stream(RESIDUAL_STREAM))
        return mx.argmax(filtered + noise, axis=-1).astype(mx.int32)

    def uniform(self, position: mx.array) -> mx.array:
        """Numbers in (0, 1), [B, K], for the acceptance tests at position [B, K]."""
        g = self.noise(position, mx.zeros((position.shape[0], 1, 1), mx.uint32), 1, mx.array(ACCEPT_STREAM, mx.uint32))
        return mx.exp(-mx.exp(-g[..., 0]))  # the distribution function of Gumbel noise, at the noise


class _Filters:
    """top_k, top_p and min_p of B rows, as one threshold per distribution."""

    def __init__(self, rows: list[Sampling]) -> None:
        def column(values: list) -> mx.array:
            return mx.array(values)[:, None, None]

        off = [s.greedy for s in rows]
        self.top_k = column([2**31 - 1 if o or not s.top_k else s.top_k for o, s in zip(off, rows, strict=True)])
        self.top_p = column([2.0 if o or s.top_p == 1 else s.top_p for o, s in zip(off, rows, strict=True)])
        self.log_min_p = mx.log(column([0.0 if o else s.min_p for o, s in zip(off, rows, strict=True)]))
        self.ranked = column([not o and bool(s.top_k or s.top_p < 1) for o, s in zip(off, rows, strict=True)])

    def threshold(self, top: mx.array) -> mx.array:
        """top [B, L, n] the n greatest values, falling -> [B, L, 1] the least value that is kept.

        As in transformers: a token stays in top_p while the probability before it, among those top_k left, is
        below p; ties with the last one kept stay.
        """
        rank = mx.arange(top.shape[-1])
        kept = rank < self.top_k
        share = mx.softmax(mx.where(kept, top, -mx.inf), axis=-1, precise=True)
        before = mx.cumsum(share, axis=-1) - share
        kept = kept & ((before < self.top_p) | (rank == 0))
        least = mx.min(mx.where(kept, top, mx.inf), axis=-1, keepdims=True)
        return mx.maximum(mx.where(self.ranked, least, -mx.inf), top[..., :1] + self.log_min_p)
