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
        A round of width 0 is one too; what it brings is best left alone until the next draft needs it.
        """
        ...

    def begin(self, row: int, length: int, state: Any) -> None:
        """Row `row` joined, as the last, with `length` positions in the target's cache; at least one more follows
        before it is asked for a draft.

        state: None for a fresh row (length is 0), else what `snapshot` returned for a row of the same tokens, of
        `length` positions or of up to one of the widest rounds more, which this row must not see.
        """
        ...

    def snapshot(self, row: int, length: int) -> Any:
        """What it takes to continue row `row` from `length` positions, now or after it has left: any tree of arrays
        and cache snapshots, or None if nothing. Not evaluated, and unchanged by whatever the row does next.

        Called inside and at the end of a prompt, where `length` is the row's own, and when a row is about to leave:
        then it may have run past `length` by two of the widest rounds.
        """
        ...

    def row_bytes(self, positions: int) -> int:
        """The most memory of its own that a row which ends at `positions` takes here, beside the target's cache."""
        ...

    def leave(self, row: int, last: int) -> None:
        """Row `row` is about to leave the target's cache, where row `last` will carry its index."""
        ...

    def state(self) -> Any:
        """All arrays of all rows (any tree): what a dispatch must evaluate."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to what `state` returned; everything since was built but never dispatched."""
        ...
