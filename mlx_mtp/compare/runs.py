"""One run of one runtime, timed from outside. Knows no runtime: only requests that go in and tokens that come out.

Every runtime is timed alike, by the moments at which its tokens reach the caller.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mlx_mtp.compare.cases import Prompt


@dataclass
class Drafts:
    """What drafting brought. rounds: target passes after the prompt, of every row or of the whole batch.

    drafted_at[i], kept_at[i]: how often position i was drafted, and how often it was kept.
    """

    rounds: int = 0
    drafted_at: list[int] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)

    def add(self, rounds: int, drafted_at: Sequence[int], kept_at: Sequence[int]) -> None:
        self.rounds += rounds
        for mine, other in ((self.drafted_at, drafted_at), (self.kept_at, kept_at)):
            mine += [0] * (len(other) - len(mine))
            for i, count in enumerate(other):
                mine[i] += count

    @property
    def by_position(self) -> list[float]:
        return [k / d if d else 0.0 for k, d in zip(self.kept_at, self.drafted_at, strict=True)]


class Session(Protocol):
    """Requests that run side by side in a runtime's loop for several."""

    def submit(self, prompt: Prompt, tokens: int) -> int: ...

    def step(self) -> list[tuple[int, list[int]]]:
        """Do a bit of work; (request, new tokens) of every request that got some."""
        ...

    def close(self) -> None: ...


class Mode(Protocol):
    """One way a runtime decodes. batches: whether it can run several rows at once."""

    batches: bool

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        """The runtime's own loop for one request, of exactly so many tokens."""
        ...

    def open(self) -> Session: ...

    def drafts(self) -> Drafts:
        """Of what has run since this was last asked."""
        ...


@dataclass
class Run:
    """Tokens of a run as they reached the caller. arrivals: (seconds since the requests, row, tokens)."""

    rows: int
    prompt_tokens: int
    arrivals: list[tuple[float, int, list[int]]] = field(default_factory=list)
    drafts: Drafts = field(default_factory=Drafts)
    peak_bytes: int = 0

    def tokens(self, row: int) -> list[int]:
        return [t for _, r, new in self.arrivals if r == row for t in new]

    @property
    def steps(self) -> int:
        """Moments at which tokens came, after the first."""
        return len({at for at, _, _ in self.arrivals}) - 1

    @property
    def prefill_s(self) -> float:
        """Until every row had a token."""
        return max(next(at for at, r, _ in self.arrivals if r == row) for row in range(self.rows))

    @property
    def window(self) -> tuple[float, float]:
        """When decoding is timed: from the first moment at which tokens came to the last but one.

        Some runtimes dispatch a round before they hand over the tokens of the one before, and where dispatching takes
        as long as computing, all but the last of these moments come a round late. Without the last, as many rounds
        are computed in the window as their tokens are counted, for every runtime.
        """
        moments = sorted({at for at, _, _ in self.arrivals})
        return moments[0], moments[-2] if len(moments) > 2 else moments[-1]

    @property
    def decoded(self) -> int:
        """Tokens of all rows that came in the window, after its beginning."""
        start, end = self.window
        return sum(len(new) for at, _, new in self.arrivals if start < at <= end)

    @property
    def decode_s(self) -> float:
        start, end = self.window
        return end - start

    @property
    def tokens_per_round(self) -> float:
        """Of a row, after its first token: by the runtime's own count of rounds, or by the steps that brought some."""
        total = sum(len(self.tokens(row)) - 1 for row in range(self.rows))
        if self.rows == 1 and self.drafts.rounds:
            return total / self.drafts.rounds
        times = sum(len({at for at, r, _ in self.arrivals if r == row}) - 1 for row in range(self.rows))
        return total / times if times else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(value: dict[str, Any]) -> Run:
        arrivals = [(at, row, tokens) for at, row, tokens in value["arrivals"]]
        return Run(value["rows"], value["prompt_tokens"], arrivals, Drafts(**value["drafts"]), value["peak_bytes"])


def run(mode: Mode, prompts: Sequence[Prompt], tokens: int) -> Run:
    """One prompt through a runtime's single loop, several through its batch; `tokens` new ones each."""
    gc.collect()  # also lets a pass finish that some runtimes leave behind
    mode.drafts()
    mx.reset_peak_memory()
    out = Run(len(prompts), sum(map(len, prompts)))
    (_batch if len(prompts) > 1 else _single)(mode, prompts, tokens, out)
    out.drafts, out.peak_bytes = mode.drafts(), mx.get_peak_memory()
    return out


def _single(mode: Mode, prompts: Sequence[Prompt], tokens: int, out: Run) -> None:
    start, count = time.perf_counter(), 0
    for new in mode.solo(prompts[0], tokens):
        new = new[: tokens - count]
        if new:
            out.arrivals.append((time.perf_counter() - start, 0, new))
        count += len(new)


def _batch(mode: Mode, prompts: Sequence[Prompt], tokens: int, out: Run) -> None:
    session, left = mode.open(), [tokens] * len(prompts)
    start = time.perf_counter()
    row_of = {session.submit(prompt, tokens): row for row, prompt in enumerate(prompts)}
    while any(left):
        got = session.step()
        now = time.perf_counter() - start
        for request, new in got:
            row = row_of[request]
            new = new[: left[row]]
            if new:
                out.arrivals.append((now, row, new))
                left[row] -= len(new)
    session.close()
