"""Random matrices in every layout that a checkpoint's products come in."""

import mlx.core as mx

from mlx_mtp.kernels.matrix import Matrix

LAYOUTS = {  # name -> group size, bits, mode
    "affine4": (64, 4, "affine"),
    "affine8": (32, 8, "affine"),
    "affine4-wide-groups": (128, 4, "affine"),
    "mxfp4": (32, 4, "mxfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "nvfp4": (16, 4, "nvfp4"),
    "plain": None,
}


def make(layout: str, n: int, k: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> Matrix:
    """[n, k]."""
    dense = mx.random.normal((n, k), key=mx.random.key(n + k + seed)).astype(dtype)
    return Matrix(dense) if LAYOUTS[layout] is None else Matrix.quantized(dense, *LAYOUTS[layout])
