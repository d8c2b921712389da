"""The verdict: which drafted tokens the text keeps, and what comes after them. Arrays in, arrays out.

Both rules are exact, and neither knows a model, a cache or a request.
Shapes: B rows, K drafted columns, V vocabulary; column j of the target's output judges draft j and follows column j-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mtp.kernels import verdict as kernel
from mlx_mtp.rows import Draft
from mlx_mtp.sampling import Sampler


@dataclass(frozen=True)
class Verdict:
    """tokens [B, K+1] int32: the first kept[b] of a row are its new text. kept [B] int32, from 1 to K+1.

    picked [B, H]: the hidden state that the last of them came from, where the kernel has picked it on its way.
    """

    tokens: mx.array
    kept: mx.array
    picked: mx.array | None = None

    @property
    def bonus(self) -> mx.array:
        """The last new token of every row, [B] int32; it is not in the cache yet."""
        return mx.take_along_axis(self.tokens, self.kept[:, None] - 1, axis=1)[:, 0]


class Judge(Protocol):
    """What an engine asks for a verdict; `verdict` is the exact one."""

    def __call__(
        self, draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
    ) -> Verdict: ...


def verdict_by_kernel(
    draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
) -> Verdict:
    """The same verdict, as far as it goes by the kernel."""
    return verdict(draft, logits, start, sampler, hidden, by_kernel=True)


def verdict(
    draft: Draft,
    logits: mx.array,
    start: mx.array,
    sampler: Sampler,
    hidden: mx.array | None = None,
    by_kernel: bool = False,
) -> Verdict:
    """Judge a draft.

    logits [B, K+1, V] float32 of the target after [bonus | draft]; start [B] int32: the position of the bonus token.
    hidden [B, K+1, H]: the states the logits came from, without which there is no kernel to do it.
    Rows are judged by drafter-invariant coupling where their sampler is coupled (seeded and greedy requests), by
    rejection sampling otherwise. Where the sampler has processors, every column is processed as if the drafts before
    it had been said: it counts only if they are kept, and then they have been.
    """
    if sampler.processors is not None:
        logits = sampler.processors.columns(logits, draft.tokens)
    rejecting = sampler.rejecting and draft.width > 0
    judged = _by_kernel(draft, logits, start, sampler, hidden) if by_kernel and not rejecting else None
    if judged is not None:
        return judged
    if sampler.greedy:
        return matching(draft.tokens, mx.argmax(logits, axis=-1).astype(mx.int32))
    position = start[:, None] + 1 + mx.arange(logits.shape[1])
    z, ids = sampler.narrowed(logits, None)
    if rejecting and not sampler.shares_noise:
        return rejection(draft, z, position, sampler, ids)
    chosen = sampler.choose(z, position, ids)
    coupled = matching(draft.tokens, chosen if ids is None else sampler.certain(chosen, logits))
    if not rejecting:
        return coupled
    drawn = rejection(draft, z, position, sampler, ids)
    tokens = mx.where(sampler.coupled, coupled.tokens, drawn.tokens)
    return Verdict(tokens, mx.where(sampler.coupled[:, 0], coupled.kept, drawn.kept))


def _by_kernel(
    draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None
) -> Verdict | None:
    """The verdict of choices that the kernel makes beside it; None where it cannot be used."""
    if hidden is None:
        return None
    least = draw = None
    if not sampler.greedy:
        logits = sampler.scaled(logits)
        least, draw = sampler.least(logits), sampler.choosing(start + 1)
    judged = kernel.Round(logits, draft.tokens, hidden, None if least is None else least[..., 0], draw)
    if kernel.why_not(judged):
        return None
    found = kernel.verdict(judged)
    return Verdict(found.tokens, found.kept, found.hidden)


def matching(draft: mx.array, chosen: mx.array) -> Verdict:
    """Keep drafts [B, K] while they equal the target's own choice [B, K+1] at their position.

    With greedy choices this is greedy decoding; with choices made by noise that is a function of (seed, position)
    it is drafter-invariant coupling (Daliri et al. 2025, algorithm 1): the text is the choices', whatever was drafted.
    """
    return Verdict(chosen, _leading(draft == chosen[:, :-1]) + 1)


def rejection(draft: Draft, z: mx.array, position: mx.array, sampler: Sampler, ids: mx.array | None = None) -> Verdict:
    """Rejection sampling (Leviathan et al. 2023, algorithm 1).

    z [B, K+1, C]: the target's filtered logits of tokens `ids` [B, K+1, C], beside which none is possible (None:
    column c is token c), p = softmax(z); position [B, K+1]. A draft x drawn from q is kept with probability
    min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(p - q, 0).
    A draft without `source` is a certain one: q(x) = 1.
    """
    width, columns = draft.width, mx.arange(z.shape[1])
    log_p = _log_chance(z[:, :-1], None if ids is None else ids[:, :-1], draft.tokens)
    log_q = 0.0 if draft.source is None else _log_chance(draft.source.logits, draft.source.ids, draft.tokens)
    kept = _leading(mx.log(sampler.uniform(position[:, :width])) < log_p - log_q)
    at = kept[:, None, None]
    p = mx.softmax(mx.take_along_axis(z, at, axis=1)[:, 0], axis=-1, precise=True)  # [B, C]
    tokens = None if ids is None else mx.take_along_axis(ids, at, axis=1)
    left = mx.maximum(p - _q_at(draft, kept, p.shape[-1], tokens), 0.0)
    left = mx.where(left.sum(axis=-1, keepdims=True) > 0, left, p)  # p = q up to rounding: nothing was rejected
    where = mx.take_along_axis(position, kept[:, None], axis=1)
    last = sampler.redraw(mx.log(left)[:, None], where, tokens)
    padded = mx.concatenate([draft.tokens, last], axis=1)
    return Verdict(mx.where(columns < kept[:, None], padded, last), kept + 1)


def _leading(hits: mx.array) -> mx.array:
    """hits [B, K] bool -> [B] int32: how many come before the first miss."""
    return mx.cumprod(hits.astype(mx.int32), axis=1).sum(axis=1)


def _log_chance(z: mx.array, ids: mx.array | None, tokens: mx.array) -> mx.array:
    """[B, K]: log of the probability of tokens [B, K] by logits z [B, K, C] of `ids`; minus infinity for others."""
    if ids is None:
        own = mx.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
    else:
        own = mx.max(mx.where(ids == tokens[..., None], z, -mx.inf), axis=-1)
    return own - mx.logsumexp(z, axis=-1)


def _q_at(draft: Draft, column: mx.array, count: int, tokens: mx.array | None) -> mx.array:
    """[B, C]: the drafter's distribution at column [B], for tokens [B, 1, C] (None: the first `count`); nothing where
    the column lies behind the draft."""
    inside = (column < draft.width)[:, None]
    at = mx.minimum(column, draft.width - 1)[:, None]
    if draft.source is None:
        drafted = mx.take_along_axis(draft.tokens, at, axis=1)
        return ((mx.arange(count) if tokens is None else tokens[:, 0]) == drafted) & inside
    q = mx.softmax(mx.take_along_axis(draft.source.logits, at[..., None], axis=1)[:, 0], axis=-1, precise=True)
    q = mx.where(inside, q, 0.0)
    ids = draft.source.ids
    if ids is None:
        return q if tokens is None else mx.take_along_axis(q, tokens[:, 0], axis=-1)
    ids = mx.take_along_axis(ids, at[..., None], axis=1)  # [B, 1, C']
    if tokens is None:
        return mx.put_along_axis(mx.zeros((q.shape[0], count)), ids[:, 0], q, axis=-1)
    return mx.where(tokens.swapaxes(1, 2) == ids, q[:, None], 0.0).sum(axis=-1)
