"""How many dispatches a step has on Metal, with MLX's own operations and with the kernels; counted, never run.

    python bench/dispatches.py [--detail 26B-A4B]

The graph of a step at the published sizes is built from weights that take no memory, and its primitives are counted:
those that only look at memory another way are none, every other one is one (MLX needs two or more for some sorts and
long reductions). RMSNorm, RoPE, dequantising and the attention that MLX fuses are one each, as they are on Metal. A
drafter step is what drafting three tokens has more than drafting two.
"""

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import graph
import mlx.core as mx
from made_up import MadeUp, Size, hollow, hollow_fill, make
from mlx.utils import tree_map

from mlx_mtp import few_rows
from mlx_mtp.accept import verdict, verdict_by_kernel
from mlx_mtp.cache import Cache
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.kernels.self_test import Outcome
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.rows import GREEDY, Draft, Forward
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.shapes import SIZES, shape

CONTEXT, MAX_WIDTH = 1536, 7


# graphs that are never run --------------------------------------------------------------------------------


def _hollow(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Always a new one: of two products with the same array, compiled graphs keep one."""
    return hollow(mx.zeros(shape, dtype))


def kernel(**definition: object):
    """In the place of mx.fast.metal_kernel: every call is one primitive."""

    def call(*, inputs, output_shapes, output_dtypes, **launch: object) -> list[mx.array]:
        made = [_hollow(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        return mx.depends(made, list(inputs))

    return call


@contextlib.contextmanager
def as_on_metal(kernels: bool) -> Iterator[None]:
    """Graphs built inside have one primitive where Metal has one operation. kernels: all of ours are used."""

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array | None = None, **how) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
        given = [w, scales] if biases is None else [w, scales, biases]
        return mx.depends([_hollow(shape, how.get("dtype", scales.dtype))], given)[0]

    def tried(cases, choice, record) -> tuple[Outcome, ...]:
        return tuple(Outcome(case.kernel, case.shape, None if kernels else "not counted") for case in cases)

    with graph.as_on_metal(), contextlib.ExitStack() as stack:
        for owner, name, value in (
            (mx, "dequantize", dequantize),
            (mx.fast, "metal_kernel", kernel),
            (mx.metal, "is_available", lambda: True),
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
            (few_rows, "self_test", tried),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


# counting -------------------------------------------------------------------------------------------------


def primitives(*trees: object) -> Counter[str]:
    """Dispatches by the name of their primitive; evaluated arrays are the leaves."""
    return Counter({name: n for name, n in graph.primitives(*trees).items() if name not in graph.VIEWS})


def networks(size: str, bits: int) -> MadeUp:
    return make(shape(size), Size(size, bits), hollow_fill)


def filled(target: Gemma4, rows: int) -> Cache:
    """A cache with rows that hold CONTEXT positions."""
    cache = Cache(target.specs, MAX_WIDTH, mx.bfloat16)
    for _ in range(rows):
        cache.join(CONTEXT + MAX_WIDTH + 1)
    cache.bounds = [CONTEXT] * rows
    cache.restore(tree_map(hollow, cache.state()))
    return cache


def round_of(made: MadeUp, width: int, rows: int = 1, drafts: bool = True) -> Counter[str]:
    """Dispatches of a greedy round of so many rows; drafts: False leaves the drafter's steps out."""
    cache, everyone = filled(made.target, rows), slice(0, rows)
    drafter, sampler = MtpDrafter(made.target, made.drafter, cache), Sampler([RowSampler.of(GREEDY)] * rows)
    drafter.restore(_hollow((rows, 1, made.target.config.hidden_size), mx.bfloat16))
    bonus, draft = _hollow((rows,), mx.int32), Draft(_hollow((rows, width), mx.int32))
    if width and drafts:
        draft = drafter.propose(everyone, bonus, sampler, width)
    tokens = mx.concatenate([bonus[:, None], draft.tokens], axis=1)
    pass_ = cache.open(everyone, width + 1, frozenset())
    hidden, taps = made.target.forward(tokens, pass_)
    judge = verdict_by_kernel if isinstance(made.target, few_rows.KernelTarget) else verdict
    judged = judge(draft, made.target.logits(hidden, capped=False), pass_.start, sampler, hidden)
    cache.commit(everyone, judged.kept, width + 1)
    drafter.observe(Forward(everyone, tokens, hidden, taps, width, judged.picked), judged.kept)
    return primitives(judged.tokens, judged.kept, judged.bonus, cache.state(), drafter.state())


@dataclass(frozen=True)
class Counts:
    plain: Counter[str]  # a target step of one column
    verify: Counter[str]  # of four
    draft: Counter[str]  # a drafter step
    round: Counter[str]  # of width 3


def counts(size: str, bits: int, kernels: bool, rows: int) -> Counts:
    with as_on_metal(kernels):
        made = networks(size, bits)
        whole, verify = round_of(made, 3, rows), round_of(made, 3, rows, drafts=False)
        step = whole - verify
        step.subtract(round_of(made, 2, rows) - round_of(made, 2, rows, drafts=False))
        return Counts(round_of(made, 0, rows), verify, step, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4, help="of both networks")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--detail", choices=SIZES, help="list the primitives of one size")
    args = parser.parse_args()
    print(f"dispatches, {args.bits} bit, {args.rows} rows       MLX's operations -> the kernels")
    for name in args.sizes:
        before, after = (counts(name, args.bits, kernels, args.rows) for kernels in (False, True))
        parts = ("plain", "verify", "draft", "round")
        cells = [f"{part} {vars(before)[part].total():5} -> {vars(after)[part].total():5}" for part in parts]
        print(f"{name:8} {'   '.join(cells)}", flush=True)
        if name == args.detail:
            for title, found in (("MLX's operations", before), ("the kernels", after)):
                print(f"  one column, {title}: {dict(found.plain.most_common())}")
                print(f"  drafter step, {title}: {dict(found.draft.most_common())}")


if __name__ == "__main__":
    main()
