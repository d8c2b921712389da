"""Real shapes without checkpoints: a published pair with random weights, or with none at all, quantised as asked.

Random weights have the size that keeps activations ordinary. The text that comes out means nothing, and routing is
about even over the experts, where that of a trained model is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_map_with_path, tree_unflatten

from mlx_mtp.cache import Cache
from mlx_mtp.doctor import on_gpu
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.few_rows import Trial, with_head_kernel, with_kernels
from mlx_mtp.models.config import TextConfig
from mlx_mtp.models.experts import ExpertLinear
from mlx_mtp.models.families import Target
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.pairs import BYTES_PER_PARAMETER
from mlx_mtp.quantized import Packing, packed_module
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import Shape, shape, target_counts

Fill = Callable[[str, mx.array], mx.array]  # (name, what stands there) -> an array of its shape and dtype
GROUP = 64


@dataclass(frozen=True)
class Size:
    """A published size of Gemma 4. bits: of a weight of both networks. layers: of the target, the first; None: all."""

    name: str
    bits: int
    layers: int | None = None


@dataclass(frozen=True)
class MadeUp:
    """A pair ready to run. layers: of the target, of so many."""

    target: Target
    drafter: Assistant
    dtype: mx.Dtype
    layers: int
    all_layers: int


def make(found: Shape, size: Size, fill: Fill | None = None) -> MadeUp:
    """A pair of one size, cut to its first layers if asked. fill: None for random weights. Raises RequestError."""
    config = truncated(found.target, size.layers)
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    target, drafter = Gemma4(config), Assistant(found.drafter)
    for model in (target, drafter):
        _finish(model, size.bits, dtype, fill or random_fill)
    trial = Trial.of()
    with_head_kernel(drafter, trial)
    model, _ = with_kernels(target, dtype, trial)
    return MadeUp(model, drafter, dtype, len(config.layers), len(found.target.layers))


def bytes_of(size: Size, batch: int, context: int) -> int:
    """What a size takes in this process: weights of both, and the cache of so many rows."""
    found = shape(size.name)
    config = truncated(found.target, size.layers)
    weights = (target_counts(config).total + found.drafter_counts.total) * BYTES_PER_PARAMETER[size.bits]
    if not on_gpu() and size.bits == 16:
        weights *= 2  # float32
    cache = Cache(Gemma4(config).specs, MAX_WIDTH, mx.bfloat16 if on_gpu() else mx.float32)
    return int(weights) + 2 * batch * cache.row_bytes(context)  # while rows join, some of it is there twice


def truncated(config: TextConfig, layers: int | None) -> TextConfig:
    """The first layers of a stack, among them at least one of either kind that owns keys and values."""
    if layers is None:
        return config
    least = max(config.layers.index(next(c for c in config.layers if (c.window is None) == full)) for full in (0, 1))
    if not least < layers <= len(config.layers):
        raise RequestError(f"layers is {layers}; expected {least + 1} to {len(config.layers)}")
    return replace(config, layers=config.layers[:layers])


def random_fill(name: str, x: mx.array) -> mx.array:
    """Random weights: products keep the size of what they are given. Norms and scalars stay as they are."""
    if x.dtype == mx.uint32:
        halves = mx.random.randint(0, 2**16, (2, *x.shape)).astype(mx.uint32)
        return halves[0] * 2**16 + halves[1]
    if x.ndim < 2:
        return x
    return mx.random.normal(x.shape, x.dtype) * x.shape[-1] ** -0.5


def hollow(x: mx.array, value: float = 0) -> mx.array:
    """An evaluated array of the same shape that takes the memory of one number; for graphs that never run."""
    made = mx.broadcast_to(mx.array(value, x.dtype), x.shape)
    mx.eval(made)
    return made


def hollow_fill(name: str, x: mx.array) -> mx.array:
    return hollow(x)


def _finish(model: nn.Module, bits: int, dtype: mx.Dtype, fill: Fill) -> None:
    """Quantise and fill a network, a module at a time, so that no more than one is held twice."""
    paths = [(path, m) for path, m in model.named_modules() if not m.children()]
    for path, module in paths:
        made = _packed(module, bits, dtype)
        if made is None:
            made = module
            module.set_dtype(dtype)
        made.update(tree_map_with_path(fill, made.parameters()))
        if made.__class__ is not module.__class__:
            _centre(made, bits, fill)
            model.update_modules(tree_unflatten([(path, made)]))
        mx.eval(made.parameters())
    rest = tree_map(lambda x: x.astype(dtype) if x.dtype == mx.float32 else x, model.parameters())
    model.update(rest)
    mx.eval(model.parameters())


def _packed(plain: nn.Module, bits: int, dtype: mx.Dtype) -> nn.Module | None:
    """The module that takes a plain one's place, or None where nothing is packed."""
    if bits == 16 or not isinstance(plain, (nn.Linear, nn.Embedding, ExpertLinear)):
        return None
    if plain.weight.shape[-1] % GROUP:
        return None
    made = packed_module(plain, Packing("affine", bits, GROUP), False, dtype)
    made.update(tree_map(lambda x: x if x.dtype == mx.uint32 else x.astype(dtype), made.parameters()))
    return made


def _centre(made: nn.Module, bits: int, fill: Fill) -> None:
    """Scales and biases under which evenly drawn bits are weights of mean 0 and variance 1 / inputs."""
    steps = 2**bits - 1
    packed: mx.array = made["weight"]
    inputs = packed.shape[-1] * 32 // bits
    scale = (12.0 / inputs) ** 0.5 / steps
    for name, value in (("scales", scale), ("biases", -scale * steps / 2)):
        whole = mx.full(made[name].shape, value, made[name].dtype)
        made[name] = hollow(whole) if fill is hollow_fill else whole
