"""Whether a Metal kernel can run here, and the construction of kernels. Knows nothing of any particular kernel."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Definition:
    """What mx.fast.metal_kernel needs besides the arrays: names and text."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""


@dataclass(frozen=True)
class Launch:
    """The grid of one call in threads, a multiple of the threadgroup (CUDA would round it up), and its outputs."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]
    template: list[tuple[str, object]]


def why_not_here() -> str | None:
    """Why no Metal kernel can run now, or None if one can."""
    if not mx.metal.is_available():
        return "this build of MLX has no Metal backend"
    if mx.default_device().type != mx.gpu:
        return "the default device is the CPU"
    return None


def on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


# MLX declares smaller inputs in another address space, and so builds a library of its own for them.
SMALL = 8


def not_small(x: mx.array) -> mx.array:
    """x, or its values flat with zeros after them, of SMALL elements at least: one library serves all sizes."""
    if x.size >= SMALL:
        return x
    return mx.concatenate([x.flatten(), mx.array([0] * (SMALL - x.size), x.dtype)])


@functools.lru_cache(maxsize=64)
def _kernel(metal_kernel: Callable[..., Callable], definition: Definition) -> Callable[..., list[mx.array]]:
    return metal_kernel(
        name=definition.name,
        input_names=list(definition.inputs),
        output_names=list(definition.outputs),
        source=definition.source,
        header=definition.header,
    )


def run(definition: Definition, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
    """Calls the kernel. A definition is built once; the factory is part of the key, for the tests exchange it."""
    kernel = _kernel(mx.fast.metal_kernel, definition)
    return kernel(
        inputs=inputs,
        template=launch.template,
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )
