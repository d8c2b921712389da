"""What a row's prompt and text do to its next logits: penalties and bias, at every column of a draft.

Column j of a round follows the text so far and draft[:j], so it is processed as if they had been said. Everything is
an array on the device; nothing here is read by the host, and nothing is built while no row of a pass asks for it.
Knows settings and token ids, not rows' other affairs.

A row takes 9 bytes a token of the vocabulary at most (2.3 MB at 262,144): 4 for counts while some live row has a
penalty, 1 for the prompt while some live row has a repetition penalty, 4 while some live row has a bias.
Shapes: R live rows, B rows of a pass, L columns, K drafted tokens, V vocabulary, C candidate tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.rows import Request, RequestError, Sampling


def check_ids(sampling: Sampling, vocabulary: int) -> None:
    """Raises RequestError where logit_bias names a token that there is not; on the device it would be a stray write."""
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise RequestError(
                f"logit_bias names token {token}; the vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}"
            )


@dataclass(frozen=True)
class Steering:
    """What is known of a constrained text before it is drafted: its next tokens, where they are forced, and what may
    follow them.

    forced [B, n] int32: the token of every step of the draft, -1 where the drafter is free. allowed [B, V] bool: what
    may stand at step at[b]; at [B] int32.
    """

    forced: mx.array
    allowed: mx.array
    at: mx.array

    def steer(self, logits: mx.array, ids: mx.array | None, step: int) -> mx.array:
        """logits [B, C] of tokens `ids` [B, C] (None: column c is token c) -> what may not be drafted at -inf.

        Where no candidate may, all stay: the draft will not be kept, but its distribution is one.
        """
        may = self.allowed if ids is None else mx.take_along_axis(self.allowed, ids, axis=-1)
        may = may | (self.at != step)[:, None]
        may = may | ~mx.any(may, axis=-1, keepdims=True)
        return mx.where(may, logits, -mx.inf)

    def force(self, logits: mx.array, ids: mx.array | None, step: int) -> tuple[mx.array, mx.array | None]:
        """The same with the forced token of a step as the only one: in the first column, or its own."""
        if step >= self.forced.shape[1]:
            return logits, ids
        token = self.forced[:, step : step + 1]
        column, first = mx.arange(logits.shape[1]), token if ids is None else mx.zeros_like(token)
        only = mx.where(column == first, 0.0, -mx.inf)
        if ids is not None:  # no id twice: the distribution would not be one
            ids = mx.where(token >= 0, (token + column) % self.allowed.shape[-1], ids)
        return mx.where(token >= 0, only, logits), ids


@dataclass(frozen=True)
class Processors:
    """What is done to the logits of B rows, and what the rows have said so far; None: no row asks for it.

    repetition, presence, frequency: [B, 1, 1] float32. Tables: said [B, V] int32, how often every token stands in a
    row's text, newest token included; prompt [B, V] bool, whether it stands in the prompt; bias [B, V] float32.
    A row that asks for nothing keeps its logits bit by bit (x / 1, x - 0, x + 0), whoever stands beside it.

    Last comes what a constraint forbids. allowed [B, L, V] bool: the tokens that may stand in every column judged.
    steering: the same for the drafter, as far as it is known while it drafts.
    """

    said: mx.array | None
    prompt: mx.array | None
    bias: mx.array | None
    repetition: mx.array | None
    presence: mx.array | None
    frequency: mx.array | None
    allowed: mx.array | None = None
    steering: Steering | None = None

    def columns(self, logits: mx.array, draft: mx.array, before: int = 0) -> mx.array:
        """logits [B, L, V] float32, column j after the text so far and draft[:, : before + j] -> processed, the same.

        draft [B, K] int32. All columns are processed by the counts before the round; then the few tokens that are
        drafted, for which alone they differ, are done again with their own. The same function of the same numbers
        decides in both cases, so a column's result does not depend on how many there are.
        """
        out = self._columns(logits, draft, before)
        return out if self.allowed is None else mx.where(self.allowed, out, -mx.inf)

    def _columns(self, logits: mx.array, draft: mx.array, before: int = 0) -> mx.array:
        out = self._apply(logits, *(None if t is None else t[:, None] for t in self._tables))
        if self.said is None or not draft.shape[1] or before + logits.shape[1] == 1:
            return out
        shape = (*logits.shape[:2], draft.shape[1])
        seen = mx.arange(shape[2]) < before + mx.arange(shape[1])[:, None]  # [L, K]
        equal = draft[:, :, None] == draft[:, None, :]  # [B, K, K]
        more = (equal[:, None] & seen[:, None, :]).sum(axis=-1)  # [B, L, K]
        said, prompt, bias = (None if t is None else self._at(t, draft) for t in self._tables)
        assert said is not None
        at = mx.broadcast_to(draft[:, None], shape)
        again = self._apply(mx.take_along_axis(logits, at, axis=-1), said + more, prompt, bias)
        return mx.put_along_axis(out, at, again, axis=-1)

    def step(self, logits: mx.array, ids: mx.array | None, drafted: Sequence[mx.array]) -> mx.array:
        """A drafter's logits [B, C] of tokens `ids` [B, C] (None: column c is token c), after the text so far and the
        tokens [B] in `drafted` -> processed, the same."""
        out = self._step(logits, ids, drafted)
        return out if self.steering is None else self.steering.steer(out, ids, len(drafted))

    def _step(self, logits: mx.array, ids: mx.array | None, drafted: Sequence[mx.array]) -> mx.array:
        draft = mx.stack(list(drafted), axis=1) if drafted else mx.zeros((logits.shape[0], 0), mx.int32)
        if ids is None:
            return self._columns(logits[:, None], draft, len(drafted))[:, 0]
        said, prompt, bias = (None if t is None else self._at(t, ids) for t in self._tables)
        if said is not None and drafted:
            said = said + (ids[:, None, :, None] == draft[:, None, None, :]).sum(axis=-1)
        return self._apply(logits[:, None], said, prompt, bias)[:, 0]

    @property
    def _tables(self) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
        return self.said, self.prompt, self.bias

    @staticmethod
    def _at(table: mx.array, ids: mx.array) -> mx.array:
        """A table's entries for ids [B, n], as [B, 1, n]."""
        return mx.take_along_axis(table, ids, axis=-1)[:, None]

    def _apply(
        self, logits: mx.array, said: mx.array | None, prompt: mx.array | None, bias: mx.array | None
    ) -> mx.array:
        """The rule, element by element: repetition, then presence and frequency, then bias."""
        if self.repetition is not None:
            assert said is not None and prompt is not None
            changed = mx.where(logits > 0, logits / self.repetition, logits * self.repetition)
            logits = mx.where((said > 0) | prompt, changed, logits)
        if self.presence is not None:
            assert said is not None and self.frequency is not None
            logits = logits - (self.presence * (said > 0) + self.frequency * said)
        return logits if bias is None else logits + bias


