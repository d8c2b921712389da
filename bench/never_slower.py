"""Whether any drafter makes decoding slower than none: the width policy beside plain decoding, by the clock.

    python bench/never_slower.py --json out.json

For every kind of drafter (two of them with random weights), kind of prompt and batch, on the embedded target: two
engines take turns, a round each, so that what slows the machine down slows both. Which is first is drawn for every pair
of rounds, so that neither runs behind its own rounds more often than the other, which is faster. Both begin the same
requests together, and the one that comes to their end first begins them again, until the other is there too: a set of
texts. One set does not count, in which the policy may still be learning, then `--sets` do. The plain side has no
drafter at all, so what a drafter costs that is not asked counts too. Code and edits are written greedily, chats drawn
at temperature 1 with a seed, so that both sides write the same text.

Of two equal engines the one that begins first is slower by two percent to the end of the text, by where its memory
lies. So every set has new engines, made and begun in an order that is drawn; the policy stays, as in a process that
serves. What it has come to believe differs from process to process, so a process is the unit: there are `--processes`
of them, and up to `--most` for cases that are near `--least`, by NEAR or two standard errors. "none" is another plain
engine in the drafter's place: what the measure says where nothing is to be found.

--cold instead asks what a program that ends with its eight prompts would see: every case has a new policy, its prompts
come one after another, `rows` of them at once, and all of it counts.

A new policy is calibrated for as many rows before its first text, as `mlx-mtp generate` and `serve` do; what that takes
is told apart, in rounds of the plain side. --uncalibrated leaves it out.

--cpu-time takes the process's own processor time, for the figures and as the policy's clock: for a machine that others
use too. It counts twice what runs at the same time.

With --json every case is written down as it is found, and --go-on adds to that: what was broken off, or other cases.

rate: tokens of rounds over their seconds, from when every row has its first token to when the first row ends. ratio: of
the two sides' rates, mean of all processes; its standard error, from theirs; then the least and the most of them.
drafting, probing: share of its time in rounds with drafts, and in those of another width than the one it takes to be
the best. calibrating: rounds of the plain side. Ends with 1 if a ratio is below `--least`.

A threaded BLAS spins on the second core beside the host's thread: OPENBLAS_NUM_THREADS=1 makes both sides faster and
the figures steadier.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from drafters import DATA, quantised  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from mlx_mtp import GREEDY, Sampling, __version__  # noqa: E402
from mlx_mtp.auto import Auto  # noqa: E402
from mlx_mtp.cache import Cache  # noqa: E402
from mlx_mtp.calibration import calibrate  # noqa: E402
from mlx_mtp.depth import MAX_WIDTH, Constant, Depth  # noqa: E402
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
NEAR = 0.02  # so near to what is asked for, a few processes cannot tell
PREFIX_BYTES = 2**28  # a prompt is computed once
KINDS = ("code", "chat", "edit")
DRAWN = Sampling(temperature=1.0, seed=1)

LEARNT = ("all", "kept", "nothing")  # of what the sets before have shown
NONE = "none"  # in a drafter's place
NAMES = (NONE, "mtp", "dflash", "draft model", "mtp, random", "dflash, random", "lookup", "mtp+lookup")

Make = Callable[[Cache], Drafter]
Clock = Callable[[], float]
Key = tuple[str, str, int]  # of a case
New = Callable[[Sequence[Request]], "Side"]
Prepare = Callable[[Auto], float]  # a policy, before its texts; returns the seconds that this took


class Watched:
    """A width policy, and where its time went."""

    def __init__(self, policy: Auto | Constant) -> None:
        self._policy, self.drafts, self.resting = policy, policy.drafts, policy.resting
        self.all_s = self.drafting_s = self.probing_s = 0.0
        self._finding: deque[bool] = deque()  # of the rounds under way: whether of another width than the best

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        width, self.resting = self._policy.choose(outlook, owed), self._policy.resting
        self._finding.append(isinstance(self._policy, Auto) and width != self._policy.settled)
        return width

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        self._policy.record(width, kept, seconds, outlook, owed)
        took, finding = seconds or 0.0, self._finding.popleft()
        self.all_s += took
        self.drafting_s += took if width else 0.0
        self.probing_s += took if finding else 0.0

    def forget(self) -> None:
        """Rounds under way, which will not be told of: their engine is no more."""
        self._finding.clear()

    def begin(self, learnt: str, prepare: Prepare) -> float:
        """Another set of texts: `LEARNT` says with what. Returns the seconds that preparing the policy took."""
        if not isinstance(self._policy, Auto):
            return 0.0
        if learnt == "nothing":
            self._policy = Auto()
        elif learnt == "kept":
            self._policy = Auto.restored(json.loads(json.dumps(self._policy.state())))
        return prepare(self._policy)

    def shares(self) -> tuple[float, float]:
        """(drafting, probing) since this was asked last."""
        found = self.drafting_s / self.all_s, self.probing_s / self.all_s
        self.all_s = self.drafting_s = self.probing_s = 0.0
        return found


@dataclass(frozen=True)
class Turn:
    """What one process found of a case. calibrating: rounds of the plain side that it took, for all sets."""

    plain_tok_s: float
    auto_tok_s: float
    drafting: float
    probing: float
    calibrating: float = 0.0

    @property
    def ratio(self) -> float:
        return self.auto_tok_s / self.plain_tok_s


@dataclass
class Case:
    """One drafter on one kind of prompts at one batch."""

    drafter: str
    prompts: str
    rows: int
    turns: list[Turn] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.drafter, self.prompts, self.rows

    @property
    def ratio(self) -> float:
        return statistics.mean(turn.ratio for turn in self.turns)

    @property
    def error(self) -> float:
        if len(self.turns) < 2:
            return math.inf
        return statistics.stdev(turn.ratio for turn in self.turns) / len(self.turns) ** 0.5

    def wants(self, processes: int, most: int, least: float) -> bool:
        """Whether it needs another process: so many at least, and at most, while it is hard to tell on which side of a
        ratio it is."""
        done = len(self.turns)
        return done < processes or (done < most and abs(self.ratio - least) <= max(NEAR, 2 * self.error))

    def line(self) -> str:
        ratios = [turn.ratio for turn in self.turns]
        spread = f"{self.ratio:.3f} ± {self.error:.3f} ({min(ratios):.2f}..{max(ratios):.2f}, {len(ratios)})"
        means = (statistics.mean(part) for part in zip(*map(astuple, self.turns), strict=True))
        plain, auto, drafting, probing, calibrating = means
        return (
            f"| {self.drafter} | {self.prompts} | {self.rows} | {spread} | {plain:.0f} | {auto:.0f} "
            f"| {drafting:.0%} | {probing:.1%} | {calibrating:.0f} |"
        )


# what is run --------------------------------------------------------------------------------------------------


def nothing(cache: Cache) -> Drafter:
    return PlainDrafter()


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
    plain = engine_of(target, nothing, Constant(0))
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

    def __init__(self, engine: Engine, clock: Clock, wanted: Sequence[Request]) -> None:
        self._engine, self._clock, self._wanted = engine, clock, wanted
        self._spent_s, self._since = 0.0, 0.0
        self._steps = False
        self.tokens, self.seconds, self.ended = 0, 0.0, False
        engine.clock = self._own

    def _own(self) -> float:
        return self._spent_s + (self._clock() - self._since if self._steps else 0.0)

    def _step(self) -> tuple[list[Event], float]:
        self._since, self._steps = self._clock(), True
        events = self._engine.step()
        self._steps = False
        took = self._clock() - self._since
        self._spent_s += took
        return events, took

    def begin(self) -> None:
        """End what runs, and run the requests until every row has its first token; nothing of that counts."""
        while not self._engine.idle:
            self._step()
        begun = set()
        for request in self._wanted:
            self._engine.submit(request)
        while len(begun) < len(self._wanted):
            begun |= {event.request for event in self._step()[0]}

    def round(self) -> None:
        """A step that counts. When a row has come to its end, all begin again."""
        events, took = self._step()
        self.tokens, self.seconds = self.tokens + sum(len(event.tokens) for event in events), self.seconds + took
        if any(event.finish_reason for event in events):
            self.ended = True
            self.begin()


def by_turns(new: Sequence[New], wanted: Sequence[Request], order: random.Random) -> list[tuple[int, float]]:
    """A set of texts on new sides: tokens and seconds of each."""
    made = {i: new[i](wanted) for i in order.sample(range(len(new)), len(new))}
    for side in order.sample(list(made.values()), len(made)):
        side.begin()
    sides = [made[i] for i in range(len(new))]
    while not all(side.ended for side in sides):
        for side in order.sample(sides, len(sides)):
            side.round()
    return [(side.tokens, side.seconds) for side in sides]


def measured(
    new: Sequence[New],
    policy: Watched,
    sets: Sequence[Sequence[Request]],
    before: int,
    learnt: str,
    prepare: Prepare,
    order: random.Random,
) -> Turn:
    """What the plain side and the other one, whose policy is given, make of sets of requests, of which the first
    `before` do not count. learnt: what every set begins with."""
    counted, preparing_s = [], 0.0
    for place, wanted in enumerate(sets):
        policy.forget()
        preparing_s += policy.begin(learnt, prepare)
        found = by_turns(new, wanted, order)
        gc.collect()  # before other engines are made
        if place < before:
            policy.shares()
        else:
            counted.append(found)
    tokens, seconds = np.sum(counted, axis=0).T
    plain, auto = (tokens / seconds).tolist()
    return Turn(plain, auto, *policy.shares(), preparing_s * plain / len(sets[0]))


def turns(process: int, wanted: Sequence[Key], args: argparse.Namespace) -> Iterator[tuple[Key, Turn]]:
    """What this process, a new one, finds of cases."""
    target, order = load_target(str(DATA / "target"), dtype=mx.float32), random.Random(process)
    clock = time.process_time if args.cpu_time else time.perf_counter
    of, made = requests(target, args.tokens), {NONE: nothing, **makers(target)}

    def side(make: Make, depth: Depth, own: Sequence[Request]) -> Side:
        return Side(engine_of(target, make, depth), clock, own)

    def prepare(make: Make, rows: int, policy: Auto) -> float:
        began_s = clock()
        if not args.uncalibrated and not policy.knows(rows):
            engine = engine_of(target, make, Constant(0))
            engine.clock = clock
            calibrate(engine, rows, [policy], target.model.config.max_positions)
        return clock() - began_s

    def policy_of(name: str) -> Watched:
        return Watched(Constant(0) if name == NONE else Auto())

    for name, cases in itertools.groupby(wanted, key=lambda key: key[0]):
        policy = policy_of(name)
        for _, kind, rows in cases:
            texts, before = of[kind], 1
            sets = [texts[:rows]] * (before + args.sets)
            if args.cold:
                policy, before = policy_of(name), 0
                sets = [texts[i : i + rows] for i in range(0, len(texts), rows)]
            new = partial(side, nothing, Constant(0)), partial(side, made[name], policy)
            own = partial(prepare, made[name], rows)
            yield (name, kind, rows), measured(new, policy, sets, before, args.learnt, own, order)


def work(process: int, wanted: Sequence[Key], args: argparse.Namespace, results: Connection) -> None:
    """`turns` in a process of its own, which ends when nobody waits for it any more."""
    parent = parent_process()
    for found in turns(process, wanted, args):
        if parent is None or not parent.is_alive():
            return
        results.send(found)
    results.close()


def in_new_process(process: int, wanted: Sequence[Key], args: argparse.Namespace) -> Iterator[tuple[Key, Turn]]:
    """What a new process finds of cases, as it finds it. Raises EOFError if it ends before."""
    context = get_context("spawn")
    results, theirs = context.Pipe(duplex=False)
    new = context.Process(target=work, args=(process, wanted, args, theirs))
    new.start()
    theirs.close()
    for _ in wanted:
        yield results.recv()
    new.join()


def earlier(args: argparse.Namespace) -> tuple[list[dict[str, str]], dict[Key, Case]]:
    """The runs that the file of results tells of and what they found, if it is to be gone on with."""
    if not args.go_on:
        return [], {}
    told = json.loads(args.json.read_text())
    cases = [Case(**{**case, "turns": [Turn(**turn) for turn in case["turns"]]}) for case in told["cases"]]
    return told["runs"], {case.key: case for case in cases}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drafter", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--prompts", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of every row")
    parser.add_argument("--sets", type=int, default=3, help="sets of texts that count, in every process")
    parser.add_argument(
        "--cold", action="store_true", help="all eight prompts, a new policy a case, from its first round"
    )
    parser.add_argument(
        "--learnt",
        choices=LEARNT,
        default=LEARNT[0],
        help="what texts begin with: all that was learnt before, as in one process; what is kept of it for the "
        "next process, as in one of its own; or nothing",
    )
    parser.add_argument("--uncalibrated", action="store_true", help="begin new policies with their first text")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--most", type=int, default=9, help="processes for cases that are hard to tell")
    parser.add_argument("--least", type=float, default=0.97, help="the least ratio that passes")
    parser.add_argument("--cpu-time", action="store_true", help="by the process's processor time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--go-on", action="store_true", help="add to what the file of --json tells of")
    args = parser.parse_args()
    if args.go_on and (args.json is None or not args.json.exists()):
        parser.error("--go-on needs the --json file of an earlier run")
    if args.processes < 2:
        parser.error(f"--processes is {args.processes}; expected at least 2, for a standard error")
    return args


def main() -> None:
    args = arguments()
    runs, cases = earlier(args)
    runs.append(provenance(["python", "bench/never_slower.py", *sys.argv[1:]], __version__))
    asked = itertools.product(args.drafter, args.batch, args.prompts)
    asked = [cases.setdefault((name, kind, rows), Case(name, kind, rows)) for name, rows, kind in asked]
    while wanted := [case for case in asked if case.wants(args.processes, args.most, args.least)]:
        process = max(len(case.turns) for case in wanted)
        for key, turn in in_new_process(process, [case.key for case in wanted], args):
            cases[key].turns.append(turn)
            print(f"process {process + 1}: {', '.join(map(str, key))}: {turn.ratio:.3f}", file=sys.stderr, flush=True)
            if args.json:
                found = {"runs": runs, "cases": [asdict(case) for case in cases.values() if case.turns]}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| drafter | prompts | rows | auto / width 0 | plain tok/s | auto tok/s | drafting | probing | calibrating |")
    print("|---" * 9 + "|")
    for case in cases.values():
        print(case.line())
    slow = [case for case in cases.values() if case.ratio < args.least]
    print(f"{len(slow)} of {len(cases)} below {args.least}", file=sys.stderr)
    sys.exit(bool(slow))


if __name__ == "__main__":
    main()
