"""Folders of one size at a time: as published, as each converter writes them, and the drafter; made when asked for."""

import shutil
import subprocess
import sys
from pathlib import Path

from published import write_drafter, write_target

CUTS = {  # size -> layers that stay, and how many of the last share keys and values
    "E2B": ("ssfssf", 3),
    "12B": ("sf", 0),
    "26B-A4B": ("sf", 0),
    "31B": ("sf", 0),
}
PUBLISHED = "published"


class Shelf:
    """A folder with the checkpoints of one size, about 6 GB at most."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def target(self, size: str, kind: str = PUBLISHED) -> Path:
        """kind: "published", or the converter with its bits, such as "mlx_lm 4"."""
        folder = self._of(size) / kind.replace(" ", "-")
        if folder.exists():
            return folder
        if kind == PUBLISHED:
            return write_target(folder, size, *CUTS[size])
        converter, bits = kind.split()
        paths = ["--hf-path", str(self.target(size)), "--mlx-path", str(folder)]
        command = [sys.executable, "-m", converter, "convert", *paths, "-q", "--q-bits", bits]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}"
        return folder

    def drafter(self, size: str) -> Path:
        folder = self._of(size) / "assistant"
        return folder if folder.exists() else write_drafter(folder, size)

    def _of(self, size: str) -> Path:
        """The folder of a size; what there is of another is removed."""
        self.clear(but=size)
        return self._root / size

    def clear(self, but: str = "") -> None:
        for other in self._root.iterdir():
            if other.name != but:
                shutil.rmtree(other)
