"""The noise in Metal is the noise in plain mlx (test_noise.py)."""

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import checks
from test_noise import SEED, draws

from mlx_mtp.kernels import noise

KERNEL = {
    "name": "noise",
    "input_names": ["seed", "position"],
    "output_names": ["gumbel", "ends"],
    "header": noise.METAL,
    "source": """
    const uint token = thread_position_in_grid.x;
    gumbel[token] = noise_gumbel(noise_key(seed[0], seed[1], position[0]), token);
    ends[token] = noise_exponential(token < 2048 ? token : 0xffffffu - (token - 2048));
""",
}


def metal_noise(**options) -> tuple[mx.array, mx.array]:
    kernel = emu.metal_kernel(**KERNEL, options=emu.Options(**options))
    return kernel(
        inputs=[SEED, mx.array([77], dtype=mx.uint32)],
        output_shapes=[(4096,), (4096,)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(4096, 1, 1),
        threadgroup=(256, 1, 1),
    )


@pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))
def test_the_metal_text_computes_the_same_numbers():
    gumbel, ends = metal_noise()
    assert np.allclose(gumbel, draws(SEED, 78, 4096)[77], rtol=1e-6, atol=1e-6)
    n = mx.concatenate([mx.arange(2048), 0xFFFFFF - mx.arange(2048)]).astype(mx.uint32)
    assert np.allclose(ends, noise.exponential(n), rtol=1e-6, atol=0)
    assert checks.relative_error(gumbel, mx.array(draws(SEED, 77, 4096)[76])) > 0.1  # another position is another noise
