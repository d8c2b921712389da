"""One choice's tokens to text: thoughts apart from the answer, cut at a stop string. Runs on the engine thread.

Gemma 4 writes a thought as `<|channel>thought\\n...<channel|>`. A stop string ends the answer; in a thought it is
text like any other, since a client that stops at a blank line means the answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mlx_mtp.rows import TokenLogprob
from mlx_mtp.server.nouns import Job, Kind, Part
from mlx_mtp.text import Detokenizer, StopStrings, Text

OPEN, CLOSE, TURN = "<|channel>", "<channel|>", "<|turn>"


def in_thought(text: Text, tokens: Sequence[int]) -> bool:
    """Whether a prompt ends inside a thought: some templates open one, after a tool's result for example."""
    opened, ends = text.id_of(OPEN), {text.id_of(CLOSE), text.id_of(TURN)}
    return next((token == opened for token in reversed(tokens) if token == opened or token in ends), False)


class Splitter:
    """Tokens to parts of text. A thought's first line is the channel's name, which is not shown."""

    def __init__(self, text: Text, splits: bool, thinking: bool) -> None:
        self._open, self._close = (text.id_of(OPEN), text.id_of(CLOSE)) if splits else (None, None)
        self._decoder = Detokenizer(text)
        self.kind: Kind = "reasoning" if thinking else "answer"
        self._naming = False
        self.reasoning_tok = 0

    def push(self, token: int) -> list[Part]:
        """Add a token; return what has become certain."""
        marker = token in (self._open, self._close)
        if self.kind == "reasoning" or marker:
            self.reasoning_tok += 1
        if not marker:
            return self._parts(self._decoder.push([token]))
        parts = self._parts(self._decoder.finish())
        self.kind, self._naming = ("reasoning", True) if token == self._open else ("answer", False)
        return parts

    def finish(self) -> list[Part]:
        return self._parts(self._decoder.finish())

    def _parts(self, text: str) -> list[Part]:
        if self._naming:
            _, line_end, text = text.partition("\n")
            self._naming = not line_end
        return [Part(self.kind, text)] if text else []


class Decoder:
    """A job's events to its text."""

    def __init__(self, text: Text, job: Job) -> None:
        self._text = text
        self._splitter, self._stops = Splitter(text, job.splits, job.thinking), StopStrings(job.stop)
        self.tokens = 0

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    @property
    def reasoning_tok(self) -> int:
        return self._splitter.reasoning_tok

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> tuple[list[Part], list[TokenLogprob]]:
        """Add tokens up to a stop string; returns text, and the log-probabilities of the answer's tokens that show."""
        parts: list[Part] = []
        shown: list[TokenLogprob] = []
        for i, token in enumerate(tokens):
            self.tokens += 1
            if logprobs and self._splitter.kind == "answer" and self._text.shows(token):
                shown.append(logprobs[i])
            parts += self._cut(self._splitter.push(token))
            if self.stop is not None:
                break
        return parts, shown

    def finish(self) -> list[Part]:
        """The text that still waited for more."""
        parts = self._cut(self._splitter.finish())
        if self.stop is None and (held := self._stops.finish()):
            parts.append(Part("answer", held))
        return parts

    def _cut(self, parts: list[Part]) -> list[Part]:
        out = []
        for part in parts:
            if part.kind == "answer":
                part = Part("answer", self._stops.push(part.text)[0])
            if part.text:
                out.append(part)
            if self.stop is not None:
                break
        return out


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbours of one kind made one, so that a round is one chunk on the wire."""
    return tuple(Part(kind, "".join(p.text for p in same)) for kind, same in groupby(parts, lambda p: p.kind))
