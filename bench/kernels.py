"""The kernels on a GPU: right or not, bytes a second beside a copy, T(columns) / T(1) beside MLX's own operations.

    python bench/kernels.py --csv bench/results/NAME.csv      # and NAME.json, with where and how it was measured
    python bench/kernels.py --dry-run                         # what would be measured; needs no GPU

Not run on a GPU yet. On a Mac it takes mx.fast.metal_kernel; on an NVIDIA GPU (mlx-cuda-13) the same kernels go through
the translation to CUDA in tests/metal_emu, which it imports from this checkout: the installed package has none.

A run is a chain of calls: each takes an input made from the output of the call before by one small operation, so that
no two overlap, and the next copy of the weights, so that none lies in a cache (as far as --room lets copies be kept).
Its time is that of mx.eval alone, over the number of calls. The kernel, MLX, numbers of columns and a copy of half a
gigabyte take turns; the order reverses with every repeat. Times: median, least, most. GB/s: the least bytes that a call
must move (kernel_cases.py) over its time. error: largest difference from the reference in float32 (for which MLX may
use TF32), over the largest value; of tokens, the share that differs. alone: the first of so many columns is, to the
bit, what a single column gives. Ends with 1 if a kernel failed, fell back or is wrong, with 2 if there is no GPU.
"""

import argparse
import contextlib
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import mlx.core as mx  # noqa: E402
from kernel_cases import LAYOUTS, MOST, Arrays, Case, Work, attempt, cases, difference  # noqa: E402

from mlx_mtp import __version__  # noqa: E402
from mlx_mtp.kernels.self_test import KERNELS  # noqa: E402
from mlx_mtp.kernels.self_test_cases import TOLERANCE  # noqa: E402
from mlx_mtp.provenance import provenance  # noqa: E402
from mlx_mtp.shapes import ALL_SIZES, shape  # noqa: E402

COPY_VALUES = 2**27  # float32: half a gigabyte, read and written
LEAST_CALLS = 8  # of a run
SHOWN = (1, 2, 4, 8, 16)  # columns that are printed; files have all


@dataclass(frozen=True)
class Plan:
    """columns: ascending, the first is 1. room_bytes: for copies of a case's weights. copy_values: float32."""

    columns: list[int]
    repeats: int
    room_bytes: float
    copy_values: int = COPY_VALUES


@dataclass(frozen=True)
class Line:
    """One line of the results; times of a call in microseconds, None where there is none. note: what went wrong."""

    size: str
    kernel: str
    what: str
    columns: int
    copies: int
    bytes: int
    copy_gb_s: float
    gb_s: float | None
    mlx_gb_s: float | None
    us: float | None
    least_us: float | None
    most_us: float | None
    mlx_us: float | None
    mlx_least_us: float | None
    mlx_most_us: float | None
    ratio: float | None
    mlx_ratio: float | None
    error: float | None
    mlx_error: float | None
    alone: bool | None
    note: str


@dataclass(frozen=True)
class Check:
    """Of one number of columns. notes: by side, why it is not timed, or what is not what it seems."""

    errors: dict[str, float | None]
    alone: bool | None
    notes: dict[str, str]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call by repeat, and of columns = 1 in the same repeats; both empty if the side failed."""

    seconds: list[float]
    single: list[float]

    def us(self, pick: Callable[[list[float]], float]) -> float | None:
        return round(1e6 * pick(self.seconds), 3) if self.seconds else None

    def gb_s(self, moved: int) -> float | None:
        return round(moved / statistics.median(self.seconds) / 1e9, 2) if self.seconds else None

    def ratio(self) -> float | None:
        found = [a / b for a, b in zip(self.seconds, self.single, strict=False)]  # of no time if columns = 1 failed
        return round(statistics.median(found), 4) if found else None


SIDES: dict[str, Callable[[Work], Callable[[mx.array], Arrays]]] = {"ours": lambda w: w.ours, "mlx": lambda w: w.mlx}


def backend() -> str | None:
    """The GPU's interface that kernels would run through here."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else None


