"""Device buffers that change by others taking their place: put into, cut, padded, copied. Knows not what is in them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class Slot:
    """An array whose values the host writes after the graph that reads it has been built, and before it is sent.

    host: the array's own memory as numpy sees it, which MLX documents to be writable.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.array = mx.array(values)
        self.host = np.array(self.array, copy=False)


def put(x: mx.array, where, value) -> mx.array:
    """x with x[where] = value. Indexed assignment changes the handle it is called on; handles here are shared with
    those who may want the old array back, so it gets one of its own (no copy: the buffer is written in place when
    nothing else refers to it)."""
    x = mx.array(x)
    x[where] = value
    return x


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def fit_rows(x: mx.array, rows: int) -> mx.array:
    """x with its first axis cut or zero-padded to `rows`."""
    if x.shape[0] == rows:
        return x
    if x.shape[0] > rows:
        return mx.contiguous(x[:rows])
    return mx.concatenate([x, mx.zeros((rows - x.shape[0], *x.shape[1:]), x.dtype)])


def fit_tokens(x: mx.array, room: int) -> mx.array:
    """x [1, H, T, D] with T cut or zero-padded to `room`."""
    if x.shape[2] == room:
        return x
    if x.shape[2] > room:
        return copy(x[:, :, :room])
    pad = mx.zeros((*x.shape[:2], room - x.shape[2], x.shape[3]), x.dtype)
    return mx.concatenate([x, pad], axis=2)


def copy(x: mx.array) -> mx.array:
    """x in a buffer of its own, to the bit. (`mx.contiguous` keeps a buffer that is up to 16 KiB larger, and a whole
    one that a pass could then no longer write in place.)"""
    return x * mx.array(1, x.dtype)
