"""The verdict: which drafted tokens the text keeps, and what comes after them. Arrays in, arrays out.

Both rules are exact, and neither knows a model, a cache or a request.
Shapes: B rows, K drafted columns, V vocabulary; column j of the target's output judges draft j and follows column j-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mtp import kernels
from mlx_mtp.kernels import verdict as kernel
from mlx_mtp.kernels.choice import Draw
from mlx_mtp.rows import Candidates, Draft
from mlx_mtp.sampling import RESIDUAL_STREAM, Sampler


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


def verdict(
    draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
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
    if sampler.greedy:
        judged = _by_kernel(draft, logits, None, hidden, None)
        return judged or matching(draft.tokens, mx.argmax(logits, axis=-1).astype(mx.int32))
    position = start[:, None] + 1 + mx.arange(logits.shape[1])
    scaled = sampler.scaled(logits)
    least = sampler.least(scaled)
    z = scaled if least is None else mx.where(scaled >= least, scaled, -mx.inf)
    judged = _by_kernel(draft, scaled, least, hidden, sampler.choosing(start + 1))
    coupled = judged or matching(draft.tokens, sampler.choose(z, position))
    if not sampler.rejecting or draft.width == 0:
        return coupled
    drawn = rejection(draft, z, position, sampler)
    tokens = mx.where(sampler.coupled, coupled.tokens, drawn.tokens)
    return Verdict(tokens, mx.where(sampler.coupled[:, 0], coupled.kept, drawn.kept))


def _by_kernel(
    draft: Draft, logits: mx.array, least: mx.array | None, hidden: mx.array | None, draw: Draw | None
) -> Verdict | None:
    """`matching` with the choices made beside it; None where the kernel cannot be used."""
    if hidden is None or not kernels.usable("verdict"):
        return None
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


def rejection(draft: Draft, z: mx.array, position: mx.array, sampler: Sampler) -> Verdict:
    """Rejection sampling (Leviathan et al. 2023, algorithm 1).

    z [B, K+1, V]: the target's filtered logits, p = softmax(z); position [B, K+1]. A draft x drawn from q is kept
    with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(p - q, 0).
    A draft without `source` is a certain one: q(x) = 1.
    """
    width, columns = draft.width, mx.arange(z.shape[1])
    log_p = mx.take_along_axis(z[:, :-1], draft.tokens[..., None], axis=-1)[..., 0]
    log_p = log_p - mx.logsumexp(z[:, :-1], axis=-1)
    log_q = _log_q(draft)
    kept = _leading(mx.log(sampler.uniform(position[:, :width])) < log_p - log_q)
    at = kept[:, None, None]
    p = mx.softmax(mx.take_along_axis(z, at, axis=1)[:, 0], axis=-1, precise=True)  # [B, V]
    left = mx.maximum(p - _q_at(draft, kept, p.shape[-1]), 0.0)
    left = mx.where(left.sum(axis=-1, keepdims=True) > 0, left, p)  # p = q up to rounding: nothing was rejected
    where = mx.take_along_axis(position, kept[:, None], axis=1)
    noise = sampler.noise(where, None, p.shape[-1], mx.array(RESIDUAL_STREAM, mx.uint32))[:, 0]
    last = mx.argmax(mx.log(left) + noise, axis=-1).astype(mx.int32)
    padded = mx.concatenate([draft.tokens, last[:, None]], axis=1)
    return Verdict(mx.where(columns < kept[:, None], padded, last[:, None]), kept + 1)


def _leading(hits: mx.array) -> mx.array:
    """hits [B, K] bool -> [B] int32: how many come before the first miss."""
    return mx.cumprod(hits.astype(mx.int32), axis=1).sum(axis=1)


def _log_q(draft: Draft) -> mx.array:
    """[B, K]: log of the probability with which every draft was drawn."""
    if draft.source is None:
        return mx.zeros(draft.tokens.shape)
    z = draft.source.logits
    return mx.take_along_axis(z, _columns(draft, draft.source), axis=-1)[..., 0] - mx.logsumexp(z, axis=-1)


def _columns(draft: Draft, source: Candidates) -> mx.array:
    """[B, K, 1]: the column of `source` that holds each drafted token."""
    if source.ids is None:
        return draft.tokens[..., None]
    return mx.argmax(source.ids == draft.tokens[..., None], axis=-1, keepdims=True)


def _q_at(draft: Draft, column: mx.array, vocabulary: int) -> mx.array:
    """[B, V]: the drafter's distribution at column [B]; nothing where the column lies behind the draft."""
    inside = (column < draft.width)[:, None]
    at = mx.minimum(column, draft.width - 1)[:, None]
    if draft.source is None:
        token = mx.take_along_axis(draft.tokens, at, axis=1)
        return (mx.arange(vocabulary) == token) & inside
    q = mx.softmax(mx.take_along_axis(draft.source.logits, at[..., None], axis=1)[:, 0], axis=-1, precise=True)
    q = mx.where(inside, q, 0.0)
    if draft.source.ids is None:
        return q
    ids = mx.take_along_axis(draft.source.ids, at[..., None], axis=1)[:, 0]
    return mx.put_along_axis(mx.zeros((q.shape[0], vocabulary)), ids, q, axis=-1)
