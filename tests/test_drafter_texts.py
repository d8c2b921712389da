"""What rows have said, on the device: whatever the schedule of passes, what is read is what became true."""

import random
from typing import Any

import mlx.core as mx
import pytest
from engines import smallest

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.texts import Texts
from mlx_mtp.rows import Forward

JUNK = 999


class Told:
    """Rows whose texts are told to `Texts` as an engine tells a drafter. feeding: rows that are in their prompt."""

    def __init__(self, seed: int = 0) -> None:
        self.cache = Cache(smallest().target.specs, MAX_WIDTH, mx.float32)
        self.texts, self.rng = Texts(self.cache), random.Random(seed)
        self.said: list[list[int]] = []  # every row's tokens, the newest too
        self.feeding: list[bool] = []

    def token(self) -> int:
        return self.rng.randrange(JUNK)

    def join(self, said: list[int] | None = None, state: mx.array | None = None) -> None:
        length = len(said) if said else 0
        self.cache.join(length + 1)
        self.cache.lengths = mx.array([*(len(s) - 1 for s in self.said), length], mx.int32)
        self.cache.bounds[-1] = length
        self.texts.begin(len(self.said), length, state)
        self.said.append([*(said or []), self.token()])
        self.feeding.append(True)

    def chunk(self, row: int, count: int, last: bool) -> None:
        new = [self.token() for _ in range(count)]
        self._pass(slice(row, row + 1), [[self.said[row][-1], *new[:-1]]], [count], [new[-1]], frozenset())
        self.said[row] += new
        self.feeding[row] = not last

    def round(self, width: int, rejects: bool = True) -> None:
        """Over the rows up to the last that decodes; those that feed their prompt stand still."""
        rows = max(i for i, feeding in enumerate(self.feeding) if not feeding) + 1
        kept = [0 if f else self.rng.randint(1, width + 1) if rejects else width + 1 for f in self.feeding[:rows]]
        new = [[self.token() for _ in range(n)] for n in kept]
        tokens = [[said[-1], *n[:-1]] for said, n in zip(self.said, new, strict=False)]
        tokens = [(t if k else []) + [JUNK] * (width + 1 - k) for t, k in zip(tokens, kept, strict=True)]
        newest = [n[-1] if n else JUNK for n in new]
        still = frozenset(i for i, n in enumerate(kept) if not n)
        self._pass(slice(0, rows), tokens, kept, newest, still)
        for said, n in zip(self.said, new, strict=False):
            said += n

    def _pass(
        self, rows: slice, tokens: list[list[int]], kept: list[int], newest: list[int], still: frozenset[int]
    ) -> None:
        columns, keeps = len(tokens[0]), mx.array(kept, mx.int32)
        self.cache.commit(rows, keeps, columns)
        last = mx.array(newest, mx.int32)
        fwd = Forward(rows, mx.array(tokens, mx.int32), mx.zeros((1, 1, 1)), {}, 0, None, last, still)
        self.texts.observe(fwd, keeps)
        for row, count in zip(range(rows.start, rows.stop), kept, strict=True):
            self.cache.settle(row, columns - count)

    def leave(self, row: int) -> None:
        last = len(self.said) - 1
        self.texts.leave(row, last)
        self.cache.leave(row)
        for per_row in (self.said, self.feeding):
            per_row[row] = per_row[last]
            per_row.pop()

    def state(self) -> Any:
        said, feeding = [list(s) for s in self.said], list(self.feeding)
        return self.cache.state(), list(self.cache.bounds), self.texts.state(), said, feeding

    def restore(self, state: Any) -> None:
        cache, self.cache.bounds, texts, self.said, self.feeding = state
        self.cache.restore(cache)
        self.texts.restore(texts)

    def check(self) -> None:
        held = self.texts._tokens.tolist()
        for row, said in enumerate(self.said):
            known = len(said) if len(said) > 1 else 0  # the first token of a prompt comes with its first chunk
            if not self.feeding[row]:
                assert held[row][:known] == said

    def step(self) -> None:
        """Something that may happen."""
        kind = self.rng.random()
        feeding = [i for i, f in enumerate(self.feeding) if f]
        if len(self.said) < 4 and kind < 0.08:
            self.join()
        elif len(self.said) < 4 and kind < 0.12 and self.said and not all(self.feeding):
            row = self.feeding.index(False)
            length = len(self.said[row]) - self.rng.randint(1, min(3, len(self.said[row]) - 1))
            self.join(self.said[row][:length], self.texts.snapshot(row, length))
        elif self.said and kind < 0.18:
            self.leave(self.rng.randrange(len(self.said)))
        elif feeding and kind < 0.6:
            self.chunk(self.rng.choice(feeding), self.rng.choice([1, 1, 2, 40]), self.rng.random() < 0.7)
        elif len(feeding) < len(self.said):
            self.round(self.rng.choice([0, 0, 0, 0, 0, 0, 1, 3]))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_rows_their_texts_are_what_became_true(seed):
    told = Told(seed)
    for _ in range(250):
        undone = told.state() if told.rng.random() < 0.1 else None
        if undone is not None and len(told.feeding) > sum(told.feeding):
            told.round(told.rng.choice([0, 2]))
            told.restore(undone)
        told.step()
        if told.rng.random() < 0.15:
            told.check()
    told.check()
