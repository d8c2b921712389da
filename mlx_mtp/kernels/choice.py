"""Who wins among scored tokens: the largest value, the lowest token on ties; with noise, a draw from the softmax.

Owns the rule that head and verdict share, in Metal and in plain mlx. A row with inverse temperature 0 is greedy: its
value is the logit; any other row's is logit * inverse temperature + noise (the Gumbel-max rule). Knows nothing of
where logits come from.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels import noise
from mlx_mtp.kernels.backend import SMALL, not_small

# part: one slot a simdgroup. group_best has a barrier before it reads them; the caller needs one before it calls again.
METAL = (
    noise.METAL
    + """
struct Best { float value; uint token; };

METAL_FUNC Best nobody() {
  Best best;
  best.value = -INFINITY;
  best.token = 0xffffffffu;
  return best;
}
METAL_FUNC Best better(Best a, Best b) {
  return (b.value > a.value || (b.value == a.value && b.token < a.token)) ? b : a;
}
METAL_FUNC Best simd_best(Best best) {
  for (ushort offset = 16; offset > 0; offset >>= 1) {
    Best other;
    other.value = simd_shuffle_xor(best.value, offset);
    other.token = simd_shuffle_xor(best.token, offset);
    best = better(best, other);
  }
  return best;
}
METAL_FUNC Best group_best(Best best, threadgroup Best* part, uint lane, uint simdgroup, uint simdgroups) {
  best = simd_best(best);
  if (lane == 0) part[simdgroup] = best;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Best all = nobody();
  if (lane < simdgroups) all = part[lane];
  return simd_best(all);
}
// If no value was above minus infinity nobody has won: token 0, so that what follows stays inside its tables.
METAL_FUNC int winner(Best best) { return best.token == 0xffffffffu ? 0 : int(best.token); }

METAL_FUNC float choice_value(float logit, float inv_temperature, uint key, uint token) {
  return inv_temperature > 0.0f ? logit * inv_temperature + noise_gumbel(key, token) : logit;
}
"""
)


@dataclass(frozen=True)
class Draw:
    """How each of R rows draws: inv_temperature [R] float32 (0 is greedy), seed [R, 2] uint32, position [R] integer."""

    inv_temperature: mx.array
    seed: mx.array
    position: mx.array


# Kernels that choose have these inputs after their own, in this order.
DRAW_INPUTS = ("inv_temperature", "seed", "position")


def draw_inputs(draw: Draw | None, rows: int) -> list[mx.array]:
    """Those inputs, flat; without a draw every row is greedy. The host's zeros are no operation."""
    if draw is not None:
        return [not_small(x) for x in (draw.inv_temperature, draw.seed, draw.position)]
    count = max(rows, SMALL)
    return [mx.array([0.0] * count), mx.array([0] * 2 * count, mx.uint32), mx.array([0] * count, mx.int32)]


def draw_text(row: str, column: str) -> str:
    """Metal text that defines `inverse` and `key` of a row and a column (numbers added to its position)."""
    return (
        f"const float inverse = float(inv_temperature[{row}]);\n"
        f"    const uint key = noise_key(uint(seed[2 * {row}]), uint(seed[2 * {row} + 1]), "
        f"uint(position[{row}]) + {column});"
    )


def values(logits: mx.array, draw: Draw, position: mx.array, tokens: mx.array) -> mx.array:
    """What competes in a draw, in plain mlx: logits [R, .., n] float32, tokens [n] or [R, .., n], position [R, ..]."""
    axes = tuple(range(1, logits.ndim))
    inverse = mx.expand_dims(draw.inv_temperature.astype(mx.float32), axes)
    seed = mx.expand_dims(draw.seed.astype(mx.uint32), axes[:-1])
    gumbel = noise.gumbel(seed, position, tokens)
    return mx.where(inverse > 0, logits * inverse + gumbel, logits)
