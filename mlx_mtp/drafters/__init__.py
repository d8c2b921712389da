"""What every drafter is to the engine. A drafter keeps its own per-row state; the engine never looks inside."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from mlx_mtp.rows import Draft, Forward
from mlx_mtp.sampling import Sampler


class Drafter(Protocol):
    """Proposes tokens for the target to check. No member is optional.

    Rows are dense: a pass runs over a slice of them, and when a row leaves, the last one takes its place.
    """

    taps: tuple[int, ...]
    """Target layers whose outputs `observe` needs."""

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        """Draft `width` >= 1 tokens to follow bonus [B] int32 (emitted, not yet in the cache), drawn by `sampler`.

        A drafter that draws one after the other tells `sampler.draw` what it has drafted before, and asks
        `sampler.offer` first, lest it draft what a constraint forbids."""
        ...

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        """The target ran a pass, and kept[b] of row b's columns became true ([B] int32; 0: the row stood still).

        A prompt chunk is a pass whose every column is kept and none was drafted.
        """
        ...

    def leave(self, row: int, last: int) -> None:
        """Row `row` is gone, and row `last` now carries its index."""
        ...

    def state(self) -> Any:
        """All arrays of all rows (any tree): what a dispatch must evaluate."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to what `state` returned; everything since was built but never dispatched."""
        ...
