"""Whether the kernels that a model uses work on this device, and win: built, compared and timed when it is loaded.

Nobody has run these kernels on Metal. So each is tried on the shapes of the model that was just read, in all variants a
round can ask for: later nothing is left to build. What the device refuses, what differs from the reference or from
itself with one row, and what takes longer than MLX's own operations is not used. Times are kept in a file; they are the
only thing that is not found out again at the next load.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx

from mlx_mtp.kept import write_whole
from mlx_mtp.kernels import attend, delta, experts, gate_up, head, rows_qmv, verdict
from mlx_mtp.kernels.backend import why_not_here
from mlx_mtp.rows import RequestError

KERNELS = {
    "rows_qmv": rows_qmv,
    "gate_up": gate_up,
    "experts": experts,
    "attend": attend,
    "delta": delta,
    "head": head,
    "verdict": verdict,
}
LOSS = 1.05  # times MLX's own from which a kernel is slower; less is noise
TIMED_ROWS = (1, 5)  # a plain round, and one that verifies four drafts
REPEATS = 4  # of both sides, in turns; the first builds what is not built yet, and does not count


@dataclass(frozen=True)
class Case:
    """A kernel for one shape of a model. shape: what the kernel is built for, as people read it.

    check: builds every variant that a round can ask for; what is wrong, or None. chain: (rows, whether by the kernel)
    -> the end of a chain of calls, each of which waits for the one before and reads what no cache holds.
    """

    kernel: str
    shape: str
    check: Callable[[], str | None]
    chain: Callable[[int, bool], Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a case. reason: why the kernel is not used, None if it is. ratio: its time over that of MLX's own
    operations, None where it was not timed."""

    kernel: str
    shape: str
    reason: str | None
    ratio: float | None = None


@dataclass(frozen=True)
class KernelChoice:
    """Which kernels may be used. names: these. forced: even where they lose."""

    names: frozenset[str] = frozenset(KERNELS)
    forced: bool = False

    @staticmethod
    def parse(text: str) -> KernelChoice:
        """ "auto" (all that win), "off", or names with commas between them. Raises RequestError."""
        if text == "auto":
            return KernelChoice()
        if text == "off":
            return KernelChoice(frozenset())
        names = frozenset(name.strip() for name in text.split(","))
        if not names <= set(KERNELS):
            raise RequestError(f"kernels is {text!r}; expected auto, off, or some of {', '.join(KERNELS)}")
        return KernelChoice(names, forced=True)


class Record:
    """Outcomes of earlier loads on this machine, in a file named by what they depend on."""

    def __init__(self, folder: Path, machine: Callable[[], tuple[str, ...]]) -> None:
        """machine: tells chip, system and MLX, with their versions."""
        self._folder, self._machine = folder, machine

    @cached_property
    def _file(self) -> Path:
        key = hashlib.sha256(repr((_sources(), *self._machine())).encode()).hexdigest()[:32]
        return self._folder / f"kernels-{key}.json"

    def outcomes(self) -> tuple[Outcome, ...]:
        """All there are; none if the file cannot be read."""
        try:
            return tuple(Outcome(*entry) for entry in json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            return ()

    def ratio(self, case: Case) -> float | None:
        """What a case was timed at."""
        found = (o.ratio for o in self.outcomes() if (o.kernel, o.shape) == (case.kernel, case.shape))
        return next((r for r in found if isinstance(r, (int, float))), None)

    def keep(self, outcomes: Iterable[Outcome]) -> None:
        """Put outcomes in the place of earlier ones of the same cases; nothing happens where no file can be written."""
        all_of_them = {(o.kernel, o.shape): o for o in (*self.outcomes(), *outcomes)}
        text = json.dumps([[o.kernel, o.shape, o.reason, o.ratio] for o in all_of_them.values()])
        write_whole(self._file, lambda stream: stream.write(text.encode()))


def self_test(cases: Iterable[Case], choice: KernelChoice, record: Record) -> tuple[Outcome, ...]:
    """Try a model's cases; none where no Metal kernel can run. Waits for the device."""
    if why_not_here():
        return ()
    outcomes = tuple(_try(case, choice, record) for case in cases if case.kernel in choice.names)
    record.keep(outcomes)
    return outcomes


def uses(outcomes: Iterable[Outcome], kernel: str, shape: str | None = None) -> bool:
    """Whether a kernel is used for a shape; without one, for any."""
    return any(o.kernel == kernel and o.reason is None and shape in (None, o.shape) for o in outcomes)


def summary(outcomes: Iterable[Outcome]) -> str:
    """One line: times in those of MLX's own operations, and what is not used and why."""
    used, unused = [], []
    for o in outcomes:
        name = f"{o.kernel} ({o.shape})"
        if o.reason:
            unused.append(f"{name}: {o.reason}")
        else:
            used.append(name if o.ratio is None else f"{name} {o.ratio:.2f}")
    parts = [f"used, with their time over that of MLX's own: {', '.join(used)}"] if used else []
    return "; ".join([*parts, *(f"not used, {text}" for text in unused)]) or "none is used"


def report(record: Record) -> tuple[tuple[str, str, str], ...]:
    """(kernel, state, reason) of what earlier loads on this machine found, for every kernel."""
    here, found = why_not_here(), record.outcomes()
    if here:
        return tuple((name, "not used", here) for name in KERNELS)
    lines = []
    for name, module in KERNELS.items():
        own = [o for o in found if o.kernel == name]
        for o in own:
            time = "not timed" if o.ratio is None else f"{o.ratio:.2f} of the time of MLX's own"
            lines.append((name, "not used" if o.reason else "used", f"{o.shape}: {o.reason or time}"))
        if not own:
            lines.append((name, "not tried yet", f"loading a model that needs it tries it; takes {module.TAKES}"))
    return tuple(lines)


def _try(case: Case, choice: KernelChoice, record: Record) -> Outcome:
    outcome = Outcome(case.kernel, case.shape, _attempt(case.check), record.ratio(case))
    if outcome.reason is None and outcome.ratio is None and mx.is_available(mx.gpu):  # an emulator's time says nothing
        outcome = _timed(case)
    if outcome.reason is None and outcome.ratio is not None and outcome.ratio > LOSS and not choice.forced:
        return replace(outcome, reason=f"it takes {outcome.ratio:.2f} times as long as MLX's own")
    return outcome


def _attempt(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # whatever Metal's compiler or MLX says: the plain path is there
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it fails on this device: {first[:160]}"


def _timed(case: Case) -> Outcome:
    found: list[float] = []
    failed = _attempt(lambda: found.append(_ratio(case)))
    return Outcome(case.kernel, case.shape, failed, found[0] if found else None)


def _ratio(case: Case) -> float:
    """Time by the kernel over that by MLX's own operations, of TIMED_ROWS together; medians."""
    sums = {True: 0.0, False: 0.0}
    for rows in TIMED_ROWS:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(REPEATS):
            for by_kernel, own in times.items():
                end = case.chain(rows, by_kernel)
                before = perf_counter()
                mx.eval(end)
                own.append(perf_counter() - before)
        for by_kernel, own in times.items():
            sums[by_kernel] += statistics.median(own[1:])
    return sums[True] / sums[False]


def _sources() -> str:
    """A name for the kernels' text as it is."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
