"""A drafter's own cache of what passes have shown it ("features"), stored when the next draft needs it.

Not when it is observed: MLX's GPU backends hold on to what a queued draft reads, and copy a buffer that is written
meanwhile (read in their source, not measured; a CPU copies nothing either way). Rounds without drafts leave their
columns to be stored together, so that a round has no operation of the drafter's: features are made of what passes have
shown when they are stored. What rounds show while the depth policy rests is not kept at all, so none of the drafter's
weights is read then: a draft behind such a gap is made as if its columns had never been, and what is before them were
nearer. So a drafter's own places are those of what it has stored.
Knows nothing of what features are, nor how a draft is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.buffers import fit_rows
from mlx_mtp.cache import Cache, LayerSpec, Pass, Snapshot
from mlx_mtp.rows import Forward


@dataclass(frozen=True)
class Seen:
    """What a pass of L columns showed: arrays [R * L, ...], row after row, of which each row's first kept [R] columns
    became true; `whole` if that is known to be all of them, as of a round without drafts."""

    shown: tuple[mx.array, ...]
    kept: mx.array
    columns: int
    whole: bool = False

    def places(self, rows: Sequence[int]) -> np.ndarray:
        """[n, L]: where these rows' columns are in what was shown."""
        return np.array(rows, np.int32)[:, None] * self.columns + np.arange(self.columns, dtype=np.int32)

    def rows(self, order: list[int]) -> Seen:
        index = mx.array(self.places(order).flatten())
        return replace(self, shown=tuple(x[index] for x in self.shown), kept=self.kept[mx.array(order, mx.int32)])

    def padded(self, rows: int) -> Seen:
        """With rows that have seen nothing behind the others."""
        if rows == len(self.kept):
            return self
        shown = tuple(fit_rows(x, rows * self.columns) for x in self.shown)
        return Seen(shown, fit_rows(self.kept, rows), self.columns)

    def behind(self, rows: int) -> Seen:
        """With so many rows that have seen nothing before the others."""
        shown = tuple(_behind(x, rows * self.columns) for x in self.shown)
        return Seen(shown, _behind(self.kept, rows), self.columns)


