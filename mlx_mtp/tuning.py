"""What a width policy has learnt of a pair on this machine, kept in a file for the next process.

A process that begins knows neither what a round costs nor how many drafts are kept, and a short text is over before it
does. Owns the file: what it is named by, and that one which cannot be read or written is no reason to stop. Plain
Python; knows no engine and no array.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mlx_mtp.auto import Auto
from mlx_mtp.depth import Apart, Depth, depth_of
from mlx_mtp.kept import write_whole

VERSION = 1  # of what is kept: a file of another one is not read
T = TypeVar("T")


class Tuning:
    """A file, named by a pair and what its rounds depend on."""

    def __init__(self, place: Path, checkpoints: Sequence[Path], *settings: object) -> None:
        """place: the folder, made when it is needed. checkpoints: folders of weights, told apart by path, sizes
        and times. settings: all else that rounds depend on."""
        weights = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns)
            for folder in checkpoints
            for file in sorted(folder.resolve().glob("*.safetensors"))
        ]
        key = hashlib.sha256(repr((VERSION, weights, settings)).encode()).hexdigest()[:32]
        self.file = place / f"tuning-{key}.json"

    def recall(self, restored: Callable[[Any], T]) -> T | None:
        """What `restored` makes of what was kept; None if nothing was, or nothing can be made of it."""
        try:
            return restored(json.loads(self.file.read_text(), parse_constant=_refuse))
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
            return None

    def keep(self, state: Any) -> None:
        """Keep plain values of JSON in place of what was kept; where that cannot be done nothing changes."""
        told = json.dumps(state).encode()
        write_whole(self.file, lambda stream: stream.write(told))


class Policies:
    """The width policies of a pair by what was asked for, each made once; "auto" begins with what a file tells."""

    def __init__(self, tuning: Tuning | None) -> None:
        self._tuning = tuning
        self._made: dict[str, Depth] = {}  # by the width as it is written: True and 1.0 are equal to 1

    def of(self, width: int | str) -> Depth:
        """Raises RequestError."""
        key = repr(width)
        if key not in self._made:
            found = self._tuning.recall(Apart.restored) if self._tuning and width == "auto" else None
            self._made[key] = found or depth_of(width)
        return self._made[key]

    def unaware(self, rows: int) -> list[Auto]:
        """Those of "auto" that do not know what rounds of so many rows cost."""
        depth = self.of("auto")
        assert isinstance(depth, Apart)
        return [auto for auto in depth.both if not auto.knows(rows)]

    def keep(self) -> None:
        """Keep what "auto" has learnt."""
        depth = self._made.get(repr("auto"))
        if self._tuning and isinstance(depth, Apart):
            self._tuning.keep(depth.state())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
