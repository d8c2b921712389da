"""The nouns every module shares: requests, rows, passes, drafts, events, errors. Imports nothing of ours.

Shapes: B rows, L columns, K width, H hidden size, V vocabulary. Positions are absolute token indices.

    MlxMtpError
    ├── CheckpointError    a file or folder that cannot be what it claims
    ├── DownloadError      a hub id that cannot be fetched
    ├── PairingError       target and drafter do not fit each other
    └── RequestError       a prompt, sampling value or limit that cannot be honoured
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]


class MlxMtpError(Exception):
    """A mistake that the user can mend. One line: what, got, expected, do this."""


class CheckpointError(MlxMtpError):
    """A checkpoint that is missing, broken, or of a kind that is not supported."""


class DownloadError(MlxMtpError):
    """A hub repository that could not be fetched."""


class PairingError(MlxMtpError):
    """A drafter that was not made for this target."""


class RequestError(MlxMtpError):
    """A request that cannot be honoured as written."""


def one_line(error: object, most: int | None = None) -> str:
    """An error's message, or a text of somebody's, as part of one line: its first `most` characters."""
    return " ".join(str(error).split())[:most]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the target's logits.

    temperature: 0 is greedy (arg-max); otherwise logits are divided by it.
    top_k: keep the k most probable tokens, and those that tie with the last, as transformers does (of more than k + 64
        ties, some). 0 keeps all.
    top_p: keep the smallest set whose probability reaches p; 1 keeps all.
    min_p: drop tokens below min_p times the most probable one; 0 drops none.
    seed: with a seed the text depends on (weights, prompt, seed) alone, at any width and in any
        batch; without one every request draws a fresh seed and the rule with the highest acceptance.
    Filters apply in the order temperature, top_k, top_p, min_p, as in transformers.

    Before the temperature, and for greedy requests too, the raw logits are processed in this order:
    repetition_penalty: logits of tokens in the prompt or the text so far are divided by it where positive, multiplied
        where not (CTRL, Keskar et al. 2019, section 4.1; as in transformers). 1 is off.
    presence_penalty, frequency_penalty: subtracted once from the logit of every token in the text so far, and once
        for every time it stands there (OpenAI's API); the prompt does not count. 0 is off.
    logit_bias: (token id, bias) pairs, added last. An id outside the vocabulary is refused when the request is
        submitted, where the vocabulary is known.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, which keeps no token; use temperature 0 for greedy decoding")
        if self.seed is not None:
            _require_integer("seed", self.seed, 0, 2**64 - 1)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _require_bias(self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether one token is certain, so that no randomness is needed."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def counts_text(self) -> bool:
        """Whether what has been said decides about the next token's logit."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.counts_prompt

    @property
    def counts_prompt(self) -> bool:
        """Whether the prompt's tokens do too."""
        return self.repetition_penalty != 1.0

    @property
    def processes(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return self.counts_text or bool(self.logit_bias)


def _require_bias(pairs: tuple[tuple[int, float], ...]) -> None:
    if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise RequestError(f"logit_bias is a {type(pairs).__name__}; expected a tuple of (token id, bias) pairs")
    seen = set()
    for token, bias in pairs:
        _require_integer("a token id in logit_bias", token, 0, 2**31 - 1)
        _require_number(f"the bias of token {token}", bias, -100.0, 100.0)
        if token in seen:
            raise RequestError(f"logit_bias names token {token} twice; give one bias for it")
        seen.add(token)


def _require_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value:g}; expected {low:g} to {high:g}")


def _require_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}; expected an integer")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; expected {low} to {high}")


GREEDY = Sampling(temperature=0.0)
MAX_LOGPROBS = 20  # the most that OpenAI's API gives


class Follower(Protocol):
    """Where one text stands in what it must be. Lives on the host; the engine asks it once a round."""

    @property
    def failed(self) -> bool:
        """Whether it cannot follow the text any more."""
        ...

    def forced(self, most: int) -> list[int]:
        """The tokens that come next whatever the model says, at most so many. They are drafted; nothing depends on
        their being complete."""
        ...

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        """[len(draft) + 1, ceil(V / 32)] uint32: bit t of row j says whether token t may follow the text and draft[:j].

        At least one token may. Rows after a draft that may not come itself are all ones.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """The text has grown by these."""
        ...


class Constraint(Protocol):
    """What a text must be, whoever writes it; requests may share one."""

    def begin(self) -> Follower:
        """Follow a new text from its first token."""
        ...


@dataclass(frozen=True)
class Request:
    """What came in. Token ids and limits, checked before it reaches the engine.

    eos: ids that end the text. priority: higher joins first and feeds its prompt first; equals in order of arrival.
    logprobs: None asks for no log-probabilities, n for those of every token and of the n most probable in its place.
    constraint: what the text must be. Needs end tokens, since only they can end it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    eos: frozenset[int] = frozenset()
    priority: int = 0
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.constraint is not None and not self.eos:
            raise RequestError("a constrained text cannot ignore the end tokens; leave out one of the two")
        if self.logprobs is not None:
            _require_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)


