"""What the constraints of some rows do to a round: forced drafts, hints for the drafter, masks for the verdict.

A constraint lives on the host, and a round's graph is built before the host knows where the texts stand. So the graph
reads what the host will say from `Slot`s, which are filled when it is sent: the hints before the draft, and the masks,
for which the host must know what was drafted, while the target's pass runs.
Shapes: B rows of the round, K width, V vocabulary, W = ceil(V / 32) words of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_mtp.buffers import Slot
from mlx_mtp.drafters.lookup import certain
from mlx_mtp.processors import Processors, Steering
from mlx_mtp.rows import Candidates, Draft, Follower
from mlx_mtp.sampling import Sampler
from mlx_mtp.scheduler import Row

NOTHING = Processors(None, None, None, None, None, None)
ALL_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Plan:
    """A round as far as constraints do not decide. width: what the depth policy has chosen. most: as wide as forced
    tokens may make it; 0 drafts none. settled: it is known what they force, since nothing is under way."""

    width: int
    most: int
    vocabulary: int
    settled: bool


class Guide:
    """The constraints of one round.

    width: what is drafted a row. own: how much of it the drafter drafted. certain: it has no part in it, so that
    nothing need be read to know the draft.
    """

    def __init__(self, decoded: Sequence[Row], active: Sequence[Row], plan: Plan) -> None:
        self._rows = [row if row in active else None for row in decoded]
        self._most, self._vocabulary, self._drafted = plan.most, plan.vocabulary, plan.width
        self._forced: list[list[int]] = [[] for _ in decoded]
        self._hints: tuple[Slot, Slot, Slot] | None = None
        self.own = 0
        if plan.settled:
            self._look()
        self.width, self.certain = self._widened()

    def fits(self) -> bool:
        """Whether the round, built before it was known, is still the one to run now that all that was said has been
        followed."""
        self._look()
        return (self.width, self.certain) == self._widened()

    def _look(self) -> None:
        self._forced = [f.forced(self._most) if f is not None and self._most else [] for f in self._followers()]

    def _widened(self) -> tuple[int, bool]:
        # Each column costs every row something: wider rounds are for the case that half of the rows gain by them.
        lengths = [len(f) for f, row in zip(self._forced, self._rows, strict=True) if row is not None and not row.done]
        lengths = sorted(lengths, reverse=True) or [0]
        width = max(self._drafted, lengths[(len(lengths) - 1) // 2])
        return width, self._drafted == 0 or lengths[-1] >= width

    def _followers(self) -> list[Follower | None]:
        return [row.follower if row is not None and not row.done else None for row in self._rows]

    # the draft ------------------------------------------------------------------------------------------------

    def hinting(self, sampler: Sampler) -> Sampler:
        """A sampler that drafts forced tokens, and after them one that may follow."""
        rows = len(self._rows)
        steps = Slot(np.full((rows, self._drafted), -1, np.int32))
        may = Slot(np.full((rows, _words(self._vocabulary)), ALL_BITS, np.uint32))
        at = Slot(np.full((rows,), -1, np.int32))
        self._hints = steps, may, at
        steering = Steering(steps.array, _bits(may.array, self._vocabulary), at.array)
        return sampler.steered(replace(sampler.processors or NOTHING, steering=steering))

    def completed(self, draft: Draft) -> Draft:
        """A draft by `hinting` with forced tokens in their places, whether its drafter has heeded them or not, and
        behind it as far as the round is wide; a row that has none there drafts token 0, surely."""
        assert self._hints is not None
        steps = self._hints[0].array[:, : draft.width]
        tokens = mx.where(steps >= 0, steps, draft.tokens)
        source = None if draft.source is None else certain(draft.source, tokens, steps >= 0)
        self._drafted = self.own = draft.width
        self.width, self.certain = self._widened()
        if self.width == draft.width:
            return Draft(tokens, source)
        tail = mx.array([row[draft.width :] for row in self.known()], mx.int32)
        return Draft(mx.concatenate([tokens, tail], axis=1), source and self._behind(source, tail))

    def _behind(self, source: Candidates, tail: mx.array) -> Candidates:
        """The source with certain drafts [B, n] behind its own."""
        count, ids = source.logits.shape[-1], source.ids
        first = tail[..., None] if ids is None else mx.zeros((*tail.shape, 1), mx.int32)
        sure = mx.where(mx.arange(count) == first, 0.0, -mx.inf)
        if ids is not None:
            others = (tail[..., None] + mx.arange(count, dtype=mx.int32)) % self._vocabulary
            ids = mx.concatenate([ids, others], axis=1)
        return Candidates(mx.concatenate([source.logits, sure], axis=1), ids)

    def known(self) -> list[list[int]]:
        """The forced tokens of every row as far as the round is wide, and zeros behind them."""
        return [[*tokens[: self.width], *[0] * (self.width - len(tokens))] for tokens in self._forced]

    def hint(self) -> None:
        """Fill what `hinting` reads, before the draft is sent."""
        if self._hints is None:
            return
        steps, may, at = (slot.host for slot in self._hints)
        for b, (follower, tokens) in enumerate(zip(self._followers(), self._forced, strict=True)):
            tokens = tokens[: steps.shape[1]]
            steps[b, : len(tokens)] = tokens
            if follower is not None and len(tokens) < self._drafted:
                may[b], at[b] = follower.masks(tokens)[-1], len(tokens)

    # the verdict ----------------------------------------------------------------------------------------------

    def judging(self, sampler: Sampler, draft: mx.array, logits: mx.array) -> Sampler:
        """A sampler that lets through, in every column, what may stand there. What it is judged by, draft [B, K] and
        the target's logits, can be computed before that is known."""
        self.draft, self.logits = draft, logits
        shape = (len(self._rows), self.width + 1, _words(self._vocabulary))
        self._masks = Slot(np.full(shape, ALL_BITS, np.uint32))
        return _allowing(sampler, self._masks.array, self._vocabulary)

    def judge(self, drafts: Sequence[Sequence[int]]) -> None:
        """Fill what `judging` reads, before the verdict is sent. drafts: B rows of K tokens."""
        for b, (follower, draft) in enumerate(zip(self._followers(), drafts, strict=True)):
            if follower is not None:
                self._masks.host[b] = follower.masks(draft)


def beginning(sampler: Sampler, followers: Sequence[Follower | None], vocabulary: int) -> Sampler:
    """A sampler that lets through what may come next in every row."""
    words = np.full((len(followers), 1, _words(vocabulary)), ALL_BITS, np.uint32)
    for b, follower in enumerate(followers):
        if follower is not None:
            words[b] = follower.masks([])
    return _allowing(sampler, mx.array(words), vocabulary)


def _allowing(sampler: Sampler, words: mx.array, vocabulary: int) -> Sampler:
    return sampler.steered(replace(sampler.processors or NOTHING, allowed=_bits(words, vocabulary)))


def _words(vocabulary: int) -> int:
    return (vocabulary + 31) // 32


def _bits(words: mx.array, vocabulary: int) -> mx.array:
    """[..., W] uint32 -> [..., V] bool, on the device: an eighth of the bytes cross over."""
    bits = (words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :vocabulary].astype(mx.bool_)
