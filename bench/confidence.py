"""What cutting unsure drafts saves a mixture-of-experts target, in experts, in time, and at a published size.

    python bench/confidence.py                    # counts: the same on every machine
    python bench/confidence.py --time             # with over without, in turns; on a quiet machine
    python bench/confidence.py --predict          # 26B-A4B by the roofline, over places of real texts

Counts are taken as if experts had so large a share of a round's time (--share); with --time the share is whatever the
rounds show. --predict records at every place of texts of the small pair how sure its drafter was and how many of its
drafts were right, and lets rounds of 26B-A4B run over them: columns cost the distinct experts that they add, as
`Overlap` has them before it has seen any, at the bytes and bandwidth that the roofline has for a chip. The pair was not
trained on these prompts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.accept import Verdict, verdict
from mlx_mtp.auto import Auto
from mlx_mtp.cache import Cache
from mlx_mtp.chips import find_chip
from mlx_mtp.confidence import Confidence, Judged, Overlap, Sizes
from mlx_mtp.depth import MAX_WIDTH, Constant, Depth, depth_of
from mlx_mtp.engine import Engine
from mlx_mtp.load import LoadedPair, load_pair
from mlx_mtp.roofline import CEILING, MLX, Roofline, Setting
from mlx_mtp.rows import GREEDY, USUAL, Draft, Request, Sampling, Stats
from mlx_mtp.sampling import Sampler
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import shape

PAIR = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tiny_moe" / "target"
KINDS = ("code", "chat")
WIDEST = 8


# counts and times -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One way to run the prompts: it keeps its policy and what it has learnt, as a process that serves does."""

    depth: Depth
    confidence: Confidence | None


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, seed=1) if args.temperature else GREEDY


def engine_of(loaded: LoadedPair, case: Case, rows: int) -> Engine:
    cache = Cache(loaded.target.model.specs, MAX_WIDTH, loaded.target.dtype)
    limits = Limits(max_rows=rows)
    engine = Engine(loaded.target.model, cache, loaded.new_drafter(cache), case.depth, limits)
    engine.confidence = case.confidence
    return engine


def run(loaded: LoadedPair, case: Case, prompts: Sequence[tuple[int, ...]], rows: int, args: argparse.Namespace):
    """(texts, summed statistics, seconds) of all prompts, so many at a time, without end tokens."""
    engine = engine_of(loaded, case, rows)
    texts = {engine.submit(Request(p, args.tokens, sampling_of(args))): [] for p in prompts}
    start = time.perf_counter()
    while not engine.idle:
        for event in engine.step():
            texts[event.request] += event.tokens
    return list(texts.values()), engine.total, time.perf_counter() - start


def encoded(pair: mlx_mtp.Pair, kind: str, count: int) -> list[tuple[int, ...]]:
    texts = json.loads((resources.files("mlx_mtp") / "data" / "tiny" / "prompts.json").read_text())[kind][:count]
    if kind == "chat":
        return [tuple(pair.text.chat([{"role": "user", "content": text}])) for text in texts]
    return [tuple(pair.text.encode(text)) for text in texts]


def per_round(stats: Stats) -> str:
    tried = stats.drafted / stats.rounds
    return f"{1 + stats.kept / stats.rounds:.2f} | {stats.experts_per_pass:.2f} | {tried:.2f}"


def counts(loaded: LoadedPair, prompts: dict[str, list[tuple[int, ...]]], args: argparse.Namespace) -> None:
    sizes = Sizes.of(loaded.target.model)
    assert sizes is not None, "no mixture of experts"
    print(f"at a share of {args.share:g}; a round's tokens, experts a layer and drafts tried, with cuts and without\n")
    print("| kind | rows | width | tokens | experts | tried | uncut: tokens | experts | tried | texts |")
    print("|---" * 10 + "|")
    for kind, ids in prompts.items():
        for rows in args.rows:
            plain, _, _ = run(loaded, Case(Constant(0), None), ids, rows, args)
            for width in args.width:
                cuts = Confidence(sizes, share=args.share)
                cut, cut_stats, _ = run(loaded, Case(Constant(width), cuts), ids, rows, args)
                whole, stats, _ = run(loaded, Case(Constant(width), None), ids, rows, args)
                same = "as width 0" if cut == whole == plain else "DIFFERENT"
                print(
                    f"| {kind} | {rows} | {width} | {per_round(cut_stats)} | {per_round(stats)} | {same} |", flush=True
                )