def kernels_on(name: str) -> contextlib.AbstractContextManager:
    """Inside, the kernels run on this GPU."""
    if name == "Metal":
        return contextlib.nullcontext()
    sys.path.append(str(ROOT / "tests"))
    from metal_emu import cuda  # pyright: ignore[reportMissingImports]

    return cuda.on_cuda()


# measuring ------------------------------------------------------------------------------------------------


@mx.compile
def tie(x: mx.array, before: mx.array) -> mx.array:
    """x, once `before` [1] is there."""
    return (x + before * 0).astype(x.dtype)


def run_s(works: list[Work], side: str, x: mx.array) -> float:
    """Seconds of a call, in a chain of so many."""
    calls, kept = max(LEAST_CALLS, len(works)), []
    for i in range(calls):
        out = SIDES[side](works[i % len(works)])(x)
        kept += out
        x = tie(x, out[0].reshape(-1)[:1])
    start = time.perf_counter()
    mx.eval(kept, x)
    return (time.perf_counter() - start) / calls


def copy_gb_s(x: mx.array) -> float:
    """Bytes read and written in a second by x + 1."""
    start = time.perf_counter()
    mx.eval(x + 1)
    return 2 * x.nbytes / (time.perf_counter() - start) / 1e9


def check(case: Case, work: Work, columns: int) -> Check:
    """Compares both sides with the reference; also the run that builds the kernels."""
    x, one = (case.cut(work.given, n) for n in (columns, 1))
    want, why = attempt(lambda: work.exact(x))
    errors, alone = dict[str, float | None](), None
    notes = {"reference": why, "fallback": work.why_not(x) or ""}
    for side in SIDES:
        got, notes[side] = attempt(lambda side=side: SIDES[side](work)(x))
        errors[side] = None if got is None or want is None else difference(got, want)
        if side == "ours" and got is not None:
            single, _ = attempt(lambda: work.ours(one))
            alone = single is not None and bool(mx.array_equal(case.cut(got[0], 1), single[0]).item())
    return Check(errors, alone, notes)


def measure(size: str, case: Case, plan: Plan) -> list[Line]:
    works = [case.make(seed) for seed in range(case.copies(plan.room_bytes))]
    given = {n: case.cut(works[0].given, n) for n in plan.columns}
    block = mx.zeros((plan.copy_values,))
    mx.eval(given, block, block + 1)
    checks = {n: check(case, works[0], n) for n in plan.columns}
    turns = [(n, side) for n in plan.columns for side in SIDES if not checks[n].notes[side]]
    copied, took = [], {(n, side): [] for n in plan.columns for side in SIDES}
    for n, side in turns:
        run_s(works, side, given[n])  # warms up
    for repeat in range(plan.repeats):
        copied.append(copy_gb_s(block))
        for n, side in turns[:: -1 if repeat % 2 else 1]:
            took[n, side].append(run_s(works, side, given[n]))
    out = []
    for n in plan.columns:
        moved, timings = case.moves(n), [Timing(took[n, side], took[1, side]) for side in SIDES]
        place = (size, case.kernel, case.what, n, len(works), moved, round(statistics.median(copied), 2))
        out.append(line(place, moved, timings, checks[n]))
    return out


def line(place: tuple[str, str, str, int, int, int, float], moved: int, timings: list[Timing], found: Check) -> Line:
    return Line(
        *place,
        *(timing.gb_s(moved) for timing in timings),
        *(timing.us(pick) for timing in timings for pick in (statistics.median, min, max)),
        *(timing.ratio() for timing in timings),
        *(found.errors[side] for side in SIDES),
        alone=found.alone,
        note="; ".join(f"{what}: {note}" for what, note in found.notes.items() if note),
    )


# the report -----------------------------------------------------------------------------------------------


