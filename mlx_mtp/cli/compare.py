"""`compare`: the checked pair beside mlx-lm and, where it is installed, mlx-vlm; a process each, taking turns."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mtp.cli.app import Debug, command
from mlx_mtp.cli.choice import EMBEDDED, KernelsOption, ModelOption, parse_width
from mlx_mtp.cli.output import print_json, print_table, say
from mlx_mtp.rows import RequestError

if TYPE_CHECKING:
    from mlx_mtp.compare.driver import Contender, Pool, Protocol
    from mlx_mtp.compare.report import Table
    from mlx_mtp.compare.worker import Load

PRELOAD = "LD_PRELOAD"


@dataclass(frozen=True)
class Compare(Debug):
    """The options of `compare`."""

    model: ModelOption = EMBEDDED
    drafter: Annotated[str, typer.Option(help="auto (the target's own, by name), a folder or hub id.")] = "auto"
    dtype: Annotated[str | None, typer.Option(help="For all; unset = the checkpoint's on a GPU, float32 on a CPU.")] = (
        None
    )
    kind: Annotated[
        list[str] | None,
        typer.Option(help="code, chat, edit, json, enumeration, long; may be repeated. Unset: code, chat."),
    ] = None
    batch: Annotated[list[int] | None, typer.Option(help="Rows at once; may be repeated. Unset: 1, 4, 8.")] = None
    width: Annotated[list[str] | None, typer.Option(help="Ours; may be repeated; 0 is added. Unset: auto.")] = None
    block: Annotated[
        list[int] | None, typer.Option(help="mlx-vlm's, drafts + 1; may be repeated. Unset: 4, its own.")
    ] = None
    kernels: KernelsOption = "auto"
    draft_model: Annotated[str | None, typer.Option(help="A smaller model for mlx-lm's own speculation.")] = None
    draft_model_width: Annotated[int, typer.Option(help="Tokens it drafts a round.", min=1)] = 3
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens of every request.", min=4)] = 128
    repeats: Annotated[int, typer.Option(help="Timed runs of everything.", min=1)] = 4
    groups: Annotated[int, typer.Option(help="Groups of prompts of every kind.", min=1)] = 2
    cool_down: Annotated[float, typer.Option(metavar="SECONDS", help="Pause before every run.", min=0)] = 0.0
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Hold one runtime's weights at a time; slower.")
    ] = False
    csv: Annotated[Path | None, typer.Option("--csv", help="Write tok/s of every repeat to a file.")] = None
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw tok/s into a file, such as out.png.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False
    preload: Annotated[
        bool, typer.Option("--preload/--no-preload", help="On Linux, start anew with OpenBLAS for every runtime.")
    ] = True


@command
def compare(options: Compare) -> None:
    """Compare speed and text with mlx-lm and mlx-vlm: same checkpoint, same token ids, end tokens off, greedy."""
    from mlx_mtp import __version__
    from mlx_mtp.compare.cases import KINDS
    from mlx_mtp.compare.plot import plot, require
    from mlx_mtp.compare.report import to_json, write_csv
    from mlx_mtp.provenance import provenance

    _check(options, KINDS)
    if options.plot:
        require()
    if options.preload:
        _preload_openblas()
    machine, tables = provenance(["mlx-mtp", *sys.argv[1:]], __version__), []
    say("; ".join(f"{name} {value}" for name, value in machine.items() if name not in ("when", "command")))
    for found in measured(options):
        tables.append(found)
        if options.csv:
            write_csv(options.csv, tables, machine)
        if not options.as_json:
            _show(found)
    if options.as_json:
        settings = {name: str(value) for name, value in vars(options).items() if value is not None}
        print_json(to_json(tables, machine, settings))
    if options.plot:
        plot(options.plot, tables, f"{options.model}, {machine['chip']}, mlx {machine['mlx']}")


def measured(options: Compare) -> Iterator[Table]:
    """Tables of every kind and number of rows, one after the other. Raises RequestError and CompareError."""
    from mlx_mtp.compare.driver import Pool, Protocol

    loads, contenders = _contenders(options)
    how = Protocol(options.tokens, options.repeats, options.cool_down, options.one_at_a_time)
    pool = Pool(loads, options.one_at_a_time)
    try:
        yield from _tables(options, pool, _only_running(pool, contenders), how)
    finally:
        pool.close()


def _check(options: Compare, kinds: tuple[str, ...]) -> None:
    """Everything that can be refused before a process is started."""
    from mlx_mtp.kernels.self_test import KernelChoice

    for kind in options.kind or ():
        if kind not in kinds:
            raise RequestError(f"kind is {kind!r}; expected {', '.join(kinds)}")
    for rows in options.batch or ():
        if not 1 <= rows <= 8:
            raise RequestError(f"batch is {rows}; expected 1 to 8")
    for block in options.block or ():
        if not 2 <= block <= 16:
            raise RequestError(f"block is {block}; expected 2 to 16")
    for width in options.width or ():
        parse_width(width)
    KernelChoice.parse(options.kernels)
    if options.drafter == "none":
        raise RequestError("drafter is none; a comparison needs one (width 0 is always part of it)")
    if find_spec("mlx_lm") is None:
        raise RequestError("mlx-lm, the baseline, is not installed: pip install 'mlx-mtp[compare]'")


def _contenders(options: Compare) -> tuple[list[Load], list[Contender]]:
    """What every process loads, and everyone who takes turns."""
    from importlib import resources

    from mlx_mtp import hub
    from mlx_mtp.compare.driver import BASELINE, PLAIN, Contender
    from mlx_mtp.compare.worker import Load
    from mlx_mtp.doctor import on_gpu
    from mlx_mtp.load import own_drafter
    from mlx_mtp.pairs import find_drafter

    embedded = str(resources.files("mlx_mtp") / "data" / "tiny" / "target")
    name = embedded if options.model == EMBEDDED else options.model
    target = str(hub.resolve(name))
    drafter = options.drafter if options.drafter != "auto" else own_drafter(name) or find_drafter(name)
    if drafter is None:
        raise RequestError(f"no drafter is known for {options.model}; name one with --drafter")
    drafter = str(hub.resolve(drafter))
    dtype = options.dtype or (None if on_gpu() else "float32")
    widths = [w for w in dict.fromkeys(options.width or ["auto"]) if w != "0"]
    contenders = [Contender(f"mlx-mtp width {w}", "mlx-mtp", w, True, PLAIN.name) for w in widths]
    contenders += [PLAIN, BASELINE]
    small = str(hub.resolve(options.draft_model)) if options.draft_model else None
    loads = [
        Load("mlx-mtp", target, drafter, dtype, kernels=options.kernels),
        Load("mlx-lm", target, None, dtype, small),
    ]
    if small:
        mode = str(options.draft_model_width)
        contenders.append(Contender("mlx-lm draft model", "mlx-lm", mode, True, BASELINE.name, batches=False))
    if find_spec("mlx_vlm") is None:
        say("mlx-vlm is not installed and is left out (pip install mlx-vlm)")
        return loads, contenders
    plain = Contender("mlx-vlm plain", "mlx-vlm", "plain", False, "mlx-vlm plain")
    blocks = dict.fromkeys(options.block or [4])
    contenders += [plain, *(Contender(f"mlx-vlm block {n}", "mlx-vlm", f"{n}", True, plain.name) for n in blocks)]
    return [*loads, Load("mlx-vlm", target, drafter, dtype)], contenders


def _only_running(pool: Pool, contenders: list[Contender]) -> list[Contender]:
    """Without mlx-vlm where it cannot run this pair: a comparison with the others is worth having."""
    from mlx_mtp.compare.driver import CompareError

    first = next((c for c in contenders if c.runtime == "mlx-vlm"), None)
    if first is None:
        return contenders
    try:
        pool.run(first, [(2, 3, 4)], 2)
        return contenders
    except CompareError as error:
        say(f"left out, since it cannot run this pair: {error}")
        return [c for c in contenders if c.runtime != "mlx-vlm"]


def _tables(options: Compare, pool: Pool, contenders: list[Contender], how: Protocol) -> Iterator[Table]:
    from mlx_mtp.compare.cases import cases_of, prompts_of
    from mlx_mtp.compare.driver import Reference, measure
    from mlx_mtp.compare.report import table
    from mlx_mtp.text import Text

    text = Text.from_dir(Path(pool.target))
    reference = Reference(pool, how.tokens)
    for kind in options.kind or ("code", "chat"):
        prompts = prompts_of(kind, text, raw=options.model == EMBEDDED)
        for rows in options.batch or (1, 4, 8):
            cases = cases_of(kind, prompts, rows, options.groups)
            measured = measure(pool, contenders, cases, how)
            differs = {m.contender.name: list(reference.divergences(cases, m.texts)) for m in measured}
            yield table(kind, measured, differs, [[len(p) for p in case.prompts] for case in cases])


def _show(found: Table) -> None:
    from mlx_mtp.compare.report import COST, SPEED, cost_rows, speed_rows

    lengths = [n for case in found.prompt_tokens for n in case]
    say(f"{found.kind}, {found.rows} row(s), prompts of {min(lengths)} to {max(lengths)} tokens; median (least..most)")
    print_table(SPEED, speed_rows(found))
    print_table(COST, cost_rows(found))
    for pair, spread in found.ratios.items():
        print(f"{pair}: {spread}, with the prompt {found.whole_ratios[pair]}")
    print()


def _preload_openblas() -> None:
    """Start anew with OpenBLAS in front: MLX's Linux wheel brings the reference BLAS, which no one would serve with.

    Every runtime's process inherits it.
    """
    if sys.platform != "linux" or "openblas" in os.environ.get(PRELOAD, ""):
        return
    library = _find_openblas()
    if library is None:
        say("no OpenBLAS found; the reference BLAS makes wide passes several times slower than they need be")
        return
    already = os.environ.get(PRELOAD)
    new = {PRELOAD: f"{library}:{already}" if already else library, "OPENBLAS_NUM_THREADS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **new})


def _find_openblas() -> str | None:
    found = ctypes.util.find_library("openblas")
    if found:
        return found
    places = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib", "opt/OpenBLAS/lib")
    hits = (hit for place in places for hit in sorted(Path("/").glob(f"{place}/libopenblas*.so.0")))
    return next((str(hit) for hit in hits), None)
