"""What every kernel's tests ask of it: MLX's own text, a clean lint, CUDA that compiles, and edits that plant bugs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from . import cuda, lint
from .kernel import Kernel
from .reference_text import mlx_generated_text
from .text import Definition


def assert_text_is_mlx_s(launches: list[Kernel]) -> None:
    """The text that was emulated is, to the byte, the text MLX would hand to Metal's compiler."""
    assert launches
    for kernel in launches:
        own = kernel.call.generate(kernel.definition).text
        assert own.strip() == mlx_generated_text(kernel.definition, kernel.call).strip()


def assert_lint_is_clean(launches: list[Kernel]) -> None:
    assert launches
    for kernel in launches:
        assert lint.complaints(kernel.definition, kernel.call) == []


def assert_compiles_for_cuda(launches: list[Kernel]) -> None:
    """Also that nothing in the call depends on what CUDA lacks: partial threadgroups, 0-d inputs."""
    assert launches
    for kernel in launches:
        call = kernel.call
        assert all(g % t == 0 for g, t in zip(call.grid, call.threadgroup, strict=True))
        assert all(x.ndim for x in call.inputs)
    cuda.compile_check([(kernel.definition, kernel.call) for kernel in launches])


def planted(kernel: str, part: str, old: str, new: str) -> Callable[[Definition], Definition]:
    """An edit for `patched`: in kernels whose name begins so, part ("source" or "header") has `new` for `old`."""

    def edit(definition: Definition) -> Definition:
        if not definition.name.startswith(kernel):
            return definition
        text = getattr(definition, part)
        assert text.count(old) == 1, (text.count(old), old)
        return replace(definition, **{part: text.replace(old, new)})

    return edit


def relative_error(got: mx.array, expected: mx.array) -> float:
    """Largest difference over the largest expected magnitude."""
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(got - expected).max() / mx.abs(expected).max()).item()
