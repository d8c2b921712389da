"""Record what the width controller is simulated on: acceptance at every place of real texts, and the cost of a round.

    python bench/traces.py > tests/fixtures/rounds.json
    python bench/traces.py --noise > tests/fixtures/noise.json    # on a machine that others use meanwhile

acceptance: for every kind of held-out prompt, for every prompt, for every generated token but the last few: how many
drafted tokens behind it the target's own greedy text confirms, at most WIDTH. cost: rows -> time of a round by width
from 0, over that of width 0 at one row; medians of interleaved runs. lookup: for the same texts, and for each asked
for again, what prompt lookup would draft at every place: [tokens kept, outlook].

--noise: rows -> times of successive rounds without drafts, over their median.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib import resources

import mlx.core as mx

import mlx_mtp
from mlx_mtp.cache import Cache
from mlx_mtp.depth import MAX_WIDTH, Constant
from mlx_mtp.drafters.lookup import GATE, SURE, longest_match
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.load import load_target
from mlx_mtp.rows import NOTHING, USUAL, Request
from mlx_mtp.scheduler import Limits
from mlx_mtp.text import Text

WIDTH = 12


def trace(pair: mlx_mtp.Pair, prompt: str, tokens: int) -> list[int]:
    """Drafts kept at every place of one greedy text."""
    ids = pair.text.encode(prompt)
    text = pair.generate([ids], mlx_mtp.GREEDY, width=0, max_tokens=tokens + WIDTH)[0].tokens
    kept = []
    for at in range(len(text) - WIDTH):
        drafted = pair.draft([*ids, *text[:at]], WIDTH)[0].tolist()[0]
        truth = text[at + 1 : at + 1 + WIDTH]
        kept.append(next((i for i, (d, t) in enumerate(zip(drafted, truth, strict=True)) if d != t), WIDTH))
    return kept


def lookup_trace(ids: list[int], text: list[int]) -> list[tuple[int, int]]:
    """(drafts kept, outlook) of prompt lookup alone at every place of a text behind a prompt."""
    said = mx.array([[*ids, *text]], mx.int32)
    newest = mx.arange(len(ids), len(ids) + len(text) - WIDTH)
    found = longest_match(mx.broadcast_to(said, (newest.size, said.shape[1])), newest).tolist()
    out = []
    for at, (length, end) in zip(newest.tolist(), found, strict=True):
        drafted = [said[0, end + 1 + i % (at - end)].item() for i in range(WIDTH)]
        truth = [*ids, *text][at + 1 : at + 1 + WIDTH]
        kept = next((i for i, (d, t) in enumerate(zip(drafted, truth, strict=True)) if d != t), WIDTH)
        outlook = NOTHING if length < GATE else USUAL + 1 + (length >= SURE)
        out.append((kept, outlook))
    return out


def lookups(pair: mlx_mtp.Pair, prompts: list[list[int]], tokens: int) -> dict[str, list[list[tuple[int, int]]]]:
    """Traces of greedy texts, of the same asked for again, and of texts at temperature 1."""
    out: dict[str, list[list[tuple[int, int]]]] = {"greedy": [], "again": [], "sampled": []}
    for ids in prompts:
        done = pair.generate([ids], mlx_mtp.GREEDY, max_tokens=tokens + WIDTH)[0].tokens
        again = [*ids, *done, *ids]
        repeated = pair.generate([again], mlx_mtp.GREEDY, max_tokens=tokens + WIDTH)[0].tokens
        drawn = pair.generate([ids], mlx_mtp.Sampling(temperature=1.0, seed=1), max_tokens=tokens + WIDTH)[0].tokens
        for name, prompt, said in (("greedy", ids, done), ("again", again, repeated), ("sampled", ids, drawn)):
            if len(said) > WIDTH:
                out[name].append(lookup_trace(prompt, said))
    return out


def cost(pair: mlx_mtp.Pair, prompt: str, repeats: int = 5, widths: int = 9) -> dict[int, list[float]]:
    """Time of a round by rows and width, over that of one row without drafts."""
    ids, took = pair.text.encode(prompt), {}
    for repeat in range(repeats + 1):
        for rows in (1, 4, 8):
            for width in range(widths):
                done = pair.generate([ids] * rows, mlx_mtp.GREEDY, width=width, max_tokens=8 * (width + 1))
                stats = max((d.stats for d in done), key=lambda s: s.rounds)
                if repeat and stats.rounds:  # the first builds every shape
                    took.setdefault((rows, width), []).append(stats.decode_s / stats.rounds)
        print(f"cost {repeat}/{repeats}", file=sys.stderr)
    one = statistics.median(took[1, 0])
    return {r: [round(statistics.median(took[r, w]) / one, 3) for w in range(widths)] for r in (1, 4, 8)}


class Timed(Constant):
    """No drafts; keeps what the engine tells of times."""

    def __init__(self) -> None:
        super().__init__(0)
        self.seconds: list[float] = []

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        self.seconds += [] if seconds is None else [seconds]


def noise(model: str, prompt: str, rounds: int) -> dict[int, list[float]]:
    """Times of rounds of 1 and 4 rows, over their median."""
    target = load_target(model, dtype=mx.float32)
    ids, found = Text.from_dir(target.path).encode(prompt), {}
    for rows in (1, 4):
        cache, timed = Cache(target.model.specs, MAX_WIDTH, target.dtype), Timed()
        engine = Engine(target.model, cache, PlainDrafter(), timed, Limits(max_rows=rows))
        while len(timed.seconds) < rounds:
            for _ in range(rows):
                engine.submit(Request(tuple(ids), 64))
            while not engine.idle:
                engine.step()
            print(f"{rows} rows {len(timed.seconds)}/{rounds}", file=sys.stderr)
        middle = statistics.median(timed.seconds)
        found[rows] = [round(s / middle, 2) for s in timed.seconds[:rounds]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=5, help="of each kind")
    parser.add_argument("--noise", action="store_true", help="record only how long rounds take, one after another")
    args = parser.parse_args()
    data = resources.files("mlx_mtp") / "data" / "tiny"
    prompts = json.loads((data / "prompts.json").read_text())
    if args.noise:
        json.dump(noise(str(data / "target"), prompts["code"][0], rounds=600), sys.stdout, separators=(",", ":"))
        return
    pair = mlx_mtp.load(args.model)
    out: dict[str, list[list[int]]] = {}
    for kind, texts in prompts.items():
        for i, text in enumerate(texts[: args.prompts], start=1):
            if kept := trace(pair, text, args.tokens):  # some replies end at once
                out.setdefault(kind, []).append(kept)
            print(f"{kind} {i}/{args.prompts}", file=sys.stderr)
    found = {"acceptance": out, "cost": cost(pair, prompts["code"][0])}
    chats = [pair.text.chat([{"role": "user", "content": text}]) for text in prompts["chat"]]
    codes = [pair.text.encode(text) for text in prompts["code"]]
    found["lookup"] = {
        f"{kind}, {how}": traces
        for kind, ids in (("code", codes), ("chat", chats))
        for how, traces in lookups(pair, [list(i) for i in ids[: args.prompts]], args.tokens).items()
    }
    json.dump(found, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    main()
