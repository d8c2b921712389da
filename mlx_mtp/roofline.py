"""What a pass and a round should take on a chip: bytes over bandwidth, operations over arithmetic, fixed costs.

Two sets of constants. `MLX` is today's MLX with its own kernels; `CEILING` is what the hardware allows. Every constant
holds for all chips and models; none is fitted to a published row. Nothing here was measured on a Mac by this project.

A pass over m rows of B sequences (m = B * (K + 1)) takes

    max(weights * growth(m) / (bandwidth * e), operations / arithmetic)      growth 1 for CEILING
    + experts read * their bytes / (bandwidth * e') + keys and values / (bandwidth * e) + fixed

and a round K drafting steps more, each its bytes / (bandwidth * e'') + fixed, and the host's time for a round.
With every draft kept independently with probability p, a round yields 1 + p + ... + p^K tokens a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mtp.chips import Chip
from mlx_mtp.shapes import Shape

PLAIN_BYTES = 2.0  # of a bfloat16 number; a packed one has fewer
TILE_ROWS = 32  # of MLX's quantised matrix kernel
GIGA = 1e9


@dataclass(frozen=True)
class Constants:
    """Shares of the bandwidth that a kind of read reaches, and costs in seconds that no byte explains.

    layer_s: of every layer of the target in a pass; moe_s: of routing, in a pass; step_s: of a drafting step;
    round_s: of a speculative round, for the host. own_kernels: row counts cost what MLX's kernels make them cost.
    state_moves: how often a column moves a recurrent state between memory and processor, one of the pass's own and one
    that runs again; None: a pass moves it in once and out once.
    """

    weights: float
    experts: float
    drafter: float
    layer_s: float
    moe_s: float
    step_s: float
    round_s: float
    own_kernels: bool
    state_moves: tuple[int, int] | None


# weights: 239 of 273 GB/s in mlx#3852 (M4 Pro). experts: mlx#4509 has 258 to 542 of 819 GB/s (M3 Ultra). drafter: small
# matrices, a guess below `weights`. layer_s, moe_s: 26B-A4B on M5 Max, M3 Ultra and M2 Pro, and the 12B and 31B on some
# of them, take 7 to 12 ms a token more than their bytes. step_s, round_s: mlxcel#1185 and #1197, and rMLX#496.
# state_moves: of a column's three operations in plain MLX (kernels/delta.py) one reads and writes the state and two
# read it, the last of them for what the column gives; the kernel `delta` does what the ceiling does.
MLX = Constants(0.85, 0.6, 0.8, 0.15e-3, 2e-3, 0.9e-3, 1.5e-3, True, (4, 3))
CEILING = Constants(0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0, False, None)


@dataclass(frozen=True)
class Setting:
    """What is decoded: bytes a number of the target and of the drafter, sequences, positions in the cache of each."""

    target_bytes: float
    drafter_bytes: float
    batch: int = 1
    context: int = 1024


@dataclass(frozen=True)
class Prediction:
    """Speed at one width, for all sequences together. cost: of a round, in plain steps."""

    width: int
    tok_s: float
    round_s: float
    speedup: float
    cost: float


@dataclass(frozen=True)
class Roofline:
    """One pair on one chip."""

    chip: Chip
    shape: Shape
    constants: Constants

    def pass_s(self, setting: Setting, width: int) -> float:
        """Seconds of a target pass over width + 1 columns of every sequence."""
        rows, counts, bandwidth = setting.batch * (width + 1), self.shape.target_counts, self._bandwidth
        c = self.constants
        read_s = counts.dense * setting.target_bytes / (bandwidth * c.weights)
        moe = self.shape.moe
        slots = self._slots(rows)
        expert_s = counts.slot * slots * setting.target_bytes / (bandwidth * c.experts)
        if moe:
            expert_s = max(expert_s, self._arithmetic_s(counts.slot * moe.top_k * rows))
        kv_s = setting.batch * self.shape.kv_read_bytes(setting.context) / (bandwidth * c.weights)
        fixed_s = len(self.shape.target.layers) * c.layer_s + (c.moe_s if moe else 0.0)
        packed = setting.target_bytes < PLAIN_BYTES
        return (
            self._products_s(read_s, counts.dense, rows, packed)
            + expert_s
            + kv_s
            + fixed_s
            + self._state_s(width, setting.batch)
        )

    def step_s(self, setting: Setting) -> float:
        """Seconds of one drafting step of every sequence."""
        c, counts, bandwidth = self.constants, self.shape.drafter_counts, self._bandwidth
        kv_s = setting.batch * self.shape.draft_kv_read_bytes(setting.context) / (bandwidth * c.drafter)
        parts = (counts.dense - counts.borrowed, setting.drafter_bytes), (counts.borrowed, setting.target_bytes)
        products_s = sum(
            self._products_s(count * size / (bandwidth * c.drafter), count, setting.batch, size < PLAIN_BYTES)
            for count, size in parts
        )
        return products_s + kv_s + c.step_s

    def round_s(self, setting: Setting, width: int) -> float:
        """Seconds of a round; of width 0, of a plain step, whose host work is hidden behind the device's."""
        if not width:
            return self.pass_s(setting, 0)
        return self.pass_s(setting, width) + width * self.step_s(setting) + self.constants.round_s

    def predict(self, setting: Setting, width: int, tokens: float) -> Prediction:
        """Speed at a width where a round yields so many tokens a sequence."""
        round_s, plain_s = self.round_s(setting, width), self.pass_s(setting, 0)
        tok_s = setting.batch * tokens / round_s
        return Prediction(width, tok_s, round_s, tok_s * plain_s / setting.batch, round_s / plain_s)

    def best(self, setting: Setting, acceptance: float, most: int) -> Prediction:
        """The fastest width from 0 to `most`, every draft being kept with this probability."""
        tried = (self.predict(setting, width, tokens_per_round(acceptance, width)) for width in range(most + 1))
        return max(tried, key=lambda p: p.tok_s)

    def _state_s(self, width: int, batch: int) -> float:
        """Seconds of moving recurrent states in a pass of so many sequences. A round runs the columns of the one before
        again, which was as wide; a plain step runs none (states.py)."""
        own, again = self.constants.state_moves or (2 / (width + 1), 0)
        moves = batch * (width + 1) * (own + (again if width else 0))
        return moves * self.shape.state_bytes / (self._bandwidth * self.constants.weights)

    @property
    def _bandwidth(self) -> float:
        reach = self.chip.generation.reach if self.constants.own_kernels else 1.0
        return self.chip.bandwidth_gb_s * GIGA * reach

    def _arithmetic_s(self, multiplied: float) -> float:
        return 2 * multiplied / (self.chip.tflops * 1e12)

    def _products_s(self, read_s: float, weights: float, rows: int, packed: bool) -> float:
        """Seconds of products of `weights` numbers with so many rows, where one row takes read_s.

        Products of bfloat16 cost about the same up to 16 rows (mlx#4265); only packed ones grow with the rows.
        """
        if not (self.constants.own_kernels and packed):
            return max(read_s, self._arithmetic_s(weights * rows))
        growth = self.chip.generation.growth
        if rows < self.chip.tile_from:
            return read_s * growth[rows - 1]
        # No cheaper than the widest product of the vector kernel: MLX changes where the two cost the same.
        least_s = read_s * growth[self.chip.tile_from - 2]
        return max(least_s, self._arithmetic_s(weights * TILE_ROWS)) * -(-rows // TILE_ROWS)

    def _slots(self, rows: int) -> float:
        """Experts read in every layer: MLX reads one for every pair of token and expert; the least is each once."""
        moe = self.shape.moe
        if not moe:
            return 0.0
        if self.constants.own_kernels:
            return float(moe.top_k * rows)
        return moe.experts * (1 - (1 - moe.top_k / moe.experts) ** rows)


def tokens_per_round(acceptance: float, width: int) -> float:
    """1 + p + ... + p^K."""
    return sum(acceptance**i for i in range(width + 1))
