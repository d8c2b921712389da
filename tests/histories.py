"""Histories of a cache that hypothesis makes up: rows join, run, leave and are copied. Knows no layer and no column.

class Rows(History[list[int]]): ...
@given(histories(longest=9, length=20, more=("undo",)))
def test(plan): follow(Rows(), plan)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from hypothesis import strategies as st

from mlx_mtp.cache import Cache

WIDEST, MOST = 3, 6  # width; rows at once
USUAL = ("join", "join", "round", "round", "round", "chunk", "leave", "keep", "again")
T = TypeVar("T")


@dataclass(frozen=True)
class Deed:
    """What is done, with numbers of which everyone takes what fits. row: a live one. count: columns of a chunk.
    kept: of every live row, columns of a round that are kept, where it has so many."""

    name: str
    row: int
    which: int
    count: int
    kept: list[int]

    @property
    def columns(self) -> int:
        """Of a round."""
        return self.count % (WIDEST + 1) + 1

    def some(self, rows: int) -> list[int]:
        """Columns kept of the first rows in a round."""
        return [min(k, self.columns) for k in self.kept[:rows]]


class History(ABC, Generic[T]):
    """A cache beside a plain list of what every row was told, and of what was kept of rows."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.rows: list[T] = []
        self._next = 1

    @abstractmethod
    def join(self) -> None: ...

    @abstractmethod
    def write(self, first: int, kept: list[int], columns: int) -> None:
        """A pass over rows from `first` on, and its commit; checks what comes out of it."""

    def round(self, kept: list[int], columns: int) -> None:
        """A pass over the first rows that drafts."""
        self.write(0, kept, columns)

    @abstractmethod
    def keep(self, row: int) -> None:
        """Keep a row as it is, if it has been told anything."""

    @abstractmethod
    def again(self, which: int, back: int) -> None:
        """Join as in something kept, or a few positions earlier; if anything was kept."""

    def do(self, deed: Deed) -> None:
        """A deed of a name of its own; rows may be none."""
        raise AssertionError(f"nobody knows the deed {deed.name}")

    def check(self) -> None:
        """After every deed."""

    def leave(self, row: int) -> None:
        self.cache.leave(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


def histories(longest: int, length: int, more: Sequence[str] = ()) -> st.SearchStrategy[list[tuple]]:
    """Up to `length` deeds, with chunks of up to `longest` columns."""
    deed = st.tuples(
        st.sampled_from([*USUAL, *more]),
        st.integers(0, 7),
        st.integers(1, longest),
        st.lists(st.integers(0, WIDEST + 1), min_size=8, max_size=8),
    )
    return st.lists(deed, max_size=length)


def follow(rows: History, plan: list[tuple]) -> None:
    rows.join()
    for name, which, count, kept in plan:
        live = len(rows.rows)
        deed = Deed(name, which % live if live else 0, which, count, kept)
        if name not in USUAL:
            rows.do(deed)
        elif name in ("join", "again"):
            if live < MOST:
                rows.join() if name == "join" else rows.again(which, kept[0])
        elif live:
            _usual(rows, deed)
        rows.check()


def _usual(rows: History, deed: Deed) -> None:
    if deed.name == "round":
        rows.round(deed.some(deed.row + 1), deed.columns)
    elif deed.name == "chunk":
        rows.write(deed.row, [deed.count], deed.count)
    elif deed.name == "leave":
        rows.leave(deed.row)
    else:
        rows.keep(deed.row)