def times(loaded: LoadedPair, prompts: dict[str, list[tuple[int, ...]]], args: argparse.Namespace) -> None:
    sizes = Sizes.of(loaded.target.model)
    assert sizes is not None, "no mixture of experts"
    print("| kind | rows | width | time with / without: median (least..most) | share found | not tried |")
    print("|---" * 6 + "|")
    for kind, ids in prompts.items():
        for rows in args.rows:
            for width in [*args.width, "auto"]:
                cases = [Case(depth_of(width), Confidence(sizes)), Case(depth_of(width), None)]
                ratios, stats = [], Stats()
                for repeat in range(args.repeats + 1):
                    took = [0.0, 0.0]
                    for i in (0, 1) if repeat % 2 else (1, 0):
                        _, total, took[i] = run(loaded, cases[i], ids, rows, args)
                        stats = total if i == 0 else stats
                    if repeat:  # the first builds every shape
                        ratios.append(took[0] / took[1])
                found = cases[0].confidence
                assert found is not None
                spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
                print(f"| {kind} | {rows} | {width} | {spread} | {found.share.value:.2f} | {stats.cut} |", flush=True)


# prediction -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One place of a text: the bins of the drafts made there, and how many of them were right."""

    bins: list[int]
    right: int


class Visiting:
    """A judge that keeps one token a round, so that every place is drafted from."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def __call__(
        self, draft: Draft, logits: mx.array, start: mx.array, sampler: Sampler, hidden: mx.array | None = None
    ) -> Verdict:
        judged = verdict(replace(draft, live=None), logits, start, sampler, hidden)
        if draft.bins is not None:
            self._found.append((draft.bins, judged.kept - 1))
        return Verdict(judged.tokens, mx.ones_like(judged.kept), None, mx.zeros_like(judged.kept))

    def __enter__(self):
        self._found: list[tuple[mx.array, mx.array]] = []
        return self

    def __exit__(self, *_: object) -> None:
        mx.eval(self._found)
        self.places = [Place(bins.tolist()[0], int(right.item())) for bins, right in self._found]


def visited(loaded: LoadedPair, ids: tuple[int, ...], args: argparse.Namespace) -> list[Place]:
    sizes = Sizes.of(loaded.target.model)
    assert sizes is not None
    engine = engine_of(loaded, Case(Constant(WIDEST), Confidence(sizes, 0.0)), 1)
    with Visiting() as visiting:
        engine.judge = visiting
        engine.submit(Request(ids, args.tokens, sampling_of(args)))
        while not engine.idle:
            engine.step()
    return [place for place in visiting.places if len(place.bins) == WIDEST]


@dataclass(frozen=True)
class Costs:
    """Seconds of a round of 26B-A4B over `rows` sequences, by width and live columns."""

    model: Roofline
    setting: Setting
    overlap: Overlap

    def seconds(self, width: int, live: int) -> float:
        """live: columns of all rows. Every distinct expert is read once, as the kernel for it does; the roofline's own
        count is MLX's, one read for every column, or that of independent choices."""
        columns, moe = self.setting.batch * (width + 1), self.model.shape.target.moe
        assert moe is not None
        if self.model.constants.own_kernels:
            reckoned = moe.top_k * columns
        else:
            reckoned = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** columns)
        bandwidth = self.model.chip.bandwidth_gb_s * 1e9
        a_slot = self.model.shape.target_counts.slot * self.setting.target_bytes
        a_slot_s = a_slot / (bandwidth * self.model.constants.experts)
        return self.model.round_s(self.setting, width) + (self.experts(live) - reckoned) * a_slot_s

    def experts(self, live: int) -> float:
        """Distinct ones a layer."""
        return float(self.overlap.distinct(np.array(live)))


