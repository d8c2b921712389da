"""mlx-lm as one of the runtimes compared: its plain loop, its batch, and its loop with a smaller draft model.

Everything that touches mlx-lm's less public names is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.utils import load_model

from mlx_mtp.compare.cases import Prompt
from mlx_mtp.compare.casting import cast
from mlx_mtp.compare.runs import Drafts


def load(path: Path, dtype: mx.Dtype | None) -> Any:
    """A model from a folder. dtype: what it is cast to; None keeps the checkpoint's."""
    model, _ = load_model(path)
    if dtype is not None:
        cast(model, dtype)
    mx.eval(model.parameters())
    return model


class Plain:
    """`generate_step`, which `stream_generate` runs, for one request; `BatchGenerator`, which `batch_generate` and the
    server run, for several."""

    batches = True

    def __init__(self, model: Any) -> None:
        self._model = model

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=tokens):
            yield [int(token)]

    def open(self) -> PlainSession:
        return PlainSession(self._model)

    def drafts(self) -> Drafts:
        return Drafts()


class PlainSession:
    """mlx-lm's batch without stop tokens."""

    def __init__(self, model: Any) -> None:
        self._generator = BatchGenerator(model)

    def submit(self, prompt: Prompt, tokens: int) -> int:
        return self._generator.insert([list(prompt)], [tokens])[0]

    def step(self) -> list[tuple[int, list[int]]]:
        return [(r.uid, [int(r.token)]) for r in self._generator.next()[1]]

    def close(self) -> None:
        self._generator.close()


class WithDraftModel:
    """`speculative_generate_step` with a smaller model, for one request; it has no loop for several."""

    batches = False

    def __init__(self, model: Any, draft_model: Any, width: int) -> None:
        self._model, self._draft_model, self._width, self._drafts = model, draft_model, width, Drafts()

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        """Tokens of one round come one by one; a round ends with the first that was not drafted."""
        steps = speculative_generate_step(
            mx.array(prompt), self._model, self._draft_model, num_draft_tokens=self._width, max_tokens=tokens
        )
        drafted = 0
        for token, _, from_draft in steps:
            yield [int(token)]
            if from_draft:
                drafted += 1
                continue
            self._drafts.add(1, [1] * self._width, [int(i < drafted) for i in range(self._width)])
            drafted = 0

    def open(self) -> PlainSession:
        raise NotImplementedError("mlx-lm has no batch with a draft model")

    def drafts(self) -> Drafts:
        taken, self._drafts = self._drafts, Drafts()
        return taken
