"""Layers compiled for passes as narrow as rounds are, and traced once for all layers that are alike.

`mx.compile` traces what it is given anew for every shape of the arguments. A layer's own function, with its weights
captured, costs a trace a layer whenever a batch or a width is new: on the embedded target nearly two rounds. With the
weights among the arguments, layers that differ in nothing else share one function, and so its traces.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Passes of up to this many columns a row run compiled: half the operations to build and, on a CPU, 0.55 of the time.
# Wider ones are prompt chunks, of which every length would be traced anew.
FUSED_COLUMNS = 16

Place = tuple[nn.Module, str]  # of a weight


class Traces:
    """The compiled functions of one model's layers."""

    def __init__(self) -> None:
        self._of: dict[Hashable, Callable[..., Any]] = {}

    def of(self, key: Hashable, method: Callable[..., Any], places: list[Place]) -> Callable[..., Any]:
        """The function (*arguments, weights) of all layers with this key; the first to ask is its pattern: `method`
        is one of it, and `places` are where that finds its weights."""
        if key not in self._of:
            self._of[key] = mx.compile(_with_weights(method, places))
        return self._of[key]


def _with_weights(method: Callable[..., Any], places: list[Place]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        *arguments, weights = given
        own = [module[name] for module, name in places]
        try:
            _put(places, weights)
            return method(*arguments)
        finally:
            _put(places, own)

    return run


def _put(places: list[Place], weights: list[mx.array]) -> None:
    for (module, name), weight in zip(places, weights, strict=True):
        module[name] = weight


class Fused:
    """A method of a layer, which runs compiled where a pass is narrow.

    kind: whatever its trace depends on besides arguments, weights, and the numbers and strings of the layer's modules.
    Layers with the same `traces` and kind share a trace, so nothing else of the layer may be read.
    """

    def __init__(self, layer: nn.Module, method: Callable[..., Any], traces: Traces, kind: Hashable = None) -> None:
        self._layer, self._method, self._traces, self._kind = layer, method, traces, kind

    def __call__(self, columns: int, *arguments: Any) -> Any:
        """columns: of every row of the pass."""
        if columns > FUSED_COLUMNS:
            return self._method(*arguments)
        run, places = self._shared
        # Weights last: MLX compares the arguments with those of every trace in order, up to the first that differs.
        return run(*arguments, [module[name] for module, name in places])

    @cached_property
    def _shared(self) -> tuple[Callable[..., Any], list[Place]]:
        """Not before the first pass: weights are quantised after a layer is made."""
        modules = sorted(self._layer.named_modules(), key=lambda named: named[0])
        weights = [(path, m, name) for path, m in modules for name in sorted(m) if isinstance(m[name], mx.array)]
        places = [(m, name) for _, m, name in weights]
        made = tuple((path, type(m), _numbers(m)) for path, m in modules)
        key = self._method.__name__, self._kind, made, tuple((path, name) for path, _, name in weights)
        return self._traces.of(key, self._method, places), places


def _numbers(module: nn.Module) -> tuple[tuple[str, float | str], ...]:
    """What it has of such, and strings: bits and group size of a quantised layer, among others."""
    return tuple(sorted((name, v) for name, v in vars(module).items() if isinstance(v, (bool, int, float, str))))
