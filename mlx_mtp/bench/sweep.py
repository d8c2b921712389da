"""The loop alone, timed over batches, contexts, widths and acceptances. All widths of a setting take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.bench.made_up import MadeUp
from mlx_mtp.bench.settings import Sweep
from mlx_mtp.bench.synthetic import Synthetic
from mlx_mtp.cache import Cache
from mlx_mtp.depth import MAX_WIDTH, depth_of
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.rows import GREEDY, Request, Stats
from mlx_mtp.scheduler import Limits

WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """One engine's work: rows, positions in the cache of each, width, and the chance of a draft to be kept."""

    batch: int
    context: int
    width: int
    acceptance: float


@dataclass(frozen=True)
class Run:
    """Timed rounds. tokens: of all rows. host_s: of seconds, in which the device had nothing to do."""

    tokens: int
    rounds: int
    seconds: float
    host_s: float

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Result:
    """All runs of a setting. verify_s, draft_s: of a round, from a profiled run, whose waits add to both."""

    setting: Setting
    runs: list[Run] = field(default_factory=list)
    verify_s: float = 0.0
    draft_s: float = 0.0

    @property
    def tok_s(self) -> list[float]:
        return [run.tok_s for run in self.runs]

    @property
    def tokens_per_round(self) -> float:
        """Of one row; also the speed-up if drafting and further columns cost nothing."""
        return sum(run.tokens for run in self.runs) / sum(run.rounds for run in self.runs) / self.setting.batch

    @property
    def host_s(self) -> float:
        """Of a round, the median over the runs."""
        return statistics.median(run.host_s / run.rounds for run in self.runs)


@dataclass(frozen=True)
class Line:
    """One line of the report: a width beside width 0 of the same setting.

    verify_ratio: T(columns) / T(1). draft_share: of a round's time on the device. speedup: median, least and most of
    the ratios within a repeat; free_speedup: what tokens per round alone would give.
    """

    setting: Setting
    tok_s: float
    tokens_per_round: float
    verify_ms: float
    verify_ratio: float
    draft_share: float
    host_ms: float
    speedup: float
    least_speedup: float
    most_speedup: float
    free_speedup: float


def sweep(made: MadeUp, asked: Sweep) -> Iterator[list[Line]]:
    """Lines of one (context, batch, acceptance) after the other, width 0 first."""
    for context in asked.contexts:
        for batch in asked.batches:
            for acceptance in asked.acceptance:
                widths = sorted({0, *asked.widths})
                yield lines(measure(made, asked, [Setting(batch, context, k, acceptance) for k in widths]))


def measure(made: MadeUp, asked: Sweep, settings: list[Setting]) -> list[Result]:
    """Runs of every setting, taking turns in an order that reverses with every repeat."""
    results = [Result(setting) for setting in settings]
    for result in results:
        _profile(made, asked, result)
    for repeat in range(asked.repeats):
        for result in results if repeat % 2 else results[::-1]:
            run, _ = _run(made, result.setting, asked.rounds, repeat, profile=False)
            result.runs.append(run)
    return results


def lines(results: list[Result]) -> list[Line]:
    """The report of results of which the first has width 0."""
    plain = results[0]
    out = []
    for r in results:
        ratios = [a / b for a, b in zip(r.tok_s, plain.tok_s, strict=True)]
        spent_s = r.verify_s + r.draft_s
        out.append(
            Line(
                setting=r.setting,
                tok_s=statistics.median(r.tok_s),
                tokens_per_round=r.tokens_per_round,
                verify_ms=1000 * r.verify_s,
                verify_ratio=r.verify_s / plain.verify_s,
                draft_share=r.draft_s / spent_s,
                host_ms=1000 * r.host_s,
                speedup=statistics.median(ratios),
                least_speedup=min(ratios),
                most_speedup=max(ratios),
                free_speedup=r.tokens_per_round / plain.tokens_per_round,
            )
        )
    return out


def _profile(made: MadeUp, asked: Sweep, result: Result) -> None:
    """Tell drafting from verifying; also the run that builds kernels, so that no timed one does."""
    _, stats = _run(made, result.setting, asked.rounds, 0, profile=True)
    result.draft_s = stats.draft_s / stats.rounds
    result.verify_s = (stats.device_s - stats.draft_s) / stats.rounds


def _run(made: MadeUp, setting: Setting, rounds: int, seed: int, profile: bool) -> tuple[Run, Stats]:
    """Some rounds of a fresh engine; statistics are of its first row, from the first timed round on."""
    engine, requests = _engine(made, setting, rounds, seed, profile)
    decoding = 0
    while decoding < setting.batch:
        decoding += sum(bool(event.tokens) for event in engine.step() if event.request in requests)
    for _ in range(WARM_UP_ROUNDS):
        engine.step()
    first = engine.scheduler.rows[0].stats
    before, start = (first.device_s, first.draft_s, first.host_s, first.rounds), time.perf_counter()
    tokens = sum(len(event.tokens) for _ in range(rounds) for event in engine.step())
    seconds = time.perf_counter() - start
    device_s, draft_s, host_s, count = (
        now - then
        for now, then in zip((first.device_s, first.draft_s, first.host_s, first.rounds), before, strict=True)
    )
    for request in requests:
        engine.cancel(request)
    mx.clear_cache()
    stats = Stats(rounds=int(count), device_s=device_s, draft_s=draft_s, host_s=host_s)
    return Run(tokens, rounds, seconds, host_s), stats


def _engine(made: MadeUp, setting: Setting, rounds: int, seed: int, profile: bool) -> tuple[Engine, list[int]]:
    """An engine with all rows submitted. None of them ends before `rounds` rounds are over."""
    cache = Cache(made.target.specs, MAX_WIDTH, made.dtype)
    drafter = MtpDrafter(made.target, made.drafter, cache)
    limits = Limits(max_rows=setting.batch)
    engine = Engine(made.target, cache, drafter, depth_of(setting.width), limits, profile)
    engine.judge = Synthetic(setting.acceptance, seed)
    vocabulary = made.target.config.vocab_size
    prompt = tuple((31 * i + 7) % vocabulary for i in range(setting.context))
    most = (setting.width + 1) * (rounds + WARM_UP_ROUNDS + setting.batch + 4)
    return engine, [engine.submit(Request(prompt, most, GREEDY)) for _ in range(setting.batch)]
