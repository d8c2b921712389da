"""A pretended Mac: MLX claims Metal, kernels are emulated, and the system answers as a chip and a macOS would.

Only what lies outside of this package is replaced: MLX's questions about the device, sysctl, the clock. What it cannot
show is anything about speed: time is what the clock is told.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import metal_emu as emu
import mlx.core as mx

from mlx_mtp import prompt_chunks
from mlx_mtp.kernels import self_test, self_test_cases

GB = 2**30


@dataclass(frozen=True)
class Mac:
    """brand: what sysctl calls the processor. architecture: of its GPU, as MLX names it."""

    brand: str
    architecture: str
    memory_gb: int
    macos: str = "26.1"

    @property
    def working_set(self) -> int:
        return int(self.memory_gb * GB * (2 / 3 if self.memory_gb <= 36 else 3 / 4))

    def device_info(self, device: object = None) -> dict[str, str | int]:
        return {
            "device_name": self.brand,
            "architecture": self.architecture,
            "max_buffer_length": int(self.memory_gb * GB * 0.56),
            "max_recommended_working_set_size": self.working_set,
            "memory_size": self.memory_gb * GB,
            "resource_limit": 499000,
        }


MACS = (
    Mac("Apple M1", "applegpu_g13g", 8, "14.7.1"),
    Mac("Apple M1 Ultra", "applegpu_g13d", 128, "15.5"),
    Mac("Apple M2 Pro", "applegpu_g14s", 16, "15.5"),
    Mac("Apple M3 Max", "applegpu_g15s", 64),
    Mac("Apple M4 Pro", "applegpu_g16s", 48, "15.1"),
    Mac("Apple M5", "applegpu_g17g", 32),
    Mac("Apple M5 Max", "applegpu_g17s", 128),
    Mac("Apple M6", "applegpu_g18g", 24),
    Mac("Apple processor", "applegpu_g13g", 7, "14.0"),  # a virtual machine
)
M4 = MACS[4]


@dataclass
class Pretended:
    """What has happened so far. wired: limits that were set, in order. cleared: how often the pool was emptied."""

    launches: list[emu.Kernel]
    launch_s: float = 0.0
    wired: list[int] = field(default_factory=list)
    cleared: int = 0
    asked: int = 0
    _counted: int = 0

    def clock(self) -> float:
        """A millisecond from one question to the next; at every second one, which ends a measurement, also what the
        launches took that were made since the one before. (An emulator runs a kernel when it is called.)"""
        self.asked += 1
        if self.asked % 2 == 0:
            self._counted = len(self.launches)
        return self.asked / 1024 + self.launch_s * self._counted

    def set_wired_limit(self, limit: int) -> int:
        self.wired.append(limit)
        return self.wired[-2] if len(self.wired) > 1 else 0

    def clear_cache(self) -> None:
        self.cleared += 1

    @property
    def libraries(self) -> set[str]:
        """What MLX would have built so far."""
        return {emu.library(launch) for launch in self.launches}


@contextlib.contextmanager
def pretended(mac: Mac = M4, launch_s: float = 0.0, **options: object) -> Iterator[Pretended]:
    """Inside, this machine is a Mac. launch_s: what a launch of a kernel takes, where MLX's own operations take
    nothing. options: of the emulator. Nothing may be traced, since an emulator needs values."""

    def run(command: list[str], *rest: object, **how: object) -> subprocess.CompletedProcess:
        if command[0] != "sysctl":
            return real_run(command, *rest, **how)
        answer = {"machdep.cpu.brand_string": mac.brand, "iogpu.wired_limit_mb": "0"}[command[-1]]
        return subprocess.CompletedProcess(command, 0, answer + "\n", "")

    def sysconf(name: str) -> int:
        return {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": mac.memory_gb * GB}.get(name) or real_sysconf(name)

    real_run, real_sysconf = subprocess.run, os.sysconf
    mx.disable_compile()
    try:
        with emu.patched(**{"check": False, **options}) as launches, contextlib.ExitStack() as stack:
            here = Pretended(launches, launch_s)
            for target, name, value in (
                (mx, "device_info", mac.device_info),
                (mx, "is_available", lambda device: True),
                (mx, "set_wired_limit", here.set_wired_limit),
                (mx, "clear_cache", here.clear_cache),
                (subprocess, "run", run),
                (os, "sysconf", sysconf),
                (platform, "system", lambda: "Darwin"),
                (self_test, "perf_counter", here.clock),
                (prompt_chunks, "PROBE", (256, 512)),  # and short chains: an emulator is slow, and so is a CPU
                (self_test, "REPEATS", 2),
                (self_test_cases, "LEAST_CALLS", 1),
                (self_test_cases, "MOST_CALLS", 2),
                (platform, "mac_ver", lambda *given: (mac.macos, ("", "", ""), "arm64")),
            ):
                stack.enter_context(mock.patch.object(target, name, value))
            yield here
    finally:
        mx.enable_compile()
