"""From runs to figures: medians with their spread, ratios within a repeat, and what the loop loses. Runs nothing."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.compare.driver import BASELINE, Divergence, Measured
from mlx_mtp.compare.runs import Drafts, Run


@dataclass(frozen=True)
class Spread:
    """A figure over the repeats."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}..{self.most:.2f})"


@dataclass(frozen=True)
class Figures:
    """One contender in one table. tok_s: of all rows, decoding. by_repeat: tok_s of every repeat.
    whole_tok_s: all tokens from the request to the last, prompt included.

    over_plain: tok/s over that of the same runtime without drafts; if_free: what tokens per round alone would give,
    if drafts and further columns cost nothing. over_baseline: over mlx-lm's plain decoding. Ratios are within a repeat.
    differs: rows that differ from what the target alone writes.
    """

    name: str
    tok_s: Spread
    row_tok_s: Spread
    prefill_tok_s: Spread
    whole_tok_s: Spread
    by_repeat: tuple[float, ...]
    tokens_per_round: float
    kept_by_position: tuple[float, ...]
    over_plain: Spread | None
    if_free: float
    over_baseline: Spread | None
    peak_bytes: int
    differs: tuple[Divergence, ...]
    stable: bool


@dataclass(frozen=True)
class Table:
    """All contenders over the prompts of one kind, in groups of so many rows. ratios: ours over every other.

    whole_ratios: the same of all tokens over the time from the request to the last of them, prompt included.
    """

    kind: str
    rows: int
    prompt_tokens: tuple[tuple[int, ...], ...]
    figures: tuple[Figures, ...]
    ratios: dict[str, Spread]
    whole_ratios: dict[str, Spread]


@dataclass(frozen=True)
class Speeds:
    """tok/s of all rows and cases of a repeat together."""

    decode: float
    prefill: float
    whole: float

    @staticmethod
    def of(runs: Sequence[Run]) -> Speeds:
        decode = sum(r.decoded for r in runs) / sum(r.decode_s for r in runs)
        prefill = sum(r.prompt_tokens for r in runs) / sum(r.prefill_s for r in runs)
        whole = sum(len(new) for r in runs for _, _, new in r.arrivals) / sum(r.arrivals[-1][0] for r in runs)
        return Speeds(decode, prefill, whole)


def table(
    kind: str, measured: Sequence[Measured], differs: dict[str, list[Divergence]], prompts: Sequence[Sequence[int]]
) -> Table:
    """differs: by contender. prompts: lengths of every case's."""
    speeds = {m.contender.name: [Speeds.of(runs) for runs in m.timed] for m in measured}
    decode = {name: [s.decode for s in found] for name, found in speeds.items()}
    whole = {name: [s.whole for s in found] for name, found in speeds.items()}
    rows = measured[0].texts[0].rows
    figures = tuple(_figures(m, decode, speeds[m.contender.name], differs[m.contender.name]) for m in measured)
    ours = [m.contender.name for m in measured if m.contender.runtime == "mlx-mtp" and m.contender.drafts]
    pairs = [(mine, m.contender.name) for mine in ours for m in measured if m.contender.name != mine]
    return Table(
        kind,
        rows,
        tuple(tuple(p) for p in prompts),
        figures,
        {f"{a} / {b}": ratio(decode[a], decode[b]) for a, b in pairs},
        {f"{a} / {b}": ratio(whole[a], whole[b]) for a, b in pairs},
    )


def ratio(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """Of two contenders, repeat by repeat."""
    return Spread.of([a / b for a, b in zip(mine, other, strict=True)])


def _figures(m: Measured, decode: dict[str, list[float]], speeds: list[Speeds], differs: list[Divergence]) -> Figures:
    name, rows = m.contender.name, m.texts[0].rows
    timed, drafts = [run for runs in m.timed for run in runs], Drafts()
    for run in timed:
        drafts.add(run.drafts.rounds, run.drafts.drafted_at, run.drafts.kept_at)
    per_round = statistics.mean(run.tokens_per_round for run in timed)
    plain = m.contender.plain if m.contender.drafts else None
    return Figures(
        name=name,
        tok_s=Spread.of(decode[name]),
        row_tok_s=Spread.of([speed / rows for speed in decode[name]]),
        prefill_tok_s=Spread.of([s.prefill for s in speeds]),
        whole_tok_s=Spread.of([s.whole for s in speeds]),
        by_repeat=tuple(decode[name]),
        tokens_per_round=per_round,
        kept_by_position=tuple(drafts.by_position),
        over_plain=ratio(decode[name], decode[plain]) if plain in decode else None,
        if_free=per_round,
        over_baseline=ratio(decode[name], decode[BASELINE.name]) if BASELINE.name in decode else None,
        peak_bytes=max(run.peak_bytes for run in timed),
        differs=tuple(differs),
        stable=m.stable,
    )


def to_json(tables: Sequence[Table], machine: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    return {"machine": machine, "settings": settings, "tables": [asdict(t) for t in tables]}


def write_csv(file: Path, tables: Sequence[Table], machine: dict[str, str]) -> None:
    """A line for every repeat of every contender in every table."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("kind", "rows", "contender", "repeat", "tok_s", "tokens_per_round", *machine))
        for t in tables:
            for f in t.figures:
                for repeat, tok_s in enumerate(f.by_repeat):
                    line = (t.kind, t.rows, f.name, repeat, f"{tok_s:.2f}", f"{f.tokens_per_round:.4f}")
                    writer.writerow((*line, *machine.values()))


# on the terminal ------------------------------------------------------------------------------------------------

SPEED = ("contender", "tok/s, all rows", "a row", "prompt", "tok/round", "kept by position")
SPEED += ("over its own plain", "if drafts were free", "over mlx-lm plain")
COST = ("contender", "peak GB", "text")


def speed_rows(t: Table) -> list[tuple[str, ...]]:
    rows = []
    for f in t.figures:
        kept = " ".join(f"{x:.2f}" for x in f.kept_by_position)
        over = (str(f.over_plain) if f.over_plain else "", f"{f.if_free:.2f}" if f.over_plain else "")
        speed = f"{f.tok_s.median:.1f} ({f.tok_s.least:.1f}..{f.tok_s.most:.1f})", f"{f.row_tok_s.median:.1f}"
        prefill = f"{f.prefill_tok_s.median:.0f}"
        baseline = str(f.over_baseline) if f.over_baseline else ""
        rows.append((f.name, *speed, prefill, f"{f.tokens_per_round:.2f}", kept, *over, baseline))
    return rows


def cost_rows(t: Table) -> list[tuple[str, ...]]:
    rows = []
    for f in t.figures:
        text = "identical"
        if f.differs:
            first = min(f.differs, key=lambda d: d.at)
            text = f"differs in {len(f.differs)} row(s), first at token {first.at}, margin {first.margin:.1e}"
        if not f.stable:
            text += "; not the same every time"
        rows.append((f.name, f"{f.peak_bytes / 1e9:.2f}", text))
    return rows
