"""Counts and times for Prometheus, and the log line of every request. Knows no dialect."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_mtp.rows import Stats

if TYPE_CHECKING:
    from mlx_mtp.server.worker import EngineThread, GenerationStream

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS_PER_SECOND = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """One server's metrics, in a registry of their own.

    request_s: a running average of how long requests take; 1 until the first has ended.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "mlx_mtp"}
        self._requests = Counter("requests", "HTTP requests", ("path", "status"), **own)
        self._tokens = Counter("tokens", "Tokens of finished outputs", ("kind",), **own)
        self._rounds = Counter("rounds", "Target passes after the prompt, summed over outputs", **own)
        self._drafts = Counter("draft_tokens", "Draft tokens, by what the target made of them", ("result",), **own)
        self._ttft = Histogram("time_to_first_token_seconds", "From request to first token", buckets=SECONDS, **own)
        self._latency = Histogram("request_latency_seconds", "From request to its end", buckets=SECONDS, **own)
        self._rate = Histogram("decode_tokens_per_second", "Of one output", buckets=TOKENS_PER_SECOND, **own)
        self._outputs = Gauge("outputs", "Outputs in the engine now", ("state",), **own)
        self._faults = Gauge("engine_faults", "Engine faults since the start", **own)
        self._ready = Gauge("ready", "1 while requests are accepted", **own)
        self.request_s = 1.0

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def generation(self, generation: GenerationStream) -> None:
        """Count a request whose outputs have ended or were cancelled."""
        seconds = time.perf_counter() - generation.start_s
        self._latency.observe(seconds)
        self.request_s += 0.2 * (seconds - self.request_s)
        if generation.first_token_s is not None:
            self._ttft.observe(generation.first_token_s - generation.start_s)
        for finish in generation.finishes:
            if finish is not None:
                self._output(finish.stats)

    def _output(self, stats: Stats) -> None:
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("cached").inc(stats.cached_tokens)
        self._tokens.labels("generated").inc(stats.generated_tokens)
        self._rounds.inc(stats.rounds)
        self._drafts.labels("accepted").inc(stats.kept)
        self._drafts.labels("rejected").inc(stats.drafted - stats.kept)
        if stats.decode_s > 0:
            self._rate.observe(stats.decode_tok_s)

    def page(self, engine_thread: EngineThread) -> bytes:
        """All metrics in Prometheus' text format."""
        self._outputs.labels("running").set(engine_thread.running)
        self._outputs.labels("open").set(engine_thread.open)
        self._faults.set(engine_thread.faults)
        self._ready.set(engine_thread.state == "ready")
        return generate_latest(self.registry)


def log_fields(generation: GenerationStream) -> dict[str, Any]:
    """A request's outputs for its log line: tokens, rounds, seconds, tokens a second.

    mean_accepted_length: 1 + accepted draft tokens / rounds with a draft, as in vLLM; 1 without drafts.
    ttft_passes, ttft_positions: the engine's passes, and their positions, from the request to its first token.
    """
    total, ended = Stats(), [finish for finish in generation.finishes if finish is not None]
    for finish in ended:
        total.add(finish.stats)
    usage, first = generation.usage, generation.first_token_s
    loops = [finish.loop_tok for finish in ended if finish.loop_tok is not None]
    drafts = sum(rounds for width, rounds in total.widths.items() if width)
    return {
        **({"loop_tok": loops} if loops else {}),
        "outputs": len(generation.choices),
        "finish": ",".join(finish.reason if finish else "error" for finish in generation.finishes),
        "prompt_tok": usage.prompt_tok,
        "cached_tok": usage.cached_tok,
        "generated_tok": usage.completion_tok,
        "rounds": total.rounds,
        "mean_accepted_length": round(1 + total.kept / drafts, 2) if drafts else 1.0,
        "ttft_passes": max((finish.stats.first_passes for finish in ended), default=0),
        "ttft_positions": max((finish.stats.first_columns for finish in ended), default=0),
        "ttft_s": None if first is None else round(first - generation.start_s, 4),
        "decode_tok_s": round(total.decode_tok_s, 1),
    }


def log(entry: dict[str, Any]) -> None:
    """One line of JSON on stderr."""
    print(json.dumps(entry, default=str), file=sys.stderr, flush=True)
