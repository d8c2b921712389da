"""Files of this package's own: where they lie, and that nobody ever sees half of one. Knows not what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def own_cache() -> Path:
    """The user's folder for them."""
    return Path.home() / ".cache" / "mlx-mtp"


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Put what `write` writes in a file's place, whose folder is made if need be; False where that cannot be done, and
    what was there stays."""
    own = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as stream:
            write(stream)
        own.replace(file)
        return True
    except OSError:
        _forget(own)
        return False


def _forget(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        pass  # the folder itself cannot be reached
