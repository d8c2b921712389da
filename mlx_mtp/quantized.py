"""MLX-quantised modules: how one is recognised from its tensors, and what takes a plain module's place.

Knows nothing of files and names. Layouts as `mx.quantize` writes them: `weight` uint32
[..., out, in * bits / 32], affine with float `scales` and `biases` [..., out, in / group], the microscaling
modes with uint8 `scales` alone, experts in nvfp4 perhaps with a `global_scale` each. Shapes and dtypes
decide; a checkpoint's own table of bits and groups, which may be wrong, is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.models.experts import ExpertLinear, QuantizedExpertLinear

# (bits, group) -> mode of uint8 scales
MICROSCALING = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
Packable = nn.Linear | nn.Embedding | ExpertLinear  # plain modules whose weight MLX can quantise
AFFINE_BITS, AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
GLOBAL_SCALE_UNIT = 448.0 * 6.0  # nvfp4: largest e4m3 scale times largest e2m1 value


@dataclass(frozen=True)
class Packing:
    """How a module's weights are packed."""

    mode: str
    bits: int
    group_size: int


def recognise(inputs: int, packed: int, groups: int, float_scales: bool) -> Packing | None:
    """How rows of `inputs` values lie in `packed` uint32 with `groups` scales, or None if MLX has no way."""
    if not inputs or not groups or packed * 32 % inputs or inputs % groups:
        return None
    bits, group = packed * 32 // inputs, inputs // groups
    if float_scales:
        return Packing("affine", bits, group) if bits in AFFINE_BITS and group in AFFINE_GROUPS else None
    mode = MICROSCALING.get((bits, group))
    return Packing(mode, bits, group) if mode else None


class Table(nn.QuantizedEmbedding):
    """A quantised embedding with rows in the model's dtype, where MLX's microscaling modes give bfloat16."""

    def __init__(self, shape: tuple[int, ...], packing: Packing, dtype: mx.Dtype) -> None:
        super().__init__(shape[0], shape[1], packing.group_size, packing.bits, packing.mode)
        self.dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids [...] -> rows [..., in]."""
        return mx.dequantize(
            self.weight[x],
            scales=self.scales[x],
            biases=None if self.biases is None else self.biases[x],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=self.dtype,
        )


class ScaledExpertLinear(QuantizedExpertLinear):
    """Quantised expert matrices with one more factor each, [E]."""

    def __init__(self, shape: tuple[int, ...], group_size: int, bits: int, mode: str) -> None:
        super().__init__(shape, group_size, bits, mode)
        self.global_scale = mx.ones(shape[:1])

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """As ExpertLinear."""
        factor = (self.global_scale[chosen] / GLOBAL_SCALE_UNIT).astype(x.dtype)
        return super().__call__(x, chosen, ordered) * factor[..., None, None]


def packed_module(plain: Packable, packing: Packing, scaled: bool, dtype: mx.Dtype) -> nn.Module:
    """A quantised module of the same kind and sizes, weights to be set; scaled: experts with global_scale."""
    shape = plain.weight.shape
    if isinstance(plain, nn.Embedding):
        return Table(shape, packing, dtype)
    if isinstance(plain, nn.Linear):
        return nn.QuantizedLinear(shape[1], shape[0], False, packing.group_size, packing.bits, packing.mode)
    kind = ScaledExpertLinear if scaled else QuantizedExpertLinear
    return kind(shape, packing.group_size, packing.bits, packing.mode)


def quantize_now(plain: nn.Module, bits: int, dtype: mx.Dtype) -> nn.Module | None:
    """The same linear layer or embedding, affine-quantised in groups of 64, or of 32 where only that divides.

    None where neither divides its rows, or where the module is of another kind.
    """
    group = group_of(plain)
    if group is None:
        return None
    assert isinstance(plain, (nn.Linear, nn.Embedding))
    made = packed_module(plain, Packing("affine", bits, group), False, dtype)
    assert isinstance(made, (nn.QuantizedLinear, Table))
    made.weight, made.scales, made.biases = mx.quantize(plain.weight, group_size=group, bits=bits)
    return made


def group_of(plain: nn.Module) -> int | None:
    """The group size that `quantize_now` would take; None where it leaves a module as it is."""
    if not isinstance(plain, (nn.Linear, nn.Embedding)):
        return None
    return next((g for g in (64, 32) if plain.weight.shape[-1] % g == 0), None)