class FeatureDrafter:
    """The half of a drafter that keeps, in layers of its own, what every row's positions have shown."""

    def __init__(
        self,
        specs: tuple[LayerSpec, ...],
        column_bytes: int,
        features: Callable[..., mx.array],
        remember: Callable[[mx.array, Pass], None],
        target_cache: Cache,
    ) -> None:
        """features: of what passes show, arrays [N, ...] that take column_bytes a column in all, -> [N, F].
        remember: store features of a pass's columns in all layers. target_cache: of which only the bounds of the rows'
        lengths are read."""
        self._features, self._remember, self._rows = features, remember, target_cache
        self._column_bytes = column_bytes
        # Twice as wide: a row's ring also holds a block or rejected columns behind what its snapshots may be old.
        self._most = 2 * (target_cache.max_width + 1)
        self._cache = Cache(specs, self._most, target_cache.dtype)
        self._seen: list[Seen] = []  # not stored yet, oldest first
        self._undrafted = False  # whether one of them was no round with drafts
        self._gaps: list[int] = []  # by row: the target's columns that are none of its own

    def _see(self, fwd: Forward, kept: mx.array, *shown: mx.array) -> Any:
        """A pass has shown arrays [B * L, ...], of which kept [B] columns of each row became true. Returns as
        `observe`."""
        columns = fwd.tokens.shape[1]
        if fwd.resting:  # a column a row
            for row in range(fwd.rows.start, fwd.rows.stop):
                self._gaps[row] += row not in fwd.still
            return ()
        seen = Seen(shown, kept, columns, whole=not fwd.drafted and not fwd.still)
        if columns > 1 and not fwd.drafted:  # a prompt chunk
            if self._undrafted:
                self._store()
            self._take(fwd.rows, self._features(*shown).reshape(len(kept), columns, -1), kept)
            return None
        full = columns + sum(seen.columns for seen in self._seen) > self._most
        if full:
            self._store()
        self._seen.append(seen.behind(fwd.rows.start) if fwd.rows.start else seen)  # one token of a prompt
        self._undrafted = self._undrafted or not fwd.drafted
        if full or fwd.rows.start:
            return None
        return () if columns == 1 else (shown, kept)  # of one column they are the pass's own

    def _store(self) -> None:
        """Write down what was seen and is not stored yet, all of it in one pass."""
        if not self._seen:
            return
        rows = len(self._cache.bounds)
        seen = [s.padded(rows) for s in self._seen]
        shown = zip(*(s.shown for s in seen), strict=True)
        features = self._features(*(mx.concatenate(list(parts)) for parts in shown))
        before = np.cumsum([0, *(rows * s.columns for s in seen)], dtype=np.int32)
        places = [s.places(range(rows)) + n for s, n in zip(seen, before[:-1], strict=True)]
        order = mx.array(np.concatenate(places, axis=1))  # [R, all columns]
        if all(s.whole for s in seen):
            kept = mx.full((rows,), order.shape[1], mx.int32)
        else:
            kept = sum((s.kept for s in seen[1:]), seen[0].kept)
            order = _true_first(order, seen)
        self._take(slice(0, rows), features[order], kept)
        self._seen, self._undrafted = [], False

    def _take(self, rows: slice, features: mx.array, kept: mx.array) -> None:
        """Store features [B, L, F], of which the first kept [B] are true."""
        columns = features.shape[1]
        self._remember(features, self._open(rows, columns))
        self._cache.commit(rows, kept, columns)

    def _open(self, rows: slice, columns: int, ahead: int = 0) -> Pass:
        """A pass over the drafter's own cache, which may begin up to `ahead` positions behind what its rows have. With
        the gaps those are as long as the target's, whose bounds are settled."""
        for row in range(rows.start, rows.stop):
            self._cache.bounds[row] = self._rows.bounds[row] - self._gaps[row] + ahead
        return self._cache.open(rows, columns)

    def listener(self, prompt: Sequence[int]) -> None:
        return None

    def begin(self, row: int, length: int, state: tuple[Snapshot, int] | None) -> None:
        stored, gap = state or (None, 0)
        own = max(0, length - gap)
        self._cache.join(1, stored, own if stored else None, most=self._rows.most(row))
        self._gaps.append(length - own)

    def snapshot(self, row: int, length: int) -> tuple[Snapshot, int]:
        """Of a row that has run on while the policy rested it has a little less than it could."""
        self._store()
        own = max(0, length - self._gaps[row])
        return self._cache.snapshot(row, own), length - own

    def owed(self, rows: slice) -> int:
        return 0

    def row_bytes(self, positions: int) -> int:
        unstored = self._most * (self._column_bytes + 4) + 4
        return self._cache.row_bytes(self._rows.capacity(positions)) + unstored

    def leave(self, row: int, last: int) -> None:
        self._cache.leave(row)
        self._gaps[row] = self._gaps[last]
        self._gaps.pop()
        order = list(range(last))
        if row != last:
            order[row] = last
        self._seen = [seen.padded(last + 1).rows(order) for seen in self._seen] if order else []

    def state(self) -> Any:
        seen = [(s.shown, s.kept, s.columns, s.whole) for s in self._seen]
        return self._cache.state(), seen, self._undrafted, list(self._gaps)

    def restore(self, state: Any) -> None:
        cache, seen, self._undrafted, gaps = state
        self._cache.restore(cache)
        self._seen, self._gaps = [Seen(*one) for one in seen], list(gaps)


def _behind(x: mx.array, rows: int) -> mx.array:
    """x [R, ...] behind so many rows of zeros."""
    return mx.concatenate([mx.zeros((rows, *x.shape[1:]), x.dtype), x])


def _true_first(places: mx.array, seen: list[Seen]) -> mx.array:
    """Places [R, L] of passes side by side, with what became true of a row before the rest, in its order."""
    if len(seen) == 1:
        return places
    true = mx.concatenate([mx.arange(s.columns) < s.kept[:, None] for s in seen], axis=1)
    rank = mx.where(true, 0, places.shape[1]) + mx.arange(places.shape[1])
    return mx.take_along_axis(places, mx.argsort(rank, axis=1), axis=1)
