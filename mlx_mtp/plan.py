"""What to expect of a pair on a Mac before it is downloaded: what fits, what takes the memory, how fast it may be.

Predictions come from the roofline; beside them stand the figures that others have published. Reads no device.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from importlib import resources

from mlx_mtp.chips import Chip, find_chip, usable_bytes
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.pairs import BYTES_PER_PARAMETER
from mlx_mtp.roofline import CEILING, MLX, Prediction, Roofline, Setting, tokens_per_round
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import Shape, shape

BITS = tuple(BYTES_PER_PARAMETER)
PLANNED_WIDTH = 8  # the widest round that `auto` considers
PROMPT_CHUNK = 512  # columns of a prompt chunk, for the working memory

# Share of drafts kept that is assumed where nobody has measured it, each draft independently: solved from published
# tokens a round of the 12B and 26B (prose .67 and .68, code .80 and .84); enumeration is nearly certain.
ACCEPTANCE = {"prose": 0.67, "code": 0.80, "enumeration": 0.98}


@dataclass(frozen=True)
class Memory:
    """Bytes by part. row: keys, values and recurrent states of one sequence. working: logits, activations, MLX's own
    buffers."""

    weights: int
    drafter: int
    row: int
    per_1k_tokens: int
    batch: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.drafter + self.row * self.batch + self.working


@dataclass(frozen=True)
class Machine:
    """A chip with its memory."""

    chip: Chip
    memory_gb: float

    @property
    def usable_bytes(self) -> int:
        return usable_bytes(self.memory_gb)


@dataclass(frozen=True)
class Wish:
    """What is to run: a size, bits a weight of target and drafter, sequences at once, positions in each."""

    size: str
    bits: int
    drafter_bits: int
    batch: int
    context: int


@dataclass(frozen=True)
class Speed:
    """Predictions for one wish. width 0 and best: with MLX's kernels; ceiling: the best round the hardware allows."""

    acceptance: float
    by_width: tuple[Prediction, ...]
    ceiling: Prediction

    @property
    def plain(self) -> Prediction:
        return self.by_width[0]

    @property
    def best(self) -> Prediction:
        return max(self.by_width, key=lambda p: p.tok_s)


def check_wish(wish: Wish, found: Shape) -> None:
    """Raise RequestError for what no machine can be asked."""
    for name, bits in (("bits", wish.bits), ("drafter bits", wish.drafter_bits)):
        if bits not in BITS:
            raise RequestError(f"{name} is {bits}; expected {', '.join(map(str, BITS))}")
    if not 1 <= wish.batch <= 64:
        raise RequestError(f"batch is {wish.batch}; expected 1 to 64")
    if not 1 <= wish.context <= found.target.max_positions:
        raise RequestError(f"context is {wish.context}; {found.size} takes 1 to {found.target.max_positions} tokens")


def memory_of(wish: Wish, found: Shape) -> Memory:
    """What a wish takes, in bytes."""
    per_weight, per_draft = BYTES_PER_PARAMETER[wish.bits], BYTES_PER_PARAMETER[wish.drafter_bits]
    target = found.target
    logits = wish.batch * (PLANNED_WIDTH + 1) * target.vocab_size * 4
    chunk = PROMPT_CHUNK * (3 * found.mlp_size + 8 * target.hidden_size) * 2
    # Beyond every window a token costs what the full layers keep.
    far = max(kept.window or 0 for kept in found.kept)
    return Memory(
        weights=int(found.target_counts.total * per_weight),
        drafter=int(found.drafter_counts.total * per_draft),
        row=found.kv_row_bytes(wish.context),
        per_1k_tokens=found.kv_row_bytes(far + 1000) - found.kv_row_bytes(far),
        batch=wish.batch,
        working=2 * logits + chunk + 256 * 2**20,
    )


def fits(machine: Machine, wish: Wish, found: Shape) -> bool:
    return memory_of(wish, found).total <= machine.usable_bytes


def speed(chip: Chip, wish: Wish, found: Shape, acceptance: float) -> Speed:
    """Predictions at every width up to PLANNED_WIDTH."""
    setting = Setting(BYTES_PER_PARAMETER[wish.bits], BYTES_PER_PARAMETER[wish.drafter_bits], wish.batch, wish.context)
    model = Roofline(chip, found, MLX)
    widths = range(PLANNED_WIDTH + 1)
    by_width = tuple(model.predict(setting, k, tokens_per_round(acceptance, k)) for k in widths)
    return Speed(acceptance, by_width, Roofline(chip, found, CEILING).best(setting, acceptance, MAX_WIDTH))


# published ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """One published row, and what the roofline says of it. speedup: over plain decoding at the same batch."""

    source: str
    chip: str
    size: str
    setting: str
    plain_tok_s: float | None
    tok_s: float | None
    speedup: float
    predicted_plain_tok_s: float
    predicted_tok_s: float
    predicted_speedup: float


def published() -> list[Published]:
    """Every published row with its prediction. Rows of one size and chip share all constants."""
    rows = _published_data()["rows"]
    shapes = {size: shape(size) for size in {row["size"] for row in rows}}
    return [_predicted(row, shapes[row["size"]]) for row in rows]


def left_out() -> list[str]:
    """Published figures that cannot be predicted, and why."""
    return _published_data()["left_out"]


def _published_data() -> dict:
    return json.loads((resources.files("mlx_mtp") / "data" / "published.json").read_text())


def _predicted(row: dict, found: Shape) -> Published:
    setting = Setting(row["bits"] / 8, row["drafter_bits"] / 8, row.get("batch", 1), row.get("context", 512))
    width, kept = row["width"], row["kept"]
    tokens = 1 + width * kept if kept is not None else tokens_per_round(ACCEPTANCE[row["kind"]], width)
    model = Roofline(find_chip(row["chip"]), found, MLX)
    plain, drafted = model.predict(setting, 0, 1.0), model.predict(setting, width, tokens)
    known = row.get("speedup") or row["tok_s"] / row["plain_tok_s"]
    words = f"{row['bits']:g} bit, drafter {row['drafter_bits']:g}, width {width}, {row['kind']}"
    words += f", {setting.batch} at once" * (setting.batch > 1) + f", {setting.context} tokens" * (
        setting.context > 512
    )
    return Published(
        row["source"],
        row["chip"],
        row["size"],
        words + (f", {kept:.0%} kept" if kept is not None else ""),
        row["plain_tok_s"],
        row.get("tok_s"),
        known,
        plain.tok_s,
        drafted.tok_s,
        drafted.speedup,
    )


def median_errors(rows: list[Published]) -> dict[str, tuple[float, int]]:
    """Median of |predicted / published - 1|, and of how many figures, by kind of figure."""
    pairs = {
        "plain tok/s": [(r.predicted_plain_tok_s, r.plain_tok_s) for r in rows],
        "speculative tok/s": [(r.predicted_tok_s, r.tok_s) for r in rows],
        "speed-up": [(r.predicted_speedup, r.speedup) for r in rows],
    }
    errors = {name: [abs(p / known - 1) for p, known in found if known] for name, found in pairs.items()}
    return {name: (statistics.median(found), len(found)) for name, found in errors.items()}
