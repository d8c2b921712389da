"""Compiles the runtime and the kernels with g++, and keeps what it compiled in a cache outside the repository.

Knows files, flags and the compiler; knows nothing of arrays or launches. A kernel's text, the flags and the shim are
the key of its shared object, so nothing is ever stale.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx

HERE = Path(__file__).parent
COMPILER = "g++"
OLDEST_COMPILER = 12  # _Float16 in C++ and -ftrivial-auto-var-init
MLX_KERNELS = "mlx/backend/metal/kernels/"

# Headers of Apple's standard library that MLX's kernels include: all of them are the shim.
STANDARD_HEADERS = (
    *("metal_atomic", "metal_common", "metal_compute", "metal_geometric", "metal_integer", "metal_limits"),
    *("metal_math", "metal_numeric", "metal_relational", "metal_simdgroup", "metal_simdgroup_matrix"),
    *("metal_stdlib", "metal_type_traits", "metal_types"),
)

# Every kernel begins as on a Mac: MLX puts its utils.h in front. Precompiled once a flag set (0.3 s a kernel to 0.1 s).
PRELUDE = f'#include <msl_shim.h>\n#include "{MLX_KERNELS}utils.h"\n'

COMMON_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-g1", "-w", "-fno-strict-aliasing", "-fwrapv", "-fno-exceptions"),
    *("-fsingle-precision-constant", "-fno-tree-loop-distribute-patterns", "-ffp-contract=off"),
)
CHECK_FLAGS = (
    *("-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fsanitize=thread"),
    *("--param=tsan-instrument-func-entry-exit=0", "-fsanitize=bounds", "-fno-sanitize-recover=bounds"),
    "-ftrivial-auto-var-init=pattern",
)

_lock = threading.Lock()


class BuildError(RuntimeError):
    """The compiler refused a text; the message ends with what it said."""


@dataclass(frozen=True)
class Module:
    """A loaded shared object; path is for addr2line."""

    compiled: ctypes.CDLL
    path: Path


def digest(*parts: object) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else str(part).encode())
        h.update(b"\0")
    return h.hexdigest()[:20]


def run_tool(command: list[object], what: str) -> str:
    """Standard output of a tool; raises BuildError if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} failed:\n{done.stderr[-6000:]}")
    return done.stdout


@functools.cache
def unavailable() -> str | None:
    """Why kernels cannot be emulated on this machine, or None if they can."""
    if sys.platform != "linux":
        return f"metal_emu runs on Linux, not on {sys.platform}"
    if shutil.which(COMPILER) is None:
        return f"metal_emu needs {COMPILER} >= {OLDEST_COMPILER}: there is no {COMPILER} on the path"
    version = run_tool([COMPILER, "-dumpversion"], "asking for the compiler's version").strip()
    if int(version.split(".")[0]) < OLDEST_COMPILER:
        return f"metal_emu needs {COMPILER} >= {OLDEST_COMPILER}: this one is {version}"
    if mlx_include() is None:
        return "metal_emu needs the Metal headers inside the mlx wheel: they are not there"
    return None


@functools.cache
def mlx_include() -> Path | None:
    """The wheel's include directory: it carries MLX's Metal headers, on Linux too. mlx is a namespace package."""
    folders = [Path(folder) / "include" for folder in mlx.__path__]
    return next((f for f in folders if (f / MLX_KERNELS / "utils.h").exists()), None)


@functools.cache
def cache_directory() -> Path:
    path = Path(tempfile.gettempdir()) / f"metal_emu_{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return path


@functools.cache
def standard_headers(target: str) -> Path:
    """A directory of one-line headers, each of which includes `target`."""
    folder = cache_directory() / f"headers_{target}"
    folder.mkdir(exist_ok=True)
    for name in STANDARD_HEADERS:
        write_atomically(folder / name, f'#include "{target}.h"\n')
    return folder


def write_atomically(path: Path, text: str) -> Path:
    """Several test processes may write the same file: each writes its own and renames it."""
    if not path.exists():
        own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        own.write_text(text)
        own.rename(path)
    return path


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    features = found.group(1).split() if found else []
    return tuple(f"-m{feature}" for feature in ("f16c", "fma") if feature in features)


