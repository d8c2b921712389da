"""Apple's chips as far as decoding speed depends on them. Knows no model.

Bandwidths and core counts are Apple's, of the largest variant of each chip (a Max with fewer GPU cores may have less
bandwidth too). Ultra chips are two Max chips.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from mlx_mtp.rows import RequestError

LEAST_MEMORY_GB = 8
ULTRA_TILE_FROM = 12


@dataclass(frozen=True)
class Generation:
    """What MLX's products of a few rows cost on one generation, for matrices above 4096 x 4096.

    growth[m - 1]: time of a 4-bit product of m rows over that of one row, while MLX takes its vector kernels.
    tile_from: rows from which it takes the matrix kernel, whose tile is 32 rows however few are used.
    tflops_per_core: what that kernel reaches on one GPU core. reach: what the generation gets of the shares of the
    bandwidth that the roofline takes for all.
    """

    growth: tuple[float, ...]
    tile_from: int
    tflops_per_core: float
    reach: float = 1.0


# growth: M1 and M2 run one row after another: 26B-A4B on an M2 Pro took 1.74, 3.12 and 3.82 times as long with 2, 4
# and 5 rows (Rapid-MLX), and so on by 0.7 a row. M3 and M4: mlx#3839 and mlx#3852, M4 Pro, matrices of 4096 x 24576 and
# 5120 x 17408. M5: mlx#3791, M5 Max, a 70B model at 1, 3, 5, 8 and 12 rows, and 4 rows from mlxcel#1182; the rest lies
# between. All at 4 bits, and used for 8 too, where they are likely too high.
# tile_from: MLX 0.32 mlx/backend/metal/quantized.cpp. tflops: M4 from mlx#3852 (6.4 on the 20 cores of an M4 Pro); M2
# from the 6.05 times that 9 rows of the 12B took on an M2 Pro (Rapid-MLX); M1 and M3 by their clock beside those;
# M5 four times the M4, by its matrix units (Apple). reach of M1: plain decoding of the 12B, 26B-A4B and 31B on two M1
# chips is 0.60 to 0.64 of what the other generations' constants give. It is the one constant that comes from rows
# which it is then tested on.
_M34 = (1.0, 1.01, 1.17, 1.45, 1.75, 2.07, 2.38, 2.75, 3.1, 3.4, 3.8, 4.1)
_M5 = (1.0, 1.05, 1.12, 1.29, 1.48, 1.74, 2.0, 2.25, 2.5, 2.7, 2.95, 3.18)
_M12 = (1.0, 1.74, 2.43, 3.12, 3.82, 4.5, 5.2, 5.9, 6.6, 7.3, 8.0)
GENERATIONS = {
    1: Generation(_M12, 6, 0.138, reach=0.6),
    2: Generation(_M12, 6, 0.153),
    3: Generation(_M34, 13, 0.29),
    4: Generation(_M34, 13, 0.32),
    5: Generation(_M5, 13, 1.28),
}


@dataclass(frozen=True)
class Chip:
    """One chip. bandwidth_gb_s: of its memory. most_memory_gb: the largest it was sold with."""

    name: str
    bandwidth_gb_s: float
    cores: int
    most_memory_gb: int

    @property
    def generation(self) -> Generation:
        return GENERATIONS[int(self.name[1])]

    @property
    def tile_from(self) -> int:
        return ULTRA_TILE_FROM if self.name.endswith("Ultra") else self.generation.tile_from

    @property
    def tflops(self) -> float:
        """What MLX's quantised matrix kernel reaches, in 10^12 operations a second."""
        return self.generation.tflops_per_core * self.cores


CHIPS = (
    Chip("M1", 68, 8, 16),
    Chip("M1 Pro", 200, 16, 32),
    Chip("M1 Max", 400, 32, 64),
    Chip("M1 Ultra", 800, 64, 128),
    Chip("M2", 100, 10, 24),
    Chip("M2 Pro", 200, 19, 32),
    Chip("M2 Max", 400, 38, 96),
    Chip("M2 Ultra", 800, 76, 192),
    Chip("M3", 100, 10, 24),
    Chip("M3 Pro", 150, 18, 36),
    Chip("M3 Max", 400, 40, 128),
    Chip("M3 Ultra", 819, 80, 512),
    Chip("M4", 120, 10, 32),
    Chip("M4 Pro", 273, 20, 64),
    Chip("M4 Max", 546, 40, 128),
    Chip("M5", 154, 10, 32),
    Chip("M5 Pro", 307, 20, 64),
    Chip("M5 Max", 614, 40, 128),
)


def find_chip(name: str) -> Chip:
    """A chip as people write it: "M4 Pro", "m4pro", "Apple M4 Pro". Raises RequestError."""
    plain = re.sub(r"[\s_-]+|apple", "", name.lower())
    found = next((chip for chip in CHIPS if chip.name.lower().replace(" ", "") == plain), None)
    if found is None:
        raise RequestError(f"chip is {name!r}; expected one of {', '.join(chip.name for chip in CHIPS)}")
    return found


def check_memory(chip: Chip, memory_gb: float) -> None:
    """Raise RequestError unless the chip was sold with so much memory or more, and macOS runs in it."""
    if not LEAST_MEMORY_GB <= memory_gb <= chip.most_memory_gb:
        raise RequestError(
            f"memory is {memory_gb:g} GB; an {chip.name} has {LEAST_MEMORY_GB} to {chip.most_memory_gb} GB"
        )


def usable_bytes(memory_gb: float) -> int:
    """What macOS lets the GPU hold: two thirds of up to 36 GB, three quarters of more.

    That is `recommendedMaxWorkingSetSize` as people have read it on many machines; Apple states no rule.
    """
    return int(memory_gb * 2**30 * (2 / 3 if memory_gb <= 36 else 3 / 4))


def this_chip(brand: str | None) -> Chip:
    """This machine's chip. brand: what sysctl calls machdep.cpu.brand_string, None elsewhere. Raises RequestError."""
    if not brand:
        what = f"{platform.system()} {platform.machine()}"
        raise RequestError(f"this machine is {what}, not a Mac; name one: --chip 'M4 Pro' --memory 24")
    return find_chip(brand)
