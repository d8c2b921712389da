"""The drafter that drafts nothing: plain decoding."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.rows import Draft, Forward
from mlx_mtp.sampling import Sampler


class PlainDrafter:
    """Keeps no state; every round has width 0."""

    taps: tuple[int, ...] = ()

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        return Draft(mx.zeros((bonus.shape[0], 0), mx.int32))

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        pass

    def begin(self, row: int, length: int, state: None) -> None:
        pass

    def snapshot(self, row: int, length: int) -> None:
        return None

    def row_bytes(self, positions: int) -> int:
        return 0

    def leave(self, row: int, last: int) -> None:
        pass

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass
