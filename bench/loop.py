"""The loop at the shape of a published size with random weights: what drafting costs where a draft is kept by chance.

    python bench/loop.py --size E2B --layers 5 --batch 1 4 8 --width 1 2 4 --csv out.csv

The drafter and the verdict do all their work; which drafts are kept is then drawn, each with the same probability. All
widths of a setting take turns. "pass ms" is the target's pass alone, from a run that waits between drafting and
verifying. Random weights route about evenly over experts, where trained ones repeat themselves, and drafts are kept
independently, where those of a text come in runs.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
from made_up import MadeUp, Size, bytes_of, make

from mlx_mtp import __version__
from mlx_mtp.accept import Verdict, verdict
from mlx_mtp.cache import Cache
from mlx_mtp.doctor import memory_bytes
from mlx_mtp.draft_length import MAX_WIDTH, make_policy
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.provenance import provenance
from mlx_mtp.rows import GREEDY, Draft, Request
from mlx_mtp.sampling import Sampler
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import SIZES, shape

WARM_UP_ROUNDS = 3


class Synthetic:
    """A verdict that keeps every draft with a probability, independently, up to the first that is not kept.

    The target's own verdict is computed all the same, and the token after the last kept draft is the target's. Draws
    depend on the seed and on how many verdicts came before.
    """

    def __init__(self, probability: float, seed: int = 0) -> None:
        self._probability, self._seed, self._count = probability, seed, 0

    def __call__(
        self, draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
    ) -> Verdict:
        judged = verdict(draft, logits, start, sampler, hidden)
        if not draft.width:
            return judged
        self._count += 1
        drawn = mx.random.uniform(shape=draft.tokens.shape, key=mx.random.key(self._seed * 2**32 + self._count))
        leading = mx.cumprod((drawn < self._probability).astype(mx.int32), axis=1).sum(axis=1) + 1
        (kept,) = mx.depends([leading.astype(mx.int32)], [judged.kept])
        ours = mx.where(mx.arange(draft.width) < kept[:, None] - 1, draft.tokens, judged.tokens[:, :-1])
        return Verdict(mx.concatenate([ours, judged.tokens[:, -1:]], axis=1), kept)


@dataclass(frozen=True)
class Setting:
    """One engine's work: rows, positions in the cache of each, width, and the chance of a draft to be kept."""

    batch: int
    context: int
    width: int
    acceptance: float


@dataclass(frozen=True)
class Run:
    """Timed rounds of all rows. verify_s, draft_s: of them all, from a profiled run; host_s: when the device waits."""

    tokens: int
    rounds: int
    seconds: float
    verify_s: float
    draft_s: float
    host_s: float


@dataclass(frozen=True)
class Line:
    """A width beside width 0 of the same setting. pass_ratio: T(columns) / T(1). Speed-ups are within a repeat."""

    tok_s: float
    tokens_per_round: float
    pass_ms: float
    pass_ratio: float
    draft_share: float
    host_ms: float
    speedup: float
    least_speedup: float
    most_speedup: float


def run(made: MadeUp, setting: Setting, rounds: int, seed: int = 0, profile: bool = False) -> Run:
    """Some rounds of a fresh engine; times are those of its first row."""
    cache = Cache(made.target.specs, MAX_WIDTH, made.dtype)
    drafter, limits = MtpDrafter(made.target, made.drafter, cache), Limits(max_rows=setting.batch)
    engine = Engine(made.target, cache, drafter, make_policy(setting.width), limits)
    engine.profile = profile
    engine.runner.judge = Synthetic(setting.acceptance, seed)
    prompt = tuple((31 * i + 7) % made.target.config.vocab_size for i in range(setting.context))
    most = (setting.width + 1) * (rounds + WARM_UP_ROUNDS + setting.batch + 4)
    requests, decoding = [engine.submit(Request(prompt, most, GREEDY)) for _ in range(setting.batch)], 0
    while decoding < setting.batch:
        decoding += sum(bool(event.tokens) for event in engine.step())
    for _ in range(WARM_UP_ROUNDS):
        engine.step()
    first = engine.scheduler.rows[0].stats
    before, start = (first.device_s, first.draft_s, first.host_s), time.perf_counter()
    tokens = sum(len(event.tokens) for _ in range(rounds) for event in engine.step())
    seconds = time.perf_counter() - start
    now = first.device_s, first.draft_s, first.host_s
    device_s, draft_s, host_s = (a - b for a, b in zip(now, before, strict=True))
    for request in requests:
        engine.cancel(request)
    mx.clear_cache()
    return Run(tokens, rounds, seconds, device_s - draft_s, draft_s, host_s)


