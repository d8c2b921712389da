"""Stands in for mx.fast.metal_kernel: same definition, same call, run on the CPU and checked.

Owns the way from MLX arrays to a launch and back. `patched` puts it under production code, which then believes that
there is a Metal device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import mlx.core as mx
import numpy as np

from . import build
from .launch import Buffer, Options, Report, Statistics, Traffic, launch
from .text import DTYPES, Definition, Generated, Input, dtype_name, generate, lower_threadgroup, strip_comments


class EmulationError(RuntimeError):
    """A kernel did something wrong. kinds: the sorted kinds of the reports, which the message spells out."""

    def __init__(self, name: str, reports: tuple[Report, ...]):
        super().__init__(f"kernel {name}:\n" + "\n".join(str(report) for report in reports))
        self.reports = reports
        self.kinds = sorted({report.kind for report in reports})


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a kernel, with MLX's names."""

    inputs: tuple[mx.array, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: tuple[tuple[str, object], ...] = ()
    init_value: float | None = None

    def described_inputs(self) -> list[Input]:
        return [Input(dtype_name(x.dtype), x.ndim, x.size) for x in self.inputs]

    def generate(self, definition: Definition, mark_lines: bool = False) -> Generated:
        dtypes, template = list(self.output_dtypes), list(self.template)
        return generate(definition, self.described_inputs(), dtypes, template, mark_lines)


def host_array(x: mx.array) -> np.ndarray:
    """The array's own memory; bfloat16 as its bits."""
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    mx.eval(bits)
    return np.array(bits, copy=False)


def device_array(x: np.ndarray, dtype: str) -> mx.array:
    return mx.array(x).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(x)


def _extent_bytes(x: np.ndarray) -> int:
    """Bytes from the first element to the end of the last one, of a view with non-negative strides."""
    if any(stride < 0 for stride in x.strides):
        raise ValueError("negative strides are not emulated")
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) + x.itemsize if x.size else 0


def _fill(shape: tuple[int, ...], dtype: str, value: float | None) -> np.ndarray:
    array = np.zeros(shape, DTYPES[dtype][1])
    if value is not None:
        array[...] = host_array(mx.array(value, dtype=mx.bfloat16)) if dtype == "bfloat16" else value
    return array


def lowered(text: str) -> str:
    """MSL that a C++ compiler can read."""
    return lower_threadgroup(strip_comments(text))


def entry_point(generated: Generated) -> str:
    """The function the runtime calls, which hands the kernel its buffers and attributes."""
    arguments = []
    for slot, p in enumerate(generated.parameters):
        qualifier = "" if p.kind == "out" else "const "
        arguments.append(f"{'*' if p.by_reference else ''}({qualifier}{p.type}*)a[{slot}]")
    for name, kind in generated.attributes:
        vector = f"uint3(ti->{name}[0], ti->{name}[1], ti->{name}[2])"
        arguments.append(f"ti->{name}" if kind == "uint" else vector)
    call = f"{generated.function}{generated.template_arguments}({', '.join(arguments)});"
    return f'\n#line 1 "entry"\nextern "C" void msl_entry(void** a, const msl_rt::ThreadInfo* ti) {{\n  {call}\n}}\n'


