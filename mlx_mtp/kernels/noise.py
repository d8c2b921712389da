"""Counter-based Gumbel noise: a pure function of (seed, position, token id), in plain mlx and in Metal.

Owns the one definition of the noise. Whoever adds noise to a logit (the target's verdict, the drafter's
head, the sampler in plain mlx) takes it from here, and so all of them see the same number for the same token at
the same place, in whatever order, batch or kernel it is computed. It knows nothing of logits or temperatures.

The hash is lowbias32 (Ellis, "hash-prospector": two multiplications and three xor-shifts, a bijection on
32 bits); all integer arithmetic wraps. Integers agree to the bit everywhere. The two logarithms are the device's
own, so floats agree to a few units in the last place between devices.
"""

import mlx.core as mx

from mlx_mtp.kernels.backend import on_cpu

# Metal text of the same function. Goes into a kernel's header; needs nothing but the standard library.
METAL = """
METAL_FUNC uint noise_mix(uint x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}
METAL_FUNC uint noise_key(uint seed_lo, uint seed_hi, uint position) {
  return noise_mix(seed_lo ^ noise_mix(seed_hi ^ noise_mix(position)));
}
// Exponential variate -log(1 - u), u = (n + 1/2) / 2^24. Each half of the range is computed from the number that
// float32 holds exactly: u itself below one half (log1p, after Kahan), 1 - u above it.
METAL_FUNC float noise_exponential(uint n) {
  if (n >= 0x800000u) return -metal::log((float(0xffffffu - n) + 0.5f) * 5.9604644775390625e-8f);
  const float u = (float(n) + 0.5f) * 5.9604644775390625e-8f;
  const float rest = 1.0f - u;
  return rest == 1.0f ? u : u * (metal::log(rest) / (rest - 1.0f));
}
METAL_FUNC float noise_gumbel(uint key, uint token) {
  const uint bits = noise_mix(noise_mix(token ^ key) + 0x9e3779b9u * (key | 1u));
  return -metal::log(noise_exponential(bits >> 8));
}
"""


def _u32(value: int) -> mx.array:
    return mx.array(value, dtype=mx.uint32)


def mix(x: mx.array) -> mx.array:
    """lowbias32 of every element; uint32 to uint32."""
    x = x ^ (x >> _u32(16))
    x = x * _u32(0x7FEB352D)
    x = x ^ (x >> _u32(15))
    x = x * _u32(0x846CA68B)
    return x ^ (x >> _u32(16))


def noise_key(seed: mx.array, position: mx.array) -> mx.array:
    """The stream of one position: seed [..., 2] uint32 (low, high) and position [...] integer -> [...] uint32."""
    return _key(seed[..., 0], seed[..., 1], position.astype(mx.uint32))


def _key(low: mx.array, high: mx.array, position: mx.array) -> mx.array:
    return mix(low ^ mix(high ^ mix(position)))


def noise_bits(key: mx.array, token: mx.array) -> mx.array:
    """32 random bits per (key, token); both uint32, broadcast against each other."""
    return mix(mix(token ^ key) + _u32(0x9E3779B9) * (key | _u32(1)))


def exponential(n: mx.array) -> mx.array:
    """-log(1 - u) for u = (n + 1/2) / 2^24, n [...] uint32 below 2^24 -> [...] float32, finite and positive.

    n + 1/2 needs 25 bits for n >= 2^23 and would round to u = 1 at the end of the range; there the complement
    1 - u is computed instead, which is exact.
    """
    scale = 2.0**-24
    upper = n >= _u32(0x800000)
    u = (mx.where(upper, _u32(0), n).astype(mx.float32) + 0.5) * scale
    complement = ((_u32(0xFFFFFF) - n).astype(mx.float32) + 0.5) * scale
    return mx.where(upper, -mx.log(complement), -mx.log1p(-u))


def gumbel(seed: mx.array, position: mx.array, token: mx.array) -> mx.array:
    """Standard Gumbel noise for each token of each place.

    seed [..., 2] uint32, position [...] integer (broadcast against seed's leading axes), token [n] or [..., n]
    integer -> [..., n] float32.
    """
    draw = _gumbel if on_cpu() else _fused_gumbel
    return draw(seed[..., 0], seed[..., 1], position.astype(mx.uint32), token.astype(mx.uint32))


def _gumbel(low: mx.array, high: mx.array, position: mx.array, token: mx.array) -> mx.array:
    key = _key(low, high, position)[..., None]
    return -mx.log(exponential(noise_bits(key, token) >> _u32(8)))


# A dispatch for every eleven of seventy operations, which MLX fuses at most, and the same numbers. On a CPU a dispatch
# costs little, and MLX would call g++ for it.
_fused_gumbel = mx.compile(_gumbel, shapeless=True)
