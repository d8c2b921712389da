"""The same kernel definition for mx.fast.cuda_kernel: a textual translation, and a compile check with nvcc.

Warps stand for simdgroups. Threadgroup variables become __shared__, other address-space words are deleted (a macro
named `device` would break __device__), attributes become constants at the top of the body, and cpp/cuda_prelude.cuh
supplies the library. Differences that stay: the grid must be a multiple of the threadgroup, inputs must not be 0-d.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from unittest import mock

import mlx.core as mx

from . import build
from .kernel import Call
from .text import DTYPES, SHAPE_INFO, THREADGROUP_DECLARATION, Definition, dtype_name, strip_comments

ARCHITECTURE = "sm_90"

_THREAD = "(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))"
_THREADS = "(blockDim.x * blockDim.y * blockDim.z)"


def _each(expression: str) -> str:
    return f"make_uint3({', '.join(expression.replace('#', axis) for axis in 'xyz')})"


ATTRIBUTES = {
    "thread_position_in_grid": ("uint3", _each("blockIdx.# * blockDim.# + threadIdx.#")),
    "thread_position_in_threadgroup": ("uint3", _each("threadIdx.#")),
    "threadgroup_position_in_grid": ("uint3", _each("blockIdx.#")),
    "threadgroups_per_grid": ("uint3", _each("gridDim.#")),
    "threads_per_threadgroup": ("uint3", _each("blockDim.#")),
    "dispatch_threads_per_threadgroup": ("uint3", _each("blockDim.#")),
    "threads_per_grid": ("uint3", _each("gridDim.# * blockDim.#")),
    "thread_index_in_threadgroup": ("uint", _THREAD),
    "thread_index_in_simdgroup": ("uint", f"{_THREAD} & 31"),
    "simdgroup_index_in_threadgroup": ("uint", f"{_THREAD} >> 5"),
    "simdgroups_per_threadgroup": ("uint", f"({_THREADS} + 31) >> 5"),
    "threads_per_simdgroup": ("uint", "32"),
    "thread_execution_width": ("uint", "32"),
}

CUDA_TYPES = {**{name: metal for name, (metal, _) in DTYPES.items()}, "float16": "__half", "bfloat16": "__nv_bfloat16"}


def unavailable() -> str | None:
    """Why kernels cannot be compiled for CUDA on this machine, or None if they can."""
    return None if shutil.which("nvcc") else "the CUDA check needs nvcc: it is not on the path"


def _without_spaces(text: str) -> str:
    """Threadgroup variables to __shared__, other address-space words to nothing."""
    text = strip_comments(text)
    text = THREADGROUP_DECLARATION.sub(lambda m: m.group(0).replace("threadgroup", "__shared__", 1), text)
    return re.sub(r"\b(device|constant|thread|threadgroup)\b(?=\s)", "", text)


def _attributes(definition: Definition) -> str:
    return "".join(
        f"  const {kind} {name} = {expression};\n"
        for name, (kind, expression) in ATTRIBUTES.items()
        if re.search(rf"\b{name}\b", definition.source)
    )


def _prelude() -> str:
    return (build.HERE / "cpp/cuda_prelude.cuh").read_text()


def translate(definition: Definition) -> tuple[str, str]:
    """(source, header) for mx.fast.cuda_kernel."""
    if definition.atomic_outputs:
        raise ValueError("atomic_outputs has no CUDA counterpart: cast inside the kernel")
    source = _attributes(definition) + _without_spaces(definition.source)
    return source, _prelude() + _without_spaces(definition.header)


def cuda_kernel(name, input_names, output_names, source, header="", ensure_row_contiguous=True, **_):
    """mx.fast.metal_kernel on MLX's CUDA backend, through the translation. Needs an NVIDIA GPU."""
    definition = Definition(name, tuple(input_names), tuple(output_names), source, header, ensure_row_contiguous)
    body, top = translate(definition)
    kernel = mx.fast.cuda_kernel(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=body,
        header=top,
        ensure_row_contiguous=ensure_row_contiguous,
    )

    def call(*, inputs, grid, threadgroup, **rest):
        if any(g % t for g, t in zip(grid, threadgroup, strict=True)):
            raise ValueError("CUDA rounds the grid up to whole threadgroups; Metal does not")
        if any(x.ndim == 0 for x in inputs):
            raise ValueError("0-d inputs are values on Metal and pointers on CUDA: use arrays of one element")
        return kernel(inputs=inputs, grid=grid, threadgroup=threadgroup, **rest)

    return call


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """Inside, kernels meant for Metal run on MLX's CUDA backend."""
    with (
        mock.patch.object(mx.fast, "metal_kernel", cuda_kernel),
        mock.patch.object(mx.metal, "is_available", return_value=True),
    ):
        yield


def _template(call: Call) -> str:
    lines = []
    for name, value in call.template:
        if isinstance(value, bool):
            lines.append(f"  constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, int):
            lines.append(f"  constexpr int {name} = {value};")
        else:
            lines.append(f"  using {name} = {CUDA_TYPES[dtype_name(value)]};")
    return "\n".join(lines) + "\n"


def _kernel_text(definition: Definition, call: Call, namespace: str) -> str:
    """The function that mlx/backend/cuda/custom_kernel.cpp builds, with its helpers, in a namespace of its own."""
    parameters = []
    for name, x in zip(definition.input_names, call.described_inputs(), strict=True):
        parameters.append(f"const {CUDA_TYPES[x.dtype]}* {name}")
        for suffix, kind in zip(SHAPE_INFO, ("Shape", "Strides", "int"), strict=True):
            if x.ndim and name + suffix in definition.source:
                parameters.append(f"const __grid_constant__ {kind} {name}{suffix}")
    for name, dtype in zip(definition.output_names, call.output_dtypes, strict=True):
        parameters.append(f"{CUDA_TYPES[dtype]}* {name}")
    return (
        f"namespace {namespace} {{\n{_without_spaces(definition.header)}\n"
        f"__global__ void {definition.name}(\n    "
        + ",\n    ".join(parameters)
        + f") {{\n{_template(call)}{_attributes(definition)}{_without_spaces(definition.source)}\n}}\n}}\n"
    )


def compile_check(kernels: list[tuple[Definition, Call]]) -> None:
    """Compiles kernels for the architecture with nvcc; raises BuildError if nvcc refuses one. Nothing is run."""
    # a stand-in for MLX's Shape and Strides
    text = (
        "#include <cstdint>\n"
        "struct Shape { int e[8]; __device__ int operator[](int i) const { return e[i]; } };\n"
        "struct Strides { long e[8]; __device__ long operator[](int i) const { return e[i]; } };\n" + _prelude()
    )
    text += "".join(_kernel_text(*kernel, f"kernel_{i}") for i, kernel in enumerate(kernels))
    done = build.cache_directory() / f"cuda_{build.digest(text, ARCHITECTURE)}.cubin"
    if done.exists():
        return
    source = build.write_atomically(done.with_suffix(".cu"), text)
    own = done.with_suffix(f".{os.getpid()}.tmp")
    names = ", ".join(definition.name for definition, _ in kernels)
    flags = ["-std=c++17", f"-arch={ARCHITECTURE}", "-cubin", "-w"]
    build.run_tool(["nvcc", *flags, "-o", own, source], f"compiling {names} for {ARCHITECTURE}")
    own.rename(done)