def _flags(check: bool) -> tuple[str, ...]:
    return COMMON_FLAGS + _machine_flags() + (CHECK_FLAGS if check else ())


def _includes() -> list[object]:
    folders = [HERE / "override", HERE / "include", standard_headers("msl_shim"), mlx_include()]
    return [word for folder in folders for word in ("-I", folder)]


@functools.cache
def _shim_digest() -> str:
    files = [p for folder in ("cpp", "include", "override") for p in sorted((HERE / folder).rglob("*")) if p.is_file()]
    compiler = run_tool([COMPILER, "--version"], "asking for the compiler's version")
    utils = (mlx_include() / MLX_KERNELS / "utils.h").read_bytes()
    return digest(*(p.read_bytes() for p in files), compiler, utils, __file__, Path(__file__).read_bytes())


@functools.cache
def runtime() -> Module:
    """The emulator's runtime, loaded so that kernels find their hooks in it."""
    path = cache_directory() / f"runtime_{_shim_digest()}.so"
    if not path.exists():
        own = path.with_suffix(f".{os.getpid()}.tmp")
        flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-w"]
        run_tool([COMPILER, *flags, "-o", own, HERE / "cpp/runtime.cpp", "-ldl"], "building the emulator's runtime")
        own.rename(path)
    return Module(ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL), path)


@functools.cache
def _prelude(check: bool) -> Path:
    """Folder with the precompiled header of a flag set."""
    folder = cache_directory() / f"prelude_{digest(_shim_digest(), *_flags(check))}"
    folder.mkdir(exist_ok=True)
    source = write_atomically(folder / "prelude.h", PRELUDE)
    compiled = folder / "prelude.h.gch"
    if not compiled.exists():
        own = folder / f"{os.getpid()}.tmp"
        command = [COMPILER, *_flags(check), *_includes(), "-x", "c++-header", "-o", own, source]
        run_tool(command, "precompiling the shim")
        own.rename(compiled)
    return folder


@functools.cache
def _load(path: Path) -> Module:
    return Module(ctypes.CDLL(str(path)), path)


def build_kernel(name: str, body: str, check: bool) -> Module:
    """The shared object of one kernel; body: C++ that follows the prelude and defines msl_entry."""
    with _lock:
        host = runtime()
        path = cache_directory() / f"kernel_{digest(body, _shim_digest(), *_flags(check))}.so"
        if not path.exists():
            source = write_atomically(path.with_suffix(".cpp"), '#include "prelude.h"\n' + body)
            own = path.with_suffix(f".{os.getpid()}.tmp")
            folder = _prelude(check)
            compiled = own.with_suffix(".o")
            command = [COMPILER, *_flags(check), "-I", folder, *_includes(), "-c", "-o", compiled, source]
            run_tool(command, f"compiling kernel {name}")
            # linked without the sanitizer flags: its hooks are the runtime's
            command = [COMPILER, "-shared", "-o", own, compiled, host.path, f"-Wl,-rpath,{host.path.parent}"]
            run_tool(command, f"linking kernel {name}")
            compiled.unlink()
            own.rename(path)
        return _load(path)


_INCLUDE = re.compile(rf'^[ \t]*#include\s+"({MLX_KERNELS}[^"]+)"[ \t]*$', re.M)
_UNCHANGED = ("utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h")


def inline_mlx_headers(text: str, rewrite: Callable[[str], str], override: Path, done: set[str] | None = None) -> str:
    """MLX headers that declare threadgroup variables must be rewritten as the kernel is, so they are put in its text.

    done: names of headers that are in the text already; grows.
    """
    done = set() if done is None else done

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name.removeprefix(MLX_KERNELS) in _UNCHANGED:
            return match.group(0)
        if name in done:
            return ""
        done.add(name)
        file = override / name if (override / name).exists() else mlx_include() / name
        body = rewrite(file.read_text()).replace("#pragma once", "")
        return f'#line 1 "{name}"\n' + inline_mlx_headers(body, rewrite, override, done) + "\n"

    return _INCLUDE.sub(replace, text)
