"""One launch of a compiled kernel: buffers in, outputs, statistics and reports out.

Mirrors the structures of cpp/state.h. Knows numpy arrays and addresses; knows nothing of MLX or of kernel text.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .build import Module, runtime
from .text import HEADER_LINES_FROM

WRITABLE, INITIALISED, RETURNED = 1, 2, 4
PARTIAL_SIMD_OK, STRICT_WRITES, COUNT_FETCHES = 1, 2, 4
MAX_BUFFERS = 31

_lock = threading.Lock()


@dataclass(frozen=True)
class Options:
    """How a kernel is run and what counts as an error."""

    dry: bool = False  # record the call and return zeros: for checks of the text alone
    check: bool = True  # memory hooks: bounds, races, uninitialised reads
    strict_simd: bool = True  # a simdgroup function must be reached by all lanes of the group
    strict_writes: bool = False  # also reject unordered writes of the same value
    allow_unwritten: bool = False  # outputs without init_value need not be written completely
    count_fetches: bool = False  # count bytes fetched, slowly (see Traffic)
    order: int = 0  # of lanes: 0 ascending, 1 descending, 2 random
    seed: int = 1
    threadgroup_bytes: int = 32768
    max_threads: int = 1024
    stack_kb: int = 64
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Buffer:
    """One argument: memory of the host, copied in if initialised and copied back if it is an output."""

    name: str
    array: np.ndarray
    output: bool = False
    initialised: bool = True
    size_bytes: int | None = None  # of a strided view; default: the array's

    @property
    def bytes(self) -> int:
        return self.array.nbytes if self.size_bytes is None else self.size_bytes


@dataclass(frozen=True)
class Report:
    """One thing that is wrong: its kind, what happened, the lines it happened at and the thread that did it."""

    kind: str
    message: str
    lines: tuple[str, ...] = ()
    thread: str = ""

    def __str__(self) -> str:
        places = [f"at {line}" for line in self.lines] + ([f"by {self.thread}"] if self.thread else [])
        return "\n    ".join([f"[{self.kind}] {self.message}", *places])


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that a launch touched.

    read and written add up the loads and stores of all lanes. fetched counts what lanes of a simdgroup load from one
    address in one instruction once, as a GPU does; it is counted if Options.count_fetches is set.
    """

    size: int
    read: int
    fetched: int
    written: int
    unwritten: int
    first_unwritten: int


@dataclass(frozen=True)
class Statistics:
    """What one launch did."""

    buffers: dict[str, Traffic]
    threadgroup_bytes: int
    collectives: int
    barriers: int
    accesses: int
    same_value_writes: int
    switches: int
    reports: tuple[Report, ...] = field(default=())


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("granule", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("read_bytes", "fetched_bytes", "written_bytes")),
        *((name, ctypes.c_uint64) for name in ("unwritten", "first_unwritten")),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("module_address", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("buffer_count", "flags", "order", "seed", "check", "stack_kb")),
        *((name, ctypes.c_uint32) for name in ("threadgroup_memory_limit", "max_reports")),
        ("timeout_s", ctypes.c_double),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("report", ctypes.c_char_p),
        ("report_capacity", ctypes.c_uint64),
        *((name, ctypes.c_uint64) for name in ("threadgroup_bytes", "collectives", "barriers", "accesses")),
        *((name, ctypes.c_uint64) for name in ("same_value_writes", "switches")),
    ]


def _describe(buffers: list[Buffer]) -> ctypes.Array:
    described = (_Buffer * len(buffers))()
    for d, b in zip(described, buffers, strict=True):
        d.host, d.size, d.name, d.granule = b.array.ctypes.data, b.bytes, b.name.encode(), b.array.itemsize
        d.flags = (WRITABLE | RETURNED if b.output else 0) | (INITIALISED if b.initialised else 0)
    return described


def _flags(options: Options) -> int:
    chosen = {
        PARTIAL_SIMD_OK: not options.strict_simd,
        STRICT_WRITES: options.strict_writes,
        COUNT_FETCHES: options.count_fetches,
    }
    return sum(flag for flag, on in chosen.items() if on)


