"""A drafter's own cache of features: what the target has computed at every position. Knows not how a draft is made.

A draft reads this cache. MLX's GPU backends hold on to what a queued draft reads, and copy a buffer that is written
meanwhile (read in their source, not measured). So the features of a round with drafts are stored by the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_mtp.cache import Cache, LayerSpec, Pass, Snapshot
from mlx_mtp.rows import Forward


class FeatureDrafter:
    """The half of a drafter that keeps the features of every row in layers of its own."""

    def __init__(
        self,
        specs: tuple[LayerSpec, ...],
        column_bytes: int,
        remember: Callable[[mx.array, Pass], None],
        target_cache: Cache,
    ) -> None:
        """column_bytes: of a column's features. remember: stores features [B, L, F] of a pass's columns in all layers.
        target_cache: of which only lengths and their bounds are read."""
        self._remember, self._rows, self._column_bytes = remember, target_cache, column_bytes
        # Twice as wide: a row's ring also holds a block or rejected columns behind what its snapshots may be old.
        self._cache = Cache(specs, 2 * (target_cache.max_width + 1), target_cache.dtype)
        self._pending: tuple[slice, mx.array, mx.array] | None = None  # rows, features, kept: of the last drafts

    def _see(self, fwd: Forward, features: mx.array, kept: mx.array) -> None:
        """A pass has computed features [B, L, F], of which kept [B] columns of each row became true."""
        self._store()
        if fwd.drafted:
            self._pending = fwd.rows, features, kept
        else:
            self._take(fwd.rows, features, kept)

    def _store(self) -> None:
        """Store what is pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._take(*pending)

    def _take(self, rows: slice, features: mx.array, kept: mx.array) -> None:
        """Store features [B, L, F], of which the first kept [B] are true."""
        columns = features.shape[1]
        self._remember(features, self._open(rows, columns))
        self._cache.commit(rows, kept, columns)

    def _open(self, rows: slice, columns: int, ahead: int = 0) -> Pass:
        """A pass over the drafter's own cache, up to `ahead` positions past the target's rows, whose bounds are
        settled."""
        for row in range(rows.start, rows.stop):
            self._cache.bounds[row] = self._rows.bounds[row] + ahead
        return self._cache.open(rows, columns)

    def begin(self, row: int, length: int, state: Snapshot | None) -> None:
        self._cache.join(1, state, length if state else None, most=self._rows.most(row))

    def snapshot(self, row: int, length: int) -> Snapshot:
        self._store()
        return self._cache.snapshot(row, length)

    def row_bytes(self, positions: int) -> int:
        pending = (self._rows.max_width + 1) * self._column_bytes
        return self._cache.row_bytes(self._rows.capacity(positions)) + pending

    def leave(self, row: int, last: int) -> None:
        self._store()
        self._cache.leave(row)

    def state(self) -> Any:
        return self._cache.state(), self._pending

    def restore(self, state: Any) -> None:
        cache, self._pending = state
        self._cache.restore(cache)
