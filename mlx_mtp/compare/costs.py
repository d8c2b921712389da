"""What a round makes the host do: reads it waits for, dispatches, and operations in them. Counted in untimed runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.bench.graph import count
from mlx_mtp.compare.cases import Prompt
from mlx_mtp.compare.runs import Mode, run

READERS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts "reads" (readers of mx.array, numpy's conversions, mx.eval), "dispatches" (mx.eval and mx.async_eval with
    something to do) and their "primitives", by wrapping them."""
    seen: Counter[str] = Counter()

    def reading(original: Callable, only_arrays: bool) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen["reads"] += not only_arrays or (bool(args) and isinstance(args[0], mx.array))
            return original(*args, **kwargs)

        return call

    def dispatching(original: Callable, waits: bool) -> Callable:
        def call(*args: Any) -> Any:
            operations = count(*args).primitives
            seen["reads"] += waits
            seen["dispatches"] += bool(operations)
            seen["primitives"] += operations
            return original(*args)

        return call

    saved = [(mx.array, name, vars(mx.array)[name], reading) for name in READERS]
    saved += [(owner, name, vars(owner)[name], reading) for owner, name in ((np, "array"), (np, "asarray"))]
    try:
        for owner, name, original, wrap in saved:
            setattr(owner, name, wrap(original, owner is np))
        run_now, run_later = mx.eval, mx.async_eval
        mx.eval, mx.async_eval = dispatching(run_now, True), dispatching(run_later, False)
        try:
            yield seen
        finally:
            mx.eval, mx.async_eval = run_now, run_later
    finally:
        for owner, name, original, _ in saved:
            setattr(owner, name, original)


def costs(mode: Mode, prompts: Sequence[Prompt], tokens: int) -> dict[str, float]:
    """Per round of decoding, without the prompt: a longer run less a shorter one. A round is a step of all rows."""
    found, rounds = [], []
    for length in (tokens // 2, tokens):
        with counted() as seen:
            done = run(mode, prompts, length)
        rounds.append(done.drafts.rounds if len(prompts) == 1 and done.drafts.rounds else done.steps)
        found.append(seen)
    more = max(1, rounds[1] - rounds[0])
    return {name: (found[1][name] - found[0][name]) / more for name in ("reads", "dispatches", "primitives")}
