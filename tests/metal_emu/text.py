"""Kernel text: what MLX writes around a kernel's body, and the rewriting after which a C++ compiler can read it.

Ports mlx/backend/common/metal_kernel.cpp. Knows nothing of compilers, memory or array values: text in, text out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

# MLX dtype name -> (name in Metal, numpy storage). numpy has no bfloat16: its bits are kept in uint16.
DTYPES: dict[str, tuple[str, type]] = {
    "float32": ("float", np.float32),
    "float16": ("float16_t", np.float16),
    "bfloat16": ("bfloat16_t", np.uint16),
    "complex64": ("complex64_t", np.complex64),
    "bool": ("bool", np.bool_),
    "bool_": ("bool", np.bool_),
    "int8": ("int8_t", np.int8),
    "int16": ("int16_t", np.int16),
    "int32": ("int32_t", np.int32),
    "int64": ("int64_t", np.int64),
    "uint8": ("uint8_t", np.uint8),
    "uint16": ("uint16_t", np.uint16),
    "uint32": ("uint32_t", np.uint32),
    "uint64": ("uint64_t", np.uint64),
}

# Kernel attributes MLX passes when the body names them, in MLX's order.
ATTRIBUTES: tuple[tuple[str, str], ...] = (
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
)

# MLX passes inputs with fewer elements than this in the `constant` address space.
MAX_CONSTANT_SIZE = 8

# Lines of a kernel's header are numbered from here, so that a bare line number says which text it is in.
HEADER_LINES_FROM = 1_000_000

SHAPE_INFO = {  # what a body may ask of an input -> (declaration, element type)
    "_shape": ("const constant int* {}", "int"),
    "_strides": ("const constant int64_t* {}", "int64_t"),
    "_ndim": ("const constant int& {}", "int"),
}


@dataclass(frozen=True)
class Definition:
    """What mx.fast.metal_kernel was given."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Input:
    """What the generated text depends on of one input array."""

    dtype: str
    ndim: int
    size: int

    @property
    def constant(self) -> bool:
        return self.size < MAX_CONSTANT_SIZE


@dataclass(frozen=True)
class Parameter:
    """One buffer of the generated function. kind: "in", "out" or a key of SHAPE_INFO; index: of the input or output."""

    kind: str
    index: int
    by_reference: bool
    type: str
    constant: bool


@dataclass(frozen=True)
class Generated:
    """MSL text with one kernel function in it, and how to call that function."""

    text: str
    function: str
    template_arguments: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[tuple[str, str], ...]


def dtype_name(dtype: object) -> str:
    """The MLX name of an MLX or numpy dtype."""
    text = str(dtype)
    if text.startswith("mlx.core."):
        return text.removeprefix("mlx.core.")
    return text if text in DTYPES else np.dtype(dtype).name


def _template_kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _template_argument(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, int) else DTYPES[dtype_name(value)][0]


def _function_name(name: str, arguments: str, inputs: list[Input], output_dtypes: list[str]) -> str:
    parts = ["custom_kernel_", name]
    if arguments:
        parts.append("_" + arguments.replace(", ", "_").replace("<", "_").replace(">", "_")[:-1])
    for x in inputs:
        parts.append("_" + DTYPES[x.dtype][0] + ("s" if x.ndim == 0 else "c" if x.constant else ""))
    parts += ["_" + DTYPES[dtype][0] for dtype in output_dtypes]
    return "".join(parts)


def _buffers(definition: Definition, inputs: list[Input], output_dtypes: list[str]) -> list[tuple[str, Parameter]]:
    """Buffer declarations in MLX's order, each with its plan."""
    buffers: list[tuple[str, Parameter]] = []
    for index, (name, x) in enumerate(zip(definition.input_names, inputs, strict=True)):
        metal_type = DTYPES[x.dtype][0]
        space = "constant" if x.constant else "device"
        mark = "&" if x.ndim == 0 else "*"
        buffers.append(
            (f"const {space} {metal_type}{mark} {name}", Parameter("in", index, x.ndim == 0, metal_type, x.constant))
        )
        for suffix, (declaration, info_type) in SHAPE_INFO.items():
            if x.ndim > 0 and name + suffix in definition.source:
                parameter = Parameter(suffix, index, suffix == "_ndim", info_type, True)
                buffers.append((declaration.format(name + suffix), parameter))
    for index, (name, dtype) in enumerate(zip(definition.output_names, output_dtypes, strict=True)):
        metal_type = DTYPES[dtype][0]
        metal_type = f"atomic<{metal_type}>" if definition.atomic_outputs else metal_type
        buffers.append((f"device {metal_type}* {name}", Parameter("out", index, False, metal_type, False)))
    return buffers


