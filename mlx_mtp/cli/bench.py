"""`bench`: the loop on real model shapes with made-up weights, and operations counted from the graph."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli.app import Debug, command
from mlx_mtp.cli.output import print_json, print_table, say
from mlx_mtp.rows import RequestError

if TYPE_CHECKING:
    from mlx_mtp.bench.settings import Size, Sweep
    from mlx_mtp.bench.steps import Steps
    from mlx_mtp.bench.sweep import Line


@dataclass(frozen=True)
class Bench(Debug):
    """The options of `bench`."""

    size: Annotated[list[str] | None, typer.Option(help="Such as E4B; may be repeated. Unset: E2B.")] = None
    bits: Annotated[int, typer.Option(metavar="4|8|16", help="Bits a weight of the target.")] = 4
    drafter_bits: Annotated[int | None, typer.Option(metavar="4|8|16", help="Of the drafter; unset = as --bits.")] = (
        None
    )
    layers: Annotated[int | None, typer.Option(help="Keep only the target's first layers, where memory is short.")] = (
        None
    )
    synthetic_acceptance: Annotated[
        list[float] | None, typer.Option(metavar="P", help="Chance of a draft to be kept; may be repeated. Unset: 0.8.")
    ] = None
    batch: Annotated[list[int] | None, typer.Option(help="Rows at once; may be repeated. Unset: 1, 4, 8.")] = None
    width: Annotated[list[int] | None, typer.Option(help="May be repeated; 0 is added. Unset: 1 to 5.")] = None
    context: Annotated[list[int] | None, typer.Option(help="Tokens in every row's cache. Unset: 1024.")] = None
    rounds: Annotated[int, typer.Option(help="Timed rounds of a run.")] = 32
    repeats: Annotated[int, typer.Option(help="Runs of every width, taking turns.")] = 4
    primitives: Annotated[
        bool, typer.Option("--primitives", help="Run nothing: count operations of a step, of all sizes or of --size.")
    ] = False
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all lines to a file, with chip and commit.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False


@command
def bench(options: Bench) -> None:
    """Time the loop on a published size with random weights made in memory, at an acceptance given by chance."""
    from mlx_mtp import __version__
    from mlx_mtp.bench.settings import Size, Sweep
    from mlx_mtp.provenance import provenance
    from mlx_mtp.shapes import SIZES

    names = options.size or (list(SIZES) if options.primitives else ["E2B"])
    drafter_bits = options.bits if options.drafter_bits is None else options.drafter_bits
    sizes = [Size(name, options.bits, drafter_bits, options.layers) for name in names]
    asked = Sweep(
        batches=tuple(options.batch or (1, 4, 8)),
        contexts=tuple(options.context or (1024,)),
        widths=tuple(options.width or (1, 2, 3, 4, 5)),
        acceptance=tuple(options.synthetic_acceptance if options.synthetic_acceptance is not None else (0.8,)),
        rounds=options.rounds,
        repeats=options.repeats,
    )
    found = provenance(["mlx-mtp", *sys.argv[1:]], __version__)
    if options.primitives:
        _count(options, sizes, found)
    else:
        _time(options, sizes, asked, found)


def _count(options: Bench, sizes: list[Size], machine: dict[str, str]) -> None:
    from mlx_mtp.bench.steps import count_steps

    if options.layers is not None or options.csv is not None:
        raise RequestError("--primitives counts all layers and writes no CSV; leave --layers and --csv out")
    batch = (options.batch or [1])[0]
    counted = [count_steps(size, batch) for size in sizes]
    if options.as_json:
        print_json({"machine": machine, "batch": batch, "steps": [asdict(steps) for steps in counted]})
        return
    say(
        f"operations of a step over {batch} row(s), counted from the graph at {options.bits} bits and never run, with "
        "norms, RoPE and attention fused as Metal has them; this package without its own kernels. In brackets those "
        "that compute and are no mere views"
    )
    rows = [_steps_row(steps) for steps in counted]
    header = ("size", "plain step", "mlx-lm's", "ratio", "round of width 1", "round of width 3")
    print_table(header, rows)


def _steps_row(steps: Steps) -> tuple[str, ...]:
    theirs, ratio = "not installed", ""
    if steps.mlx_lm:
        theirs = f"{steps.mlx_lm.primitives} ({steps.mlx_lm.kernels})"
        ratio = f"{steps.plain.primitives / steps.mlx_lm.primitives:.2f} "
        ratio += f"({steps.plain.kernels / steps.mlx_lm.kernels:.2f})"
    ours = f"{steps.plain.primitives} ({steps.plain.kernels})"
    return steps.size, ours, theirs, ratio, *(f"{c.primitives} ({c.kernels})" for c in steps.rounds.values())


def _time(options: Bench, sizes: list[Size], asked: Sweep, machine: dict[str, str]) -> None:
    from mlx_mtp.bench.made_up import make
    from mlx_mtp.bench.sweep import sweep
    from mlx_mtp.shapes import shape

    shapes = {size.name: shape(size.name) for size in sizes}
    for size in sizes:
        _check_memory(size, asked)
    out: list[dict[str, Any]] = []
    for size in sizes:
        made = make(shapes[size.name], size)
        whole = f"{made.layers} of {made.all_layers} layers" if made.layers < made.all_layers else "all layers"
        head = {"size": size.name, "bits": size.bits, "drafter_bits": size.drafter_bits, "layers": made.layers}
        head["all_layers"] = made.all_layers
        for lines in sweep(made, asked):
            out += [{**head, **asdict(line.setting), **_figures(line)} for line in lines]
            if options.csv:
                _write_csv(options.csv, out, machine)
            if not options.as_json:
                _show(f"{size.name}, {size.bits} bit, {whole}", lines)
        del made
    if options.as_json:
        print_json({"machine": machine, "lines": out})


def _check_memory(size: Size, asked: Sweep) -> None:
    from mlx_mtp.bench.made_up import bytes_of
    from mlx_mtp.doctor import memory_bytes

    need, have = bytes_of(size, max(asked.batches), max(asked.contexts)), memory_bytes()
    if need > have:
        raise RequestError(
            f"{size.name} at {size.bits} bits takes {need / 1e9:.1f} GB, this machine has {have / 1e9:.1f}; "
            "take fewer --bits, rows or --context, or only some of its --layers"
        )


def _figures(line: Line) -> dict[str, Any]:
    figures = asdict(line)
    del figures["setting"]
    return {name: round(value, 4) for name, value in figures.items()}


def _show(title: str, lines: list[Line]) -> None:
    setting = lines[0].setting
    say(
        f"{title}: {setting.batch} row(s), {setting.context} tokens in the cache, drafts kept with probability "
        f"{setting.acceptance:g}, random weights"
    )
    rows = [
        (
            f"{line.setting.width}",
            f"{line.tok_s:.1f}",
            f"{line.tokens_per_round:.2f}",
            f"{line.verify_ms:.1f}",
            f"{line.verify_ratio:.2f}",
            f"{line.draft_share:.0%}",
            f"{line.host_ms:.2f}",
            f"{line.speedup:.2f} ({line.least_speedup:.2f}..{line.most_speedup:.2f})",
            f"{line.free_speedup:.2f}",
        )
        for line in lines
    ]
    header = ("width", "tok/s", "tokens/round", "pass ms", "T(columns)/T(1)", "drafting", "host ms", "speed-up")
    print_table((*header, "if columns were free"), rows)
    print()


def _write_csv(file: Path, lines: list[dict[str, Any]], machine: dict[str, str]) -> None:
    """Every line with what it depends on, so that a file may be cut and joined."""
    try:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, [*lines[0], *machine])
            writer.writeheader()
            writer.writerows(line | machine for line in lines)
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}") from error
