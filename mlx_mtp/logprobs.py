"""Log-probabilities of tokens: computed beside the verdict, packed as integers so that one host read brings all.

They are the log-softmax of the target's logits as they come. Knows no row and no sampler.
"""

from __future__ import annotations

import struct

import mlx.core as mx

from mlx_mtp.rows import TokenLogprob


def packed_size(most: int) -> int:
    """Numbers a token takes when the `most` most probable ones are packed beside it."""
    return 1 + 2 * most


def pack(logits: mx.array, tokens: mx.array, most: int) -> mx.array:
    """logits [B, L, V] float32, tokens [B, L] int32 -> [B, L, 1 + 2 * most] int32.

    The token's log-probability and the `most` greatest ones, in no order, as the bits of float32; then their ids.
    """
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, tokens[..., None], axis=-1)
    if not most:
        return (own - total).view(mx.int32)
    ids = mx.argpartition(-logits, most - 1, axis=-1)[..., :most].astype(mx.int32)
    values = mx.concatenate([own, mx.take_along_axis(logits, ids, axis=-1)], axis=-1) - total
    return mx.concatenate([values.view(mx.int32), ids], axis=-1)


def packed_rows(logits: mx.array, tokens: mx.array, rows: list[int], most: int) -> list[mx.array]:
    """`pack` of some of the rows, flat, in a list; an empty one for no rows."""
    if not rows:
        return []
    if len(rows) < logits.shape[0]:
        some = mx.array(rows, mx.int32)
        logits, tokens = logits[some], tokens[some]
    return [pack(logits, tokens, most).reshape(-1)]


def unpack(values: list[int], tokens: list[int], most: int, wanted: int) -> tuple[TokenLogprob, ...]:
    """What `pack` gave for the columns of one row, flat, as far as there are tokens; the best `wanted` of the `most`.

    Best first, the lowest id first on ties, the token itself among them: so a greedy choice always comes first.
    """
    out, size = [], packed_size(most)
    for i, token in enumerate(tokens):
        part = values[i * size : (i + 1) * size]
        own, *floats = struct.unpack(f"={1 + most}f", struct.pack(f"={1 + most}i", *part[: 1 + most]))
        top = dict(zip(part[1 + most :], floats, strict=True))
        top[token] = own
        best = sorted(top.items(), key=lambda pair: (-pair[1], pair[0]))[:wanted]
        out.append(TokenLogprob(token, own, tuple(best)))
    return tuple(out)
