"""Parses generated Gemma 4 tokens incrementally into reasoning, answer text and tool calls.

The format (`...` stands for text):

    <|channel>thought\\n...\\n<channel|>...<|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|><|tool_response>

Markers are recognised by token id, so an answer may spell `<|channel>` in ordinary text. A marker without a token in
the vocabulary is searched for in the text instead.

Models omit parts of the format. The parser then loses no text:
- A tool call ends an open thought.
- At the beginning of an answer or after another call, `call:` and the name of an offered tool begin a call.
- A call without an end ends with the output.
- What turns out not to be a call is answer text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from mlx_mtp.arguments import CLOSING, QUOTE, ArgumentsParser, json_scalar
from mlx_mtp.text import Detokenizer, StopStrings, Text


class Marker(Enum):
    """Special tokens that separate segments."""

    THOUGHT = "<|channel>"
    THOUGHT_END = "<channel|>"
    CALL = "<|tool_call>"
    CALL_END = "<tool_call|>"
    QUOTE = QUOTE


TURN = "<|turn>"
CHANNEL = "thought"  # the channel name after Marker.THOUGHT
MAX_HEADER = 200  # characters of a call before its arguments; a longer header is answer text

# HEADER_PREFIX matches every prefix of what HEADER matches, and HEADER's first match is its shortest. So the result
# does not depend on how much text has arrived.
HEADER = re.compile(r"\s*(?:call\s*:\s*|:\s*|(?!call\s*:))(\w[\w.:/-]*?)\s*([{(]|BEGIN_ARG:)")
HEADER_PREFIX = re.compile(r"\s*(?:call\s*:\s*|:\s*)?[\w.:/-]*\s*(?:B[A-Z_]*)?")
NAME_ONLY = re.compile(r"\s*call\s*:\s*(\w[\w.:/-]*)\s*")
POSITIONAL = re.compile(r"BEGIN_ARG:[ \t]*\n?(.*?)\n?END_ARG", re.DOTALL)


@dataclass(frozen=True)
class Segment:
    """A fragment of the output. Adjacent fragments of one kind belong together.

    kind: "reasoning" and "answer" are text. "call" opens a tool call, and its text is the tool's name. "arguments" is
    the next fragment of the call's JSON object. "end" completes the call.
    call: index of the call, from 0; -1 for reasoning and answer.
    """

    kind: Literal["reasoning", "answer", "call", "arguments", "end"]
    text: str = ""
    call: int = -1


class Previous(Enum):
    """What the next answer text follows."""

    START = "start"
    MARKER = "marker"
    CALL = "call"  # its closing bracket; the closing marker may still come
    TEXT = "text"


DROPPED_BEFORE_CALL = {Previous.START: " \t\r\n", Previous.MARKER: " \t\r\n", Previous.CALL: " \t\r\n}]),;"}
"""Characters that are dropped if a call follows them."""


class Mode(Enum):
    """What kind of text comes next. The comments say what is in the parser's buffer."""

    ANSWER = "answer"  # buffer: text that may begin a call without a marker
    CHANNEL = "channel"  # buffer: the channel name so far
    REASONING = "reasoning"  # buffer: line breaks, which are dropped at the end of a thought
    HEADER = "header"  # buffer: the call so far, up to its arguments
    ARGUMENTS = "arguments"
    POSITIONAL = "positional"  # buffer: arguments without names, between BEGIN_ARG: and END_ARG


