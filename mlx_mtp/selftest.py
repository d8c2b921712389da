"""The checks of a first run on a machine that nobody has tried: are outputs exact, whatever a round drafts.

They run the embedded pair, which is small: no figure of it says how fast a large model is.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_mtp.compare.cases import Prompt, prompts_of
from mlx_mtp.compare.report import Table
from mlx_mtp.doctor import facts, memory_bytes, on_gpu
from mlx_mtp.kernels.noise import gumbel
from mlx_mtp.pair import TINY, Pair, load
from mlx_mtp.plan import what_fits
from mlx_mtp.rows import GREEDY, Sampling, one_line

DRAFT_LENGTHS, BATCHES = range(8), (1, 4)
SEED = 7
SAMPLED = {"greedy": GREEDY, "seeded": Sampling(seed=SEED)}
# Between the best two logits, noise included. bfloat16, which a GPU computes in, tells numbers of 16 to 32 apart by an
# eighth; a CPU computes in float32.
NEAR_TIE_GPU, NEAR_TIE_CPU = 0.25, 1e-3


@dataclass(frozen=True)
class Check:
    """One line of the report. data: the figures, as JSON takes them."""

    result: Literal["pass", "fail", "not run"]
    detail: str
    data: object = None
    name: str = ""
    seconds: float = 0.0


def checked(name: str, run: Callable[[], Check]) -> Check:
    """A check with its name and time. Whatever it raises is its failure, and the others still run."""
    began = time.perf_counter()
    try:
        check = run()
    except Exception as error:  # the machine is one nobody has seen: the report is where this belongs
        check = Check("fail", one_line(f"{type(error).__name__}: {error}", 500))
    return replace(check, name=name, seconds=round(time.perf_counter() - began, 2))


def environment() -> Check:
    """What `doctor` says of this machine, but for folders."""
    found = [asdict(replace(fact, reason="") if fact.item == "python" else fact) for fact in facts()]
    found = [fact for fact in found if fact["item"] != "hub cache"]
    device = next(fact["state"] for fact in found if fact["item"] == "device")
    return Check("pass", device, found)


def memory() -> Check:
    """Which published sizes fit, by the budget that loading keeps to."""
    usable = memory_bytes()
    lines = [f"{item}: {fitting}" for item, fitting, _ in what_fits(usable)]
    return Check("pass", f"{usable / 1e9:.1f} GB usable; {'; '.join(lines)}", {"usable_bytes": usable, "fits": lines})


def without_private(value: Any, private: Mapping[str, str]) -> Any:
    """JSON whose texts have something else in the place of private words. A word counts where no letter or digit
    stands beside it, so that a short name spoils no other word."""
    if isinstance(value, dict):
        return {key: without_private(part, private) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_private(part, private) for part in value]
    if not isinstance(value, str):
        return value
    for word in sorted(filter(None, private), key=len, reverse=True):
        value = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", private[word], value)
    return value


@dataclass(frozen=True)
class Parting:
    """An output that is not plain decoding's from token `at` on. margin: between the best two logits there."""

    how: str
    draft_length: int
    batch: int
    at: int
    margin: float

    def __str__(self) -> str:
        where = f"{self.how}, draft length {self.draft_length}, {self.batch} at once"
        return f"{where}, token {self.at}, margin {self.margin:.2g}"


def exactness(tokens: int) -> Check:
    """Whether outputs of the embedded pair are the same at every draft length, alone and four at once."""
    pair = load(TINY, prefix_bytes=0)
    prompts = prompts_of("code", pair.text, raw=True)[: max(BATCHES)]
    count, partings = 0, []
    for how, sampling in SAMPLED.items():
        plain = [_outputs(pair, [prompt], sampling, 0, tokens)[0] for prompt in prompts]
        for length, batch in itertools.product(DRAFT_LENGTHS, BATCHES):
            outputs = _outputs(pair, prompts[:batch], sampling, length, tokens)
            count += batch
            for prompt, wanted, output in zip(prompts, plain, outputs, strict=False):
                at = _first_difference(wanted, output)
                if at is not None:
                    margin = _margin(pair, [*prompt, *wanted[:at]], sampling)
                    partings.append(Parting(how, length, batch, at, margin))
    return _judged(count, partings)


def _outputs(pair: Pair, prompts: Sequence[Prompt], sampling: Sampling, length: int, tokens: int) -> list[list[int]]:
    return [one.tokens for one in pair.generate(prompts, sampling, width=length, max_tokens=tokens)]


def _first_difference(wanted: Sequence[int], output: Sequence[int]) -> int | None:
    pairs = enumerate(itertools.zip_longest(wanted, output))
    return next((i for i, (a, b) in pairs if a != b), None)


def _margin(pair: Pair, tokens: Sequence[int], sampling: Sampling) -> float:
    """By how much the token that follows these is better than the second best, in logits with their noise."""
    second, best = np.sort(_scores(pair, tokens, sampling))[-2:]
    return float(best - second)


def _scores(pair: Pair, tokens: Sequence[int], sampling: Sampling) -> np.ndarray:
    """What plain decoding chooses the next token by: logits, and a drawn token's noise."""
    scores = pair.logits(tokens)[0, -1]
    if not sampling.greedy:
        seed, ids = mx.array([SEED, 0], mx.uint32), mx.arange(scores.size, dtype=mx.uint32)
        scores = scores + gumbel(seed, mx.array(len(tokens)), ids)
    return np.array(scores)


def near_tie() -> float:
    """The margin up to which arithmetic in another order may choose the other token."""
    return NEAR_TIE_GPU if on_gpu() else NEAR_TIE_CPU


def _judged(count: int, partings: list[Parting]) -> Check:
    """MLX's own products may round otherwise in wider passes; outputs may then part where two tokens nearly tie."""
    data = {"outputs": count, "partings": [str(p) for p in partings]}
    if not partings:
        return Check("pass", f"all {count} outputs are plain decoding's", data)
    worst = max(partings, key=lambda p: p.margin)
    if worst.margin <= near_tie():
        detail = f"{len(partings)} of {count} outputs part from plain decoding's, all at near-ties"
        return Check("pass", f"{detail}: margins up to {worst.margin:.2g}", data)
    return Check("fail", f"{len(partings)} of {count} outputs part from plain decoding's: {worst}", data)


def judged_tables(tables: Sequence[Table]) -> Check:
    """A comparison's tables: whether ours writes what the target alone writes, and how fast beside mlx-lm."""
    ours = [(table, f) for table in tables for f in table.figures if f.name.startswith("mlx-mtp")]
    margins = [one.margin for _, f in ours for one in f.differs]
    speeds = [f"{f.over_baseline} at {t.rows}" for t, f in ours if f.over_plain and f.over_baseline]
    detail = f"times mlx-lm's plain speed: {', '.join(speeds)}"
    if margins:
        detail += f"; {len(margins)} outputs part from plain decoding's, margins up to {max(margins):.2g}"
    result = "fail" if margins and max(margins) > near_tie() else "pass"
    return Check(result, detail, [asdict(table) for table in tables])
