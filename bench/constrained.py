"""Time per token of constrained texts, drafting beside not drafting, by turns in one process; and their counts.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python bench/constrained.py [--rows 1 --rows 4] [--repeats 9]

The embedded pair writes calls and answers for schemas of real tools, and strings of which nothing is forced, greedily,
by a seed and freely; and for comparison text without a constraint. What counts is the ratio of two turns that follow
each other: median, quartiles and extremes over repeats and groups of schemas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx_mtp  # noqa: E402
from mlx_mtp.grammar import Grammars, Tool  # noqa: E402
from mlx_mtp.pair import Pair  # noqa: E402
from mlx_mtp.rows import GREEDY, Request, Sampling, Stats  # noqa: E402

SCHEMAS = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "schemas" / "tools.json"
# Texts over these come to an end within a hundred tokens or two.
NAMES = ("glob", "web_fetch", "search_flights", "set_thermostat", "stock_price", "filter", "grep", "run_tests")
# Nothing is forced in it, and a model of code has no idea of it.
PROSE = {"type": "string", "minLength": 100, "maxLength": 200}
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": Sampling(temperature=0.8, seed=7),
    "free": Sampling(temperature=1.0, top_k=64, top_p=0.95),
}
KINDS = ("none", "answer", "call", "prose")
WIDTHS: tuple[int | str, ...] = (0, 3, "auto")


@dataclass
class Turn:
    """Some requests that ran together at one width. stats: summed over them."""

    seconds: float = 0.0
    stats: Stats = field(default_factory=Stats)

    @property
    def per_token_s(self) -> float:
        return self.seconds / self.stats.generated_tokens


def turn(pair: Pair, requests: Sequence[Request], width: int | str) -> Turn:
    """Run requests together; the time from the first token of the last to begin to the end of all is not told apart
    from that of the prompts, which are a few tokens."""
    start, out = time.perf_counter(), Turn()
    for request in requests:
        pair.submit(request, width)
    while not pair.idle:
        for event in pair.step():
            if event.stats is not None:
                out.stats.add(event.stats)
    out.seconds = time.perf_counter() - start
    return out


def groups(
    pair: Pair, grammars: Grammars, kind: str, sampling: Sampling, rows: int, schemas: int
) -> list[list[Request]]:
    """Requests in groups that run together; kind: "answer", "call", "prose" or "none"."""
    prompt, tools = tuple(pair.text.encode("def f(x):\n")), json.loads(SCHEMAS.read_text())
    out = []
    for name in NAMES[:schemas]:
        request = Request(prompt, 300, sampling, pair.eos)
        if kind == "none":
            request = Request(tuple(pair.text.encode(f"def {name}(x):\n")), 100, sampling, frozenset())
        elif kind == "prose":
            request = replace(request, constraint=grammars.json(PROSE), prompt=tuple(pair.text.encode(f"def {name}(")))
        elif kind == "answer":
            request = replace(request, constraint=grammars.json(tools[name]))
        else:
            calls = grammars.calls([Tool(name, tools[name], strict=True)], must=True, several=False)
            request = replace(request, constraint=calls)
        out.append(request)
    return [out[i : i + rows] for i in range(0, len(out), rows)]


def compare(pair: Pair, batches: list[list[Request]], repeats: int) -> tuple[dict, dict[int | str, Stats]]:
    """Ratios of time per token to that of width 0, by width, and each width's counts."""
    for batch in batches:  # what a width policy learns it keeps, as in a process that serves
        for width in WIDTHS:
            turn(pair, batch, width)
    ratios: dict[int | str, list[float]] = {w: [] for w in WIDTHS if w != 0}
    totals = {w: Stats() for w in WIDTHS}
    seconds = dict.fromkeys(WIDTHS, 0.0)
    for repeat in range(repeats):
        order = WIDTHS if repeat % 2 else WIDTHS[::-1]
        for batch in batches:
            took = {width: turn(pair, batch, width) for width in order}
            for width, one in took.items():
                totals[width].add(one.stats)
                seconds[width] += one.seconds
            for width in ratios:
                ratios[width].append(took[width].per_token_s / took[0].per_token_s)
    return {w: (spread(r), seconds[w] / totals[w].generated_tokens) for w, r in ratios.items()} | {
        0: (None, seconds[0] / totals[0].generated_tokens)
    }, totals


def spread(values: list[float]) -> tuple[float, ...]:
    """(least, first quartile, median, third quartile, most)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return min(values), low, middle, high, max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, action="append", help="requests that run together; 1 and 4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--sampling", choices=tuple(SAMPLINGS), action="append")
    parser.add_argument("--schemas", type=int, default=len(NAMES), help="of so many tools")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, for a machine that others load too")
    args = parser.parse_args()
    if args.cpu_time:
        time.perf_counter = time.process_time  # for the width policy too
    pair = mlx_mtp.load("tiny", args.drafter, dtype=args.dtype)
    grammars = Grammars(pair.text, pair.vocab_size, pair.eos)
    print(
        "rows kind   sampling width  tok/round reads/round ms/tok   median [quartiles] (least..most) of width 0's time"
    )
    for rows in args.rows or (1, 4):
        for kind in args.kind or KINDS:
            for name in args.sampling or SAMPLINGS:
                batches = groups(pair, grammars, kind, SAMPLINGS[name], rows, args.schemas)
                pair.restart()
                found, totals = compare(pair, batches, args.repeats)
                for width in WIDTHS:
                    report(f"{rows:<4} {kind:<6} {name:<8} {width!s:<5}", totals[width], *found[width])


def report(label: str, stats: Stats, ratios: tuple[float, ...] | None, per_token_s: float) -> None:
    reads = stats.host_reads / max(stats.rounds, 1)
    line = f"{label} {stats.generated_tokens / stats.rounds:9.2f} {reads:11.2f} {1000 * per_token_s:6.2f}"
    if ratios is not None:
        least, low, middle, high, most = ratios
        line += f"   {middle:.3f} [{low:.3f} {high:.3f}] ({least:.3f}..{most:.3f})"
    print(line, flush=True)


if __name__ == "__main__":
    main()