def simulated(
    texts: Sequence[list[Place]], costs: Costs, depth: Depth, confidence: Confidence | None, rounds: int = 1000
) -> float:
    """Tokens a second: every row goes through a text from somewhere in it to its end, and then through another."""
    rows, seconds, tokens, rng = costs.setting.batch, 0.0, 0, random.Random(0)
    left: list[list[Place]] = [[] for _ in range(rows)]
    for _ in range(rounds):
        width = depth.choose([USUAL] * rows)
        for i in range(rows):
            if not left[i]:
                text = rng.choice(texts)
                left[i] = text[rng.randrange(len(text)) :]
        here = [places[0] for places in left]
        bins, truth = [p.bins[:width] for p in here], [min(p.right, width) for p in here]
        live = [width] * rows
        if confidence is not None and width:
            through = np.cumprod(confidence.calibration.table[np.array(bins)], axis=1)
            live = (through >= confidence.threshold).sum(axis=1).tolist()
        kept = [min(t, n) + 1 for t, n in zip(truth, live, strict=True)]
        took = costs.seconds(width, rows + sum(live))
        depth.record(width, kept, took, [USUAL] * rows)
        if confidence is not None and width:
            right = [min(t, n + 1) for t, n in zip(truth, live, strict=True)]
            judged = Judged(live, right, bins)
            confidence.record(judged, (rows, width), costs.experts(rows + sum(live)), took)
        seconds, tokens = seconds + took, tokens + sum(kept)
        left = [places[k:] for places, k in zip(left, kept, strict=True)]
    return tokens / seconds


def predict(loaded: LoadedPair, prompts: dict[str, list[tuple[int, ...]]], args: argparse.Namespace) -> None:
    found = shape("26B-A4B")
    moe = found.target.moe
    assert moe is not None
    slot = int(found.target_counts.slot * 4.5 / 8)
    sizes = Sizes(moe.experts, moe.top_k, slot, int(found.target_counts.dense * 4.5 / 8))
    print("| kind | chip | constants | rows | width 0 | auto, uncut | auto, cut | gain |")
    print("|---" * 8 + "|")
    for kind, ids in prompts.items():
        texts = [places for p in ids if (places := visited(loaded, p, args))]
        for chip in args.chip:
            for name, constants in (("MLX", MLX), ("ceiling", CEILING)):
                for rows in args.rows:
                    setting = Setting(4.5 / 8, 4.5 / 8, rows)
                    overlap = Overlap(moe.experts, moe.top_k)
                    costs = Costs(Roofline(find_chip(chip), found, constants), setting, overlap)
                    line = figures(texts, costs, sizes)
                    print(f"| {kind} | {chip} | {name} | {rows} | " + " | ".join(line) + " |", flush=True)


def figures(texts: Sequence[list[Place]], costs: Costs, sizes: Sizes) -> Iterable[str]:
    plain = simulated(texts, costs, Constant(0), None)
    uncut, cut = (simulated(texts, costs, Auto(), c) for c in (None, Confidence(sizes)))
    return f"{plain:.0f}", f"{uncut:.0f}", f"{cut:.0f}", f"{cut / uncut - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PAIR))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; otherwise with a seed")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--width", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chip", nargs="+", default=["M4 Pro", "M5 Max"])
    args = parser.parse_args()
    loaded = load_pair(args.model, "auto")
    prompts = {kind: encoded(mlx_mtp.load(args.model, None), kind, args.prompts) for kind in KINDS}
    (times if args.time else predict if args.predict else counts)(loaded, prompts, args)


if __name__ == "__main__":
    main()
