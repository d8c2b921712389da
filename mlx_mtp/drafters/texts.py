"""Every row's tokens where the device can read them, for drafters that look back. Knows nothing of what it is for."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.buffers import put, round_up
from mlx_mtp.cache import Cache
from mlx_mtp.rows import Forward

STEP_TOK = 256  # grows in multiples of this many positions


class Texts:
    """What is written, [R, T] int32: row b's token at position p is [b, p], up to the newest, which stands at its
    length in the cache. What lies behind that is left over from rejected drafts."""

    def __init__(self, cache: Cache) -> None:
        """cache: the target's, which knows how long every row is."""
        self._cache = cache
        self._tokens = mx.zeros((0, STEP_TOK), mx.int32)

    def lengths(self, rows: slice) -> mx.array:
        """[B] int32: the position of every row's newest token."""
        return self._cache.lengths[rows]

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        """Take over a pass that has been committed; rows that stood still get what is behind their length anyhow."""
        assert fwd.newest is not None
        rows, newest = fwd.rows, fwd.newest[:, None]
        ahead = mx.arange(fwd.tokens.shape[1] + 1)
        # One write a place, for the order of several is not defined.
        tokens = mx.where(ahead == kept[:, None], newest, mx.concatenate([fwd.tokens, newest], axis=1))
        self._fit(max(self._cache.bounds[rows]) + 1)
        at = (self.lengths(rows) - kept)[:, None] + ahead
        if rows == slice(0, self._tokens.shape[0]):  # one operation, where indexing rows too takes MLX eight
            self._tokens = mx.put_along_axis(self._tokens, at, tokens, axis=1)
        else:
            self._tokens = put(self._tokens, (mx.arange(rows.start, rows.stop)[:, None], at), tokens)

    def at(self, rows: slice, positions: mx.array) -> mx.array:
        """Tokens at positions [B, L] -> [B, L]."""
        return mx.take_along_axis(self._tokens[rows], positions, axis=1)

    def begin(self, row: int, length: int, state: mx.array | None) -> None:
        """A row joined as the last; state: what `snapshot` returned, or None."""
        if state is None:
            state = mx.zeros((1, STEP_TOK), mx.int32)
        self._fit(max(length, state.shape[1]))
        pad = mx.zeros((1, self._tokens.shape[1] - state.shape[1]), mx.int32)
        self._tokens = mx.concatenate([self._tokens[:row], mx.concatenate([state, pad], axis=1)])

    def snapshot(self, row: int, length: int) -> mx.array:
        """[1, length] int32: a row's first tokens, copied."""
        return self._tokens[row : row + 1, :length] + 0  # mx.contiguous may be a view, which would hold the buffer

    def row_bytes(self, positions: int) -> int:
        """The most that a row which ends at `positions` takes; the longest row's length is every row's."""
        most = self._cache.capacity(positions)
        return 4 * (most + most // 4 + STEP_TOK)

    def leave(self, row: int, last: int) -> None:
        """Row `row` is about to leave the cache."""
        if row < last:
            self._tokens = put(self._tokens, row, self._tokens[last])
        # A cut of an array holds the whole of it.
        self._tokens = self._tokens[:last] if last else mx.zeros((0, STEP_TOK), mx.int32)

    def state(self) -> mx.array:
        """As of a drafter."""
        return self._tokens

    def restore(self, state: mx.array) -> None:
        self._tokens = state

    def _fit(self, positions: int) -> None:
        have = self._tokens.shape[1]
        if positions > have:
            room = round_up(max(positions, have + have // 4), STEP_TOK)
            pad = mx.zeros((self._tokens.shape[0], room - have), mx.int32)
            self._tokens = mx.concatenate([self._tokens, pad], axis=1)
