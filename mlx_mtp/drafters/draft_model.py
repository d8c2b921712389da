"""A smaller Gemma 4 that drafts for a larger one, with a cache of its own. Knows tokens, and nothing of the target's.

What its cache holds of a row lags behind the target's: the newest committed token is always fed again, together with
the bonus token, so that the first step of a draft is two columns for every row, whether the row's last draft was kept
whole (then it has never seen that token) or not. What a constraint has forced beside its drafts is fed like that too.
Drafting K tokens costs K calls for the whole batch.

Rounds of width 0 are not run through it: they cost nothing, and what they brought is fed when it next drafts, in the
first step if all rows lack the same few tokens, as a prompt is otherwise.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import put
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.kinds import Kind, Network
from mlx_mtp.drafters.texts import Texts
from mlx_mtp.models.config import TARGET_TYPES, TextConfig, read_target
from mlx_mtp.models.families import TargetConfig
from mlx_mtp.models.gemma4 import FAMILY, Gemma4
from mlx_mtp.rows import Draft, Forward, PairingError
from mlx_mtp.sampling import Drawn, Sampler

CHUNK_TOK = 512  # as wide as it catches up in one pass


class DraftModel:
    """Drafts with a whole model. All rows of a step run in one call, whatever their lengths."""

    taps: tuple[int, ...] = ()

    def __init__(self, model: Gemma4, target_cache: Cache) -> None:
        """target_cache: tells how long every row is; its keys and values are the target's and not looked at."""
        self._model, self._target = model, target_cache
        self._cache = Cache(model.specs, MAX_WIDTH, target_cache.dtype)
        self._texts = Texts(target_cache)
        # Committed tokens of every row that its cache lacks, at most; the newest always counts.
        self._behind: list[int] = []
        self._have = mx.zeros((0,), mx.int32)  # [R] positions that its cache has, one less where that makes no odds

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        behind = set(self._behind[rows])
        if len(behind) > 1 or max(behind) > MAX_WIDTH:
            self._catch_up(rows)
        columns = max(1, *self._behind[rows]) + 1
        end = self._texts.lengths(rows)
        start = self._have[rows]  # a row that lacks less runs past its end, unseen
        at = mx.minimum(start[:, None] + mx.arange(columns), end[:, None])
        tokens = mx.where(at == end[:, None], bonus[:, None], self._texts.at(rows, at))
        hidden = self._run(rows, tokens, start, 0)
        hidden = mx.take_along_axis(hidden, (end - start)[:, None, None], axis=1)
        drafted: list[mx.array] = []
        steps: list[Drawn] = []
        for i in range(width):
            if i:
                hidden = self._run(rows, drafted[-1][:, None], end + i, i)
            scores, _ = sampler.offer(self._model.logits(hidden[:, 0]), None, drafted)
            steps.append(sampler.draw(scores, None, end + 1 + i, drafted))
            drafted.append(steps[-1].tokens)
        return Drawn.draft(steps)

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        self._texts.observe(fwd, kept)
        columns, own = fwd.tokens.shape[1], fwd.drafted - fwd.forced
        for row in range(fwd.rows.start, fwd.rows.stop):
            if row - fwd.rows.start not in fwd.still:
                self._behind[row] = 1 + fwd.forced if own else self._behind[row] + columns
        if own:  # the bonus token and all its drafts but the last have been fed
            end = self._texts.lengths(fwd.rows)
            self._has(fwd.rows, mx.where(kept > 0, mx.minimum(end - kept + own, end - 1), self._have[fwd.rows]))
        if columns > 1 and not fwd.drafted:  # a prompt chunk
            self._catch_up(fwd.rows)

    def _catch_up(self, rows: slice) -> None:
        """Feed what rows lack up to their newest token, which stays; one pass for neighbours that lack as much.

        A row is never fed what it has: to compute a place again takes the window before it, and behind a wide chunk
        the ring holds no more than its last window.
        """
        for _, group in groupby(range(rows.start, rows.stop), key=lambda row: self._behind[row]):
            members = list(group)
            here, behind = slice(members[0], members[-1] + 1), self._behind[members[0]]
            while behind > 1:
                columns = min(behind - 1, CHUNK_TOK)
                start, end = self._have[here], self._texts.lengths(here)
                at = mx.minimum(start[:, None] + mx.arange(columns), end[:, None])
                self._run(here, self._texts.at(here, at), start, min(MAX_WIDTH - behind, -1))
                self._has(here, mx.minimum(start + columns, end - 1))
                behind -= columns
                self._behind[here] = [behind] * len(members)

    def _has(self, rows: slice, positions: mx.array) -> None:
        self._have = put(self._have, rows, positions)

    def _run(self, rows: slice, tokens: mx.array, start: mx.array, ahead: int) -> mx.array:
        """One pass over tokens [B, L] from position start [B], at most `ahead` past the target's length -> hidden
        [B, L, H]; nothing past it counts any more."""
        columns = tokens.shape[1]
        self._cache.lengths = put(self._cache.lengths, rows, start)
        for row in range(rows.start, rows.stop):
            self._cache.bounds[row] = max(0, self._target.bounds[row] + ahead)
        hidden, _ = self._model.forward(tokens, self._cache.open(rows, columns))
        return hidden

    # rows -------------------------------------------------------------------------------------------------------

    def begin(self, row: int, length: int, state: Any) -> None:
        cache, tokens, behind = state or (None, None, 0)
        self._cache.join(max(length, 1), cache, length, most=self._target.most(row))
        self._texts.begin(row, length, tokens)
        self._behind.append(min(behind, length))
        self._have = mx.concatenate([self._have[:row], mx.array([length - self._behind[row]], mx.int32)])

    def snapshot(self, row: int, length: int) -> Any:
        return self._cache.snapshot(row, length), self._texts.snapshot(row, length), self._behind[row]

    def row_bytes(self, positions: int) -> int:
        return self._cache.row_bytes(self._target.capacity(positions)) + self._texts.row_bytes(positions)

    def leave(self, row: int, last: int) -> None:
        self._cache.leave(row)
        self._texts.leave(row, last)
        self._behind[row] = self._behind[last]
        self._behind.pop()
        self._has(slice(row, row + 1), self._have[last : last + 1])
        self._have = self._have[:last] if last else mx.zeros((0,), mx.int32)

    def state(self) -> Any:
        return self._cache.state(), self._texts.state(), self._have, list(self._cache.bounds), list(self._behind)

    def restore(self, state: Any) -> None:
        arrays, texts, self._have, bounds, behind = state
        self._texts.restore(texts)
        self._cache.restore(arrays)
        self._cache.bounds, self._behind = list(bounds), list(behind)


# pairing ----------------------------------------------------------------------------------------------------


def check(target: TargetConfig, config: TextConfig, advice: str) -> list[str]:
    """Raise PairingError unless both have the same vocabulary and the drafter's context reaches as far."""
    if config.vocab_size != target.vocab_size:
        raise PairingError(
            f"draft model has vocabulary {config.vocab_size}, target has {target.vocab_size}; "
            f"use a smaller model with the same tokenizer, or a drafter made for this target: {advice}"
        )
    if config.max_positions < target.max_positions:
        return [
            f"the draft model's context is {config.max_positions} tokens, the target's {target.max_positions}; "
            "behind that few drafts will be kept"
        ]
    return []


KIND = Kind(
    "draft_model",
    lambda parts: DraftModel(parts.network, parts.cache),
    Network(
        recognise=lambda config: config.get("model_type") in TARGET_TYPES,
        read=read_target,
        build=Gemma4,
        check=check,
        stored=FAMILY.stored,
    ),
    catch_up=0.02,  # a guess: prompt tokens of a small model in the time of a large one's pass
)
