"""Log-probabilities of tokens: computed beside the verdict, packed as integers so that one host read brings all.

They are the log-softmax of the target's logits as they come. Knows no row and no sampler.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_mtp.rows import TokenLogprob
from mlx_mtp.top_k import top_k


def pack(logits: mx.array, tokens: mx.array, most: int) -> mx.array:
    """logits [B, L, V] float32, tokens [B, L] int32 -> [B, L, 1 + 2 * most] int32.

    The token's log-probability and the `most` greatest ones, by their ids, as the bits of float32; then those.
    """
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, tokens[..., None], axis=-1)
    if not most:
        return (own - total).view(mx.int32)
    ids = top_k(logits, most)
    values = mx.concatenate([own, mx.take_along_axis(logits, ids, axis=-1)], axis=-1) - total
    return mx.concatenate([values.view(mx.int32), ids], axis=-1)


def unpack(packed: np.ndarray, tokens: list[int], wanted: int) -> tuple[TokenLogprob, ...]:
    """What `pack` gave for the columns of one row, [L, 1 + 2 * most], as far as there are tokens; the best `wanted`.

    Best first, the lowest id first on ties, the token itself among them: so a greedy choice always comes first.
    """
    out, most = [], packed.shape[1] // 2
    for token, column in zip(tokens, packed, strict=False):
        own, *floats = map(float, column[: 1 + most].view(np.float32))
        top = dict(zip(map(int, column[1 + most :]), floats, strict=True))
        top[token] = own
        best = sorted(top.items(), key=lambda pair: (-pair[1], pair[0]))[:wanted]
        out.append(TokenLogprob(token, own, tuple(best)))
    return tuple(out)
