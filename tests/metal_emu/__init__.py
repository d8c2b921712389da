"""Runs mx.fast.metal_kernel definitions on a CPU and checks every memory access: the proving ground for kernels.

    text             what MLX writes around a kernel, and the rewriting a C++ compiler needs
    build            g++, flags, the cache of compiled kernels
    launch           one launch: buffers in, statistics and reports out
    kernel           the stand-in for mx.fast.metal_kernel, and `patched`
    lint             a second, stricter reading by clang; nothing is run
    reference_text   the text MLX itself generates, to compare with ours
    cuda             the same definitions for mx.fast.cuda_kernel
    include, cpp     the Metal language on C++17, and the runtime: fibers, scheduler, checker

What it cannot show: acceptance by Apple's compiler, the numerics of Apple's exp and log, register pressure, and
anything about speed. Byte counts prove how often memory is read, nothing more.
"""

from .build import BuildError, unavailable
from .kernel import Call, EmulationError, Kernel, bytes_fetched, bytes_read, library, metal_kernel, patched
from .launch import Options, Report, Statistics
from .reference_text import mlx_generated_text
from .text import Definition, generate

__all__ = [
    "BuildError",
    "Call",
    "Definition",
    "EmulationError",
    "Kernel",
    "Options",
    "Report",
    "Statistics",
    "bytes_fetched",
    "bytes_read",
    "generate",
    "library",
    "metal_kernel",
    "mlx_generated_text",
    "patched",
    "unavailable",
]
