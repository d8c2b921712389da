"""Every row's tokens where the device can read them, for drafters that look back. Knows nothing of what it is for.

Rounds without drafts leave their tokens to be written together: to write one costs as many operations as to write 16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import put, round_up
from mlx_mtp.cache import Cache
from mlx_mtp.rows import Forward

STEP_TOK = 256  # grows in multiples of this many positions
UNWRITTEN = 16  # rounds that may wait to be written


class Texts:
    """What is written, [R, T] int32: row b's token at position p is [b, p], up to the newest, which stands at its
    length in the cache. What lies behind that is left over from rejected drafts."""

    def __init__(self, cache: Cache) -> None:
        """cache: the target's, which knows how long every row is."""
        self._cache = cache
        self._tokens = mx.zeros((0, STEP_TOK), mx.int32)
        # Columns [B, 1] of the first B rows, oldest first, all of them true, and what follows the last of them [B].
        self._waiting: list[mx.array] = []
        self._newest: mx.array | None = None

    def lengths(self, rows: slice) -> mx.array:
        """[B] int32: the position of every row's newest token."""
        return self._cache.lengths[rows]

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        """Take over a pass that has been committed; rows that stood still get what is behind their length anyhow."""
        rows, waits = fwd.rows, fwd.tokens.shape[1] == 1 and fwd.rows.start == 0 and not fwd.still
        if self._waiting:
            before = self._waiting[0].shape[0]
            if waits and rows.stop == before and len(self._waiting) < UNWRITTEN:
                self._waiting.append(fwd.tokens)
                self._newest = fwd.newest
                return
            if rows.start < before:  # else it is a prompt of its own
                self._write(self.lengths(slice(0, before)) - kept[:before])
        if waits:
            self._waiting, self._newest = [fwd.tokens], fwd.newest
        else:
            self._put(rows, self.lengths(rows) - kept, kept, fwd.tokens, fwd.newest)

    def _write(self, end: mx.array) -> None:
        """Write down what waits; end [B] is where the newest of it stands."""
        columns = len(self._waiting)
        tokens = mx.concatenate(self._waiting, axis=1)
        waited, newest, self._waiting, self._newest = slice(0, tokens.shape[0]), self._newest, [], None
        self._put(waited, end - columns, None, tokens, newest)

    def _put(
        self, rows: slice, start: mx.array, kept: mx.array | None, tokens: mx.array, newest: mx.array | None
    ) -> None:
        """Write columns [B, L] from position start [B] on, and behind the kept [B] of them, or all, the newest [B]."""
        if newest is not None:
            tokens = mx.concatenate([tokens, newest[:, None]], axis=1)
        ahead = mx.arange(tokens.shape[1])
        if newest is not None and kept is not None:  # one write a place, for the order of several is not defined
            tokens = mx.where(ahead == kept[:, None], newest[:, None], tokens)
        self._fit(max(self._cache.bounds[rows]) + 1)
        at = start[:, None] + ahead
        if rows == slice(0, self._tokens.shape[0]):  # one operation, where indexing rows too takes MLX eight
            self._tokens = mx.put_along_axis(self._tokens, at, tokens, axis=1)
        else:
            self._tokens = put(self._tokens, (mx.arange(rows.start, rows.stop)[:, None], at), tokens)

    def written(self) -> mx.array:
        """All rows' tokens [R, T]. Not to be asked for between a pass's commit and its `observe`."""
        if self._waiting:
            self._write(self.lengths(slice(0, self._waiting[0].shape[0])))
        return self._tokens

    def at(self, rows: slice, positions: mx.array) -> mx.array:
        """Tokens at positions [B, L] -> [B, L]."""
        return mx.take_along_axis(self.written()[rows], positions, axis=1)

    def begin(self, row: int, length: int, state: mx.array | None) -> None:
        """A row joined as the last; state: what `snapshot` returned, or None."""
        if state is None:
            state = mx.zeros((1, STEP_TOK), mx.int32)
        self._fit(max(length, state.shape[1]))
        pad = mx.zeros((1, self._tokens.shape[1] - state.shape[1]), mx.int32)
        self._tokens = mx.concatenate([self._tokens[:row], mx.concatenate([state, pad], axis=1)])

    def snapshot(self, row: int, length: int) -> mx.array:
        """[1, length] int32: a row's first tokens, copied."""
        return self.written()[row : row + 1, :length] + 0  # mx.contiguous may be a view, which would hold the buffer

    def row_bytes(self, positions: int) -> int:
        """The most that a row which ends at `positions` takes; the longest row's length is every row's."""
        most = self._cache.capacity(positions)
        return 4 * (most + most // 4 + STEP_TOK + UNWRITTEN + 1)

    def leave(self, row: int, last: int) -> None:
        """Row `row` is about to leave the cache."""
        tokens = self.written()
        if row < last:
            tokens = put(tokens, row, tokens[last])
        # A cut of an array holds the whole of it.
        self._tokens = tokens[:last] if last else mx.zeros((0, STEP_TOK), mx.int32)

    def state(self) -> Any:
        """As of a drafter."""
        return self._tokens, list(self._waiting), self._newest

    def restore(self, state: Any) -> None:
        self._tokens, waiting, self._newest = state
        self._waiting = list(waiting)

    def _fit(self, positions: int) -> None:
        have = self._tokens.shape[1]
        if positions > have:
            room = round_up(max(positions, have + have // 4), STEP_TOK)
            pad = mx.zeros((self._tokens.shape[0], room - have), mx.int32)
            self._tokens = mx.concatenate([self._tokens, pad], axis=1)
