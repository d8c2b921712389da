"""Routed experts of a mixture-of-experts layer: every token's own few, gathered from stacked weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.kernels.gate_up import geglu
from mlx_mtp.models.config import MoeConfig

SORT_FROM = 64  # (token, expert) pairs from which MLX's gathered products run faster, and share reads, when sorted


class ExpertLinear(nn.Module):
    """One matrix for every expert: weight [E, out, in], not quantised."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, in] times the matrix of chosen [...] -> [..., 1, out]."""
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=chosen, sorted_indices=ordered)


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear over MLX-quantised weights: `weight` uint32, `scales`, and `biases` where affine."""

    def __init__(self, shape: tuple[int, ...], group_size: int, bits: int, mode: str) -> None:
        """shape: [E, out, in] of the matrices it stands for."""
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        groups = (*shape[:2], shape[2] // group_size)
        self.weight = mx.zeros((*shape[:2], shape[2] * bits // 32), mx.uint32)
        self.scales = mx.zeros(groups, mx.float32 if mode == "affine" else mx.uint8)
        self.biases = mx.zeros(groups) if mode == "affine" else None

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """As ExpertLinear."""
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )


class Experts(nn.Module):
    """Sum over a token's experts of weight * down(gelu_tanh(gate x) * up x)."""

    def __init__(self, size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(moe.experts, size, moe.width)
        self.up_proj = ExpertLinear(moe.experts, size, moe.width)
        self.down_proj = ExpertLinear(moe.experts, moe.width, size)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x [..., H], chosen and weights [..., k] -> [..., H]."""
        k, size = chosen.shape[-1], x.shape[-1]
        flat, pairs = x.reshape(-1, 1, 1, size), chosen.reshape(-1, k)
        order = None
        if pairs.size >= SORT_FROM:
            order = mx.argsort(pairs.flatten())
            flat, pairs = flat[order // k][:, 0], pairs.flatten()[order]
        y = geglu(self.gate_proj(flat, pairs, order is not None), self.up_proj(flat, pairs, order is not None))
        y = self.down_proj(y, pairs, order is not None)
        if order is not None:
            y = y[mx.argsort(order)]
        y = y.reshape(*chosen.shape, size)
        return (y * weights[..., None]).sum(axis=-2)


def distinct_experts(chosen: list[mx.array]) -> mx.array:
    """How many different experts a pass touches, summed over its layers: chosen [N, k] a layer -> int32 scalar."""
    picks = mx.sort(mx.stack([c.flatten() for c in chosen]), axis=-1)
    return (picks[:, 1:] != picks[:, :-1]).sum().astype(mx.int32) + len(chosen)