@dataclass
class Stats:
    """Counts and times of one request.

    rounds: passes of the target after the prompt.
    drafted_at[i], kept_at[i]: how often position i was drafted, and how often the draft there was kept.
        Drafts behind the end of the text (end token, max_tokens) are not counted.
    widths: width -> rounds of that width.
    first_passes, first_columns: passes that ended from the request's coming to its first token, and all columns in
        them.
    prefill_s: from joining to the first token. decode_s: from the first token to the last.
    device_s, host_s: of decode_s, from the dispatch of a pass to its end, and from there to the next dispatch, when
        the device has nothing to do. draft_s: of device_s, in drafting; 0 unless profiled.
    experts_per_pass: distinct experts a pass of a mixture-of-experts target touched, mean over rounds and layers.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    drafted_at: list[int] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)
    widths: dict[int, int] = field(default_factory=dict)
    host_reads: int = 0
    first_passes: int = 0
    first_columns: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    device_s: float = 0.0
    host_s: float = 0.0
    draft_s: float = 0.0
    experts: float = 0.0
    peak_memory_bytes: int = 0

    def count_round(self, width: int, kept: int, emitted: int) -> None:
        """Add a round: `width` tokens drafted, `kept` columns committed, `emitted` of them in the text."""
        self.rounds += 1
        self.widths[width] = self.widths.get(width, 0) + 1
        counted = width if emitted == kept else min(width, emitted)
        self.drafted_at += [0] * (counted - len(self.drafted_at))
        self.kept_at += [0] * (counted - len(self.kept_at))
        for i in range(counted):
            self.drafted_at[i] += 1
            self.kept_at[i] += i < kept - 1

    def add(self, other: Stats) -> None:
        """Sum another request's counts and times into this one; the peak is the greater."""
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "rounds", "host_reads", "experts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prefill_s", "decode_s", "device_s", "host_s", "draft_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, new in ((self.drafted_at, other.drafted_at), (self.kept_at, other.kept_at)):
            mine += [0] * (len(new) - len(mine))
            mine[: len(new)] = [a + b for a, b in zip(mine, new, strict=False)]
        for width, rounds in other.widths.items():
            self.widths[width] = self.widths.get(width, 0) + rounds
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)

    @property
    def drafted(self) -> int:
        return sum(self.drafted_at)

    @property
    def kept(self) -> int:
        """Drafted tokens that the target kept (the target's own token of every round is not counted)."""
        return sum(self.kept_at)

    @property
    def tokens_per_round(self) -> float:
        return (self.generated_tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of rounds with a draft at position i in which that draft was kept (cumulative, so falling)."""
        return [k / d if d else 0.0 for k, d in zip(self.kept_at, self.drafted_at, strict=True)]

    @property
    def experts_per_pass(self) -> float:
        return self.experts / self.rounds if self.rounds else 0.0

    @property
    def decode_tok_s(self) -> float:
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    def to_json(self) -> dict:
        """The statistics as plain JSON values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "kept": self.kept,
            "kept_per_round": self.kept / self.rounds if self.rounds else 0.0,
            "tokens_per_round": self.tokens_per_round,
            "acceptance": self.kept / self.drafted if self.drafted else 0.0,
            "acceptance_by_position": self.acceptance_by_position,
            "widths": {str(k): v for k, v in sorted(self.widths.items())},
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "device_s": self.device_s,
            "host_s": self.host_s,
            "draft_s": self.draft_s,
            "experts_per_pass": self.experts_per_pass,
            "host_reads": self.host_reads,
            "first_passes": self.first_passes,
            "first_columns": self.first_columns,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and those of the most probable tokens in its place, best first.

    They are the log-softmax of the target's logits as the model gives them, in float32: before temperature,
    penalties, bias and filters. So a token that was sampled, or steered to, need not be among `top`.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """New tokens of one request; the last event of a request carries its finish reason and statistics.

    text: what these tokens add to the text. It may lag behind the tokens by an unfinished character or
        a possible stop string; all events of a request together hold all tokens and all text.
    logprobs: one for every token, where the request asked for them.
    """

    request: int
    tokens: tuple[int, ...]
    text: str = ""
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished request. `tokens` end with the end token where there is one; `text` leaves it out.

    logprobs: one for every token, where they were asked for.
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Forward:
    """One target pass.

    rows: the dense slice of rows it ran over. tokens: [B, L] int32.
    hidden: [B, C, H] after the final norm, for the last C of the L columns.
    taps: outputs of the layers the drafter asked for, [B * L, H] each, row after row.
    drafted: how many trailing columns the drafter proposed; 0 for a prompt chunk.
    picked: [B, H], of `hidden` the column that each row's newest token came from, if that is known already.
    newest: [B] int32, the token behind each row's kept columns: its next bonus, or the prompt's next.
    still: places in `rows` that keep nothing whatever is kept: they are feeding their prompt, or have ended.
    forced: of the drafted columns, how many last ones a constraint forced. The drafter was asked for those before it,
        or not at all where there are none.
    """

    rows: slice
    tokens: mx.array
    hidden: mx.array
    taps: dict[int, mx.array]
    drafted: int
    picked: mx.array | None = None
    newest: mx.array | None = None
    still: frozenset[int] = frozenset()
    forced: int = 0


@dataclass(frozen=True)
class Candidates:
    """The distribution a draft was drawn from.

    logits: [B, K, C] float32, filtered as the row's sampling asks (-inf = impossible).
    ids: [B, K, C] int32 token ids of the columns, or None where column c is token c.
    """

    logits: mx.array
    ids: mx.array | None


@dataclass(frozen=True)
class Draft:
    """Proposed tokens [B, K] int32, and what they were drawn from (None: each is its drafter's only choice)."""

    tokens: mx.array
    source: Candidates | None = None

    @property
    def width(self) -> int:
        return self.tokens.shape[1]
