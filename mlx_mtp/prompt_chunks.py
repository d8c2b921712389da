"""How long prompt chunks are on this device. Runs nothing but one probe of MLX's attention.

A GPU multiplies 2,048 rows at a time far better than 128. What bounds a chunk there is memory: where MLX has no fused
attention for a head size, it keeps the scores of all heads, queries and keys.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_mtp.cache import LayerSpec
from mlx_mtp.doctor import on_gpu
from mlx_mtp.loaded import LoadedPair
from mlx_mtp.scheduler import Limits

FIRST_CHUNK = 256  # beside running rows, until the GPU's speed is known
PROBE = 1024, 4096  # queries and keys: enough for MLX to take its fused attention if it has one


def fitted(limits: Limits, chunk: int, loaded: LoadedPair) -> Limits:
    """Limits with a GPU's chunks where they were left at the defaults, which suit a CPU. chunk: that memory allows."""
    if not on_gpu():
        return limits
    plain, gpu = vars(Limits()), {"alone_tok": chunk, "chunk_tok": chunk, "first_chunk_tok": min(chunk, FIRST_CHUNK)}
    limits = replace(limits, **{name: gpu[name] for name in gpu if vars(limits)[name] == plain[name]})
    target = loaded.target
    full = [spec for spec in target.model.specs if isinstance(spec, LayerSpec) and spec.window is None]
    bounded = any(_keeps_scores(target.model.heads, spec, target.dtype) for spec in dict.fromkeys(full))
    return replace(limits, score_chunk=loaded.size.score_chunk) if bounded else limits


def _keeps_scores(heads: int, spec: LayerSpec, dtype: mx.Dtype) -> bool:
    """Whether MLX's causal attention over a chunk keeps the scores; asked by how much memory it takes."""
    queries, keys = PROBE
    shapes = (1, heads, queries, spec.head_dim), (1, spec.kv_heads, keys, spec.head_dim)
    q, k, v = (mx.zeros(shapes[i > 0], dtype) for i in range(3))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal"))
    return mx.get_peak_memory() - before >= heads * queries * keys * dtype.size // 2
