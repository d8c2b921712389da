"""The text MLX itself generates for a kernel, obtained without Metal: tracing an export prints it."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from .kernel import Call
from .text import Definition


def mlx_generated_text(definition: Definition, call: Call, metal_kernel=mx.fast.metal_kernel) -> str:
    """What MLX would hand to Metal's compiler for this call. metal_kernel: MLX's own, taken before any patching."""
    kernel = metal_kernel(
        name=definition.name,
        input_names=list(definition.input_names),
        output_names=list(definition.output_names),
        source=definition.source,
        header=definition.header,
        ensure_row_contiguous=definition.ensure_row_contiguous,
        atomic_outputs=definition.atomic_outputs,
    )

    def traced(*inputs: mx.array) -> tuple[mx.array, ...]:
        outputs = kernel(
            inputs=list(inputs),
            output_shapes=list(call.output_shapes),
            output_dtypes=[getattr(mx, dtype.removesuffix("_")) for dtype in call.output_dtypes],
            grid=call.grid,
            threadgroup=call.threadgroup,
            template=list(call.template) or None,
            verbose=True,
        )
        return tuple(outputs)

    with tempfile.TemporaryDirectory() as folder:
        printed = _captured_stdout(lambda: mx.export_function(f"{folder}/traced.mlxfn", traced, *call.inputs), folder)
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def _captured_stdout(action, folder: str) -> str:
    """What C++ code prints while action runs: the file descriptor itself is redirected."""
    path = Path(folder) / "stdout"
    sys.stdout.flush()
    saved = os.dup(1)
    target = os.open(path, os.O_CREAT | os.O_RDWR)
    os.dup2(target, 1)
    try:
        action()
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(target)
        os.close(saved)
    return path.read_text()
