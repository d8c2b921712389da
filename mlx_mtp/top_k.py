"""The largest of many values without sorting them, in plain mlx and with nothing read by the host.

`mx.topk` sorts everything on Metal and is slow on a CPU. Knows neither tokens nor settings.
Shapes: [..., V], each column of V values for itself.
"""

from __future__ import annotations

import mlx.core as mx

SORTED = 4096  # values of a column that may be sorted: a threadgroup of MLX's sort holds as many
ADDED = 64  # rows that are added up first: additions of long rows are vectorised


def top_k(x: mx.array, k: int) -> mx.array:
    """Places of the k largest values of x [..., V], ascending, int32 [..., k]; k is at most V.

    Of values that equal the smallest of them, which ones come along depends on nothing but the column.

    The k largest values lie in the k blocks with the largest maxima: a value elsewhere has k maxima above it.
    """
    count = x.shape[-1]
    size = 1 << ((count // k).bit_length() // 2)  # blocks and members of the chosen ones are about as many
    blocks = count // size
    if count <= SORTED or blocks < 2 * k:
        return mx.sort(_largest(x, k), axis=-1).astype(mx.int32)
    whole = x[..., : size * blocks].reshape(*x.shape[:-1], size, blocks)  # block i: values i, i + blocks, ...
    chosen = _largest(mx.max(whole, axis=-2), k)
    members = chosen[..., None, :] + mx.arange(0, size * blocks, blocks, dtype=mx.uint32)[:, None]
    members = members.reshape(*x.shape[:-1], size * k)
    if size * blocks < count:
        tail = mx.arange(size * blocks, count, dtype=mx.uint32)
        members = mx.concatenate([members, mx.broadcast_to(tail, (*x.shape[:-1], tail.size))], axis=-1)
    best = _largest(mx.take_along_axis(x, members, axis=-1), k)
    return mx.sort(mx.take_along_axis(members, best, axis=-1), axis=-1).astype(mx.int32)


def _largest(x: mx.array, k: int) -> mx.array:
    """As `top_k`, in no order, uint32."""
    return mx.argpartition(x, x.shape[-1] - k, axis=-1)[..., x.shape[-1] - k :]


def falling(x: mx.array, k: int) -> mx.array:
    """The k largest values of x [..., V], the largest first: [..., k]."""
    if k == 1:
        return mx.max(x, axis=-1, keepdims=True)
    if x.shape[-1] > SORTED and k < x.shape[-1]:
        x = mx.take_along_axis(x, top_k(x, k), axis=-1)
    return mx.sort(x, axis=-1)[..., ::-1][..., :k]


def nucleus(x: mx.array, p: mx.array) -> mx.array:
    """The least value that top_p keeps, [..., 1]: of softmax(x), the values above it have less than p, [..., 1].

    x [..., V] float32, not all of it minus infinity. Bit by bit, the largest value that with those above it has p.
    """
    bits = x.view(mx.int32)
    key = (bits ^ ((bits >> 31) | -(2**31))).view(mx.uint32)  # unsigned integers in the order of the values
    mass = mx.exp(x - mx.max(x, axis=-1, keepdims=True))
    wanted, found = p * _sum(mass), mx.zeros((*x.shape[:-1], 1), mx.uint32)
    for bit in range(31, -1, -1):
        higher = found | mx.array(1 << bit, mx.uint32)
        found = mx.where(_sum(mass * (key >= higher)) >= wanted, higher, found)
    return mx.where(found >> 31, found ^ mx.array(1 << 31, mx.uint32), ~found).view(mx.float32)


def _sum(x: mx.array) -> mx.array:
    """x [..., V] -> [..., 1]."""
    if x.shape[-1] % ADDED == 0:
        x = mx.sum(x.reshape(*x.shape[:-1], ADDED, -1), axis=-2)
    return mx.sum(x, axis=-1, keepdims=True)
