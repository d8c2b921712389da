"""How many operations a graph has that is about to run. Knows arrays, and no model.

Every primitive costs the host time to build and dispatch, and most cost the device a kernel; on fast chips this, and
not the bytes, is what a step takes. The count is read from MLX's own drawing of the graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

NODE = re.compile(r'\[label ="([^"]+)"')
# Primitives that only describe the same memory anew. (A Reshape of something out of order copies; it is rare.)
VIEWS = frozenset(
    ("AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split")
    + ("Squeeze", "StopGradient", "Transpose", "Unflatten", "View")
)
FUSED = "Fused"  # the stand-in of one fused Metal operation
VECTOR_DIMS, VECTOR_QUERIES, VECTOR_HEADS = (64, 96, 128, 192, 256, 512), 8, 32  # of MLX's fused attention, see below


@dataclass(frozen=True)
class Count:
    """Primitives of a graph. kernels: those that compute something rather than look at memory differently."""

    primitives: int
    kernels: int


def primitives(*arrays: Any) -> Counter[str]:
    """Every primitive that evaluating some trees of arrays would run, by name. Evaluated arrays are the leaves."""
    drawing = _Text()
    flat = [value for tree in arrays for _, value in tree_flatten([tree]) if isinstance(value, mx.array)]
    mx.export_to_dot(drawing, *flat)
    return Counter(FUSED if name == "Depends" else name for name in NODE.findall("".join(drawing.parts)))


def count(*arrays: Any) -> Count:
    """The same, as two numbers."""
    return of(primitives(*arrays))


def of(found: Counter[str]) -> Count:
    return Count(found.total(), sum(n for name, n in found.items() if name not in VIEWS))


class _Text:
    """What mx.export_to_dot writes to."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Let graphs hold one primitive where Metal has one fused operation and the CPU several.

    RMSNorm and RoPE always; attention where MLX 0.32's vector kernel takes it (up to 8 queries, at most 32 of them
    with their grouped heads, and a head size it knows; 512 is one with MLX_SDPA_D512_MIN_KL=0). The graphs cannot be
    evaluated. Nothing changes where the default device is a GPU.
    """
    if mx.default_device() == mx.gpu:
        yield
        return
    fast = (mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention)

    def one(x: mx.array, *others: Any) -> mx.array:
        given = [other for other in others if isinstance(other, mx.array)]
        return mx.depends([x], given or [x])[0]

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return one(x, weight)

    def rope(x: mx.array, *args: Any, offset: Any = None, freqs: Any = None, **options: Any) -> mx.array:
        return one(x, offset)  # frequencies are constants, computed in the first pass

    def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        queries, dim = q.shape[2:]
        grouped = queries * (q.shape[1] // k.shape[1])
        if dim in VECTOR_DIMS and queries <= VECTOR_QUERIES and grouped <= VECTOR_HEADS:
            return one(q, k, v, options.get("mask"))
        return fast[2](q, k, v, **options)

    _set_fast(rms_norm, rope, attention)
    try:
        yield
    finally:
        _set_fast(*fast)


def _set_fast(rms_norm: Callable, rope: Callable, attention: Callable) -> None:
    mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention = rms_norm, rope, attention
