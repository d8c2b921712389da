"""Every row's tokens where the device can read them, for drafters that look back. Knows nothing of what it is for."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.buffers import put, round_up
from mlx_mtp.cache import Cache
from mlx_mtp.rows import Forward

STEP_TOK = 256  # grows in multiples of this many positions


class Texts:
    """tokens [R, T] int32: row b's token at position p is tokens[b, p], up to the newest, which stands at its length
    in the cache. What lies behind that is left over from rejected drafts."""

    def __init__(self, cache: Cache) -> None:
        """cache: the target's, which knows how long every row is."""
        self._cache = cache
        self.tokens = mx.zeros((0, STEP_TOK), mx.int32)

    def lengths(self, rows: slice) -> mx.array:
        """[B] int32: the position of every row's newest token."""
        return self._cache.lengths[rows]

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        """Take over a pass that has been committed; rows that stood still get what is behind their length anyhow."""
        columns, rows = fwd.tokens.shape[1], fwd.rows
        self._fit(max(self._cache.bounds[rows]) + columns + 1)
        row, end = mx.arange(rows.start, rows.stop), self.lengths(rows)
        where = row[:, None], (end - kept)[:, None] + mx.arange(columns)
        self.tokens = put(self.tokens, where, fwd.tokens)
        if fwd.newest is not None:
            self.tokens = put(self.tokens, (row, end), fwd.newest)

    def at(self, rows: slice, positions: mx.array) -> mx.array:
        """Tokens at positions [B, L] -> [B, L]."""
        return mx.take_along_axis(self.tokens[rows], positions, axis=1)

    def begin(self, row: int, length: int, state: mx.array | None) -> None:
        """A row joined as the last; state: what `snapshot` returned, or None."""
        if state is None:
            state = mx.zeros((1, STEP_TOK), mx.int32)
        self._fit(max(length, state.shape[1]))
        pad = mx.zeros((1, self.tokens.shape[1] - state.shape[1]), mx.int32)
        self.tokens = mx.concatenate([self.tokens[:row], mx.concatenate([state, pad], axis=1)])

    def snapshot(self, row: int, length: int) -> mx.array:
        """[1, length] int32: a row's first tokens, copied."""
        return self.tokens[row : row + 1, :length] + 0  # mx.contiguous may be a view, which would hold the buffer

    def row_bytes(self, positions: int) -> int:
        """The most that a row which ends at `positions` takes; the longest row's length is every row's."""
        most = self._cache.capacity(positions)
        return 4 * (most + most // 4 + STEP_TOK)

    def leave(self, row: int, last: int) -> None:
        if row < last:
            self.tokens = put(self.tokens, row, self.tokens[last])
        # A cut of an array holds the whole of it.
        self.tokens = self.tokens[:last] if last else mx.zeros((0, STEP_TOK), mx.int32)

    def _fit(self, positions: int) -> None:
        have = self.tokens.shape[1]
        if positions > have:
            room = round_up(max(positions, have + have // 4), STEP_TOK)
            pad = mx.zeros((self.tokens.shape[0], room - have), mx.int32)
            self.tokens = mx.concatenate([self.tokens, pad], axis=1)
