"""A verdict by chance: how fast the loop is at an acceptance that made-up weights cannot have."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.accept import Verdict, verdict
from mlx_mtp.rows import Draft
from mlx_mtp.sampling import Sampler


class Synthetic:
    """Keeps every draft with a probability, independently, up to the first that is not kept.

    The drafter's and the target's own verdict are computed all the same. The token after the last kept draft is the
    target's. Draws depend on the seed and on how many verdicts came before.
    """

    def __init__(self, probability: float, seed: int = 0) -> None:
        self._probability, self._seed, self._count = probability, seed, 0

    def __call__(
        self, draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
    ) -> Verdict:
        judged = verdict(draft, logits, start, sampler, hidden)
        if not draft.width:
            return judged
        self._count += 1
        drawn = mx.random.uniform(shape=draft.tokens.shape, key=mx.random.key(self._seed * 2**32 + self._count))
        leading = mx.cumprod((drawn < self._probability).astype(mx.int32), axis=1).sum(axis=1) + 1
        (kept,) = mx.depends([leading.astype(mx.int32)], [judged.kept])
        columns = mx.arange(draft.width)
        ours = mx.where(columns < kept[:, None] - 1, draft.tokens, judged.tokens[:, :-1])
        return Verdict(mx.concatenate([ours, judged.tokens[:, -1:]], axis=1), kept)
