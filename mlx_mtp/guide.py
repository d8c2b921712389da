"""What the constraints of some rows do to a round: forced drafts, hints for the drafter, masks for the verdict.

A constraint lives on the host, so the host must know what was drafted before the verdict can be built. The target's
pass does not depend on it, and runs meanwhile.
Shapes: B rows of the round, K width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.processors import Processors, Steering
from mlx_mtp.rows import Candidates, Draft, Follower
from mlx_mtp.sampling import Sampler
from mlx_mtp.scheduler import Row

NOTHING = Processors(None, None, None, None, None, None)


class Guide:
    """The constraints of one round."""

    def __init__(self, decoded: Sequence[Row], active: Sequence[Row], width: int, most: int, vocabulary: int) -> None:
        """width: what the depth policy has chosen; the round becomes wider, up to `most`, where tokens are forced."""
        self._followers: list[Follower | None] = [r.follower if r in active else None for r in decoded]
        self._vocabulary = vocabulary
        self._forced = [f.forced(most) if f is not None and width else [] for f in self._followers]
        # Each column costs every row something: wider rounds are for the case that half of the rows gain by them.
        lengths = sorted((len(f) for f in self._forced), reverse=True)
        self.width = max(width, lengths[(len(lengths) - 1) // 2]) if width else 0
        self._drafted = width
        # The whole draft of every row that counts is known: nothing need be drafted, and nothing read.
        self.certain = all(len(f) >= self.width for f, row in zip(self._forced, decoded, strict=True) if row in active)

    def hinting(self, sampler: Sampler) -> Sampler:
        """A sampler that drafts forced tokens, and after them one that may follow."""
        rows = len(self._followers)
        forced = np.full((rows, max((len(f) for f in self._forced), default=0)), -1, np.int32)
        allowed, at = np.full((rows, _words(self._vocabulary)), 0xFFFFFFFF, np.uint32), np.full(rows, -1, np.int32)
        for b, (follower, tokens) in enumerate(zip(self._followers, self._forced, strict=True)):
            forced[b, : len(tokens)] = tokens
            if follower is not None and len(tokens) < self._drafted:
                allowed[b], at[b] = follower.masks(tokens)[-1], len(tokens)
        steering = Steering(mx.array(forced), _bits(allowed, self._vocabulary), mx.array(at))
        return sampler.steered(dataclasses.replace(sampler.processors or NOTHING, steering=steering))

    def extended(self, draft: Draft) -> Draft:
        """A draft with forced tokens up to the round's width; a row that has none there drafts token 0, surely."""
        more = self.width - draft.width
        if more <= 0:
            return draft
        rows, begin = len(self._followers), draft.width
        tail = np.zeros((rows, more), np.int32)
        for b, tokens in enumerate(self._forced):
            tokens = tokens[begin : self.width]
            tail[b, : len(tokens)] = tokens
        tokens = mx.concatenate([draft.tokens, mx.array(tail)], axis=1)
        source = draft.source
        if source is not None:
            count = source.logits.shape[-1]
            first = mx.array(tail)[..., None] if source.ids is None else mx.zeros((rows, more, 1), mx.int32)
            sure = mx.where(mx.arange(count) == first, 0.0, -mx.inf)
            ids = source.ids
            if ids is not None:
                others = (mx.array(tail)[..., None] + mx.arange(count, dtype=mx.int32)) % self._vocabulary
                ids = mx.concatenate([ids, others], axis=1)
            source = Candidates(mx.concatenate([source.logits, sure], axis=1), ids)
        return Draft(tokens, source)

    def known(self) -> list[list[int]]:
        """The draft of a round that is `certain`."""
        return [[*tokens[: self.width], *[0] * (self.width - len(tokens))] for tokens in self._forced]

    def judging(self, sampler: Sampler, drafts: Sequence[Sequence[int]]) -> Sampler:
        """A sampler that lets through, in every column, what may stand there. drafts: B rows of K tokens."""
        return allowing(sampler, self._followers, drafts, self._vocabulary)


def allowing(
    sampler: Sampler, followers: Sequence[Follower | None], drafts: Sequence[Sequence[int]], vocabulary: int
) -> Sampler:
    """A sampler that lets through what may follow every row's text and each beginning of its draft."""
    columns = len(drafts[0]) + 1
    masks = np.full((len(followers), columns, _words(vocabulary)), 0xFFFFFFFF, np.uint32)
    for b, (follower, draft) in enumerate(zip(followers, drafts, strict=True)):
        if follower is not None:
            masks[b] = follower.masks(draft)
    return sampler.steered(dataclasses.replace(sampler.processors or NOTHING, allowed=_bits(masks, vocabulary)))


def _words(vocabulary: int) -> int:
    return (vocabulary + 31) // 32


def _bits(words: np.ndarray, vocabulary: int) -> mx.array:
    """[..., ceil(V / 32)] uint32 -> [..., V] bool, on the device: an eighth of the bytes cross over."""
    bits = (mx.array(words)[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :vocabulary].astype(mx.bool_)
