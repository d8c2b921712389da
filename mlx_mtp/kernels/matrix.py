"""One weight matrix in any of the layouts MLX stores, and the Metal text that reads it.

Owns the meaning of packed weights: plain (float32, float16, bfloat16), affine 4 and 8 bit with groups of 32, 64 or 128,
mxfp4, mxfp8, nvfp4. Knows nothing of products: kernels decide which rows they read and in which order they sum.
"""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)

# mode -> number in the Metal text
FORMATS = {"plain": 0, "affine": 1, "mxfp4": 2, "mxfp8": 2, "nvfp4": 3}

# Values a lane takes at a time. Divides every group size, so that a block has one scale.
BLOCK = 8

# Kernels read a row in blocks of 8 values: block_values gives them without their scale, scale_value and bias_value what
# belongs to the block. FORMAT and BITS are template arguments of the kernel; a plain row is a pointer to its dtype, a
# packed one to words. Pointers are template parameters because MLX passes small inputs in another address space.
METAL = """
METAL_FUNC float fp4_value(uint code) {
  // 0, 1/2, 1, 3/2, 2, 3, 4, 6: twice the value is an integer, and the integers fit into one word
  const float magnitude = 0.5f * float((0xc8643210u >> (4 * (code & 7u))) & 15u);
  return (code & 8u) ? -magnitude : magnitude;
}
METAL_FUNC float fp8_value(uint code) {
  // e4m3; built without denormals, which some devices flush
  const uint rest = code & 127u;
  const float normal = as_type<float>((rest << 20) + (120u << 23));
  const float magnitude = rest < 8u ? float(rest) * 0.001953125f : normal;
  return (code & 128u) ? -magnitude : magnitude;
}
METAL_FUNC float power_of_two(uint code) { return as_type<float>(code == 0u ? 0x400000u : code << 23); }

template <int FORMAT, int BITS>
METAL_FUNC float packed_value(uint word, uint place) {
  const uint code = (word >> (BITS * place)) & ((1u << BITS) - 1u);
  return FORMAT == 1 ? float(code) : BITS == 4 ? fp4_value(code) : fp8_value(code);
}

// Values 8 * block .. 8 * block + 7 of a row of K.
template <int FORMAT, int BITS, typename P>
METAL_FUNC void block_values(P row, uint block, uint K, thread float* values) {
  if (FORMAT == 0) {
    for (uint j = 0; j < 8; j++) values[j] = block * 8 + j < K ? float(row[block * 8 + j]) : 0.0f;
  } else {
    constexpr uint PER_WORD = FORMAT == 0 ? 1 : 32 / BITS, WORDS = 8 / PER_WORD;
    for (uint i = 0; i < WORDS; i++) {
      const uint word = uint(row[block * WORDS + i]);
      for (uint j = 0; j < PER_WORD; j++) values[i * PER_WORD + j] = packed_value<FORMAT, BITS>(word, j);
    }
  }
}

template <int FORMAT, typename P>
METAL_FUNC float scale_value(P scales, size_t index) {
  if (FORMAT == 0) return 1.0f;
  if (FORMAT == 1) return float(scales[index]);
  const uint code = uint(scales[index]);
  return FORMAT == 2 ? power_of_two(code) : fp8_value(code);
}

template <int FORMAT, typename P>
METAL_FUNC float bias_value(P biases, size_t index) {
  return FORMAT == 1 ? float(biases[index]) : 0.0f;
}
"""


@dataclass(frozen=True)
class Matrix:
    """weight [..., N, K] in a float dtype if mode is "plain"; else packed uint32 with scales (and biases if affine)."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 0
    mode: str = "plain"

    @staticmethod
    def quantized(dense: mx.array, group_size: int, bits: int, mode: str = "affine") -> "Matrix":
        """A dense [..., N, K] packed as MLX packs it."""
        parts = mx.quantize(dense, group_size=group_size, bits=bits, mode=mode)
        biases = parts[2] if len(parts) == 3 else None
        return Matrix(parts[0], parts[1], biases, group_size, bits, mode)

    @staticmethod
    def of(module: Any) -> "Matrix":
        """The weights of a linear layer, an embedding, or a matrix for every expert: a module, plain or quantised."""
        if "scales" not in module:
            return Matrix(module.weight)
        return Matrix(module.weight, module.scales, module.biases, module.group_size, module.bits, module.mode)

    @property
    def rows(self) -> int:
        return self.weight.shape[-2]

    @property
    def columns(self) -> int:
        return self.weight.shape[-1] * (32 // self.bits if self.packed else 1)

    @property
    def packed(self) -> bool:
        return self.mode != "plain"

    def packing(self) -> tuple[mx.array, mx.array | None]:
        """Scales and biases of packed weights."""
        if self.scales is None or (self.mode == "affine" and self.biases is None):
            raise ValueError(f"weights of mode {self.mode} need scales, and biases if affine; got {self.scales}")
        return self.scales, self.biases

    @property
    def tensors(self) -> tuple[mx.array, ...]:
        return tuple(t for t in (self.weight, self.scales, self.biases) if t is not None)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with its scales and biases."""
        return sum(t.itemsize * t.shape[-1] for t in self.tensors)

    def kernel_inputs(self) -> list[mx.array]:
        """Weight, scales, biases. What a layout lacks is never read: the weight stands in, a new array would cost a
        dispatch."""
        return [self.weight, *(self.weight if t is None else t for t in (self.scales, self.biases))]

    def template(self) -> list[tuple[str, int]]:
        return [("FORMAT", FORMATS[self.mode]), ("BITS", self.bits or 8), ("GROUP", self.group_size or BLOCK)]

    def why_not(self) -> str | None:
        """Why the kernels cannot read this layout, or None if they can."""
        if self.mode not in FORMATS:
            return f"weights of mode {self.mode}; the kernels read {', '.join(FORMATS)}"
        if not self.packed:
            return None if self.weight.dtype in FLOATS else f"weights are {self.weight.dtype}, not a float type"
        if self.mode == "affine" and (self.bits not in (4, 8) or self.group_size not in (32, 64, 128)):
            got = f"affine weights of {self.bits} bits in groups of {self.group_size}"
            return f"{got}; the kernels read 4 and 8 bits in groups of 32, 64, 128"
        return None

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The weights themselves [..., N, K], dequantised in float32."""
        if not self.packed:
            return self.weight.astype(dtype)
        scales, biases = self.widened()
        how = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return mx.dequantize(self.weight, scales, biases, **how, dtype=mx.float32).astype(dtype)

    def widened(self) -> tuple[mx.array, mx.array | None]:
        """Scales and biases, in float32 if affine: MLX's CPU kernels accumulate in their dtype (bfloat16: 5 % off)."""
        scales, biases = self.packing()
        if biases is None:
            return scales, None
        return scales.astype(mx.float32), biases.astype(mx.float32)

    def take(self, indices: mx.array) -> "Matrix":
        """The rows named by indices [...]: a gather of packed rows, [..., K] in the same layout."""
        scales = None if self.scales is None else self.scales[indices]
        biases = None if self.biases is None else self.biases[indices]
        return replace(self, weight=self.weight[indices], scales=scales, biases=biases)
