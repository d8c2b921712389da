"""What passes between a dialect and the engine thread: settings, stream chunks, usage, errors. Plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_mtp.loops import LoopLimits
from mlx_mtp.rows import Stats, TokenLogprob
from mlx_mtp.segments import Segment

State = Literal["loading", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class Settings:
    """How a server runs. The command line checks the values."""

    name: str  # the model id that clients see
    aliases: tuple[str, ...] = ()  # other ids that requests may name; "*" accepts any
    max_num_seqs: int = 8  # sequences that run at once; n=4 is four sequences
    max_queued: int = 64  # sequences that may wait
    num_draft_tokens: int | str = "auto"  # draft tokens a round: a number, "heuristic" or "auto"
    sampling: dict[str, Any] = field(default_factory=dict)  # replaces the checkpoint's defaults
    max_tokens: int | None = None  # for requests that set no limit
    api_key: str | None = None  # None leaves the server open
    origins: tuple[str, ...] = ()  # web origins that may call; "*" allows any
    hosts: tuple[str, ...] = ()  # host names to answer to, besides this machine's own; "*" allows any
    body_bytes: int = 32 * 2**20  # the longest request body
    loop_guard: LoopLimits | None = field(default_factory=LoopLimits)  # ends a chat output that repeats; None is off
    keepalive_s: float = 5.0  # a silent stream sends a keepalive this often
    # (sequences at once, prompt tokens of each), one after another before the first request: no client waits for
    # kernels to compile. "auto" measures the cost of rounds first.
    warm_up: tuple[tuple[int, int], ...] = ((1, 8), (1, 600), (2, 24), (4, 24))
    grace_s: float = 30.0  # time that open requests have after SIGTERM


@dataclass(frozen=True)
class FinishInfo:
    """How one choice ended."""

    reason: Literal["stop", "length", "cancelled"]
    stop: str | None  # the stop string that ended it
    calls: int  # tool calls in the output
    reasoning_tok: int  # reasoning tokens, markers included
    stats: Stats
    loop_tok: int | None = None  # period of the loop that the guard found, in tokens


@dataclass(frozen=True)
class StreamChunk:
    """What a round added to one choice. The last chunk of a choice has `finish`.

    logprobs: of the answer's visible tokens, in order. Text may arrive later than its tokens.
    """

    segments: tuple[Segment, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishInfo | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request, summed over its choices. A prompt that choices share counts once."""

    prompt_tok: int
    cached_tok: int
    completion_tok: int
    reasoning_tok: int


@dataclass(eq=False)
class ServerError(Exception):
    """A request that is refused or has failed. Each dialect writes it in its own form."""

    status: int  # of HTTP
    code: str | None  # for programs
    message: str
    param: str | None = None  # the field at fault
    retry_s: float | None = None  # seconds until a retry may succeed


def invalid(message: str, param: str | None = None, code: str | None = None) -> ServerError:
    """A request that cannot be honoured as written (400)."""
    return ServerError(400, code, message, param)


def shutting_down() -> ServerError:
    return ServerError(503, "shutting_down", "the server is shutting down")
