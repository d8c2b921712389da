"""What clusters built from a drafter's own embedding save and cost: drafts kept on the tiny pairs, bytes on all pairs.

    python bench/clusters.py

First table: measured, greedy, on held-out prompts; bytes are the weights one drafter step reads, as if in bfloat16.
"own" are clusters that were trained with the drafter. Second table: sizes of published pairs, nothing measured; a
round is bandwidth only, and clusters pay while they cost a smaller share of the tokens per round than of its bytes.
"""

import argparse
import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import mlx.core as mx

import mlx_mtp
from mlx_mtp import clusters
from mlx_mtp.load import LoadedPair, head_rows, load_pair
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.pair import Pair
from mlx_mtp.pairs import KNOWN, KnownPair
from mlx_mtp.text import Text
from mlx_mtp.weights import parameters

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"tiny": ROOT / "mlx_mtp" / "data" / "tiny" / "target", "tiny_moe": ROOT / "tests/fixtures/tiny_moe/target"}
VOCABULARY, HIDDEN = 262144, 1024  # of the 12B, 26B and 31B drafters
EXPERTS = {"26B-A4B": (22.84e9, 128, 8)}  # parameters of all experts, how many, how many a token uses
BF16_BYTES = 2


@dataclass(frozen=True)
class Measured:
    """What one head made of the prompts: the weights read a step, drafts kept and tokens per round, and the text."""

    step_bytes: int
    kept: float
    tokens_per_round: float
    text: list[list[int]]


def step_bytes(model: Assistant) -> int:
    """Bytes of weights one drafter step reads, every weight taken for bfloat16; indices of clusters are int32."""
    body = sum(p.size for name, p in parameters(model).items() if not name.startswith(("model.embed", "masked")))
    rows, hidden = model.model.embed_tokens.weight.shape
    if not model.config.clusters:
        return BF16_BYTES * (body + rows * hidden)
    count, top = model.config.clusters
    candidates = top * rows // count
    return BF16_BYTES * (body + (count + candidates) * hidden) + 4 * candidates


def measured(loaded: LoadedPair, prompts: list[str], tokens: int, width: int) -> Measured:
    assert loaded.drafter is not None
    pair = Pair(loaded, Text.from_dir(loaded.target.path))
    done = pair.generate(prompts, mlx_mtp.GREEDY, width=width, max_tokens=tokens)
    kept, rounds = sum(d.stats.kept for d in done), sum(d.stats.rounds for d in done)
    text = [d.tokens for d in done]
    return Measured(step_bytes(loaded.drafter.model), kept / rounds, (kept + rounds) / rounds, text)


def cases(model: Assistant, tops: list[int]):
    """(name of a head, set it) in turn; the first is the head that scores the whole vocabulary."""
    own = model.config.clusters

    def whole() -> None:
        model.config = replace(model.config, clusters=None)

    def built(top: int) -> None:
        rows = head_rows(model)
        made = clusters.build(rows, clusters.best_count(len(rows), top))
        model.use_clusters(mx.array(made.centroids), mx.array(made.ordering), top)

    yield "whole", whole
    if own:
        yield f"own, {own[1]} of {own[0]}", lambda: setattr(model, "config", replace(model.config, clusters=own))
    for top in tops:
        count = clusters.best_count(model.config.text.vocab_size, top)
        yield f"built, {top} of {count}", lambda top=top: built(top)


def measure(name: str, args: argparse.Namespace, prompts: list[str]) -> None:
    loaded = load_pair(str(PAIRS[name]), dtype=mx.float32)
    assert loaded.drafter is not None
    model, base = loaded.drafter.model, None
    for head, set_head in cases(model, args.tops):
        set_head()
        got = measured(loaded, prompts, args.tokens, args.width)
        base = base or got
        lost = 1 - got.tokens_per_round / base.tokens_per_round
        same = "the same" if got.text == base.text else "DIFFERENT"
        share = f"{got.step_bytes:9,} ({got.step_bytes / base.step_bytes:4.0%})"
        line = f"{share}  {got.kept:4.2f}  {got.tokens_per_round:4.2f}  {lost:6.1%}  {same}"
        print(f"{name:9} {head:17} {line}")


def round_gb(pair: KnownPair, bits: int, drafter_bits: int, width: int, clustered: tuple[int, int] | None) -> float:
    """GB of weights a round of this width reads: the target once, the drafter once a column."""
    extra = 0.0
    if pair.size in EXPERTS:  # columns route independently: distinct experts among width + 1 columns
        total, count, top = EXPERTS[pair.size]
        extra = total * (1 - (1 - top / count) ** (width + 1) - top / count)
    target = replace(pair, read=pair.read + extra).read_bytes(bits)
    return (target + width * drafter_step(pair, clustered).drafter_read_bytes(drafter_bits)) / 1e9


def drafter_step(pair: KnownPair, clustered: tuple[int, int] | None) -> KnownPair:
    """The pair with what a step of its drafter reads when it has clusters (count, top)."""
    if clustered is None:
        return pair
    count, top = clustered
    rows = count + top * VOCABULARY // count
    return replace(pair, drafter_read=pair.drafter_read + (rows - VOCABULARY) * HIDDEN)


def reckon(top: int, width: int) -> None:
    clustered = clusters.best_count(VOCABULARY, top), top
    for pair in KNOWN[2:]:
        for bits, drafter_bits in ((16, 16), (4, 16), (4, 4)):
            step = [drafter_step(pair, c).drafter_read_bytes(drafter_bits) / 1e6 for c in (None, clustered)]
            before, after = (round_gb(pair, bits, drafter_bits, width, c) for c in (None, clustered))
            sizes = f"{bits:2} bit + {drafter_bits:2} bit   {step[0]:4.0f} -> {step[1]:4.0f} MB"
            print(f"{pair.size:9} {sizes}   {before:6.2f} -> {after:6.2f} GB   {1 - after / before:5.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4, help="tokens drafted per round")
    parser.add_argument("--tokens", type=int, default=48, help="generated for each prompt")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tops", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="clusters that compete")
    parser.add_argument("--real-top", type=int, default=128, help="the same, in the second table")
    args = parser.parse_args()
    prompts = json.loads((resources.files("mlx_mtp") / "data" / "tiny" / "prompts.json").read_text())["code"]
    print(f"width {args.width}, {len(prompts[: args.prompts])} prompts, {args.tokens} tokens each")
    print("pair      head              bytes a step      kept  tokens per round, lost, text")
    for name in PAIRS:
        measure(name, args, prompts[: args.prompts])
    top, count = args.real_top, clusters.best_count(VOCABULARY, args.real_top)
    share = (count + top * VOCABULARY // count) / VOCABULARY
    print(f"\nwidth {args.width}, {top} of {count} clusters: {share:.1%} of the rows over {VOCABULARY} tokens")
    print("pair      target + drafter   drafter step       bytes of a round     pays while it costs less than")
    reckon(top, args.width)


if __name__ == "__main__":
    main()
