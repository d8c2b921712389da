"""What passes between a dialect and the worker: settings, jobs, deltas, errors. Plain values; knows no HTTP library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_mtp.loops import LoopLimits
from mlx_mtp.rows import Constraint, Sampling, Stats, TokenLogprob
from mlx_mtp.segments import Segment

State = Literal["loading", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class Settings:
    """How a server runs; the command line's options, checked.

    name: the model id that clients see. aliases: other names that requests may give; "*" is any.
    rows: requests that run at once. queue: how many more may wait. choices counted, so n=4 is four of them.
    width: tokens drafted a round, a number, "heuristic" or "auto".
    sampling: values that take the place of the checkpoint's defaults. max_tokens: for requests that name none.
    api_key: None leaves the server open. origins: web origins that may call it, "*" is any. hosts: host names beside
    this machine's that it answers to, "*" is any.
    warm_up: (requests at once, prompt tokens of each), run one after another before the first request, so that no
    client waits for kernels to be compiled; before them "auto" measures what rounds cost.
    loop_guard: when a chat's text counts as a loop, and is ended; None lets it go on to its limit.
    keepalive_s: a stream that has nothing to say for so long says that it lives. grace_s: how long running requests
    may go on after SIGTERM.
    """

    name: str
    aliases: tuple[str, ...] = ()
    rows: int = 8
    queue: int = 64
    width: int | str = "auto"
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 32 * 2**20
    loop_guard: LoopLimits | None = field(default_factory=LoopLimits)
    keepalive_s: float = 5.0
    warm_up: tuple[tuple[int, int], ...] = ((1, 8), (1, 600), (2, 24), (4, 24))
    grace_s: float = 30.0


@dataclass(frozen=True)
class Job:
    """One text to generate.

    splits: whether thoughts, answer and tool calls are told apart, where they come in a notation that is read here; if
    not, all text is answer. tools: the JSON schema of each tool's parameters by its name, to read calls with.
    one_call: end the text after its first tool call. stop: strings that end the answer. logprobs: how many alternatives
    a token, None for none at all.
    ends: whether the checkpoint's end tokens end the text. constraint: what the text must be.
    loops: when it has run into a loop, and is ended. hurry_s: this long after its first token it ends with its line.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    splits: bool = False
    tools: dict[str, dict[str, Any]] | None = None
    one_call: bool = False
    ends: bool = True
    constraint: Constraint | None = None
    loops: LoopLimits | None = None
    hurry_s: float | None = None


@dataclass(frozen=True)
class Finish:
    """How a job ended. stop: the stop string that ended it. calls: tool calls in it.

    reasoning_tok: tokens of thoughts, their markers included. loop_tok: the text was ended as if at its limit, because
    it repeated these many tokens without end.
    """

    reason: Literal["stop", "length", "cancelled"]
    stop: str | None
    calls: int
    reasoning_tok: int
    stats: Stats
    loop_tok: int | None = None


@dataclass(frozen=True)
class Delta:
    """What a round added to a job: text that has become certain, and how many tokens. The last one has the finish.

    logprobs: of the answer's tokens that show, in order, where the job asked; text may come later than its tokens.
    """

    parts: tuple[Segment, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a whole HTTP request, all its choices together; a prompt shared by choices counts once."""

    prompt_tok: int
    cached_tok: int
    completion_tok: int
    reasoning_tok: int


class ServerError(Exception):
    """A request that is refused or has failed; every dialect writes it in its own form.

    status: of HTTP. code: a word for programs. param: the field at fault. retry_s: when to try again.
    retry: whether the same request may succeed later; clients that repeat by themselves are told.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_s = status, code, message, param, retry_s

    @property
    def retry(self) -> bool:
        return self.retry_s is not None


def invalid(message: str, param: str | None = None, code: str | None = None) -> ServerError:
    """A request that cannot be honoured as written."""
    return ServerError(400, code, message, param)
