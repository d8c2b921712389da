"""Passes of a loaded network over one prompt, for tests that compare numbers."""

import mlx.core as mx
import numpy as np

from mlx_mtp.cache import Cache
from mlx_mtp.load import LoadedDrafter, LoadedTarget

ROW = slice(0, 1)
WIDEST = 7  # drafts a round


def prefilled(target: LoadedTarget, ids: np.ndarray) -> tuple[Cache, mx.array]:
    """The cache of one prompt that entered in one pass, and its hidden states [1, L, H]."""
    cache = Cache(target.model.specs, WIDEST, target.dtype)
    cache.join(len(ids) + 64)
    return cache, extended(target, cache, ids)


def extended(target: LoadedTarget, cache: Cache, ids: np.ndarray, is_round: bool = False) -> mx.array:
    """Hidden states [1, L, H] of so many more tokens, which stay in the cache; of a prompt, or of a round."""
    pass_ = cache.open(ROW, len(ids), frozenset() if is_round else None)
    hidden, _ = target.model.forward(mx.array(ids)[None], pass_)
    cache.commit(ROW, mx.array([len(ids)]), len(ids))
    return hidden


def logits(target: LoadedTarget, ids: np.ndarray) -> np.ndarray:
    """Logits of one prompt in one pass, [L, V]."""
    return np.array(target.model.logits(prefilled(target, ids)[1])[0])


def draft(target: LoadedTarget, drafter: LoadedDrafter, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the first draft step after a prompt, and the token ids of its columns."""
    cache, hidden = prefilled(target, ids)
    sliding, full = target.model.config.drafter_slots
    views = cache.committed(sliding, ROW, 17), cache.committed(full, ROW, None)
    embedded = target.model.embed(mx.array(ids)[None, -1:])
    y, _ = drafter.model.step(embedded, hidden[:, -1:], cache.lengths[ROW], views)
    out, columns = drafter.model.logits(y)
    return np.array(out[0]), np.array(mx.arange(out.shape[1]) if columns is None else columns[0])


def shared_with_drafter(target: LoadedTarget, cache: Cache) -> dict[str, np.ndarray]:
    """Keys and values [heads, positions, D] that the drafter reads: a window and one of the sliding layer, all of the
    full one."""
    length, found = cache.bounds[0], {}
    for slot, kind in zip(target.model.config.drafter_slots, ("sliding_attention", "full_attention"), strict=True):
        window = target.model.specs[slot].window
        places = np.arange(max(0, length - window - 1) if window else 0, length)
        (part,) = cache.committed(slot, ROW, window and window + 1).parts
        where = mx.array(places % cache.ring_size(window) if window else places)
        found |= {f"{kind}_keys": part.keys[0][:, where], f"{kind}_values": part.values[0][:, where]}
    return {name: np.array(value.astype(mx.float32)) for name, value in found.items()}


def best_token(target: LoadedTarget, prompt: np.ndarray, text: np.ndarray, columns: int) -> np.ndarray:
    """The token that each of a text's columns would choose [L]: after a prompt, in passes of so many columns."""
    cache, chosen = prefilled(target, prompt)[0], []
    for first in range(0, len(text), columns):
        hidden = extended(target, cache, text[first : first + columns], is_round=True)
        chosen.append(np.array(mx.argmax(target.model.logits(hidden)[0], axis=-1)))
    return np.concatenate(chosen)


def greedy(target: LoadedTarget, prompt: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that follow a prompt, one a pass, and by how much the logit of each exceeds the second best."""
    cache, hidden = prefilled(target, prompt)
    tokens, margins = [], []
    for _ in range(count):
        scores = target.model.logits(hidden[:, -1])[0].astype(mx.float32)
        best = mx.topk(scores, 2)
        tokens.append(mx.argmax(scores).item())
        margins.append(mx.abs(best[0] - best[1]).item())
        hidden = extended(target, cache, np.array(tokens[-1:]), is_round=True)
    return np.array(tokens), np.array(margins)