class Segmenter:
    """Parses one sequence's output. How the tokens are split only decides where segments are split.

    reasoning_tok: reasoning tokens so far, including markers.
    """

    def __init__(
        self,
        text: Text,
        prompt: Sequence[int] = (),
        stops: tuple[str, ...] = (),
        tools: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """prompt: token ids; the prompt may end inside a thought.

        stops: strings that end the output when they occur in answer text.
        tools: the offered tools: name -> JSON schema of the parameters.
        """
        self._text, self._decoder, self._stops = text, Detokenizer(text), StopStrings(stops)
        ids = {marker: text.id_of(marker.value) for marker in Marker}
        self._token_markers = {i: marker for marker, i in ids.items() if i is not None}
        self._text_markers = {marker.value: marker for marker, i in ids.items() if i is None}
        self._tools = tools or {}
        self._pending = ""  # text that may begin a marker
        self._mode, self._buffer = Mode.ANSWER, ""
        self._previous = Previous.START
        self._has_answer = self._has_reasoning = False  # whether any was emitted
        self._thought_has_text = False  # whether the current thought has emitted text
        self._calls, self._call_has_marker = 0, False  # calls opened; whether the latest had an opening marker
        self._arguments = ArgumentsParser()
        self._name, self._thought_at = "", 0  # of the current call; where a thought began in its positional arguments
        self._segments: list[Segment] = []
        self.reasoning_tok = 0
        self._read_prompt(prompt)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the output, or None. Tokens after it are ignored."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._mode in (Mode.CHANNEL, Mode.REASONING)

    @property
    def answering(self) -> bool:
        """Whether the next text is answer text, unless a marker precedes it."""
        return self._mode is Mode.ANSWER

    @property
    def calls(self) -> int:
        """Number of calls opened so far."""
        return self._calls

    def push(self, tokens: Sequence[int]) -> list[Segment]:
        """Add tokens. Returns the segments that later tokens cannot change."""
        for token in tokens:
            if self.stop:
                break
            marker = self._token_markers.get(token)
            if marker is None:
                self._split_text_markers(self._decoder.push([token]))
            else:
                self._flush_text()
                self._on_marker(marker)
            self.reasoning_tok += self._mode in (Mode.CHANNEL, Mode.REASONING) or marker is Marker.THOUGHT_END
        return self._take()

    def finish(self, complete: bool = True) -> list[Segment]:
        """End the output. Returns the segments that were still waiting.

        complete: whether the model ended the output itself. Otherwise, after a token limit for example, an open call
        stays open, so that truncated arguments do not look complete.
        """
        if not self.stop:
            self._flush_text()
            self._end_mode(complete)
            self._end_answer()
        return self._take()

    # tokens to text and markers ---------------------------------------------------------------------------------

    def _read_prompt(self, prompt: Sequence[int]) -> None:
        """Enter the thought that the prompt left open, if any."""
        opening, closing = self._text.id_of(Marker.THOUGHT.value), self._text.id_of(Marker.THOUGHT_END.value)
        if opening is not None:
            ends = {closing, self._text.id_of(TURN)}
            at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == opening or prompt[i] in ends), -1)
            thought = None if at < 0 or prompt[at] in ends else self._text.decode(prompt[at + 1 :])
        else:
            tail = self._text.decode(prompt[-256:])
            _, marker, thought = tail.rpartition(Marker.THOUGHT.value)
            if not marker or Marker.THOUGHT_END.value in thought or TURN in thought:
                thought = None
        if thought is not None:
            self._on_marker(Marker.THOUGHT)
            self._on_text(thought)
            self._segments.clear()

    def _split_text_markers(self, text: str) -> None:
        """Split text at the markers that have no token."""
        if not self._text_markers:
            return self._on_text(text)
        self._pending += text
        while not self.stop:
            found = [(at, name) for name in self._text_markers if (at := self._pending.find(name)) >= 0]
            if not found:
                break
            at, name = min(found)
            before, self._pending = self._pending[:at], self._pending[at + len(name) :]
            self._on_text(before)
            self._on_marker(self._text_markers[name])
        at = self._pending.rfind("<")
        incomplete = at >= 0 and any(name.startswith(self._pending[at:]) for name in self._text_markers)
        at = at if incomplete else len(self._pending)
        before, self._pending = self._pending[:at], self._pending[at:]
        return self._on_text(before)

    def _flush_text(self) -> None:
        """Read the text that still waits in the detokenizer. A marker ends every run of byte tokens."""
        self._split_text_markers(self._decoder.finish())
        pending, self._pending = self._pending, ""
        self._on_text(pending)

    # text and markers to segments -------------------------------------------------------------------------------

    def _on_text(self, text: str) -> None:
        while text and not self.stop:
            if self._mode is Mode.ANSWER:
                text = self._in_answer(text)
            elif self._mode is Mode.CHANNEL:
                text = self._in_channel(text)
            elif self._mode is Mode.REASONING:
                text = self._in_reasoning(text)
            elif self._mode is Mode.HEADER:
                text = self._in_header(text)
            elif self._mode is Mode.ARGUMENTS:
                text = self._in_arguments(text)
            else:
                self._buffer, text = self._buffer + text, ""

    def _on_marker(self, marker: Marker) -> None:
        if self.stop:
            return
        if self._mode is Mode.ARGUMENTS:
            if marker is Marker.QUOTE:
                return self._arguments.quote_token()
            if self._arguments.in_token_string and marker is not Marker.CALL_END:
                return self._on_text(marker.value)
        elif self._mode is Mode.POSITIONAL and marker in (Marker.THOUGHT, Marker.THOUGHT_END):
            if marker is Marker.THOUGHT:  # some models write an empty thought inside a value
                self._thought_at = len(self._buffer)
            else:
                self._buffer = self._buffer[: self._thought_at]
            return None
        elif marker is Marker.QUOTE:
            return self._on_text(marker.value)
        if self._mode in (Mode.CHANNEL, Mode.REASONING) and marker is Marker.CALL_END:
            return None
        self._end_mode(complete=True, marker=True)
        self._end_answer()
        self._buffer, self._previous, self._thought_has_text = "", Previous.MARKER, False
        self._mode = {Marker.THOUGHT: Mode.CHANNEL, Marker.CALL: Mode.HEADER}.get(marker, Mode.ANSWER)
        return None

    def _end_mode(self, complete: bool, marker: bool = False) -> None:
        """End the current mode and emit its buffer. marker: whether a marker follows."""
        mode, buffer, self._buffer = self._mode, self._buffer, ""
        if mode is Mode.ARGUMENTS or mode is Mode.POSITIONAL:
            if complete:
                self._end_call(buffer)
            else:
                self._add("arguments", self._arguments.take())
        elif mode is Mode.CHANNEL and not CHANNEL.startswith(buffer):
            self._add("reasoning", buffer)
        elif mode is Mode.HEADER:
            name_only = NAME_ONLY.fullmatch(buffer) if complete else None
            if name_only:
                self._begin_call(name_only[1], "{", has_marker=True)
                self._end_call("")
            else:
                self._answer(buffer)
        elif mode is Mode.ANSWER and buffer:
            droppable = not buffer.strip(DROPPED_BEFORE_CALL[self._previous])
            if not droppable or (self._previous is Previous.START and not marker):
                self._answer(buffer)
        self._mode = Mode.ANSWER

    def _in_answer(self, text: str) -> str:
        if self._previous is Previous.TEXT:
            self._answer(text)
            return ""
        self._buffer += text
        candidate = self._buffer.lstrip(DROPPED_BEFORE_CALL[self._previous])
        match = HEADER.match(candidate) if candidate.startswith("call:") else None
        if match and match.end() <= MAX_HEADER and self._may_call(match[1]):
            has_marker, self._buffer = self._shares_marker(), ""
            self._begin_call(match[1], match[2], has_marker)
            return candidate[match.end() :]
        incomplete = not match and len(candidate) <= MAX_HEADER and HEADER_PREFIX.fullmatch(candidate)
        if not (incomplete and "call:".startswith(candidate[:5])):
            buffer, self._buffer = self._buffer, ""
            self._answer(buffer)
        return ""

    def _may_call(self, name: str) -> bool:
        """Whether a call of this name is recognised without its own marker."""
        return name.rstrip(":") in self._tools or self._shares_marker()

    def _shares_marker(self) -> bool:
        """Whether a call here is inside the markers of the call before it."""
        return self._call_has_marker and self._previous is Previous.CALL

    def _in_channel(self, text: str) -> str:
        self._buffer += text
        if CHANNEL.startswith(self._buffer):
            return ""
        buffer, self._buffer = self._buffer, ""
        self._mode = Mode.REASONING
        return buffer[len(CHANNEL) :] if buffer.startswith(CHANNEL + "\n") else buffer

    def _in_reasoning(self, text: str) -> str:
        text = self._buffer + text if self._thought_has_text else text.lstrip("\n")
        shown = text.rstrip("\n")
        self._buffer = text[len(shown) :]
        if shown and not self._thought_has_text:
            shown = "\n" + shown if self._has_reasoning else shown  # separates a second thought
            self._thought_has_text = self._has_reasoning = True
        self._add("reasoning", shown)
        return ""

    def _in_header(self, text: str) -> str:
        self._buffer += text
        match = HEADER.match(self._buffer)
        if match and match.end() <= MAX_HEADER:
            after, self._buffer = self._buffer[match.end() :], ""
            self._begin_call(match[1], match[2], has_marker=True)
            return after
        if match or not HEADER_PREFIX.fullmatch(self._buffer) or len(self._buffer) > MAX_HEADER:
            buffer, self._buffer = self._buffer, ""
            self._mode = Mode.ANSWER
            self._answer(buffer)
        return ""

    def _in_arguments(self, text: str) -> str:
        after = self._arguments.push(text)
        self._add("arguments", self._arguments.take())
        if self._arguments.done:
            self._end_call("")
        return after

    # segments ---------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        if self._previous in (Previous.MARKER, Previous.CALL) and not self._has_answer:
            text = text.lstrip("\n")
        if text:
            self._previous, self._has_answer = Previous.TEXT, True
            self._add("answer", self._stops.push(text)[0])

    def _end_answer(self) -> None:
        if not self.stop:
            self._add("answer", self._stops.finish())

    def _begin_call(self, name: str, opening: str, has_marker: bool) -> None:
        self._end_answer()
        self._name, self._call_has_marker, self._thought_at = name.rstrip(":"), has_marker, 0
        self._calls += 1
        self._segments.append(Segment("call", self._name, self._calls - 1))
        positional = opening not in CLOSING
        self._arguments = ArgumentsParser("{" if positional else opening, self._parameters())
        self._mode, self._buffer = (Mode.POSITIONAL, opening) if positional else (Mode.ARGUMENTS, "")

    def _end_call(self, positional: str) -> None:
        after = ""
        if self._mode is Mode.POSITIONAL:
            values, after = POSITIONAL.findall(positional), POSITIONAL.sub("", positional).strip()
            self._add("arguments", self._with_names(values))
        else:
            if not self._arguments.done:
                self._arguments.close()
            self._add("arguments", self._arguments.take())
        self._segments.append(Segment("end", "", self._calls - 1))
        self._mode, self._buffer, self._previous = Mode.ANSWER, "", Previous.CALL
        self._answer(after)

    def _parameters(self) -> Mapping[str, Any]:
        found = self._tools.get(self._name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}

    def _with_names(self, values: list[str]) -> str:
        """The JSON object for positional arguments: required parameters first, then the others, in schema order."""
        parameters, required = self._parameters(), self._tools.get(self._name, {}).get("required")
        names = [name for name in required if name in parameters] if isinstance(required, list) else []
        names += [name for name in parameters if name not in names]
        names += [f"argument_{i}" for i in range(len(names), len(values))]
        pairs = [
            f"{_quoted(name)}:{json_scalar(value.strip(), parameters.get(name)) or _quoted(value)}"
            for name, value in zip(names, values, strict=False)
        ]
        return "{" + ",".join(pairs) + "}"

    def _add(self, kind: Literal["reasoning", "answer", "arguments"], text: str) -> None:
        if text:
            self._segments.append(Segment(kind, text, self._calls - 1 if kind == "arguments" else -1))

    def _take(self) -> list[Segment]:
        out: list[Segment] = []
        for segment in self._segments:
            if out and (segment.kind, segment.call) == (out[-1].kind, out[-1].call) and segment.kind != "call":
                out[-1] = Segment(segment.kind, out[-1].text + segment.text, segment.call)
            else:
                out.append(segment)
        self._segments = []
        return out


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
