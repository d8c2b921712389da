"""What has been computed of token sequences that later requests may begin with, within a budget. Looks into no array.

Sliding layers forget, so a prefix cannot be cut anywhere: it is kept at certain lengths. Each costs a copy of the
windows; the full layers of all lengths of one row are one buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp.cache import Snapshot


@dataclass(frozen=True)
class Spacing:
    """Where a prompt's prefixes are kept, besides its end. Multiples of the chunk of a prompt alone, so that it is
    computed in the same pieces whether prefixes are kept or not.

    every_tok: at every multiple. On 26B-A4B the windows cost as much as the full layers of some ten thousand positions,
    so oftener would be mostly windows; and an edit costs at most so many tokens.
    tail_tok: at the last multiple that leaves half as many behind it: what changes at the end of a prompt (a cursor, a
    question) costs a few hundred tokens whatever came before.
    share_tok: a request waits for another that is about to compute at least this many of its tokens.
    """

    every_tok: int = 4096
    tail_tok: int = 256
    share_tok: int = 256

    def stops(self, begin: int, end: int) -> list[int]:
        """Where to keep prefixes while a prompt is computed from `begin` to `end`: ascending, the last is `end`."""
        at = set(range(begin // self.every_tok * self.every_tok + self.every_tok, end, self.every_tok))
        tail = (end - self.tail_tok // 2) // self.tail_tok * self.tail_tok
        if tail > begin:
            at.add(tail)
        return [*sorted(at), end]


@dataclass(eq=False)
class Prefix:
    """The beginning of a row: its tokens [n] int32, and what the cache and the drafter need to continue it.

    back: a row may begin up to this many positions before the end.
    """

    tokens: np.ndarray
    cache: Snapshot
    drafter: Any
    back: int = 0
    used: int = 0

    def __post_init__(self) -> None:
        self.own_bytes = sum(a.nbytes for a in self.arrays)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def arrays(self) -> list:
        """What belongs to this prefix alone, to evaluate it."""
        return list(arrays_of([self.cache, self.drafter]))

    @property
    def snapshots(self) -> list[Snapshot]:
        """What shares full layers with others."""
        return list(snapshots_of([self.cache, self.drafter]))

    def usable(self, tokens: np.ndarray) -> int:
        """How many of these tokens need not be computed; the last always is, for what follows it is asked for."""
        sure = self.length - self.back
        if len(tokens) <= max(sure, 1) or (sure > 0 and self.tokens[sure - 1] != tokens[sure - 1]):
            return 0
        count = min(shared(self.tokens, tokens), len(tokens) - 1)
        return count if count >= sure else 0


class Prefixes:
    """Prefixes by their tokens; the least recently used goes first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._prefixes: list[Prefix] = []  # longest first
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def nbytes(self) -> int:
        """All that is kept, what several share counted once; what live rows hold anyway is not counted."""
        trunks = {id(s.trunk): s.trunk.nbytes for p in self._prefixes for s in p.snapshots}
        return sum(p.own_bytes for p in self._prefixes) + sum(trunks.values())

    def find(self, tokens: np.ndarray) -> tuple[Prefix | None, int]:
        """The prefix that spares most of these tokens [n] int32, which counts as used, and how many it spares."""
        best, most = None, 0
        for prefix in self._prefixes:
            if prefix.length <= most:
                break
            count = prefix.usable(tokens)
            if count > most:
                best, most = prefix, count
        if best is not None:
            best.used = next(self._clock)
        return best, most

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix. Of two with the same tokens the one that can be used further back stays, on the full layers
        of the newer, so that the older's may go."""
        for old in [p for p in self._prefixes if np.array_equal(p.tokens, prefix.tokens)]:
            self._prefixes.remove(old)
            if old.back > prefix.back:
                for mine, newer in zip(old.snapshots, prefix.snapshots, strict=True):
                    mine.move(newer.trunk)
                prefix = old
        self._prefixes.append(prefix)
        self._prefixes.sort(key=lambda p: -p.length)
        prefix.used = next(self._clock)

    def fit(self, budget_bytes: int) -> None:
        """Forget the least recently used until the rest takes no more than that."""
        budget_bytes = min(budget_bytes, self.budget_bytes)
        while self._prefixes and self.nbytes > budget_bytes:
            self._forget(min(self._prefixes, key=lambda p: p.used))

    def clear(self) -> None:
        self._prefixes.clear()

    def _forget(self, prefix: Prefix) -> None:
        trunks = [s.trunk for s in prefix.snapshots]
        self._prefixes.remove(prefix)
        del prefix  # the trunks ask who still refers to them
        for trunk in trunks:
            trunk.trim()


def arrays_of(state: Any) -> Iterator[mx.array]:
    """All arrays in a tree of arrays and snapshots, trunks left out."""
    for _, leaf in tree_flatten(state):
        if isinstance(leaf, Snapshot):
            yield from leaf.arrays
        elif isinstance(leaf, mx.array):
            yield leaf


def snapshots_of(state: Any) -> Iterator[Snapshot]:
    """All snapshots in a tree."""
    return (leaf for _, leaf in tree_flatten(state) if isinstance(leaf, Snapshot))


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two sequences have in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
