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
from mlx_mtp.top_k import SORTED, falling, nucleus, top_k

# Streams of noise for unseeded rows, whose draft, acceptance test and correction must be independent.
DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0x6A09E667, 0xBB67AE85, 0x3C6EF372

# Tokens that tie with the last one that top_k keeps stay too, and of bfloat16 logits several do at every rank, about
# a tenth of top_k in [16, 32). So there are columns for as many ties as top_k, and TIES more; of still more, `top_k`
# decides which stay. (The kernel of the verdict keeps them all.)
TIES = 64
MOST_COLUMNS = 1024  # to match a draft's candidates with the target's takes the product of both


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
        self.shares_noise = any(r.coupled for r in rows)
        self.keep_logits = keep_logits or self.rejecting
        self.processors: Processors | None = None
        if self.greedy:
            return
        column = [1.0 if r.sampling.greedy else 1.0 / r.sampling.temperature for r in rows]
        self._scale, self._scales = mx.array(column)[:, None, None], any(scale != 1 for scale in column)
        self._certain = mx.array([r.sampling.greedy for r in rows])[:, None, None]
        self._some_certain = any(r.sampling.greedy for r in rows)
        self.coupled = mx.array([r.coupled for r in rows])[:, None]
        self._seed = mx.array([[r.seed & 0xFFFFFFFF, r.seed >> 32] for r in rows], dtype=mx.uint32)
        # Computed once: a sampler lives as long as its rows are together.
        self._draft_seed, self._own_seed = (self._stream_seed(s)[:, None] for s in (DRAFT_STREAM, RESIDUAL_STREAM))
        drawn = [r.sampling for r in rows if not r.sampling.greedy]
        self._filtered = any(s.top_k or s.top_p < 1 or s.min_p for s in drawn)
        self._most = max(s.top_k for s in drawn)
        self._columns = 2 * self._most + TIES if all(s.top_k for s in drawn) else None
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

    def narrowed(self, logits: mx.array, ids: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """logits [B, L, C] float32 of tokens `ids` [B, 1, C] (None: column c is token c) -> (logits as by `filter`,
        ids) of the fewer columns [B, L, n] that top_k may keep, in their order; of all where it leaves too many."""
        most = self._columns
        if most is None or most > MOST_COLUMNS or most >= logits.shape[-1]:
            return self.filter(logits), ids
        columns = top_k(logits, most)
        found = columns if ids is None else mx.take_along_axis(ids, columns, axis=-1)
        return self.filter(mx.take_along_axis(logits, columns, axis=-1)), found

    def filter(self, logits: mx.array) -> mx.array:
        """logits [B, L, C] float32 -> the same over temperature, with what the filters drop at -inf."""
        z = self.scaled(logits)
        least = self.least(z)
        return z if least is None else mx.where(z >= least, z, -mx.inf)

    def scaled(self, logits: mx.array) -> mx.array:
        """logits [B, L, C] float32 over temperature."""
        return logits * self._scale if self._scales else logits

    def least(self, z: mx.array) -> mx.array | None:
        """z [B, L, C], scaled -> [B, L, 1] the least value that the filters keep; None if no row filters."""
        return self._filters.least(z) if self._filtered else None

    def noise(self, position: mx.array, ids: mx.array | None, count: int, stream: mx.array) -> mx.array:
        """Gumbel noise [B, L, C] at position [B, L] for tokens `ids` [B, L or 1, C], or 0 .. count-1.

        stream [B, 1] or scalar uint32 is mixed into the seed; rows whose token is certain get none.
        """
        seed = self._seed[:, None]
        return self._noise(position, ids, count, mx.stack([seed[..., 0], seed[..., 1] ^ stream], axis=-1))

    def _noise(self, position: mx.array, ids: mx.array | None, count: int, seed: mx.array) -> mx.array:
        tokens = mx.arange(count, dtype=mx.uint32) if ids is None else ids
        found = gumbel(seed, position, tokens)
        return mx.where(self._certain, 0.0, found) if self._some_certain else found

    def choosing(self, position: mx.array) -> Draw | None:
        """`choose`'s noise as kernels take it, with scaled logits; position [B] is that of the first column."""
        if self.greedy:
            return None
        inverse = mx.where(self._certain, 0.0, 1.0)[:, 0, 0]
        return Draw(inverse, self._own_seed[:, 0], position)

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
        z, found = (None if a is None else a[:, 0] for a in (all_.logits, all_.ids))
        return Drawn(all_.tokens[:, 0], z, found)

    def draw_all(self, logits: mx.array, position: mx.array) -> Draft:
        """As `draw`, for drafts that were computed together: logits [B, L, V], position [B, L]. Penalties still see
        the tokens drawn before."""
        if self.processors is None:
            drawn = self._drawn(logits, None, position)
            source = None if drawn.logits is None else Candidates(drawn.logits, drawn.ids)
            return Draft(drawn.tokens, source)
        steps: list[Drawn] = []
        for i in range(logits.shape[1]):
            steps.append(self.draw(logits[:, i], None, position[:, i], [s.tokens for s in steps]))
        return Drawn.draft(steps)

    def _drawn(self, logits: mx.array, ids: mx.array | None, position: mx.array) -> Drawn:
        """logits [B, L, C] of tokens `ids` [B, 1, C], position [B, L] -> tokens [B, L], logits and ids [B, L, n]."""
        z = competing = logits
        if not self.greedy:
            z, ids = self.narrowed(logits, ids)
            competing = z + self._noise(position, ids, z.shape[-1], self._draft_seed)
        token = _best(competing, ids)
        return Drawn(token, z if self.keep_logits else None, ids)

    def offer(
        self, logits: mx.array, ids: mx.array | None, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """What `draw` is to choose from: a drafter's logits [B, C] of tokens `ids` [B, C] (None: column c is token c),
        or, in rows whose token after the ones in `drafted` is known beforehand, that token alone."""
        steering = self.processors.steering if self.processors is not None else None
        return (logits, ids) if steering is None else steering.force(logits, ids, len(drafted))

    def choose(self, filtered: mx.array, position: mx.array, ids: mx.array | None = None) -> mx.array:
        """The target's own choices [B, L] int32: filtered [B, L, C] of tokens `ids` as `narrowed` gives them, position
        [B, L]."""
        return _best(filtered + self._noise(position, ids, filtered.shape[-1], self._own_seed), ids)

    def redraw(self, logits: mx.array, position: mx.array, ids: mx.array | None) -> mx.array:
        """Tokens [B, L] int32 drawn from logits [B, L, C] of `ids`, independently of drafts and tests, at position
        [B, L]; coupled rows too."""
        noise = self.noise(position, ids, logits.shape[-1], mx.array(RESIDUAL_STREAM, mx.uint32))
        return _best(logits + noise, ids)

    def certain(self, chosen: mx.array, logits: mx.array) -> mx.array:
        """chosen [B, L], made from few columns, with the first of the best tokens of all, logits [B, L, V], in greedy
        rows: of more ties than columns, `narrowed` may have left it out."""
        if not self._some_certain:
            return chosen
        return mx.where(self._certain[..., 0], _best(logits, None), chosen)

    def uniform(self, position: mx.array) -> mx.array:
        """Numbers in (0, 1), [B, K], for the acceptance tests at position [B, K]."""
        g = self.noise(position, mx.zeros((position.shape[0], 1, 1), mx.uint32), 1, mx.array(ACCEPT_STREAM, mx.uint32))
        return mx.exp(-mx.exp(-g[..., 0]))  # the distribution function of Gumbel noise, at the noise


def _best(competing: mx.array, ids: mx.array | None) -> mx.array:
    """The winners' tokens, [B, L] int32: competing [B, L, C] of tokens `ids` [B, L, C] (None: column c is token c)."""
    column = mx.argmax(competing, axis=-1)
    if ids is not None:
        column = mx.take_along_axis(ids, column[..., None], axis=-1)[..., 0]
    return column.astype(mx.int32)


class _Filters:
    """top_k, top_p and min_p of B rows, as one threshold per distribution."""

    def __init__(self, rows: list[Sampling]) -> None:
        def column(values: list) -> mx.array:
            return mx.array(values)[:, None, None]

        drawn = [None if s.greedy else s for s in rows]
        self._most = max(s.top_k for s in drawn if s)
        self._alone = [bool(s and s.top_p < 1 and not s.top_k) for s in drawn]  # rows with top_p and without top_k
        self.top_k = column([s.top_k if s and s.top_k else 2**31 - 1 for s in drawn])
        self.top_p = column([s.top_p if s and s.top_p < 1 else 2.0 for s in drawn])
        self.log_min_p = mx.log(column([s.min_p if s else 0.0 for s in drawn]))
        self.ranked = column([bool(s and (s.top_k or s.top_p < 1)) for s in drawn])
        self.alone = column(self._alone)

    def least(self, z: mx.array) -> mx.array:
        """z [B, L, C] -> [B, L, 1] the least value that is kept.

        As in transformers: a token stays in top_p while the probability before it, among those top_k left, is
        below p; ties with the last one kept stay.
        """
        count, sums = z.shape[-1], any(self._alone)
        if sums and count <= SORTED:
            return self._threshold(falling(z, count))
        top = falling(z, min(max(self._most, 1), count))  # min_p alone needs only the maximum
        least = self._threshold(top)
        if not sums:
            return least
        return mx.where(self.alone, mx.maximum(nucleus(z, self.top_p), top[..., :1] + self.log_min_p), least)

    def _threshold(self, top: mx.array) -> mx.array:
        """The same from the n greatest values alone, falling, [B, L, n]."""
        rank = mx.arange(top.shape[-1])
        kept = rank < self.top_k
        share = mx.softmax(mx.where(kept, top, -mx.inf), axis=-1, precise=True)
        before = mx.cumsum(share, axis=-1) - share
        kept = kept & ((before < self.top_p) | (rank == 0))
        least = mx.min(mx.where(kept, top, mx.inf), axis=-1, keepdims=True)
        return mx.maximum(mx.where(self.ranked, least, -mx.inf), top[..., :1] + self.log_min_p)