def generate(
    definition: Definition,
    inputs: list[Input],
    output_dtypes: list[str],
    template: list[tuple[str, object]],
    mark_lines: bool = False,
) -> Generated:
    """The text MLX hands to Metal; with mark_lines also #line marks, and no explicit instantiation."""
    values = [value for _, value in template]
    arguments = "<" + ", ".join(_template_argument(v) for v in values) + ">" if template else ""
    function = _function_name(definition.name, arguments, inputs, output_dtypes)
    buffers = _buffers(definition, inputs, output_dtypes)
    attributes = tuple((name, kind) for name, kind in ATTRIBUTES if name in definition.source)
    lines = [f"  {declaration} [[buffer({i})]]" for i, (declaration, _) in enumerate(buffers)]
    lines += [f"  {kind} {name} [[{name}]]" for name, kind in attributes]
    text = definition.header
    if mark_lines and text:
        text = f'\n#line {HEADER_LINES_FROM + 1} "{definition.name}:header"\n{text}'
    if template:
        text += "template <" + ", ".join(f"{_template_kind(v)} {n}" for n, v in template) + ">\n"
    text += f"[[kernel]] void {function}(\n" + ",\n".join(lines) + ") {\n"
    if mark_lines:
        text += f'\n#line 1 "{definition.name}"\n'
    text += definition.source + "\n}\n"
    if template and not mark_lines:
        whole = function + arguments
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({whole}) {whole};\n'
    return Generated(text, function, arguments, tuple(parameter for _, parameter in buffers), attributes)


# ---- rewriting for compilers that are not Apple's --------------------------------------------------

# `threadgroup T a[N], b;` as a statement. Pointers and references to threadgroup memory do not match.
THREADGROUP_DECLARATION = re.compile(
    r"(?<![\w])threadgroup\s+"
    r"((?:const\s+|volatile\s+)*[A-Za-z_][\w:]*(?:\s*<[^;{}()]*?>)?(?:\s+(?!\w+\s*\()[A-Za-z_]\w*(?=\s+[A-Za-z_]))?)\s+"
    r"([A-Za-z_]\w*(?:\s*\[[^;{}]*?\])*(?:\s*,\s*[A-Za-z_]\w*(?:\s*\[[^;{}]*?\])*)*)\s*;"
)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group(0))


def strip_comments(text: str) -> str:
    """Comments and [[attributes]] become spaces; line numbers stay."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", _blank, text, flags=re.S)
    return re.sub(r"\[\[[^\[\]]*\]\]", _blank, text)


def lower_threadgroup(text: str) -> str:
    """`threadgroup T a[N], b;` -> MSL_TG_DECL(a, [N], T); MSL_TG_DECL(b, , T); (a macro of the shim)."""

    def lower(match: re.Match[str]) -> str:
        declared = []
        for variable in re.split(r",(?![^\[]*\])", match.group(2)):
            name, bracket, rest = variable.strip().partition("[")
            declared.append(f"MSL_TG_DECL({name.strip()}, {bracket}{rest}, {match.group(1)});")
        return " ".join(declared) + "\n" * match.group(0).count("\n")

    return THREADGROUP_DECLARATION.sub(lower, text)


_POINTER = re.compile(
    r"^\s*(?:const\s+)?(?!return\b|else\b|using\b|typedef\b|new\b)([A-Za-z_][\w:]*(?:<[^;{}()]*>)?)"
    r"\s*(?:const\s*)?[*&]\s*(?:const\s+)?(\w+)\s*(?:=|$)"
)
_FUNCTION = re.compile(r"\w[\w:<>\s*&]*\s\w+\s*\((.*)\)\s*(?:const\s*)?(?:thread\s*)?\{")
_SPACES = re.compile(r"\b(device|threadgroup|thread|constant)\b")


def unqualified_pointers(text: str) -> list[tuple[int, str]]:
    """(line, declaration) of pointers and references without an address space: an error on Metal that neither g++ nor
    clang's OpenCL mode reports. A heuristic over declarations and parameter lists that stand on one line."""
    found = []
    for number, line in enumerate(strip_comments(text).split("\n"), 1):
        parts = re.split(r"[;{]", line)
        function = _FUNCTION.search(line)
        if function:
            parts += function.group(1).split(",")
        for part in (p.strip() for p in parts):
            if _POINTER.match(part) and not _SPACES.search(part) and not re.match(r"(const\s+)?auto\b", part):
                found.append((number, part))
    return found
