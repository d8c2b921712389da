"""What a pair's rounds cost on this machine: measured once, on dummy prompts, and stored in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from mlx_mtp.draft_length import CostProfile, DraftRound
from mlx_mtp.engine import Engine
from mlx_mtp.kept import write_whole
from mlx_mtp.rows import Request

LENGTHS, BATCHES = (0, 1, 2, 4, 8), (1, 4, 8)
MIN_SWEEPS, MAX_SWEEPS, ENOUGH_S = 3, 9, 1.0  # sweeps over the lengths: at least so many, more while they are quick
PROMPT_TOK, OUTPUT_TOK = 8, 400  # as many as all sweeps can bring
VERSION = 1  # of the file's format


class _Sweeps:
    """A DraftLengthPolicy that runs every length twice in turn. The first round of each two counts: the next one is
    built meanwhile, and is of the same length."""

    drafts = True

    def __init__(self, batch: int) -> None:
        self._batch, self._lengths, self._before = batch, cycle([k for k in LENGTHS for _ in range(2)]), -1
        self.times: dict[int, list[float]] = defaultdict(list)  # seconds, by what was drafted

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        return next(self._lengths) if len(matched) == self._batch else 0  # others are still on their way

    def record(self, done: DraftRound) -> None:
        if len(done.num_accepted) == self._batch:
            if done.k != self._before and done.seconds is not None:
                self.times[done.k].append(done.seconds)
            self._before = done.k


def measure(engine: Engine, batch: int, max_tokens: int) -> list[float] | None:
    """Costs of rounds at a batch size, as in `CostProfile`, by running a new engine; None where too few rounds fit into
    max_tokens, which is what a sequence has room for."""
    engine.policy = sweeps = _Sweeps(batch)
    for prompt in dummy_prompts(batch, PROMPT_TOK):
        engine.submit(Request(prompt, max(1, min(OUTPUT_TOK, max_tokens - PROMPT_TOK))))
    began_s, done = time.perf_counter(), 0
    while not engine.idle and (done <= MIN_SWEEPS or (done <= MAX_SWEEPS and time.perf_counter() - began_s < ENOUGH_S)):
        engine.step()
        done = min(len(times) for times in sweeps.times.values()) if len(sweeps.times) > 1 else 0
    # The first round of a length builds kernels. The minimum, because other programs only ever add time.
    timed = {k: min(times[1:]) for k, times in sweeps.times.items() if len(times) > 1}
    return _by_length(timed) if 0 in timed and len(timed) > 1 else None


def _by_length(seconds: dict[int, float]) -> list[float]:
    """Costs of all lengths, on a line between those measured. A round never takes longer than one that drafts more:
    where it seemed to, something else had the machine."""
    took = {k: min(s for longer, s in seconds.items() if longer >= k) for k in seconds}
    costs = []
    for k in range(max(LENGTHS) + 1):
        low, high = max(n for n in took if n <= k), min((n for n in took if n >= k), default=max(took))
        part = (k - low) / (high - low) if high > low else 0.0
        costs.append((took[low] + part * (took[high] - took[low])) / took[0])
    return costs


def dummy_prompts(batch: int, length: int) -> list[tuple[int, ...]]:
    """Prompts of so many tokens, for outputs that nobody reads."""
    return [tuple(3 + (i + row) % 32 for i in range(length)) for row in range(batch)]


class CostProfiler:
    """Loads a pair's profile, measures what it lacks, and stores it."""

    def __init__(self, file: Path, catch_up: float) -> None:
        """catch_up: as of `CostProfile`."""
        self._file, self._catch_up = file, catch_up
        self._costs: dict[int, list[float]] | None = None  # not loaded yet

    def profile(
        self, batches: Iterable[int], new_engine: Callable[[], Engine], max_tokens: int
    ) -> tuple[CostProfile | None, bool]:
        """The profile, with these batch sizes among those measured; None where none can be measured. And whether any
        had to be.

        max_tokens: that a sequence has room for.
        """
        if self._costs is None:
            self._costs = load_costs(self._file)
        missing = sorted(set(batches) - set(self._costs))
        for size in missing:
            costs = measure(new_engine(), size, max_tokens)
            if costs is None:
                break
            self._costs[size] = costs
        if missing:
            text = json.dumps({"version": VERSION, "costs": self._costs}).encode()
            write_whole(self._file, lambda stream: stream.write(text))
        return CostProfile(self._costs, self._catch_up) if self._costs else None, bool(missing)


def file_of(folder: Path, checkpoints: Sequence[Path], *settings: object) -> Path:
    """Where the profile of a pair lies: named by its weights (path, sizes, times) and all else that costs depend on."""
    weights = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for checkpoint in checkpoints
        for file in sorted(checkpoint.resolve().glob("*.safetensors"))
    ]
    key = hashlib.sha256(repr((weights, settings)).encode()).hexdigest()[:32]
    return folder / f"costs-{key}.json"


def load_costs(file: Path) -> dict[int, list[float]]:
    """What was stored; nothing where there is no such file or it is damaged."""
    try:
        value: Any = json.loads(file.read_text())
        costs = {int(batch): [float(cost) for cost in row] for batch, row in value["costs"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        return {}
    whole = value.get("version") == VERSION and all(_plausible(batch, row) for batch, row in costs.items())
    return costs if whole else {}


def _plausible(batch: int, row: list[float]) -> bool:
    rising = all(math.isfinite(b) and a <= b for a, b in zip(row, row[1:], strict=False))
    return batch > 0 and len(row) == max(LENGTHS) + 1 and row[0] == 1.0 and rising
