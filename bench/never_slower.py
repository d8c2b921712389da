"""Whether any drafter makes decoding slower than none: the width policy beside plain decoding, by the clock.

    python bench/never_slower.py --json out.json

For every kind of drafter (two of them with random weights), kind of prompt and batch, on the embedded target, in one
process: two engines take turns, a round each, so that what slows the machine down slows both. Which is first is drawn
for every pair of rounds, so that neither runs behind its own rounds more often than the other, which is faster. Both
run the same requests again and again. First `--seconds` of each side that do not count, in which the policy may still
be learning; then `--repeats` times as many, and up to `--most` times while the ratio's standard error leaves open on
which side of `--least` it is. The plain side has no drafter at all, so what a drafter costs that is not asked counts
too. Code and edits are written greedily, chats drawn at temperature 1 with a seed, so that both sides write the same
text.

--cpu-time takes the process's own processor time, for the figures and as the policy's clock: for a machine that others
use too. It counts twice what runs at the same time.

rate: tokens of rounds over their seconds, from when every row has its first token to when the first row ends. ratio: of
the two rates over all repeats, so that a rare dear round counts as it should; its standard error, from the repeats'
ratios; then the least and the most of those.
A policy keeps what it learnt from cell to cell, as in a process that serves. drafting, probing: share of its time in
rounds with drafts, and in those to find something out. Ends with 1 if a ratio is below `--least`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
from drafters import DATA, quantised  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from mlx_mtp import GREEDY, Sampling, __version__  # noqa: E402
from mlx_mtp.cache import Cache  # noqa: E402
from mlx_mtp.depth import MAX_WIDTH, Auto, Constant, Depth  # noqa: E402
from mlx_mtp.drafters import Drafter  # noqa: E402
from mlx_mtp.drafters.kinds import Parts  # noqa: E402
from mlx_mtp.drafters.lookup import LookupDrafter  # noqa: E402
from mlx_mtp.drafters.plain import PlainDrafter  # noqa: E402
from mlx_mtp.engine import Engine  # noqa: E402
from mlx_mtp.load import LoadedDrafter, LoadedTarget, load_drafter, load_target  # noqa: E402
from mlx_mtp.provenance import provenance  # noqa: E402
from mlx_mtp.rows import Event, Request  # noqa: E402
from mlx_mtp.scheduler import Limits  # noqa: E402
from mlx_mtp.text import Text  # noqa: E402

DFLASH = ROOT / "tests" / "fixtures" / "tiny_dflash"
PREFIX_BYTES = 2**28  # a prompt is computed once
KINDS = ("code", "chat", "edit")
DRAWN = Sampling(temperature=1.0, seed=1)

Make = Callable[[Cache], Drafter]
Clock = Callable[[], float]


class Watched(Auto):
    """The width policy, and where its time went."""

    def __init__(self) -> None:
        super().__init__()
        self.all_s = self.drafting_s = self.probing_s = 0.0
        self.finding: deque[bool] = deque()  # of the rounds under way: whether they are to find something out

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        width = super().choose(outlook, owed)
        self.finding.append(width != self.settled)
        return width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        super().record(width, kept, seconds, outlook, owed)
        took, finding = seconds or 0.0, self.finding.popleft()
        self.all_s += took
        self.drafting_s += took if width else 0.0
        self.probing_s += took if finding else 0.0

    def shares(self) -> tuple[float, float]:
        """(drafting, probing) since this was asked last."""
        found = self.drafting_s / self.all_s, self.probing_s / self.all_s
        self.all_s = self.drafting_s = self.probing_s = 0.0
        return found


@dataclass
class Cell:
    """One drafter on one kind of prompts at one batch."""

    drafter: str
    prompts: str
    rows: int
    plain_tok_s: list[float] = field(default_factory=list)
    auto_tok_s: list[float] = field(default_factory=list)
    drafting: float = 0.0
    probing: float = 0.0

    @property
    def ratios(self) -> list[float]:
        return [a / p for a, p in zip(self.auto_tok_s, self.plain_tok_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.mean(self.auto_tok_s) / statistics.mean(self.plain_tok_s)

    @property
    def error(self) -> float:
        return statistics.stdev(self.ratios) / len(self.ratios) ** 0.5

    def line(self) -> str:
        spread = f"{self.ratio:.3f} ± {self.error:.3f} ({min(self.ratios):.2f}..{max(self.ratios):.2f})"
        rates = f"{statistics.mean(self.plain_tok_s):.0f} | {statistics.mean(self.auto_tok_s):.0f}"
        shares = f"{self.drafting:.0%} | {self.probing:.1%}"
        return f"| {self.drafter} | {self.prompts} | {self.rows} | {spread} | {rates} | {shares} |"


# what is run --------------------------------------------------------------------------------------------------


def makers(target: LoadedTarget) -> dict[str, Make]:
    """Every kind of drafter by name, as what makes one over a cache."""
    mtp, dflash = load_drafter(str(DATA / "drafter"), target), load_drafter(str(DFLASH), target)
    random_mtp, random_dflash = load_drafter(str(DATA / "drafter"), target), load_drafter(str(DFLASH), target)
    for key, drafter in enumerate((random_mtp, random_dflash)):
        shuffle(drafter, key)
    copy = load_drafter(quantised("tiny"), target)
    made = {"mtp": mtp, "dflash": dflash, "draft model": copy, "mtp, random": random_mtp}
    made["dflash, random"] = random_dflash

    def network(loaded: LoadedDrafter) -> Make:
        return lambda cache: loaded.kind.make(Parts(target.model, cache, loaded.model, PlainDrafter()))

    found = {name: network(loaded) for name, loaded in made.items()}
    found["lookup"] = lambda cache: LookupDrafter(PlainDrafter(), cache)
    found["mtp+lookup"] = lambda cache: LookupDrafter(network(mtp)(cache), cache)
    return found


def shuffle(drafter: LoadedDrafter, key: int) -> None:
    """Replace all weights by noise of the same mean and spread; integers (the clusters) stay."""
    keys = iter(mx.random.split(mx.random.key(key), 4096))

    def noise(w: mx.array) -> mx.array:
        if not mx.issubdtype(w.dtype, mx.floating):
            return w
        return mx.mean(w) + mx.std(w) * mx.random.normal(w.shape, w.dtype, key=next(keys))

    drafter.model.update(tree_map(noise, drafter.model.parameters()))
    mx.eval(drafter.model.parameters())


def engine_of(target: LoadedTarget, make: Make, depth: Depth) -> Engine:
    cache = Cache(target.model.specs, MAX_WIDTH, target.dtype)
    return Engine(target.model, cache, make(cache), depth, Limits(prefix_bytes=PREFIX_BYTES))


def requests(target: LoadedTarget, tokens: int) -> dict[str, list[Request]]:
    """Eight requests of each kind; an edit is a text as the target went on with it, and then begun again."""
    text, held_out = Text.from_dir(target.path), json.loads((DATA / "prompts.json").read_text())
    code = [tuple(text.encode(p)) for p in held_out["code"][:8]]
    chat = [tuple(text.chat([{"role": "user", "content": p}])) for p in held_out["chat"][:8]]
    plain = engine_of(target, lambda cache: PlainDrafter(), Constant(0))
    said: dict[int, list[int]] = {plain.submit(Request(ids, 48)): [] for ids in code}
    while not plain.idle:
        for event in plain.step():
            said[event.request] += event.tokens
    edit = [(*ids, *done, *ids) for ids, done in zip(code, said.values(), strict=True)]
    kinds = {"code": (code, GREEDY), "chat": (chat, DRAWN), "edit": (edit, GREEDY)}
    return {kind: [Request(ids, tokens, sampling) for ids in every] for kind, (every, sampling) in kinds.items()}


class Side:
    """An engine that runs the same requests again and again, end tokens off, and knows only the time of its own steps:
    a step of it and a step of another can take turns, and what slows the machine down slows both."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self._clock = engine, clock
        self._wanted: Sequence[Request] = ()
        self._spent_s, self._since = 0.0, 0.0
        self._steps = False
        self.tokens, self.seconds = 0, 0.0
        engine.clock = self._own

    def _own(self) -> float:
        return self._spent_s + (self._clock() - self._since if self._steps else 0.0)

    def _step(self) -> tuple[list[Event], float]:
        self._since, self._steps = self._clock(), True
        events = self.engine.step()
        self._steps = False
        took = self._clock() - self._since
        self._spent_s += took
        return events, took

    def drain(self) -> None:
        """Run to the end; it does not count."""
        while not self.engine.idle:
            self._step()

    def begin(self, wanted: Sequence[Request]) -> None:
        """End what runs, and run new requests until every row has its first token; nothing of that counts."""
        self.drain()
        self._wanted, begun = wanted, set()
        for request in wanted:
            self.engine.submit(request)
        while len(begun) < len(wanted):
            begun |= {event.request for event in self._step()[0]}

    def round(self) -> None:
        """A step that counts. When a row has come to its end, all begin again."""
        events, took = self._step()
        self.tokens, self.seconds = self.tokens + sum(len(event.tokens) for event in events), self.seconds + took
        if any(event.finish_reason for event in events):
            self.begin(self._wanted)

    def rate(self) -> float:
        """Tokens a second since this was asked last."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.tokens, self.seconds = 0, 0.0
        return rate


def measure(cell: Cell, plain: Side, auto: Side, wanted: Sequence[Request], args: argparse.Namespace) -> None:
    """Fill in a cell."""
    policy, order = auto.engine.depth, random.Random(0)
    assert isinstance(policy, Watched)
    auto.drain()
    policy.finding.clear()  # a round that nobody needed was undone
    for side in (plain, auto):
        side.begin(wanted)
    for repeat in range(max(args.repeats, args.most) + 1):
        if repeat > args.repeats and abs(cell.ratio - args.least) > 2 * cell.error:
            break
        while min(plain.seconds, auto.seconds) < args.seconds:
            for side in order.sample((plain, auto), 2):
                side.round()
        if not repeat:
            policy.shares()
        rates = plain.rate(), auto.rate()
        if repeat:
            cell.plain_tok_s.append(rates[0])
            cell.auto_tok_s.append(rates[1])
    cell.drafting, cell.probing = policy.shares()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drafter", nargs="+", help="of those that are named in the table; all if unset")
    parser.add_argument("--prompts", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of every row")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--most", type=int, default=18, help="repeats of a case that is hard to tell")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each side in a repeat")
    parser.add_argument("--least", type=float, default=0.97, help="the least ratio that passes")
    parser.add_argument("--cpu-time", action="store_true", help="by the process's processor time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats is {args.repeats}; expected at least 2, for a standard error")
    return args


def main() -> None:
    args = arguments()
    target = load_target(str(DATA / "target"), dtype=mx.float32)
    wanted, cells = requests(target, args.tokens), []
    clock = time.process_time if args.cpu_time else time.perf_counter
    plain = Side(engine_of(target, lambda cache: PlainDrafter(), Constant(0)), clock)
    print("| drafter | prompts | rows | auto / width 0 | plain tok/s | auto tok/s | drafting | probing |")
    print("|---" * 8 + "|", flush=True)
    for name, make in makers(target).items():
        if args.drafter and name not in args.drafter:
            continue
        auto = Side(engine_of(target, make, Watched()), clock)
        for rows, kind in itertools.product(args.batch, args.prompts):
            cells.append(Cell(name, kind, rows))
            measure(cells[-1], plain, auto, wanted[kind][:rows], args)
            print(cells[-1].line(), flush=True)
    if args.json:
        found = {"provenance": provenance(sys.argv, __version__), "cells": [asdict(cell) for cell in cells]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    slow = [cell for cell in cells if cell.ratio < args.least]
    print(f"{len(slow)} of {len(cells)} below {args.least}", file=sys.stderr)
    sys.exit(bool(slow))


if __name__ == "__main__":
    main()