def good(found: Line) -> bool:
    """Whether the kernel itself ran, and gave what it should."""
    right = found.error is not None and found.error <= TOLERANCE and found.alone is True  # false for nan
    return right and found.us is not None and "fallback" not in found.note


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show(found: Line) -> None:
    times = f"{cell(found.us, '.1f'):>8} us {cell(found.gb_s, '.0f'):>5} GB/s x{cell(found.ratio, '.2f')}"
    mlx = f"MLX {cell(found.mlx_us, '.1f'):>8} us {cell(found.mlx_gb_s, '.0f'):>5} GB/s x{cell(found.mlx_ratio, '.2f')}"
    right = f"error {cell(found.error, '.1e')} (MLX {cell(found.mlx_error, '.1e')}) alone {found.alone}"
    place = f"{found.size:12}{found.kernel:9}{found.what:44}{found.columns:3}"
    print(f"{place} {times}  {mlx}  copy {found.copy_gb_s:.0f} GB/s  {right} {found.note}".rstrip(), flush=True)


def dry_run(work: list[tuple[str, Case]], columns: list[int], room_bytes: float) -> None:
    print(f"{'size':12}{'kernel':9}{'shape':44}{'copies':>7}{'MB held':>9}  MB a call at 1 and {columns[-1]} columns")
    for size, case in work:
        moved = " ".join(f"{case.moves(n) / 1e6:9.3f}" for n in (1, columns[-1]))
        copies = case.copies(room_bytes)
        print(f"{size:12}{case.kernel:9}{case.what:44}{copies:7}{copies * case.holds / 1e6:9.1f}  {moved}")
    kernels = len({case.kernel for _, case in work})
    print(f"{len(work)} cases of {kernels} kernels, {len(columns)} numbers of columns, two sides")


def write(path: Path, settings: dict[str, object], lines: list[Line]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(found) for found in lines)
    path.with_suffix(".json").write_text(json.dumps(settings, indent=1) + "\n")


def measure_all(work: list[tuple[str, Case]], plan: Plan, path: Path | None, settings: dict) -> list[Line]:
    """Prints and writes after every case, so that what was measured is there whatever follows."""
    lines: list[Line] = []
    if path:
        write(path, settings, lines)  # now, if it cannot be written
    for size, case in work:
        lines += measure(size, case, plan)
        for found in lines[-len(plan.columns) :]:
            if found.columns in SHOWN:
                show(found)
        mx.clear_cache()
        if path:
            write(path, settings, lines)
    return lines


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="results; the same name with .json says where and how")
    parser.add_argument("--dry-run", action="store_true", help="list the work and measure nothing")
    parser.add_argument("--sizes", nargs="+", choices=ALL_SIZES, default=["31B", "26B-A4B", "E4B", "Qwen3.5-4B"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--layout", choices=LAYOUTS, default="affine4", help="of all weights")
    parser.add_argument("--context", type=int, default=8192, help="positions in the cache")
    parser.add_argument("--columns", type=int, nargs="+", default=list(range(1, MOST + 1)), help="1 is always measured")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--room", type=float, default=2.0, help="GB that copies of a case's weights may take")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parsed(arguments)
    columns, room_bytes, layout = sorted({1, *args.columns}), args.room * 1e9, LAYOUTS[args.layout]
    if not 1 <= columns[0] <= columns[-1] <= MOST or args.repeats < 1 or args.context < 1:
        print(f"columns are 1 to {MOST}, repeats and context at least 1", file=sys.stderr)
        return 2
    every = [(size, case) for size in args.sizes for case in cases(shape(size), layout, args.context)]
    work = [(size, case) for size, case in every if case.kernel in args.kernels]
    if args.dry_run:
        dry_run(work, columns, room_bytes)
        return 0
    here = backend()
    if here is None:
        print("no GPU: MLX computes on the CPU here; a Mac or mlx-cuda-13 is needed (see --dry-run)", file=sys.stderr)
        return 2
    settings = {"machine": provenance(["python", "bench/kernels.py", *arguments], __version__), "backend": here}
    settings |= {name: value for name, value in vars(args).items() if name != "csv"}
    with kernels_on(here):
        lines = measure_all(work, Plan(columns, args.repeats, room_bytes), args.csv, settings)
    return 0 if all(map(good, lines)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