def measure(made: MadeUp, settings: Sequence[Setting], rounds: int, repeats: int) -> list[Line]:
    """Every setting, of which the first has width 0, in an order that reverses with every repeat."""
    profiled = [run(made, setting, rounds, profile=True) for setting in settings]  # also builds the kernels
    timed: list[list[Run]] = [[] for _ in settings]
    for repeat in range(repeats):
        for i in range(len(settings)) if repeat % 2 else reversed(range(len(settings))):
            timed[i].append(run(made, settings[i], rounds, repeat))
    return [line(settings[0].batch, *pair, timed[0], profiled[0]) for pair in zip(timed, profiled, strict=True)]


def line(batch: int, runs: list[Run], profiled: Run, plain: list[Run], plain_profiled: Run) -> Line:
    tok_s, plain_tok_s = ([r.tokens / r.seconds for r in some] for some in (runs, plain))
    ratios = [a / b for a, b in zip(tok_s, plain_tok_s, strict=True)]
    return Line(
        tok_s=statistics.median(tok_s),
        tokens_per_round=sum(r.tokens for r in runs) / sum(r.rounds for r in runs) / batch,
        pass_ms=1000 * profiled.verify_s / profiled.rounds,
        pass_ratio=profiled.verify_s / profiled.rounds / (plain_profiled.verify_s / plain_profiled.rounds),
        draft_share=profiled.draft_s / (profiled.draft_s + profiled.verify_s),
        host_ms=1000 * statistics.median(r.host_s / r.rounds for r in runs),
        speedup=statistics.median(ratios),
        least_speedup=min(ratios),
        most_speedup=max(ratios),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="E2B")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="of both networks")
    parser.add_argument("--layers", type=int, help="keep only the target's first layers, where memory is short")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.8], help="chance of a draft to be kept")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--width", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="0 is added")
    parser.add_argument("--context", type=int, default=1024, help="tokens in every row's cache")
    parser.add_argument("--rounds", type=int, default=32, help="timed rounds of a run")
    parser.add_argument("--repeats", type=int, default=4, help="runs of every width, taking turns")
    parser.add_argument("--csv", type=Path, help="write all lines to a file, with chip and commit")
    args = parser.parse_args(argv)
    size = Size(args.size, args.bits, args.layers)
    need, have = bytes_of(size, max(args.batch), args.context), memory_bytes()
    if need > have:
        parser.error(f"{args.size} takes {need / 1e9:.1f} GB, this machine has {have / 1e9:.1f}; try --layers")
    made, machine = make(shape(size.name), size), provenance(["bench/loop.py", *sys.argv[1:]], __version__)
    print(f"{size.name}, {size.bits} bit, {made.layers} of {made.all_layers} layers, random weights")
    print("batch width  tok/s  tokens/round  pass ms  T(columns)/T(1)  drafting  host ms  speed-up")
    found = []
    for batch in args.batch:
        for chance in args.acceptance:
            settings = [Setting(batch, args.context, width, chance) for width in sorted({0, *args.width})]
            for setting, got in zip(settings, measure(made, settings, args.rounds, args.repeats), strict=True):
                found.append({"size": size.name, "bits": size.bits, "layers": made.layers, **asdict(setting)})
                found[-1] |= {name: round(value, 4) for name, value in asdict(got).items()} | machine
                print(
                    f"{batch:5} {setting.width:5} {got.tok_s:6.1f} {got.tokens_per_round:13.2f} {got.pass_ms:8.1f}"
                    f" {got.pass_ratio:16.2f} {got.draft_share:9.0%} {got.host_ms:8.2f}"
                    f"  {got.speedup:.2f} ({got.least_speedup:.2f}..{got.most_speedup:.2f})",
                    flush=True,
                )
    if args.csv:
        with args.csv.open("w", newline="") as out:
            writer = csv.DictWriter(out, found[0])
            writer.writeheader()
            writer.writerows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
