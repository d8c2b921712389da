"""How long a request waits for its first token, here and in mlx-lm: idle, behind a long prompt, beside another request.

    python bench/latency.py --repeats 7 --json out.json

Greedy, float32, end tokens off, the embedded pair, one process; the runtimes take turns. Speed is `mlx-mtp compare`'s.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx  # noqa: E402

from mlx_mtp import __version__  # noqa: E402
from mlx_mtp.compare import mlx_lm  # noqa: E402
from mlx_mtp.compare.cases import Prompt, prompts_of  # noqa: E402
from mlx_mtp.compare.driver import turns  # noqa: E402
from mlx_mtp.compare.ours import Ours  # noqa: E402
from mlx_mtp.compare.runs import Mode  # noqa: E402
from mlx_mtp.load import load_pair  # noqa: E402
from mlx_mtp.provenance import provenance  # noqa: E402
from mlx_mtp.text import Text  # noqa: E402

TINY = Path(__file__).resolve().parent.parent / "mlx_mtp" / "data" / "tiny"


@dataclass(frozen=True)
class Planned:
    """A request that arrives `at` seconds after the start."""

    prompt: Prompt
    tokens: int
    at: float = 0.0


def play(mode: Mode, plan: Sequence[Planned]) -> list[list[float]]:
    """Run requests through a batch; like a server's loop it takes up what has arrived between two steps.

    Seconds since the start at which tokens of each request came.
    """
    session, times = mode.open(), [[] for _ in plan]
    left, row_of, waiting = [p.tokens for p in plan], {}, list(range(len(plan)))
    start = time.perf_counter()
    while any(left):
        now = time.perf_counter() - start
        for i in [i for i in waiting if plan[i].at <= now]:
            row_of[session.submit(plan[i].prompt, plan[i].tokens)] = i
            waiting.remove(i)
        got = session.step()
        now = time.perf_counter() - start
        for request, new in got:
            row = row_of[request]
            taken = min(len(new), left[row])
            if taken:
                times[row].append(now)
                left[row] -= taken
    session.close()
    return times


def latency(mode: Mode, short: Prompt, long: Prompt, running: Planned) -> dict[str, float]:
    """Milliseconds to the first token of a short request, and between the tokens of a running one.

    idle: the machine has nothing else to do. behind: it arrives 1 ms after a long prompt. beside: it arrives
    while another request decodes. entering: a long prompt arrives while another request decodes; gap is that
    request's longest wait between two tokens then, usual_gap its longest without.
    """
    gc.collect()
    idle = play(mode, [Planned(short, 8)])[0][0]
    behind = play(mode, [Planned(long, 8), Planned(short, 8, 0.001)])[1][0] - 0.001
    alone = play(mode, [running])[0]
    at = alone[0] + (alone[-1] - alone[0]) / 4
    beside = play(mode, [running, Planned(short, 8, at)])[1][0] - at
    entering = play(mode, [running, Planned(long, 8, at)])
    found = {"idle": idle, "behind": behind, "beside": beside, "entering": entering[1][0] - at}
    found |= {"usual_gap": longest_gap(alone), "gap": longest_gap(entering[0])}
    return {name: 1000 * seconds for name, seconds in found.items()}


def longest_gap(times: Sequence[float]) -> float:
    return max(b - a for a, b in zip(times, times[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256, help="of the running request")
    parser.add_argument("--json", type=Path, help="write to a file instead of stdout")
    args = parser.parse_args()
    loaded = load_pair(str(TINY / "target"), str(TINY / "drafter"), dtype=mx.float32)
    text = Text.from_dir(TINY / "target")
    modes: dict[str, Mode] = {f"mlx-mtp width {w}": Ours(loaded, w) for w in ("auto", 3, 0)}
    modes["mlx-lm plain"] = mlx_lm.Plain(mlx_lm.load(TINY / "target", mx.float32))
    short, running = prompts_of("code", text, raw=True)[:2]
    long = prompts_of("long", text, raw=True)[0]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    for repeat in range(args.repeats):
        for i in turns(len(modes), repeat, 0):
            name = list(modes)[i]
            found[name].append(latency(modes[name], short, long, Planned(running, args.tokens)))
    medians = {
        name: {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }
    lengths = {"short_tokens": len(short), "long_tokens": len(long), "running_tokens": args.tokens}
    out = {
        "machine": provenance(["python", "bench/latency.py", *sys.argv[1:]], __version__),
        **lengths,
        "milliseconds": medians,
    }
    line = json.dumps(out, indent=1) + "\n"
    if args.json:
        args.json.write_text(line)
    else:
        print(line, end="")


if __name__ == "__main__":
    main()
