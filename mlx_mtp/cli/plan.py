"""`plan`: what to expect of the published pairs on a Mac, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli.app import Debug, command
from mlx_mtp.cli.output import print_json, print_table, say
from mlx_mtp.rows import RequestError

if TYPE_CHECKING:
    from mlx_mtp.memory_budget import Budget
    from mlx_mtp.plan import Machine, Memory, Published, Wish
    from mlx_mtp.roofline import Setting
    from mlx_mtp.shapes import Shape

CAVEAT = (
    "predictions of a roofline model with MLX's own kernels; nothing was measured on a Mac, and of Qwen 3.5 no "
    "published speed was held against it. ceiling: what bandwidth and arithmetic allow at any width"
)


@dataclass(frozen=True)
class Plan(Debug):
    """The options of `plan`."""

    chip: Annotated[str | None, typer.Option(help='Such as "M4 Pro"; unset = this Mac.')] = None
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Of the machine; goes with --chip.")] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder or hub id: the memory its own files take, by config and headers. Downloads no weights.",
        ),
    ] = None
    size: Annotated[str | None, typer.Option(help="One size, such as 31B, with every width. Unset: all sizes.")] = None
    bits: Annotated[int | None, typer.Option(metavar="4|8|16", help="Bits a weight; unset = all that fit.")] = None
    drafter_bits: Annotated[int, typer.Option(metavar="4|8|16", help="Bits a weight of the drafter.")] = 16
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; may be repeated. Unset: 1, 4, 8.")] = None
    context: Annotated[int, typer.Option(help="Tokens in the cache of every sequence.")] = 2048
    published: Annotated[bool, typer.Option("--published", help="Show predictions beside published figures.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False


@command
def plan(options: Plan) -> None:
    """Say which pairs fit into a Mac, what takes the memory, and how fast they should be, plain and speculative."""
    if options.published:
        _show_published(options.as_json)
        return
    machine = _machine(options)
    if options.model is not None:
        _show_model(machine, options)
        return
    from mlx_mtp.plan import BITS, Wish, check_wish, memory_of
    from mlx_mtp.shapes import ALL_SIZES, shape

    shapes = [shape(size) for size in ([options.size] if options.size else ALL_SIZES)]
    batches = options.batch or [1, 4, 8]
    wishes = [
        (Wish(found.size, bits, options.drafter_bits, batch, options.context), found)
        for found in shapes
        for bits in ([options.bits] if options.bits is not None else BITS)
        for batch in batches
    ]
    for wish, found in wishes:
        check_wish(wish, found)
    if options.as_json:
        print_json({"machine": _machine_json(machine), "pairs": [_entry(machine, *wish) for wish in wishes]})
        return
    usable = machine.usable_bytes / 1e9
    say(f"{machine.chip.name}, {machine.memory_gb:g} GB, of which the GPU may hold {usable:.1f} GB; {CAVEAT}")
    _show_memory(machine, [wish for wish in wishes if wish[0].batch == batches[0]])
    print()
    running = [wish for wish in wishes if memory_of(machine, *wish).fits]
    if not running:
        say("nothing of this fits")
    elif options.size:
        _show_widths(machine, running)
    else:
        _show_speed(machine, running)


def _machine(options: Plan) -> Machine:
    from mlx_mtp.chips import check_memory, find_chip, this_chip
    from mlx_mtp.doctor import memory_bytes, ram_bytes
    from mlx_mtp.mlx_setup import chip_brand
    from mlx_mtp.plan import Machine

    if options.chip is None:
        if options.memory is not None:
            raise RequestError("--memory is given without --chip; name the chip too, or neither for this Mac")
        return Machine(this_chip(chip_brand()), round(ram_bytes() / 2**30), memory_bytes())
    chip = find_chip(options.chip)
    if options.memory is None:
        raise RequestError(f"--chip {chip.name!r} is given without --memory; say how many GB it has")
    check_memory(chip, options.memory)
    return Machine(chip, options.memory)


def _show_memory(machine: Machine, wishes: list[tuple[Wish, Shape]]) -> None:
    from mlx_mtp.plan import memory_of

    rows = []
    for wish, found in wishes:
        m = memory_of(machine, wish, found)
        rows.append((found.size, f"{wish.bits}", *_memory_row(m)))
    batch, context = wishes[0][0].batch, wishes[0][0].context
    print_table(("size", "bits", *_memory_header(batch, context)), rows)


def _show_model(machine: Machine, options: Plan) -> None:
    """What a checkpoint takes on a machine, by its files."""
    from mlx_mtp.plan import check_bits, memory_in, read_pair

    assert options.model is not None
    check_bits("drafter bits", options.drafter_bits)
    found = read_pair(options.model, options.drafter_bits)
    batches = options.batch or [1, 4, 8]
    memories = [memory_in(found.size, machine.usable_bytes, batch, options.context) for batch in batches]
    if options.as_json:
        files = {"model": found.target, "drafter": found.drafter, "stored_bytes": found.stored_bytes}
        found_for = [_memory_json(m) for m in memories]
        print_json({"machine": _machine_json(machine), **files, "notes": found.notes, "memory": found_for})
        return
    for note in found.notes:
        say(f"warning: {note}")
    parts = ", ".join(f"{how} {size / 1e9:.2f} GB" for how, size in found.stored_bytes.items())
    say(f"{machine.chip.name}, {machine.memory_gb:g} GB, of which the GPU may hold {machine.usable_bytes / 1e9:.1f} GB")
    say(f"{found.target}, text stack: {parts}; drafter: {found.drafter or 'none'}")
    rows = [(f"{m.batch}", *_memory_row(m)) for m in memories]
    print_table(("batch", *_memory_header("batch", options.context)), rows)
    if known := found.shape:
        say(CAVEAT)
        settings = [found.setting(m.batch, options.context) for m in memories if m.fits]
        print_table(("batch", *SPEEDS), [(f"{s.batch}", *_speeds(machine, s, known)) for s in settings])


def _memory_header(batch: int | str, context: int) -> tuple[str, ...]:
    parts = ("GB: target", "drafter", "passes", f"cache, {batch} x {context}", "total", "per 1k tokens", "fits")
    return (*parts, "at once", "tokens each", "tokens alone")


def _memory_row(m: Memory) -> tuple[str, ...]:
    parts = (m.target, m.drafter, m.working, m.seq * m.batch, m.total, m.per_1k_tokens)
    return (*(f"{part / 1e9:.2f}" for part in parts), "yes" if m.fits else "no", *_most(m.default))


def _most(b: Budget) -> tuple[str, str, str]:
    """How many sequences run at once by default, and the tokens of each, and of one alone."""
    return (f"{b.num_seqs}", f"{b.fair_share_len:,}", f"{b.max_seq_len:,}") if b.fits else ("-", "-", "-")


def _show_speed(machine: Machine, wishes: list[tuple[Wish, Shape]]) -> None:
    from mlx_mtp.plan import setting_of

    rows = [(found.size, f"{w.bits}", f"{w.batch}", *_speeds(machine, setting_of(w), found)) for w, found in wishes]
    print_table(("size", "bits", "batch", *SPEEDS), rows)


SPEEDS = ("plain tok/s", "prose: width", "tok/s", "ceiling", "code: width", "tok/s", "ceiling")


def _speeds(machine: Machine, setting: Setting, found: Shape) -> list[str]:
    """The columns SPEEDS."""
    from mlx_mtp.plan import ACCEPTANCE, speed

    both = [speed(machine.chip, setting, found, ACCEPTANCE[kind]) for kind in ("prose", "code")]
    row = [f"{both[0].plain.tok_s:.0f}"]
    for s in both:
        row += [f"{s.best.width}", f"{s.best.tok_s:.0f} ({s.best.speedup:.2f}x)", f"{s.ceiling.tok_s:.0f}"]
    return row


def _show_widths(machine: Machine, wishes: list[tuple[Wish, Shape]]) -> None:
    """Of one size: tok/s at every width."""
    from mlx_mtp.plan import ACCEPTANCE, PLANNED_WIDTH, setting_of, speed

    rows = []
    for wish, found in wishes:
        for kind in ("prose", "code"):
            s = speed(machine.chip, setting_of(wish), found, ACCEPTANCE[kind])
            at = (f"{p.tok_s:.0f}" for p in s.by_width)
            best = f"{s.best.width} ({s.best.speedup:.2f}x)"
            row = (f"{wish.bits}", f"{wish.batch}", kind, *at, best, f"{s.ceiling.tok_s:.0f} at {s.ceiling.width}")
            rows.append(row)
    widths = (f"width {k}" for k in range(PLANNED_WIDTH + 1))
    print_table(("bits", "batch", "text", *widths, "best", "ceiling"), rows)


def _machine_json(machine: Machine) -> dict[str, Any]:
    return {"chip": machine.chip.name, "memory_gb": machine.memory_gb, "usable_bytes": machine.usable_bytes}


def _memory_json(memory: Memory) -> dict[str, Any]:
    parts = asdict(memory)
    default = {**parts.pop("default"), "fits": memory.default.fits}
    return {"fits": parts.pop("fits"), "memory_bytes": {**parts, "total": memory.total}, "default": default}


def _entry(machine: Machine, wish: Wish, found: Shape) -> dict[str, Any]:
    """One wish as JSON."""
    from mlx_mtp.plan import ACCEPTANCE, memory_of, setting_of, speed

    memory = memory_of(machine, wish, found)
    entry: dict[str, Any] = {**asdict(wish), **_memory_json(memory)}
    entry["speed"] = {}
    for kind in ("prose", "code"):
        s = speed(machine.chip, setting_of(wish), found, ACCEPTANCE[kind])
        entry["speed"][kind] = {**asdict(s), "best_width": s.best.width}
    return entry


def _show_published(as_json: bool) -> None:
    from mlx_mtp.plan import left_out, median_errors, published

    rows, missing = published(), left_out()
    errors = median_errors(rows)
    if as_json:
        found = {name: {"median_error": error, "figures": count} for name, (error, count) in errors.items()}
        print_json({"rows": [asdict(row) for row in rows], "errors": found, "left_out": missing})
        return
    header = ("source", "chip", "size", "setting", "plain: published", "predicted", "drafted: published")
    print_table((*header, "predicted", "speed-up: published", "predicted"), [_published_row(row) for row in rows])
    print()
    for name, (error, count) in errors.items():
        print(f"median error, {name}: {error:.0%} of {count} figures")
    for reason in missing:
        print(f"left out: {reason}")


def _published_row(row: Published) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    plain = number(row.plain_tok_s, 1), number(row.predicted_plain_tok_s, 1)
    drafted = number(row.tok_s, 1), number(row.predicted_tok_s, 1)
    return (
        row.source,
        row.chip,
        row.size,
        row.setting,
        *plain,
        *drafted,
        f"{row.speedup:.2f}",
        (f"{row.predicted_speedup:.2f}"),
    )
