"""What has been computed of token sequences that later requests may begin with. Looks into no array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mtp.cache import Snapshot


@dataclass(frozen=True)
class Prefix:
    """The beginning of a row: its tokens, and what the cache and the drafter need to continue it."""

    tokens: tuple[int, ...]
    cache: Snapshot
    drafter: Any

    @property
    def length(self) -> int:
        return len(self.tokens)
