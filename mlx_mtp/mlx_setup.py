"""MLX as a run wants it: command buffers, wired memory, the pool of free buffers. All that this package sets is here.

On a Mac only; elsewhere nothing is set. MLX reads its variables when its GPU is first used, so `prepare` comes before
any array. What the user has set stays.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib import metadata

import mlx.core as mx

# A boundary between command buffers costs about 20 us of GPU time. MLX ends one after 40 or 50 operations or "MB" (it
# counts elements of whole inputs, so that a stack of experts ends one every time). With higher limits M1 to M3 chips
# ran mixtures of experts 5 to 60 % faster (mlx#4521, mlxcel#353, vllm-metal#637); 2000 "MB" was too much
# (vllm-metal#585). M5 chips gained nothing.
BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}
BUFFERS_UNTIL = 4  # the last chip generation that gets them
# MLX 0.32 keeps its fused attention for heads of 512 to single queries over 1,024 keys and more without a mask.
ATTENTION = {"MLX_SDPA_D512_MIN_KL": "0"}
WIRED_FROM = 15  # the first macOS that has MLX's wired limit


@dataclass(frozen=True)
class Setup:
    """How a Mac's GPU is used. kernels: "auto" (those that win), "off", or names with commas between them. tuning: set
    MLX's limits on command buffers and wired memory."""

    kernels: str = "auto"
    tuning: bool = True


def chip_brand() -> str | None:
    """What macOS calls its processor, such as "Apple M4 Pro"; None elsewhere. Asks no GPU."""
    return sysctl("machdep.cpu.brand_string")


def sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def variables(brand: str | None) -> dict[str, str]:
    """What MLX's variables should be on a Mac with such a processor."""
    found = re.match(r"Apple M(\d+)\b", brand or "")
    early = found is not None and int(found[1]) <= BUFFERS_UNTIL
    return (BUFFERS if early else {}) | ATTENTION


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set MLX's variables that are not set; before the GPU is first used."""
    if platform.system() == "Darwin":
        for name, value in variables(chip_brand()).items():
            environment.setdefault(name, value)


class Tuned:
    """Keeps weights and caches from being paged out until it is closed, as mlx-lm does while it generates."""

    def __init__(self) -> None:
        self._before: int | None = None
        limit = _wired_limit()
        if limit is not None:
            try:
                self._before = mx.set_wired_limit(limit)
            except (RuntimeError, ValueError):
                pass  # the system allows less than it recommends

    def idle(self) -> None:
        """Give back the buffers that no array uses, for a moment when nothing runs."""
        if mx.metal.is_available():
            mx.clear_cache()

    def close(self) -> None:
        """Set the limit that was there before."""
        if self._before is not None:
            mx.synchronize()  # what still runs may need its memory wired
            mx.set_wired_limit(self._before)
            self._before = None


def machine() -> tuple[str, ...]:
    """What decides how fast and how right a kernel runs here: chip, system, MLX."""
    chip = chip_brand() or str(mx.device_info(mx.default_device()).get("device_name", platform.machine()))
    return chip, platform.system(), platform.mac_ver()[0] or platform.release(), metadata.version("mlx")


def facts() -> list[tuple[str, str, str]]:
    """(item, state, reason) of everything that loading a model sets here."""
    if platform.system() != "Darwin":
        return []
    found = []
    for name, value in variables(chip_brand()).items():
        own = os.environ.get(name)
        reason = "set by you, and left as it is" if own not in (None, value) else "set when a model is loaded"
        found.append((name, own or value, f"{reason}; --no-tuning leaves MLX as it is"))
    limit = _wired_limit()
    setting = sysctl("iogpu.wired_limit_mb")
    chosen = "the system's default" if setting in (None, "0") else f"iogpu.wired_limit_mb is {setting}"
    if limit is None:
        found.append(("wired memory", "not limited", f"needs Metal and macOS {WIRED_FROM}; {chosen}"))
    else:
        more = "for a model near it: sudo sysctl iogpu.wired_limit_mb=<MB>"
        found.append(("wired memory", f"{limit / 1e9:.1f} GB", f"set when a model is loaded; {chosen}; {more}"))
    return found


def _wired_limit() -> int | None:
    """Bytes that may be wired; None where MLX has no such limit."""
    if not mx.metal.is_available() or int((platform.mac_ver()[0] or "0").split(".")[0]) < WIRED_FROM:
        return None
    limit = mx.device_info(mx.default_device()).get("max_recommended_working_set_size")
    return limit if isinstance(limit, int) and limit > 0 else None
