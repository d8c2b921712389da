"""DFlash as the engine sees it: a block of drafts in one pass, over a cache of projected target features of its own.

What a round shows is stored when the next draft needs it, not when it is observed: MLX's GPU backends hold on to what
a queued draft reads, and copy a buffer that is written meanwhile (read in their source, not measured; a CPU copies
nothing either way). Rounds without drafts leave their columns to be stored together, so that while nothing is drafted
the drafter's weights are read once in 16 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.cache import Cache, Pass, Snapshot
from mlx_mtp.drafters.kinds import Kind, Network
from mlx_mtp.models.config import TextConfig
from mlx_mtp.models.dflash import DFlash, DFlashConfig, is_dflash, read_dflash
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.rows import Draft, Forward, PairingError
from mlx_mtp.sampling import Sampler


@dataclass(frozen=True)
class Seen:
    """What a pass showed of every row: tapped [R, L, n * H], of which the first kept [R] columns became true."""

    tapped: mx.array
    kept: mx.array

    def rows(self, order: list[int]) -> Seen:
        index = mx.array(order, mx.int32)
        return Seen(self.tapped[index], self.kept[index])

    def padded(self, rows: int) -> Seen:
        """With rows that have seen nothing behind the others."""
        return Seen(_padded(self.tapped, rows), _padded(self.kept, rows))


class DFlashDrafter:
    """Drafts at most a block less the known token, whatever is asked for.

    A narrower draft is made from a narrower block, as in vLLM, mlx-vlm and z-lab's own code: the masks beyond it are
    not computed, so the layers that look ahead see fewer of them than in the full block.
    """

    def __init__(self, target: Gemma4, network: DFlash, cache: Cache) -> None:
        """cache: the target's, of which only the bounds of the rows' lengths are read."""
        self._target, self._network, self._rows = target, network, cache
        self.taps: tuple[int, ...] = network.config.taps
        self._most = cache.max_width + 1
        # Twice as wide: a row's ring also holds a block or rejected columns behind what its snapshots may be old.
        self._cache = Cache(network.specs, 2 * self._most, cache.dtype)
        self._seen: list[Seen] = []  # not stored yet, oldest first
        self._undrafted = False  # whether one of them was no round with drafts

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        self._store()
        config = self._network.config
        width = min(width, config.block - 1)
        masks = mx.full((bonus.shape[0], width), config.mask, mx.int32)
        pass_ = self._open(rows, width + 1)
        block = self._target.embed(mx.concatenate([bonus[:, None], masks], axis=1))
        hidden = self._network.denoise(block, pass_)[:, 1:]
        logits = self._target.logits(hidden, capped=config.softcap is not None and not sampler.greedy)
        position = pass_.start[:, None] + 1 + mx.arange(width)
        return sampler.draw_all(logits, position)

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        tapped = mx.concatenate([fwd.taps[i] for i in self.taps], axis=-1)
        columns = tapped.shape[1]
        if columns > 1 and not fwd.drafted:  # a prompt chunk
            if self._undrafted:
                self._store()
            self._network.remember(tapped, self._open(fwd.rows, columns))
            self._cache.commit(fwd.rows, kept, columns)
            return
        if columns + sum(seen.tapped.shape[1] for seen in self._seen) > self._most:
            self._store()
        before = fwd.rows.start
        if before:  # one token of a prompt
            tapped = mx.concatenate([mx.zeros((before, *tapped.shape[1:]), tapped.dtype), tapped])
            kept = mx.concatenate([mx.zeros((before,), kept.dtype), kept])
        self._seen.append(Seen(tapped, kept))
        self._undrafted = self._undrafted or not fwd.drafted

    def begin(self, row: int, length: int, state: Snapshot | None) -> None:
        self._cache.join(1, state, length if state else None, most=self._rows.most(row))

    def snapshot(self, row: int, length: int) -> Snapshot:
        self._store()
        return self._cache.snapshot(row, length)

    def row_bytes(self, positions: int) -> int:
        column = len(self.taps) * self._network.config.hidden_size * self._cache.dtype.size + 4
        unstored = self._most * column + 4
        return self._cache.row_bytes(self._rows.capacity(positions)) + unstored

    def leave(self, row: int, last: int) -> None:
        self._cache.leave(row)
        order = list(range(last))
        if row != last:
            order[row] = last
        self._seen = [seen.padded(last + 1).rows(order) for seen in self._seen] if order else []

    def state(self) -> Any:
        return self._cache.state(), [(seen.tapped, seen.kept) for seen in self._seen], self._undrafted

    def restore(self, state: Any) -> None:
        cache, seen, self._undrafted = state
        self._cache.restore(cache)
        self._seen = [Seen(*pair) for pair in seen]

    def _store(self) -> None:
        """Write down what was seen and is not stored yet, all of it in one pass."""
        if not self._seen:
            return
        seen = [s.padded(len(self._cache.bounds)) for s in self._seen]
        tapped = mx.concatenate([s.tapped for s in seen], axis=1)
        true = [mx.arange(s.tapped.shape[1]) < s.kept[:, None] for s in seen]
        rows, columns = slice(0, tapped.shape[0]), tapped.shape[1]
        if len(true) > 1:  # what is true of a row comes first, in its order
            place = mx.arange(columns) + mx.where(mx.concatenate(true, axis=1), 0, columns)
            tapped = mx.take_along_axis(tapped, mx.argsort(place, axis=1)[..., None], axis=1)
        self._network.remember(tapped, self._open(rows, columns))
        self._cache.commit(rows, sum((s.kept for s in seen[1:]), seen[0].kept), columns)
        self._seen, self._undrafted = [], False

    def _open(self, rows: slice, columns: int) -> Pass:
        """A pass over the drafter's own cache. The target's rows are as long, and their bounds are settled."""
        for row in range(rows.start, rows.stop):
            self._cache.bounds[row] = self._rows.bounds[row]
        return self._cache.open(rows, columns)


def _padded(x: mx.array, rows: int) -> mx.array:
    """x with its first axis zero-padded to `rows`."""
    missing = rows - x.shape[0]
    return mx.concatenate([x, mx.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x


# pairing ----------------------------------------------------------------------------------------------------


def check(target: TextConfig, config: DFlashConfig, advice: str) -> list[str]:
    """Raise PairingError unless the drafter's sizes are the target's, and the layers it taps are there."""
    facts = (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("a vocabulary of", config.vocab_size, target.vocab_size),
        ("layers numbering", config.target_layers, len(target.layers)),
        ("logits capped at", config.softcap or target.softcap, target.softcap),
    )
    for what, got, expected in facts:
        if got != expected:
            raise PairingError(f"drafter expects {what} {got}, target has {expected}; {advice}")
    if max(config.taps) >= len(target.layers):
        raise PairingError(
            f"drafter taps layer {max(config.taps)}, expected at most {len(target.layers) - 1}, the target's last; "
            f"{advice}"
        )
    if config.mask >= target.vocab_size:
        raise PairingError(f"drafter's mask token is {config.mask}, target has {target.vocab_size} tokens; {advice}")
    return []


KIND = Kind(
    "dflash",
    lambda parts: DFlashDrafter(parts.target, parts.network, parts.cache),
    Network(recognise=is_dflash, read=read_dflash, build=DFlash, check=check, nested=True),
)
