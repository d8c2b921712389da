"""What figures depend on: machine, versions, commit, command. Every report carries it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_mtp.doctor import facts, ram_bytes
from mlx_mtp.mlx_setup import chip_brand

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "mlx-vlm", "numpy")


def provenance(command: list[str], version: str) -> dict[str, str]:
    """Plain text by name. command: what made the report, word by word; version: of this package."""
    found = {fact.item: fact for fact in facts()}
    out = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(command),
        "mlx-mtp": version,
        "commit": _commit(),
        "chip": chip_brand() or _processor(),
        "device": found["device"].state,
        "memory": f"{ram_bytes() / 2**30:.0f} GiB",
        "system": platform.platform(),
        "processors": str(os.cpu_count()),
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()),
        "python": platform.python_version(),
    }
    if "BLAS" in found:
        out["BLAS"] = found["BLAS"].state
    return out | _versions()


def chip() -> str:
    """The name of what computes here, for a file name or a column."""
    return chip_brand() or str(mx.device_info(mx.default_device()).get("device_name", _processor()))


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _commit() -> str:
    """Of the checkout this package runs from, marked where files differ from it; "release" outside of one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return "release"
    try:
        describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
