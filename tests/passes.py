"""One pass of a loaded network over one prompt, for tests that compare numbers."""

import mlx.core as mx
import numpy as np

from mlx_mtp.cache import Cache
from mlx_mtp.load import LoadedDrafter, LoadedTarget


def logits(target: LoadedTarget, ids: np.ndarray) -> np.ndarray:
    """Logits of one prompt in one pass, [L, V]."""
    cache = Cache(target.model.specs, 7, target.dtype)
    cache.join(64)
    hidden, _ = target.model.forward(mx.array(ids)[None], cache.open(slice(0, 1), len(ids)))
    return np.array(target.model.logits(hidden)[0])


def draft(target: LoadedTarget, drafter: LoadedDrafter, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the first draft step after a prompt, and the token ids of its columns."""
    cache = Cache(target.model.specs, 7, target.dtype)
    cache.join(64)
    row, tokens = slice(0, 1), mx.array(ids)[None]
    hidden, _ = target.model.forward(tokens, cache.open(row, len(ids)))
    cache.commit(row, mx.array([len(ids)]), len(ids))
    sliding, full = target.model.drafter_slots
    views = cache.committed(sliding, row, 17), cache.committed(full, row, None)
    embedded = target.model.embed(tokens[:, -1:])
    y, _ = drafter.model.step(embedded, hidden[:, -1:], cache.lengths[row], views)
    out, columns = drafter.model.logits(y)
    return np.array(out[0]), np.array(mx.arange(out.shape[1]) if columns is None else columns[0])
