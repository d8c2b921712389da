"""What commands print: JSON, tables, one-line messages, progress. stdout is data, stderr is the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def say(message: str) -> None:
    """One line on stderr."""
    print("mlx-mtp:", " ".join(message.split()), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table as wide as the terminal; in a file or pipe no line is broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False).print(table)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr for what has a known size; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def report(stage: str, done_bytes: int, total_bytes: int) -> None:
        if not total_bytes:  # a download begins, and huggingface_hub shows its own bars
            bar.stop()
            say(stage)
            return
        bar.start()
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total_bytes)
        bar.update(tasks[stage], completed=done_bytes, total=total_bytes)

    try:
        yield report
    finally:
        bar.stop()
