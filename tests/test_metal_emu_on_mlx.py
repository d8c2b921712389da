"""MLX's own Metal kernels, from the headers inside the wheel, run in the emulator: real code, and no false alarm."""

import metal_emu as emu
import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
KERNELS = "mlx/backend/metal/kernels/"
QUANTIZED = "".join(f'#include "{KERNELS}{f}"\n' for f in ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"))
UNBATCHED = "0, nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr"
PLACE = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"


def test_mlx_s_own_quantised_product_agrees_with_mlx_on_the_cpu():
    m, n, k = 2, 37, 448
    x = mx.random.normal((m, k), key=mx.random.key(5))
    packed = mx.quantize(mx.random.normal((n, k), key=mx.random.key(6)), 64, 4)
    kernel = emu.metal_kernel(
        "qmv",
        ["w", "scales", "biases", "x"],
        ["y"],
        f"affine_qmv<T, 64, 4, false>(w, scales, biases, x, y, {k}, {n}, {UNBATCHED}, {PLACE});",
        QUANTIZED,
    )
    y = kernel(
        inputs=[*packed, x],
        template=[("T", mx.float32)],
        grid=(m * 32, (n + 7) // 8 * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(m, n)],
        output_dtypes=[mx.float32],
    )[0]
    assert mx.allclose(y, mx.quantized_matmul(x, *packed, group_size=64, bits=4), atol=1e-4)


@pytest.mark.parametrize("dropped", [None, 0, 1, 2])
def test_mlx_s_own_attention_needs_each_of_its_barriers(dropped):
    heads, kv_heads, queries, keys, dim = 4, 2, 3, 77, 64
    shapes = [(1, heads, queries, dim), (1, kv_heads, keys, dim), (1, kv_heads, keys, dim)]
    q, k, v = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    text = (emu.build.mlx_include() / KERNELS / "sdpa_vector.h").read_text()
    if dropped is not None:
        start = text.index("void sdpa_vector(")
        pieces = text[start:].split(BARRIER, dropped + 1)
        text = text[:start] + BARRIER.join(pieces[:-1]) + pieces[-1]
    kernel = emu.metal_kernel(
        "sdpa",
        ["q", "k", "v"],
        ["out"],
        f"sdpa_vector<T, {dim}>(q, k, v, out, {heads // kv_heads}, {keys}, {keys * dim}, {dim}, {keys * dim}, {dim}, "
        f"{dim**-0.5:.9f}f, nullptr, nullptr, 0, 0, 0, nullptr, 0, threadgroup_position_in_grid, "
        "threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);",
        # function constants become ordinary variables, false unless set
        text,
    )

    def attend():
        return kernel(
            inputs=[q, k, v],
            template=[("T", mx.float32)],
            grid=(heads * 1024, queries, 1),
            threadgroup=(1024, 1, 1),
            output_shapes=[shapes[0]],
            output_dtypes=[mx.float32],
        )[0]

    if dropped is None:
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)
        assert mx.allclose(attend(), expected, atol=1e-5)
    else:
        with pytest.raises(emu.EmulationError) as caught:
            attend()
        assert "race" in caught.value.kinds
