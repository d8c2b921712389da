"""Who is compared, the processes they run in, and whose turn it is. Computes nothing itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_mtp.compare.cases import Case, Prompt
from mlx_mtp.compare.runs import Run
from mlx_mtp.compare.worker import Load
from mlx_mtp.rows import MlxMtpError


class CompareError(MlxMtpError):
    """A runtime that cannot be compared, or a process of it that has ended."""


@dataclass(frozen=True)
class Contender:
    """One way of decoding. plain: the contender that decodes without drafts in the same runtime."""

    name: str
    runtime: str
    mode: str
    drafts: bool
    plain: str
    batches: bool = True


PLAIN = Contender("mlx-mtp width 0", "mlx-mtp", "0", False, "mlx-mtp width 0")
BASELINE = Contender("mlx-lm plain", "mlx-lm", "plain", False, "mlx-lm plain")


@dataclass(frozen=True)
class Protocol:
    """How it is measured. one_at_a_time: only one process holds weights; they are read anew for every turn."""

    tokens: int
    repeats: int
    cool_down_s: float = 0.0
    one_at_a_time: bool = False


class Worker:
    """A process of one runtime. Raises CompareError where it fails."""

    def __init__(self, what: Load) -> None:
        self._runtime = what.runtime
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlx_mtp.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.ask(asdict(what))

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send a job and wait for its answer."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; its last words follow
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"its process ended ({self._process.wait()})"}
        if "error" in reply:
            said = "" if line else f": {self._last_words()}"
            self.close()
            raise CompareError(f"{self._runtime}: {reply['error']}{said}")
        return reply

    def close(self) -> None:
        """Let it end, which frees its memory."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _last_words(self) -> str:
        self._stderr.seek(0)
        return next((line.strip() for line in reversed(self._stderr.readlines()) if line.strip()), "it said nothing")


class Pool:
    """A worker for every runtime, started when it is first needed."""

    def __init__(self, loads: Sequence[Load], one_at_a_time: bool) -> None:
        self._loads, self._alone = {load.runtime: load for load in loads}, one_at_a_time
        self._workers: dict[str, Worker] = {}
        self.target = loads[0].target  # the folder that all of them load

    def ask(self, runtime: str, job: dict[str, Any]) -> dict[str, Any]:
        if runtime not in self._workers:
            if self._alone:
                self.close()
            self._workers[runtime] = Worker(self._loads[runtime])
        return self._workers[runtime].ask(job)

    def run(self, contender: Contender, prompts: Sequence[Prompt], tokens: int) -> Run:
        job = {"do": "run", "mode": contender.mode, "prompts": prompts, "tokens": tokens}
        return Run.of(self.ask(contender.runtime, job))

    def margin(self, tokens: Sequence[int]) -> float:
        return self.ask(PLAIN.runtime, {"do": "margin", "tokens": list(tokens)})["margin"]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


@dataclass
class Measured:
    """A contender's runs of one table. texts: of the warm-up, by case; timed: by repeat and case."""

    contender: Contender
    texts: list[Run] = field(default_factory=list)
    timed: list[list[Run]] = field(default_factory=list)

    @property
    def stable(self) -> bool:
        """Whether every run of a case wrote the same."""
        return all(
            run.tokens(row) == text.tokens(row)
            for runs in self.timed
            for run, text in zip(runs, self.texts, strict=True)
            for row in range(run.rows)
        )


def turns(count: int, repeat: int, case: int) -> list[int]:
    """The order of `count` contenders: turned by one with every second repeat and every case, and reversed in every
    other repeat, so that two repeats are A B .. B A."""
    shift = (repeat // 2 + case) % count
    order = [(i + shift) % count for i in range(count)]
    return order[::-1] if repeat % 2 else order


def measure(pool: Pool, contenders: Sequence[Contender], cases: Sequence[Case], how: Protocol) -> list[Measured]:
    """Every contender over every case: a warm-up, whose text is kept, then `how.repeats` timed runs in turns."""
    rows = len(cases[0].prompts)
    out = [Measured(c) for c in contenders if rows == 1 or c.batches]
    for m in out:
        m.texts = [pool.run(m.contender, case.prompts, how.tokens) for case in cases]
    for repeat in range(how.repeats):
        for m in out:
            m.timed.append([])
        for number, case in enumerate(cases):
            for i in turns(len(out), repeat, number):
                time.sleep(how.cool_down_s)
                out[i].timed[-1].append(pool.run(out[i].contender, case.prompts, how.tokens))
    return out


@dataclass(frozen=True)
class Divergence:
    """Where a row's text first differs from what the target alone writes, and by how much the target was sure there."""

    case: int
    row: int
    at: int
    expected: int
    got: int
    margin: float


class Reference:
    """What the target alone writes: this package at width 0, a row at a time."""

    def __init__(self, pool: Pool, tokens: int) -> None:
        self._pool, self._count = pool, tokens
        self._known: dict[Prompt, list[int]] = {}

    def tokens(self, prompt: Prompt) -> list[int]:
        if prompt not in self._known:
            self._known[prompt] = self._pool.run(PLAIN, [prompt], self._count).tokens(0)
        return self._known[prompt]

    def divergences(self, cases: Sequence[Case], texts: Sequence[Run]) -> Iterator[Divergence]:
        for number, (case, text) in enumerate(zip(cases, texts, strict=True)):
            for row, prompt in enumerate(case.prompts):
                wanted, got = self.tokens(prompt), text.tokens(row)
                at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), None)
                if at is not None:
                    margin = self._pool.margin([*prompt, *wanted[:at]])
                    yield Divergence(number, row, at, wanted[at], got[at], margin)