class Kernel:
    """A kernel definition that can be called like the object mx.fast.metal_kernel returns."""

    def __init__(self, definition: Definition, options: Options, observe: Callable[[Kernel], None] | None = None):
        if not definition.output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.definition = definition
        self.options = options
        self.observe = observe
        self.call: Call | None = None  # the last one
        self.statistics: Statistics | None = None  # of the last call

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None, **rest):
        self.call = Call(
            tuple(x if isinstance(x, mx.array) else mx.array(x) for x in inputs),
            tuple(tuple(shape) for shape in output_shapes),
            tuple(dtype_name(dtype) for dtype in output_dtypes),
            tuple(grid),
            tuple(threadgroup),
            tuple(template or ()),
            rest.pop("init_value", None),
        )
        rest.pop("stream", None)
        if rest:
            raise TypeError(f"not emulated: {sorted(rest)}")
        self._check_counts()
        return self._run(self.call)

    def _check_counts(self) -> None:
        d, call = self.definition, self.call
        for what, got, names in (
            ("inputs", call.inputs, d.input_names),
            ("output_shapes", call.output_shapes, d.output_names),
            ("output_dtypes", call.output_dtypes, d.output_names),
        ):
            if len(got) != len(names):
                raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}.")

    def _run(self, call: Call) -> list[mx.array]:
        if self.options.dry:
            if self.observe:
                self.observe(self)
            outputs = zip(call.output_shapes, call.output_dtypes, strict=True)
            return [mx.zeros(shape, dtype=getattr(mx, dtype.removesuffix("_"))) for shape, dtype in outputs]
        generated = call.generate(self.definition, mark_lines=True)
        body = build.inline_mlx_headers(
            lowered(generated.text) + entry_point(generated), lowered, build.HERE / "override"
        )
        module = build.build_kernel(self.definition.name, body, self.options.check)
        outputs = [
            _fill(shape, dtype, call.init_value)
            for shape, dtype in zip(call.output_shapes, call.output_dtypes, strict=True)
        ]
        buffers = self._buffers(generated, outputs)
        name = self.definition.name
        sources = {name: self.definition.source, f"{name}:header": self.definition.header}
        self.statistics = launch(module, buffers, call.grid, call.threadgroup, sources, self.options)
        if self.statistics.reports:
            raise EmulationError(name, self.statistics.reports)
        if self.observe:
            self.observe(self)
        return [device_array(x, dtype) for x, dtype in zip(outputs, call.output_dtypes, strict=True)]

    def _buffers(self, generated: Generated, outputs: list[np.ndarray]) -> list[Buffer]:
        arrays = [host_array(x) for x in self.call.inputs]
        if self.definition.ensure_row_contiguous:
            arrays = [np.ascontiguousarray(x) if x.ndim else x for x in arrays]
        buffers = []
        for p in generated.parameters:
            if p.kind == "out":
                started = self.call.init_value is not None
                buffers.append(Buffer(self.definition.output_names[p.index], outputs[p.index], True, started))
                continue
            name, x = self.definition.input_names[p.index], arrays[p.index]
            if p.kind == "in":
                buffers.append(Buffer(name, x, size_bytes=_extent_bytes(x)))
                continue
            info = {
                "_shape": np.array(x.shape, np.int32),
                "_strides": np.array([stride // x.itemsize for stride in x.strides], np.int64),
                "_ndim": np.array([x.ndim], np.int32),
            }[p.kind]
            buffers.append(Buffer(name + p.kind, info))
        return buffers


def metal_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    options: Options | None = None,
) -> Kernel:
    """mx.fast.metal_kernel, emulated."""
    names = tuple(input_names), tuple(output_names)
    definition = Definition(name, *names, source, header, ensure_row_contiguous, atomic_outputs)
    return Kernel(definition, options or Options())


@contextlib.contextmanager
def patched(
    observe: Callable[[Kernel], None] | None = None,
    edit: Callable[[Definition], Definition] | None = None,
    **options: object,
) -> Iterator[list[Kernel]]:
    """Inside, mx.fast.metal_kernel builds emulated kernels and MLX claims a Metal device.

    Yields the list of launches made so far. observe is called after each launch; edit may change a definition
    (tests plant bugs with it); options are those of Options.
    """
    chosen = replace(Options(), **options)
    launches: list[Kernel] = []

    def record(kernel: Kernel) -> None:
        snapshot = Kernel(kernel.definition, kernel.options)
        snapshot.call, snapshot.statistics = kernel.call, kernel.statistics
        launches.append(snapshot)
        if observe:
            observe(snapshot)

    def factory(*arguments: object, **named: object) -> Kernel:
        definition = metal_kernel(*arguments, **named).definition
        return Kernel(edit(definition) if edit else definition, chosen, record)

    with (
        mock.patch.object(mx.fast, "metal_kernel", factory),
        mock.patch.object(mx.metal, "is_available", return_value=True),
        mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu)),
    ):
        yield launches


def library(launch: Kernel) -> str:
    """What MLX would build for a launch, by its text: a library for every other text."""
    generated = launch.call.generate(launch.definition)
    return f"{generated.function}{generated.template_arguments}\n{generated.text}"


def bytes_read(launches: list[Kernel], *names: str) -> int:
    """Bytes that lanes loaded from buffers of these names; from all buffers if no name is given."""
    return sum(t.read for t in _traffic(launches, names))


def bytes_fetched(launches: list[Kernel], *names: str) -> int:
    """Bytes that simdgroups fetched from buffers of these names (option count_fetches); from all if none is given."""
    assert all(kernel.options.count_fetches for kernel in launches)
    return sum(t.fetched for t in _traffic(launches, names))


def _traffic(launches: list[Kernel], names: tuple[str, ...]) -> list[Traffic]:
    buffers = [entry for kernel in launches for entry in kernel.statistics.buffers.items()]
    return [traffic for name, traffic in buffers if not names or name in names]