def launch(
    module: Module,
    buffers: list[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    sources: dict[str, str],
    options: Options,
) -> Statistics:
    """Runs a kernel; outputs are written into the buffers' arrays. sources: file name in #line -> its text."""
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"{len(buffers)} buffer arguments; Metal allows {MAX_BUFFERS}")
    if math.prod(threadgroup) > options.max_threads:
        raise ValueError(f"{math.prod(threadgroup)} threads in a threadgroup; Metal allows {options.max_threads}")
    described = _describe(buffers)
    text = ctypes.create_string_buffer(1 << 16)
    entry = ctypes.cast(module.compiled.msl_entry, ctypes.c_void_p).value
    call = _Launch(
        entry=entry,
        module_address=entry,
        buffer_count=len(buffers),
        flags=_flags(options),
        order=options.order,
        seed=options.seed,
        check=int(options.check),
        stack_kb=options.stack_kb,
        threadgroup_memory_limit=options.threadgroup_bytes,
        max_reports=12,
        timeout_s=options.timeout_s,
        buffers=described,
        report=ctypes.cast(text, ctypes.c_char_p),
        report_capacity=len(text) - 1,
    )
    call.grid[:], call.threadgroup[:] = grid, threadgroup
    if math.prod(grid) and math.prod(threadgroup):
        with _lock:
            if runtime().compiled.msl_launch(ctypes.byref(call)) < 0:
                raise MemoryError("the emulator could not map its buffers")
    records = text.value.decode(errors="replace").split("\x1e")
    reports = [_resolve(record, module.path, sources) for record in records if record]
    traffic = {
        d.name.decode(): Traffic(d.size, d.read_bytes, d.fetched_bytes, d.written_bytes, d.unwritten, d.first_unwritten)
        for d in described
    }
    if options.check and not options.allow_unwritten and not reports:
        reports += [_unwritten(b, traffic[b.name]) for b in buffers if b.output and traffic[b.name].unwritten]
    counters = ("threadgroup_bytes", "collectives", "barriers", "accesses", "same_value_writes", "switches")
    return Statistics(traffic, *(getattr(call, name) for name in counters), tuple(reports))


def _unwritten(buffer: Buffer, traffic: Traffic) -> Report:
    count = traffic.size // buffer.array.itemsize
    message = (
        f"{traffic.unwritten} of {count} elements of output {buffer.name} were never written "
        f"(first: {traffic.first_unwritten})"
    )
    return Report("unwritten-output", message)


def _resolve(record: str, path: Path, sources: dict[str, str]) -> Report:
    """A record of the runtime with its program counter turned into lines of the kernel."""
    kind, offset_text, line_text, thread, message = record.split("\x1f")
    offset, line = int(offset_text, 16), int(line_text)
    lines: list[str] = []
    if offset:  # innermost frame first, then the callers it was inlined into
        found = subprocess.run(["addr2line", "-i", "-e", path, hex(offset - 1)], capture_output=True, text=True)
        for location in (entry.split(" (")[0] for entry in found.stdout.splitlines()):
            file, _, number = location.rpartition(":")
            if number.isdigit():
                lines += _quote(file, int(number), sources)
    elif line:
        header = line > HEADER_LINES_FROM
        name = next(name for name in sources if name.endswith(":header") == header)
        lines += _quote(name, line, sources)
    message = re.sub(r"line (\d{7})", lambda m: f"header line {int(m.group(1)) - HEADER_LINES_FROM}", message)
    return Report(kind, message, tuple(lines), thread)


def _quote(file: str, line: int, sources: dict[str, str]) -> list[str]:
    """The line itself, if it is one of the kernel's; its place only, if it is MLX's; nothing for the shim's."""
    if "mlx/backend" in file:
        return [f"{file[file.index('mlx/backend') :]}:{line}"]
    name = file.rpartition("/")[2]
    if name not in sources:
        return []
    line -= HEADER_LINES_FROM if line > HEADER_LINES_FROM else 0
    text = sources[name].split("\n")
    return [f"{name}:{line}: {text[line - 1].strip()}"] if 0 < line <= len(text) else []
