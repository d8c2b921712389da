"""Casting a model of mlx-lm or mlx-vlm as their own converters do. Knows neither."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path


def cast(model: Any, dtype: mx.Dtype) -> None:
    """Cast what may be cast: a model of theirs may have a `cast_predicate` that says what keeps its precision, such as
    the decay rates of recurrent layers."""
    try:
        may = model.cast_predicate
    except AttributeError:
        model.set_dtype(dtype)
        return

    def one(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and may(path) else value

    model.update(tree_map_with_path(one, model.parameters()))
