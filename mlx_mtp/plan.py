"""What to expect of a pair on a Mac before it is downloaded: what fits, what takes the memory, how fast it may be.

Predictions come from the roofline; beside them stand the figures that others have published. Reads no device.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from importlib import resources

from mlx_mtp.chips import CHIPS, Chip, find_chip, usable_bytes
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.load import described, plan_pair
from mlx_mtp.memory_budget import Budget, PairSize, Room, budget
from mlx_mtp.pairs import BYTES_PER_PARAMETER, Offer
from mlx_mtp.roofline import CEILING, MLX, Prediction, Roofline, Setting, tokens_per_round
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import ALL_SIZES, SIZES, Shape, shape
from mlx_mtp.weights import bits_of, stored_dtype

BITS = tuple(BYTES_PER_PARAMETER)
PLANNED_WIDTH = 8  # the widest round that `auto` considers

# Share of drafts kept that is assumed where nobody has measured it, each draft independently: solved from published
# tokens a round of the 12B and 26B (prose .67 and .68, code .80 and .84); enumeration is nearly certain.
ACCEPTANCE = {"prose": 0.67, "code": 0.80, "enumeration": 0.98}


@dataclass(frozen=True)
class Memory:
    """Bytes by part of so many sequences (batch), each of so many tokens. seq: caches of one, in target and drafter.

    fits: whether `load` takes the pair and runs them all at once. default: what runs where nothing is asked for.
    """

    target: int
    drafter: int
    working: int
    seq: int
    per_1k_tokens: int
    batch: int
    fits: bool
    default: Budget

    @property
    def total(self) -> int:
        return self.target + self.drafter + self.working + self.seq * self.batch


@dataclass(frozen=True)
class Machine:
    """A chip with its memory. gpu_bytes: what its system lets the GPU hold; None is Apple's default."""

    chip: Chip
    memory_gb: float
    gpu_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        return self.gpu_bytes or usable_bytes(self.memory_gb)


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


def check_bits(name: str, bits: int) -> None:
    """Raise RequestError for a number of bits that nothing is packed in."""
    if bits not in BITS:
        raise RequestError(f"{name} is {bits}; expected {', '.join(map(str, BITS))}")


def check_wish(wish: Wish, found: Shape) -> None:
    """Raise RequestError for what no machine can be asked."""
    check_bits("bits", wish.bits)
    check_bits("drafter bits", wish.drafter_bits)
    if not 1 <= wish.batch <= 64:
        raise RequestError(f"batch is {wish.batch}; expected 1 to 64")
    if not 1 <= wish.context <= found.target.max_positions:
        raise RequestError(f"context is {wish.context}; {found.size} takes 1 to {found.target.max_positions} tokens")


@dataclass(frozen=True)
class FilePair:
    """A target and its drafter as their files describe them. stored_bytes: of the target, by how they are packed.

    shape: the published one with the same config and drafter, None if there is none.
    """

    target: str
    drafter: str | None
    stored_bytes: dict[str, int]
    size: PairSize
    shape: Shape | None
    notes: tuple[str, ...]

    def setting(self, batch: int, context: int) -> Setting:
        """What is decoded, with the mean bytes of a weight. Raises ValueError without a shape."""
        if self.shape is None:
            raise ValueError(f"{self.target} has no published shape")
        target, drafter = self.shape.target_counts.total, self.shape.drafter_counts.total
        return Setting(self.size.target_bytes / target, self.size.drafter_bytes / drafter, batch, context)


def read_pair(model: str, drafter_bits: int = 16) -> FilePair:
    """A folder or hub id, and the drafter that "auto" finds, by configs and headers alone.

    Raises DownloadError, CheckpointError, PairingError, RequestError.
    """
    quantize = None if drafter_bits == 16 else drafter_bits
    planned = plan_pair(model, "auto", None, quantize, described)
    name = planned.opened.folder.name if planned.opened else None
    size = planned.size(stored_dtype(planned.target.sources))
    configs = planned.target.folder.config, planned.opened and planned.opened.folder.config
    known = next((found for found in map(shape, ALL_SIZES) if (found.target, found.drafter) == configs), None)
    return FilePair(model, name, bits_of(planned.target), size, known, planned.notes)


def memory_of(machine: Machine, wish: Wish, found: Shape) -> Memory:
    """What a wish takes on a machine."""
    drafter = found.drafter_counts.total
    by_bits = {bits: int(drafter * size) for bits, size in BYTES_PER_PARAMETER.items()}
    size = found.pair_size(
        int(found.target_counts.total * BYTES_PER_PARAMETER[wish.bits]),
        by_bits[wish.drafter_bits],
        by_bits[wish.drafter_bits] - by_bits[4],
    )
    return memory_in(size, machine.usable_bytes, wish.batch, wish.context)


def memory_in(size: PairSize, usable_bytes: int, batch: int, context: int) -> Memory:
    """What so many sequences of so many tokens take, and whether a machine runs them."""
    asked, default = budget(size, Room(usable_bytes, batch)), budget(size, Room(usable_bytes))
    far = size.pass_size.window + 1000  # beyond every window a token costs what the full layers hold
    return Memory(
        target=size.target_bytes,
        drafter=size.drafter_bytes,
        working=size.working_bytes(asked.chunk, batch, context),
        seq=size.seq_bytes(context),
        per_1k_tokens=(size.seq_bytes(far + 256_000) - size.seq_bytes(far)) // 256,
        batch=batch,
        fits=asked.fits and asked.num_seqs == batch and asked.fair_share_len >= context,
        default=default,
    )


def offer_budget(offer: Offer, usable_bytes: int) -> Budget:
    """What a machine makes of a published pair; the drafter's caches are counted as those of the size's own."""
    size = shape(offer.size).pair_size(offer.target_bytes, offer.drafter_bytes)
    return budget(size, Room(usable_bytes))


def what_fits(usable_bytes: int) -> list[tuple[str, str, str]]:
    """(what, the largest sizes that fit, why those) for the sizes of Gemma 4 at 4 and at 8 bits."""
    lines = []
    for bits in (4, 8):
        machine = Machine(CHIPS[-1], 0, usable_bytes)
        budgets = {size: memory_of(machine, Wish(size, bits, 16, 1, 1), shape(size)).default for size in SIZES}
        fitting = [f"{size} ({b.num_seqs} x {b.fair_share_len:,})" for size, b in budgets.items() if b.fits]
        found = ", ".join(fitting) or "no size of Gemma 4"
        lines.append((f"fits at {bits} bits", found, "sequences at once x tokens of each, with a bf16 drafter"))
    return lines


def setting_of(wish: Wish) -> Setting:
    """What a wish decodes, as the roofline takes it."""
    return Setting(BYTES_PER_PARAMETER[wish.bits], BYTES_PER_PARAMETER[wish.drafter_bits], wish.batch, wish.context)


def speed(chip: Chip, setting: Setting, found: Shape, acceptance: float) -> Speed:
    """Predictions at every width up to PLANNED_WIDTH."""
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
