"""What a drafter costs that is attached and not asked: operations and Python calls of a round of width 0, over none.

    python bench/not_asked.py

Counted, not timed, so the figures are the same on every machine. operations: primitives of the graph that a round
dispatches, mean of 64 rounds (some kinds store what they were shown in every 16th); of these, in brackets, those that
are no mere look at memory. calls: of Python functions and of C functions from Python, as cProfile counts them; MLX's
operations are not among them. The drafters are those of `never_slower.py` over the embedded target, and the head of the
tests' Qwen 3.5.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from drafters import DATA  # noqa: E402
from never_slower import Make, makers  # noqa: E402

from mlx_mtp.bench.graph import count  # noqa: E402
from mlx_mtp.cache import Cache  # noqa: E402
from mlx_mtp.depth import MAX_WIDTH, Constant  # noqa: E402
from mlx_mtp.drafters import Drafter  # noqa: E402
from mlx_mtp.drafters.kinds import Parts  # noqa: E402
from mlx_mtp.drafters.lookup import LookupDrafter  # noqa: E402
from mlx_mtp.drafters.plain import PlainDrafter  # noqa: E402
from mlx_mtp.engine import Engine  # noqa: E402
from mlx_mtp.load import LoadedTarget, load_pair, load_target  # noqa: E402
from mlx_mtp.passes import Pass  # noqa: E402
from mlx_mtp.rows import Request  # noqa: E402
from mlx_mtp.scheduler import Limits  # noqa: E402

QWEN = ROOT / "tests" / "fixtures" / "qwen"
PROMPT_TOK, FIRST, ROUNDS = 40, 8, 64  # rounds that do not count yet, and that do


class Counting(Engine):
    """An engine that counts what it dispatches before it does."""

    operations = kernels = 0
    counts = False

    def _dispatch(self, built: Pass) -> None:
        if self.counts:
            found = count(built.out, self._state())
            self.operations, self.kernels = self.operations + found.primitives, self.kernels + found.kernels
        super()._dispatch(built)


@dataclass(frozen=True)
class Cost:
    """Of a round, mean."""

    operations: float
    kernels: float
    calls: float

    def over(self, other: Cost) -> Cost:
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(mine - theirs for mine, theirs in parts))

    def __str__(self) -> str:
        return f"{self.operations:.1f} ({self.kernels:.1f}) {self.calls:.0f}"


def cost(target: LoadedTarget, make: Make, rows: int) -> Cost:
    """Of a round of width 0: its operations in one run, its calls in another."""
    engine = filled(target, make, rows)
    engine.counts = True
    for _ in range(ROUNDS):
        engine.step()
    profile, other = cProfile.Profile(), filled(target, make, rows)
    profile.enable()
    for _ in range(ROUNDS):
        other.step()
    profile.disable()
    calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return Cost(engine.operations / ROUNDS, engine.kernels / ROUNDS, calls / ROUNDS)


def filled(target: LoadedTarget, make: Make, rows: int) -> Counting:
    """An engine whose rows all decode."""
    cache = Cache(target.model.specs, MAX_WIDTH, target.dtype)
    engine = Counting(target.model, cache, make(cache), Constant(0), Limits())
    engine.hands_over_first = False  # as on a GPU
    for row in range(rows):
        engine.submit(Request(tuple(3 + (row + i) % 200 for i in range(PROMPT_TOK)), 4 * ROUNDS))
    while len(engine.scheduler.rows) < rows or any(row.left for row in engine.scheduler.rows):
        engine.step()
    for _ in range(FIRST):
        engine.step()
    return engine


def show(target: LoadedTarget, makes: dict[str, Make], rows: list[int]) -> None:
    none = [cost(target, lambda cache: PlainDrafter(), n) for n in rows]
    print(f"| none, in all | {' | '.join(map(str, none))} |", flush=True)
    for name, make in makes.items():
        found = [cost(target, make, n).over(plain) for n, plain in zip(rows, none, strict=True)]
        print(f"| {name} | {' | '.join(map(str, found))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    args = parser.parse_args()
    tiny, qwen = load_target(str(DATA / "target")), load_pair(str(QWEN))
    head = qwen.drafter
    assert head is not None and head.model is not None

    def own(cache: Cache) -> Drafter:
        return head.kind.make(Parts(qwen.target.model, cache, head.model, PlainDrafter()))

    print("operations (of which no mere views) and calls a round, over no drafter")
    print(f"| drafter | {' | '.join(f'{n} rows' for n in args.rows)} |\n|{'---|' * (len(args.rows) + 1)}")
    show(tiny, {name: make for name, make in makers(tiny).items() if "random" not in name}, args.rows)
    print("| Qwen 3.5: |" + " |" * len(args.rows))
    show(qwen.target, {"own head": own, "own head+lookup": lambda cache: LookupDrafter(own(cache), cache)}, args.rows)


if __name__ == "__main__":
    main()
