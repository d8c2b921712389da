"""What the queries of a pass see in one layer, and attention over it. Knows no cache: arrays and masks are given."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels import attend
from mlx_mtp.kernels.attend import Attention


@dataclass(frozen=True)
class Whole:
    """A part as the kernel takes it: whole buffers [B', H, T, D] with position p in slot p mod T, not cut, since a cut
    would be copied. start [B' or more] int32: position of the first query; a query at p sees p - window + 1 .. p."""

    keys: mx.array
    values: mx.array
    start: mx.array
    window: int


@dataclass(frozen=True)
class Part:
    """Keys and values [B', H, T, D] of a slice of the pass's rows, and who may see what: mask [B', 1, L, T] bool.

    causal: the mask is MLX's own causal one, the last query seeing the last key; its fused attention needs no other.
    whole: the same for the kernel, in a round; None where it is not used.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array
    whole: Whole | None = None
    causal: bool = False

    def attend(self, queries: mx.array, column: mx.array | None) -> mx.array:
        """queries [B', heads, L, D] -> the same shape. column [B']: which of the mask's L it is, if it is one of a
        prompt."""
        if self.whole is not None:
            w = self.whole
            given = Attention(queries, w.keys, w.values, w.start, w.window)
            if not attend.why_not(given):
                return attend.attend(given)
        mask: mx.array | str = "causal" if self.causal and column is None else self.mask
        if column is not None:
            mask = mx.take_along_axis(self.mask, column[:, None, None, None], axis=2)
        return mx.fast.scaled_dot_product_attention(queries, self.keys, self.values, scale=1.0, mask=mask)


@dataclass(frozen=True)
class View:
    """What the queries of a pass may see in one layer: one part for all rows, or one part a row."""

    parts: tuple[Part, ...]

    def attend(self, queries: mx.array, last: mx.array | None = None) -> mx.array:
        """Attention with scale 1 (Gemma 4 scales inside q_norm): [B, heads, L, D] -> [B * L, heads * D].

        last [B]: the queries' columns in the pass, where there is one a row.
        """
        b, heads, columns, dim = queries.shape
        outs, row = [], 0
        last = last if columns == 1 else None
        for part in self.parts:
            here = slice(row, row + part.keys.shape[0])
            outs.append(part.attend(queries[here], None if last is None else last[here]))
            row = here.stop
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
        return out.transpose(0, 2, 1, 3).reshape(b * columns, heads * dim)
