"""A picture of a comparison: tok/s of every contender, with its spread. Needs matplotlib, the `plot` extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mlx_mtp.compare.report import Table
from mlx_mtp.rows import RequestError


def require() -> None:
    """Raise RequestError where nothing can be drawn; asked before anything is measured."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib, which is not installed: pip install 'mlx-mtp[plot]'")


def plot(file: Path, tables: Sequence[Table], title: str) -> None:
    """Write a picture: a group of bars for every table, whiskers from the slowest repeat to the fastest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(f.name for t in tables for f in t.figures))
    figure = Figure(figsize=(2 + 1.6 * len(tables), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [(i, f) for i, t in enumerate(tables) for f in t.figures if f.name == name]
        at = [i + (place - (len(names) - 1) / 2) * width for i, _ in found]
        speeds = [f.tok_s for _, f in found]
        below = [s.median - s.least for s in speeds], [s.most - s.median for s in speeds]
        axes.bar(at, [s.median for s in speeds], width, yerr=below, label=name, capsize=2)
    axes.set_xticks(range(len(tables)), [f"{t.kind}\n{t.rows} row(s)" for t in tables])
    axes.set_ylabel("tok/s, all rows")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be written: {error}") from None