class History:
    """The tables behind `Processors` for all live rows, which are dense: the last one moves into a gap."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._settings: list[Sampling] = []
        self._wanted = False  # whether any row asks for anything
        self._said: mx.array | None = None
        self._prompt: mx.array | None = None
        self._bias: mx.array | None = None

    def join(self, request: Request, tokens: Sequence[int] = ()) -> None:
        """Add a row with these tokens of output. Its whole prompt counts, cached or not."""
        rows, wanted = len(self._settings), request.sampling
        said = prompt = bias = None
        if wanted.counts_text:
            said = np.bincount(np.array(tokens, np.int64), minlength=self._vocabulary).astype(np.int32)
        if wanted.counts_prompt:
            prompt = np.zeros(self._vocabulary, np.bool_)
            prompt[list(request.prompt)] = True
        if wanted.logit_bias:
            bias = np.zeros(self._vocabulary, np.float32)
            bias[[token for token, _ in wanted.logit_bias]] = [value for _, value in wanted.logit_bias]
        self._said, self._prompt = _joined(self._said, rows, said), _joined(self._prompt, rows, prompt)
        self._bias = _joined(self._bias, rows, bias)
        self._settings.append(wanted)
        self._wanted = self._wanted or wanted.processes

    def leave(self, row: int) -> None:
        """Free a row; a table that nobody needs any more goes with it."""
        last = self._settings.pop()
        if row < len(self._settings):
            self._settings[row] = last
        count, self._wanted = len(self._settings), any(s.processes for s in self._settings)
        self._said = _left(self._said, row, count, any(s.counts_text for s in self._settings))
        self._prompt = _left(self._prompt, row, count, any(s.counts_prompt for s in self._settings))
        self._bias = _left(self._bias, row, count, any(s.logit_bias for s in self._settings))

    def add(self, rows: slice, tokens: mx.array, kept: mx.array) -> None:
        """The first kept[b] of tokens [B, L] are new text; kept [B] int32."""
        if self._said is None or not any(s.counts_text for s in self._settings[rows]):
            return
        new = mx.arange(tokens.shape[1]) < kept[:, None]
        where = mx.arange(rows.start, rows.stop)[:, None]
        self._said = self._said.at[where, tokens].add(new.astype(mx.int32))

    def processors(self, rows: slice) -> Processors | None:
        """What is to be done to the logits of a slice of rows after all that has been added; None: nothing."""
        own = self._settings[rows] if self._wanted else []
        if not any(s.processes for s in own):
            return None
        counts, prompts = any(s.counts_text for s in own), any(s.counts_prompt for s in own)
        steers = any(s.presence_penalty or s.frequency_penalty for s in own)

        def column(values: list[float]) -> mx.array:
            return mx.array(values, mx.float32)[:, None, None]

        return Processors(
            said=_cut(self._said, rows, counts),
            prompt=_cut(self._prompt, rows, prompts),
            bias=_cut(self._bias, rows, any(s.logit_bias for s in own)),
            repetition=column([s.repetition_penalty for s in own]) if prompts else None,
            presence=column([s.presence_penalty for s in own]) if steers else None,
            frequency=column([s.frequency_penalty for s in own]) if steers else None,
        )

    def state(self) -> tuple[Any, ...]:
        """All arrays: what a dispatch must evaluate, or `restore` go back to."""
        return self._said, self._prompt, self._bias

    def restore(self, state: tuple[Any, ...]) -> None:
        """Forget what was added since `state` was taken; none of it may have been dispatched."""
        self._said, self._prompt, self._bias = state


def _joined(table: mx.array | None, rows: int, new: np.ndarray | None) -> mx.array | None:
    """A table [rows, V] with one row more, zeros where it is not given; None if nobody has needed it yet."""
    if new is not None:
        row = mx.array(new)[None]
    elif table is not None:
        row = mx.zeros((1, table.shape[1]), table.dtype)
    else:
        return None
    if table is None:
        table = mx.zeros((rows, row.shape[1]), row.dtype)
    return mx.concatenate([table, row])


def _left(table: mx.array | None, row: int, count: int, needed: bool) -> mx.array | None:
    """A table of count + 1 rows without one of them, whose place the last takes."""
    if table is None or not needed:
        return None
    order = list(range(count))
    if row < count:
        order[row] = count
    return table[mx.array(order, mx.int32)]


def _cut(table: mx.array | None, rows: slice, needed: bool) -> mx.array | None:
    return table[rows] if table is not None and needed else None
