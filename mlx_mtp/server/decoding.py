"""One choice's tokens to text: thoughts, answer and tool calls, cut at a stop string. Runs on the engine thread.

A stop string ends the answer; in a thought or a call it is text like any other, since a client that stops at a blank
line means the answer's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mlx_mtp.loops import LoopGuard
from mlx_mtp.rows import TokenLogprob
from mlx_mtp.segments import Segment, Segmenter
from mlx_mtp.server.nouns import Job
from mlx_mtp.text import StoppedText, Text


class Plain:
    """Tokens to text that is all answer; has what of a Segmenter is used here."""

    calls = reasoning_tok = 0
    answering = True

    def __init__(self, text: Text, stops: tuple[str, ...]) -> None:
        self._shown = StoppedText(text, stops)

    @property
    def stop(self) -> str | None:
        return self._shown.stop

    def push(self, tokens: Sequence[int]) -> list[Segment]:
        return _answer(self._shown.push(tokens))

    def finish(self, complete: bool = True) -> list[Segment]:
        return _answer(self._shown.finish())


class Decoder:
    """A job's events to its text. tokens: how many have been read."""

    def __init__(self, text: Text, job: Job) -> None:
        self._text, self._one_call = text, job.one_call
        self._parser: Plain | Segmenter = Plain(text, job.stop)
        if job.splits and text.segmented:
            self._parser = Segmenter(text, job.prompt, job.stop, job.tools)
        self._guard = LoopGuard(job.loops) if job.loops is not None else None
        self._hurry_s, self._first_s = job.hurry_s, 0.0
        self._hurried = self._called = False
        self.tokens = 0

    @property
    def ended(self) -> bool:
        """Whether the text ends here, whatever the model would have gone on to say."""
        return self._parser.stop is not None or (self._called and self._one_call)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._parser.stop

    @property
    def loop_tok(self) -> int | None:
        """The length of the piece that the text repeats without end; None where it does not."""
        return self._guard.period_tok if self._guard is not None else None

    @property
    def cut(self) -> bool:
        """Whether the text is to end here as if at its limit: it is in a loop, or late."""
        return self._hurried or self.loop_tok is not None

    @property
    def calls(self) -> int:
        return self._parser.calls

    @property
    def reasoning_tok(self) -> int:
        return self._parser.reasoning_tok

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()
    ) -> tuple[list[Segment], list[TokenLogprob]]:
        """Add tokens up to the text's end; returns text, and log-probabilities of the answer's tokens that show."""
        parts: list[Segment] = []
        shown: list[TokenLogprob] = []
        for i, token in enumerate(tokens):
            self.tokens += 1
            self._first_s = self._first_s or time.perf_counter()
            if self._guard is not None:
                self._guard.push([token])
            if logprobs and self._parser.answering and self._text.shows(token):
                shown.append(logprobs[i])
            new = self._parser.push([token])
            parts += new
            self._called = self._called or any(part.kind == "end" for part in new)
            self._hurried = self._is_late() and any("\n" in part.text for part in new)
            if self.ended or self._hurried:
                break
        return parts, shown

    def _is_late(self) -> bool:
        return self._hurry_s is not None and time.perf_counter() - self._first_s >= self._hurry_s

    def finish(self, complete: bool) -> list[Segment]:
        """The text that still waited for more. complete: the model ended by itself, and not at a limit."""
        return self._parser.finish(complete)


def joined(parts: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind made one, so that a round is one chunk on the wire."""
    out: list[Segment] = []
    for part in parts:
        if out and part.kind == out[-1].kind != "call" and part.call == out[-1].call:
            out[-1] = Segment(part.kind, out[-1].text + part.text, part.call)
        else:
            out.append(part)
    return tuple(out)


def _answer(text: str) -> list[Segment]:
    return [Segment("answer", text)] if text else []
