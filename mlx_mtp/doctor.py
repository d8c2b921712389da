"""What this machine has, and what of it a run will use and why. Loads no model and changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_mtp import mlx_setup

GB = 1e9
CPU_SHARE = 0.85  # of the RAM; the system and other programs have the rest


@dataclass(frozen=True)
class Fact:
    """One line of the report: what it is about, what was found, and what follows from it."""

    item: str
    state: str
    reason: str


def facts(kernels: tuple[tuple[str, str, str], ...] = ()) -> list[Fact]:
    """Everything worth knowing about this machine. kernels: (kernel, state, reason) rows to append."""
    found = [_platform(), _python(), _mlx(), _device(), _memory(), _dtype(), _compiler(), _blas()]
    found += [Fact(*line) for line in mlx_setup.facts()]
    found += [_hub_cache(), _hub_network()]
    found += [Fact(f"kernel {name}", state, reason) for name, state, reason in kernels]
    return [fact for fact in found if fact is not None]


def memory_bytes() -> int:
    """Bytes for weights, caches and passes: a Mac's GPU working set, the memory of CUDA, else most of the RAM."""
    info = _device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        value = info.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return int(CPU_SHARE * ram_bytes())


def ram_bytes() -> int:
    """All memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return mx.default_device().type == mx.DeviceType.gpu


def _device_info() -> dict[str, str | int]:
    return mx.device_info(mx.default_device())


def _platform() -> Fact:
    if platform.system() == "Darwin":
        return Fact("system", f"macOS {platform.mac_ver()[0]} {platform.machine()}", "Metal kernels can run")
    return Fact("system", f"{platform.system()} {platform.release()} {platform.machine()}", "no Metal here")


def _python() -> Fact:
    return Fact("python", platform.python_version(), sys.executable)


def _mlx() -> Fact:
    parts = []
    for name in ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "huggingface-hub"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Fact("mlx", metadata.version("mlx"), ", ".join(parts) or "no other packages of its family")


def _device() -> Fact:
    name = _device_info().get("device_name", "unknown")
    if mx.metal.is_available():
        used = "Metal GPU" if on_gpu() else "CPU, although a Metal GPU is there"
    elif mx.cuda.is_available():
        used = "CUDA GPU" if on_gpu() else "CPU, although a CUDA GPU is there"
    else:
        used = "CPU"
    reason = "MLX has no GPU here" if used == "CPU" else "MLX's default device"
    return Fact("device", f"{used}: {name}", reason)


def _memory() -> Fact:
    usable = memory_bytes()
    return Fact("memory", f"{usable / GB:.1f} GB", f"usable by {'the GPU' if on_gpu() else 'the CPU'}")


def _dtype() -> Fact:
    if on_gpu():
        return Fact("dtype", "the checkpoint's own", "bfloat16 in published files; no conversion needed")
    reason = "MLX's CPU multiplies experts in no other, and sums quantised products in the input's type"
    return Fact("dtype", "float32", reason)


def _compiler() -> Fact | None:
    if on_gpu():
        return None
    path = shutil.which("g++")
    if path:
        return Fact("mx.compile", "used", f"elementwise chains are compiled by {path}")
    return Fact("mx.compile", "not used", "MLX compiles for the CPU by calling g++, which is not on PATH")


def _blas() -> Fact | None:
    """Which BLAS the CPU's matrix products run in, by the libraries mapped into this process."""
    maps = Path("/proc/self/maps")
    if on_gpu() or not maps.is_file():
        return None
    lines = maps.read_text(errors="replace").splitlines()
    files = {Path(line.split()[-1]) for line in lines if "/" in line and "blas" in line.lower()}
    # numpy and scipy bring an OpenBLAS of their own with renamed symbols, which MLX does not call.
    names = sorted(f.name for f in files if not f.parent.name.startswith(("numpy", "scipy")))
    preloaded = next((name for name in names if name.startswith("libopenblas")), None)
    if preloaded:
        return Fact("BLAS", preloaded, "preloaded, so matrix products run in it")
    return Fact(
        "BLAS",
        f"reference ({names[0]})" if names else "unknown",
        "several times slower than OpenBLAS: install libopenblas0, run with LD_PRELOAD=libopenblas.so.0",
    )


def _hub_cache() -> Fact:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    count = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    return Fact("hub cache", str(folder), f"{count} repositories; HF_HOME or HF_HUB_CACHE moves it")


def _hub_network() -> Fact:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Fact("hub", "offline", "HF_HUB_OFFLINE is set: only what is in the cache can be used")
    return Fact("hub", "online", f"downloads come from {constants.ENDPOINT}; HF_HUB_OFFLINE=1 forbids them")
