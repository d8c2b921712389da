"""Counts and times for Prometheus, and the log line of every request. Knows no dialect."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_mtp.rows import Stats

if TYPE_CHECKING:
    from mlx_mtp.server.worker import Generation, Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's metrics, in a registry of their own.

    job_s: how long a text takes of late, from its request to its end; 1 until it is known.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "mlx_mtp"}
        self._requests = Counter("requests", "HTTP requests", ("path", "status"), **own)
        self._tokens = Counter("tokens", "Tokens of finished texts", ("kind",), **own)
        self._rounds = Counter("rounds", "Passes of the target after the prompt, over all texts", **own)
        self._drafts = Counter("drafts", "Drafted tokens", ("verdict",), **own)
        self._first = Histogram("first_token_seconds", "From the request to its first token", buckets=SECONDS, **own)
        self._whole = Histogram("generation_seconds", "From the request to its end", buckets=SECONDS, **own)
        self._rate = Histogram(
            "decode_tokens_per_second", "Of one text", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500), **own
        )
        self._rows = Gauge("texts", "Texts in the engine now", ("state",), **own)
        self._faults = Gauge("engine_faults", "Faults of the engine since the start", **own)
        self._ready = Gauge("ready", "1 while requests are taken", **own)
        self.job_s = 1.0

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def generation(self, generation: Generation) -> None:
        """A request's texts have ended, or were cancelled."""
        seconds = time.perf_counter() - generation.begun_s
        self._whole.observe(seconds)
        self.job_s += 0.2 * (seconds - self.job_s)
        if generation.first_token_s is not None:
            self._first.observe(generation.first_token_s - generation.begun_s)
        for finish in generation.finishes:
            if finish is not None:
                self._text(finish.stats)

    def _text(self, stats: Stats) -> None:
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("cached").inc(stats.cached_tokens)
        self._tokens.labels("generated").inc(stats.generated_tokens)
        self._rounds.inc(stats.rounds)
        self._drafts.labels("kept").inc(stats.kept)
        self._drafts.labels("rejected").inc(stats.drafted - stats.kept)
        if stats.decode_s > 0:
            self._rate.observe(stats.decode_tok_s)

    def page(self, worker: Worker) -> bytes:
        """Everything in Prometheus' text form."""
        self._rows.labels("running").set(worker.running)
        self._rows.labels("open").set(worker.open)
        self._faults.set(worker.faults)
        self._ready.set(worker.state == "ready")
        return generate_latest(self.registry)


def facts(generation: Generation) -> dict[str, Any]:
    """What the log line tells of a request's texts: tokens, rounds, times in seconds, tokens a second."""
    total, ended = Stats(), [f for f in generation.finishes if f is not None]
    for finish in ended:
        total.add(finish.stats)
    usage, first = generation.usage, generation.first_token_s
    loops = [finish.loop_tok for finish in ended if finish.loop_tok is not None]
    return {
        **({"loop_tok": loops} if loops else {}),
        "texts": len(generation.jobs),
        "finish": ",".join(f.reason if f else "error" for f in generation.finishes),
        "prompt_tok": usage.prompt_tok,
        "cached_tok": usage.cached_tok,
        "generated_tok": usage.completion_tok,
        "rounds": total.rounds,
        "kept_per_round": round(total.kept / total.rounds, 2) if total.rounds else 0.0,
        "first_passes": max((finish.stats.first_passes for finish in ended), default=0),
        "first_columns": max((finish.stats.first_columns for finish in ended), default=0),
        "first_token_s": None if first is None else round(first - generation.begun_s, 4),
        "decode_tok_s": round(total.decode_tok_s, 1),
    }


def log(entry: dict[str, Any]) -> None:
    """One line of JSON on stderr."""
    print(json.dumps(entry, default=str), file=sys.stderr, flush=True)
