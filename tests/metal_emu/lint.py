"""A second reading of a kernel: clang's "C++ for OpenCL", which knows address spaces. Nothing is run.

Optional: without clang-19 there is no second reading. It reports wrong address spaces, std::, missing functions; a
search beside it reports pointers without an address space, which clang's mode allows and Metal does not.
"""

from __future__ import annotations

import shutil
import subprocess

from . import build
from .kernel import Call, lowered
from .text import Definition, Generated, unqualified_pointers

CLANG = "clang-19"
FLAGS = (
    *("--target=x86_64-linux-gnu", "-x", "cl", "-cl-std=clc++2021", "-cl-single-precision-constant"),
    *("-fsyntax-only", "-w"),
)


def unavailable() -> str | None:
    """Why kernels cannot be linted on this machine, or None if they can."""
    return None if shutil.which(CLANG) else f"the lint needs {CLANG}: it is not on the path"


def _entry(generated: Generated) -> str:
    """A kernel that calls the kernel with null pointers in the address spaces MLX would choose."""
    arguments = []
    for p in generated.parameters:
        space = "__constant" if p.constant else "__global"
        qualifier = "" if p.kind == "out" else "const "
        arguments.append(f"{'*' if p.by_reference else ''}({qualifier}{space} {p.type}*)0")
    arguments += ["(uint)0" if kind == "uint" else "(uint3)(0u)" for _, kind in generated.attributes]
    call = f"{generated.function}{generated.template_arguments}({', '.join(arguments)});"
    return f'\n#line 1 "entry"\n__kernel void msl_entry(__global int* msl_a) {{ {call} }}\n'


def complaints(definition: Definition, call: Call) -> list[str]:
    """Complaints about a kernel as it would be compiled for this call; empty if there are none."""
    generated = call.generate(definition, mark_lines=True)
    text = lowered(generated.text) + _entry(generated)
    text = f'#include "msl_lint.h"\n#include "{build.MLX_KERNELS}utils.h"\n{text}'
    text = build.inline_mlx_headers(text, lowered, build.HERE / "lint")
    source = build.write_atomically(build.cache_directory() / f"lint_{build.digest(text)}.clcpp", text)
    folders = [build.HERE / "lint", build.HERE / "override", build.standard_headers("msl_lint"), build.mlx_include()]
    includes = [word for folder in folders for word in ("-I", str(folder))]
    done = subprocess.run([CLANG, *FLAGS, *includes, str(source)], capture_output=True, text=True)
    found = [line for line in done.stderr.split("\n") if ": error:" in line or "note: candidate" in line]
    for part, body in (("header", definition.header), ("source", definition.source)):
        found += [
            f"{definition.name} {part}:{line}: error: no address space: {declaration}"
            for line, declaration in unqualified_pointers(body)
        ]
    return found
