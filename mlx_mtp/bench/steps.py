"""Operations of a decoding step and of a speculative round, of any published size, counted and never run.

The engine builds its passes as always; instead of being dispatched they are counted, and everything they would have
computed is replaced by hollow arrays. So no weights are needed, and all layers are counted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_mtp.bench.graph import Count, as_on_metal, count
from mlx_mtp.bench.made_up import GROUP, MadeUp, hollow, hollow_fill, make
from mlx_mtp.bench.settings import Size
from mlx_mtp.cache import Cache
from mlx_mtp.depth import MAX_WIDTH, depth_of
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.engine import Engine, Heard, Pass
from mlx_mtp.rows import GREEDY, Event, Request
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import read_configs, shape

CONTEXT = 1536  # positions in the cache: past every window, so that all rings are full
WIDTHS = (1, 3)


@dataclass(frozen=True)
class Steps:
    """Operations of one size. rounds: width -> of a round. mlx_lm: of its plain step; None if it is not installed."""

    size: str
    plain: Count
    rounds: dict[int, Count]
    mlx_lm: Count | None


class CountingEngine(Engine):
    """An engine that counts what it would dispatch. Every round keeps one token a row."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.counted: list[tuple[Pass, Count]] = []

    def _dispatch(self, built: Pass) -> None:
        self.counted.append((built, count(built.out, self._state())))
        cache, drafter, self._bonus, history = tree_map(lambda x: None if x is None else hollow(x), self._state())
        self.cache.restore(cache)
        self.drafter.restore(drafter)
        self._history.restore(history)
        self._running, self._sent_s = replace(built, out=hollow(built.out, 1)), 0.0

    def _read(self, done: Pass, away_s: float) -> tuple[list[Event], Heard]:
        self._last = None  # nothing takes any time
        return super()._read(done, 0.0)


def count_steps(size: Size, batch: int = 1) -> Steps:
    """Count one size, all layers, with `batch` rows."""
    made = make(shape(size.name), size, hollow_fill)
    with as_on_metal():
        rounds = {width: count_round(made, width, batch) for width in WIDTHS}
        return Steps(size.name, count_round(made, 0, batch), rounds, _mlx_lm(size, batch))


def count_round(made: MadeUp, width: int, batch: int, context: int = CONTEXT) -> Count:
    """Operations of one dispatch of the engine; a step of width 0 has no drafter to keep informed."""
    cache = Cache(made.target.specs, MAX_WIDTH, made.dtype)
    drafter = MtpDrafter(made.target, made.drafter, cache) if width else PlainDrafter()
    limits = Limits(max_rows=batch, alone_tok=context, chunk_tok=context, first_chunk_tok=context)
    engine = CountingEngine(made.target, cache, drafter, depth_of(width), limits)
    for _ in range(batch):
        engine.submit(Request((0,) * context, MAX_WIDTH + 64, GREEDY))
    while not engine.counted or len(engine.counted[-1][0].active) < batch or engine.counted[-1][0].chunks:
        engine.step()
    return engine.counted[-1][1]


def _mlx_lm(size: Size, batch: int) -> Count | None:
    """The same of mlx-lm's model and greedy step: what its `generate_step` dispatches for one token."""
    if find_spec("mlx_lm") is None:
        return None
    from mlx_lm.models import gemma4

    config = copy.deepcopy(read_configs(size.name)["target"])
    model = gemma4.Model(gemma4.ModelArgs.from_dict(config | {"model_type": "gemma4"}))
    if size.bits != 16:
        nn.quantize(model, group_size=GROUP, bits=size.bits)
    model.update(tree_map(hollow, model.parameters()))
    return count_mlx_lm(model, batch, CONTEXT)


def count_mlx_lm(model: nn.Module, batch: int, context: int) -> Count:
    """Operations of one token of an mlx-lm model whose weights are evaluated, with so many positions in its cache."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for tokens in (hollow(mx.zeros((batch, context), mx.int32)), hollow(mx.zeros((batch, 1), mx.int32))):
        # A rotating cache ends its first turn with a pass of one token, so one such pass comes before the counted one.
        model(tokens, cache=cache)
        for layer in cache:
            layer.keys, layer.values = hollow(layer.keys), hollow(layer.values)
    logits = model(hollow(mx.zeros((batch,), mx.int32))[:, None], cache=cache)[:, -1, :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return count(mx.argmax(logprobs, axis=-1), logprobs.squeeze(0) if batch == 1 else logprobs)
