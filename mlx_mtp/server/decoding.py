"""One choice's tokens to text: reasoning, answer and tool calls, and where the output ends. Runs on the engine thread.

A stop string ends the answer only. In reasoning or a tool call it is ordinary text: a client that stops at a blank
line means the answer's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mlx_mtp.loops import LoopGuard, LoopLimits
from mlx_mtp.rows import FinishReason, Stats, TokenLogprob
from mlx_mtp.segments import Segment, Segmenter
from mlx_mtp.server.asking import GenerationRequest
from mlx_mtp.server.nouns import FinishInfo, StreamChunk
from mlx_mtp.text import StoppedText, Text


class PlainParser:
    """Tokens to text that is all answer. Has the part of Segmenter's interface that is used here."""

    calls = reasoning_tok = 0
    answering, thinking = True, False

    def __init__(self, text: Text, stops: tuple[str, ...]) -> None:
        self._text = StoppedText(text, stops)

    @property
    def stop(self) -> str | None:
        return self._text.stop

    def push(self, tokens: Sequence[int]) -> list[Segment]:
        return _answer(self._text.push(tokens))

    def finish(self, complete: bool = True) -> list[Segment]:
        return _answer(self._text.finish())


class OutputDecoder:
    """Turns the tokens of one choice into text, and decides where the output ends.

    tokens: how many have been read. reason: why the output has ended, None while it goes on.
    """

    def __init__(
        self, text: Text, request: GenerationRequest, prompt: Sequence[int], loops: LoopLimits | None = None
    ) -> None:
        """prompt: token ids; it may end inside a thought. loops: when a chat's output counts as a loop."""
        self._text, self._one_call = text, not request.response_format.parallel_tool_calls
        self._parser: PlainParser | Segmenter = PlainParser(text, request.stop)
        if request.parse_output and text.segmented:
            schemas = {tool.name: tool.parameters for tool in request.response_format.functions}
            self._parser = Segmenter(text, prompt, request.stop, schemas)
        is_chat = request.parse_output and request.stop_at_eos
        self._guard = LoopGuard(loops) if loops is not None and is_chat else None
        self._time_limit_s, self._first_s = request.time_limit_s, 0.0
        self._late = self._called = False
        self.tokens = 0
        self.reason: FinishReason | None = None

    @property
    def thinking(self) -> bool:
        """Whether the next token is reasoning."""
        return self._parser.thinking

    def push(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        reason: FinishReason | None = None,
    ) -> StreamChunk:
        """Add tokens up to the output's end. reason: why the engine ended the request, if it has."""
        segments: list[Segment] = []
        shown: list[TokenLogprob] = []
        before = self.tokens
        for i, token in enumerate(tokens):
            self.tokens += 1
            self._first_s = self._first_s or time.perf_counter()
            if self._guard is not None:
                self._guard.push([token])
            if logprobs and self._parser.answering and self._text.shows(token):
                shown.append(logprobs[i])
            new = self._parser.push([token])
            segments += new
            self._called = self._called or any(segment.kind == "end" for segment in new)
            self._late = self._is_late() and any("\n" in segment.text for segment in new)
            if self._stopped or self._late:
                break
        if not self._stopped:
            reason = reason or ("length" if self._late or self._loop_tok else None)
            if reason:
                segments += self._parser.finish(reason == "stop")
        self.reason = "stop" if self._stopped else reason
        return StreamChunk(_merged(segments), self.tokens - before, tuple(shown))

    def finish(self, stats: Stats, reason: FinishReason) -> FinishInfo:
        """How the choice ended. stats: the engine's."""
        parser = self._parser
        return FinishInfo(reason, parser.stop, parser.calls, parser.reasoning_tok, stats, self._loop_tok)

    @property
    def _stopped(self) -> bool:
        """Whether a stop string, or the only tool call allowed, ends the output here."""
        return self._parser.stop is not None or (self._called and self._one_call)

    @property
    def _loop_tok(self) -> int | None:
        return self._guard.period_tok if self._guard is not None else None

    def _is_late(self) -> bool:
        return self._time_limit_s is not None and time.perf_counter() - self._first_s >= self._time_limit_s


def _merged(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Adjacent segments of one kind as one, so that a round is one chunk on the wire."""
    out: list[Segment] = []
    for segment in segments:
        if out and segment.kind == out[-1].kind != "call" and segment.call == out[-1].call:
            out[-1] = Segment(segment.kind, out[-1].text + segment.text, segment.call)
        else:
            out.append(segment)
    return tuple(out)


def _answer(text: str) -> list[Segment]:
    return [Segment("answer", text)] if text else []
