"""Time of a verdict, of a draft step and of log-probabilities over a real vocabulary, by sampling settings.

    OPENBLAS_NUM_THREADS=1 python bench/sampling.py [--rows 1 --rows 4] [--repeats 7] [--json out.json]
    python bench/sampling.py --against DIR      # another checkout's package as well, by turns, with ratios

Logits are random and need no model. A verdict judges 4 drafts, so 5 positions; a draft step draws one token a row.
Times are milliseconds from building the graph to its end, medians over repeats. With --against, each checkout has a
process of its own, they take turns, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, DRAFTED, CLUSTERED = 262_144, 4, 4096
FILTERS = {"top_k": 64, "top_p": 0.95}
SETTINGS = {
    "greedy": [{"temperature": 0.0}],
    "seeded": [{"seed": 7}],
    "seeded, top_k + top_p": [{**FILTERS, "seed": 7}],
    "default: top_k + top_p": [FILTERS],
    "top_p alone": [{"top_p": 0.95}],
    "min_p alone": [{"min_p": 0.05}],
    "mixed": [FILTERS, {**FILTERS, "seed": 7}, {"temperature": 0.0}],
}


def timed(run: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, in milliseconds, after one that does not count."""
    mx.eval(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measured(rows: int, repeats: int) -> dict[str, float]:
    """Case -> milliseconds, of the package that is first on the path."""
    from mlx_mtp.accept import verdict
    from mlx_mtp.logprobs import pack
    from mlx_mtp.rows import Sampling
    from mlx_mtp.sampling import Drawn, RowSampler, Sampler

    logits = mx.random.normal((rows, DRAFTED + 1, VOCABULARY), key=mx.random.key(1)) * 3
    drafter = logits + mx.random.normal(logits.shape, key=mx.random.key(2))
    ids = mx.random.randint(0, VOCABULARY // CLUSTERED, (rows, CLUSTERED), key=mx.random.key(3))
    ids = (ids + mx.arange(CLUSTERED) * (VOCABULARY // CLUSTERED)).astype(mx.int32)
    start = mx.arange(rows) + 100
    mx.eval(logits, drafter, ids)
    out = {}
    for name, settings in SETTINGS.items():
        own = [RowSampler.of(Sampling(**settings[i % len(settings)])) for i in range(rows)]
        sampler = Sampler(own)
        drawn = [sampler.draw(drafter[:, i], None, start + 1 + i) for i in range(DRAFTED)]
        draft = Drawn.draft(drawn)
        mx.eval([a for a in (draft.tokens, draft.source and draft.source.logits) if a is not None])
        one, few = drafter[:, 0], mx.take_along_axis(drafter[:, 0], ids, axis=-1)
        mx.eval(one, few)

        def judge(draft=draft, sampler=sampler):
            found = verdict(draft, logits, start, sampler)
            return found.tokens, found.kept

        def drawing(scores, which, sampler=sampler):
            found = sampler.draw(scores, which, start)
            return [a for a in (found.tokens, found.logits) if a is not None]

        out[f"verdict, {name}"] = timed(judge, repeats)
        out[f"draft step, {name}"] = timed(lambda one=one, drawing=drawing: drawing(one, None), repeats)
        if "default" in name:
            out[f"draft step, clusters, {name}"] = timed(lambda few=few, drawing=drawing: drawing(few, ids), repeats)
    tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    mx.eval(tokens)
    for most in (0, 5, 20):
        out[f"log-probabilities, {most} best"] = timed(lambda most=most: pack(logits, tokens, most), repeats)
    return out


def in_turns(folders: list[Path], given: argparse.Namespace) -> dict[str, dict[int, list[list[float]]]]:
    """Case -> rows -> for each folder the medians of its processes."""
    found: dict[str, dict[int, list[list[float]]]] = {}
    for turn in range(given.turns):
        for at, folder in reversed([*enumerate(folders)]) if turn % 2 else enumerate(folders):
            command = [sys.executable, __file__, "--child", "--repeats", str(given.repeats)]
            command += [word for rows in given.rows for word in ("--rows", str(rows))]
            done = subprocess.run([*command, "--package", str(folder)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            for rows, cases in json.loads(done.stdout).items():
                for case, took in cases.items():
                    columns = found.setdefault(case, {}).setdefault(int(rows), [[] for _ in folders])
                    columns[at].append(took)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--turns", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--package", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.rows = given.rows or [1, 4]
    sys.path.insert(0, str(given.package))
    if given.child:
        print(json.dumps({rows: measured(rows, given.repeats) for rows in given.rows}))
        return
    from mlx_mtp import __version__
    from mlx_mtp.provenance import provenance

    folders = [*([given.against.resolve()] if given.against else []), ROOT]
    found = in_turns(folders, given)
    for case, by_rows in found.items():
        for rows, columns in by_rows.items():
            times = [statistics.median(c) for c in columns]
            shown = "  ".join(f"{t:8.2f} ms" for t in times)
            print(f"{case:44s} {rows} rows  {shown}" + (f"  {times[1] / times[0]:.3f}" if given.against else ""))
    if given.json:
        result = {"provenance": provenance(["python", *sys.argv], __version__), "folders": len(folders), "cases": found}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
