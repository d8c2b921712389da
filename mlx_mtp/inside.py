"""What target and drafter say of a prompt by themselves, outside of any engine."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.load import LoadedPair, LoadedTarget
from mlx_mtp.rows import GREEDY, Forward
from mlx_mtp.sampling import RowSampler, Sampler


def logits(target: LoadedTarget, ids: mx.array) -> mx.array:
    """The target's logits after every position, by one pass: ids [B, L] -> [B, L, V] float32."""
    cache, rows = _fresh(target, ids)
    scores = target.model.logits(target.model.forward(ids, cache.open(rows, ids.shape[1]))[0])
    mx.eval(scores)
    return scores


def draft(pair: LoadedPair, ids: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """What the network proposes, greedily, to follow the target's own greedy token: ids [B, L] -> (tokens [B, K] int32,
    logits [B, K, V] float32); what a clustered head does not score gets the least of its row's scores minus 1."""
    model = pair.target.model
    cache, rows = _fresh(pair.target, ids)
    pass_, drafter = cache.open(rows, ids.shape[1]), pair.new_drafter(cache)
    hidden, taps = model.forward(ids, pass_, drafter.taps)
    kept = mx.full((ids.shape[0],), ids.shape[1], mx.int32)
    cache.commit(rows, kept, ids.shape[1])
    for row in range(ids.shape[0]):
        drafter.begin(row, 0, None)
    bonus = mx.argmax(model.logits(hidden[:, -1]), axis=-1).astype(mx.int32)
    drafter.observe(Forward(rows, ids, hidden, taps, 0, newest=bonus), kept)
    sampler = Sampler([RowSampler.of(GREEDY)] * ids.shape[0], keep_logits=True)
    proposed = drafter.propose(rows, bonus, sampler, width)
    assert proposed.source is not None
    scores, which = proposed.source.logits, proposed.source.ids
    if which is not None:
        filler = mx.min(scores, axis=-1, keepdims=True) - 1
        full = mx.broadcast_to(filler, (*scores.shape[:2], model.config.vocab_size))
        scores = mx.put_along_axis(full, which, scores, axis=-1)
    mx.eval(proposed.tokens, scores)
    return proposed.tokens, scores


def _fresh(target: LoadedTarget, ids: mx.array) -> tuple[Cache, slice]:
    """A cache with a row for each of ids [B, L]."""
    cache = Cache(target.model.specs, MAX_WIDTH, target.dtype)
    for _ in range(ids.shape[0]):
        cache.join(ids.shape[1])
    return cache, slice(0, ids.shape[0])
