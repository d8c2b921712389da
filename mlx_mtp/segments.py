"""Generated tokens of Gemma 4 taken apart while they come: reasoning, answer, tool calls. Knows no protocol.

What the model writes (`...` stands for text):

    <|channel>thought\\n...\\n<channel|>...<|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|><|tool_response>

Markers are told from text by their token ids, so that an answer may spell `<|channel>` without opening a thought. Only
where a tokenizer has no token for a marker is it looked for in the text.

Models leave parts of this out; then the reading that loses nothing is taken. A call ends an open thought. A call needs
its opening marker or, at the beginning of an answer or after another call, `call:` and the name of a tool on offer. A
call that does not end is ended where the text does. What turns out not to be a call is answer text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from mlx_mtp.arguments import CLOSING, QUOTE, Arguments, scalar
from mlx_mtp.text import Detokenizer, StopStrings, Text


class Marker(Enum):
    """Tokens that separate segments, as the tokenizer spells them."""

    THOUGHT = "<|channel>"
    THOUGHT_END = "<channel|>"
    CALL = "<|tool_call>"
    CALL_END = "<tool_call|>"
    QUOTE = QUOTE


TURN = "<|turn>"
CHANNEL = "thought"  # the name after Marker.THOUGHT
MOST_HEADER = 200  # characters of a call before its arguments; longer is text

# Each beginning of what HEADER matches is matched by HEADER_BEGUN, and HEADER's first match is its shortest: so what is
# read as a call does not depend on how much text has come.
HEADER = re.compile(r"\s*(?:call\s*:\s*|:\s*|(?!call\s*:))(\w[\w.:/-]*?)\s*([{(]|BEGIN_ARG:)")
HEADER_BEGUN = re.compile(r"\s*(?:call\s*:\s*|:\s*)?[\w.:/-]*\s*(?:B[A-Z_]*)?")
NAME_ONLY = re.compile(r"\s*call\s*:\s*(\w[\w.:/-]*)\s*")
POSITIONAL = re.compile(r"BEGIN_ARG:[ \t]*\n?(.*?)\n?END_ARG", re.DOTALL)


@dataclass(frozen=True)
class Segment:
    """A piece of one kind; pieces of one kind in a row belong together.

    reasoning, answer: text. call: a tool's name, which opens call number `call`, counted from 0. arguments: the next
    fragment of its JSON object. end: the call is complete.
    """

    kind: Literal["reasoning", "answer", "call", "arguments", "end"]
    text: str = ""
    call: int = -1


class After(Enum):
    """What the answer text that comes next stands behind."""

    START = "start"
    MARKER = "marker"
    CALL = "call"  # its last bracket: a closing marker may still come
    TEXT = "text"


BETWEEN = {After.START: " \t\r\n", After.MARKER: " \t\r\n", After.CALL: " \t\r\n}]),;"}
"""What may stand before a call, and is no text if one follows."""


class Mode(Enum):
    """What the text that comes next is."""

    ANSWER = "answer"
    CHANNEL = "channel"  # the name of a channel; held: what of it has come
    REASONING = "reasoning"  # held: line breaks that may turn out to be the last
    HEADER = "header"  # held: a call up to its arguments
    ARGUMENTS = "arguments"
    POSITIONAL = "positional"  # held: arguments between BEGIN_ARG: and END_ARG, without names


class Segmenter:
    """Takes apart one request's tokens. How they are cut makes no difference to the segments but where they are cut.

    reasoning_tok: tokens of thoughts so far, their markers included.
    """

    def __init__(
        self,
        text: Text,
        prompt: Sequence[int] = (),
        stops: tuple[str, ...] = (),
        tools: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """prompt: what the model goes on from; it may end inside a thought. stops: strings that end an answer.

        tools: the JSON schema of the parameters of each tool on offer, by name.
        """
        self._text, self._decoder, self._stops = text, Detokenizer(text), StopStrings(stops)
        ids = {marker: text.id_of(marker.value) for marker in Marker}
        self._ids = {i: marker for marker, i in ids.items() if i is not None}
        self._spelled = {marker.value: marker for marker, i in ids.items() if i is None}
        self._tools = tools or {}
        self._unread = ""  # text that may be the beginning of a spelled marker
        self._mode, self._held = Mode.ANSWER, ""
        self._after = After.START
        self._answered = self._thought = False  # whether there has been answer text, and reasoning
        self._begun = False  # whether the thought under way has shown text
        self._calls, self._marked = 0, False  # calls opened; whether the newest had its opening marker
        self._arguments = Arguments()
        self._name, self._aside = "", 0
        self._stopped = False
        self._segments: list[Segment] = []
        self.reasoning_tok = 0
        self._go_on_from(prompt)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer; what comes after it is not read."""
        return self._stopped

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the answer."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._mode in (Mode.CHANNEL, Mode.REASONING)

    @property
    def answering(self) -> bool:
        """Whether the text that comes next is answer, unless a marker comes before it."""
        return self._mode is Mode.ANSWER

    @property
    def calls(self) -> int:
        """Calls opened so far."""
        return self._calls

    def push(self, tokens: Sequence[int]) -> list[Segment]:
        """Add tokens; return what has become certain."""
        for token in tokens:
            if self._stopped:
                break
            marker = self._ids.get(token)
            if marker is None:
                self._read(self._decoder.push([token]))
            else:
                self._flush_text()
                self._on_marker(marker)
            self.reasoning_tok += self._mode in (Mode.CHANNEL, Mode.REASONING) or marker is Marker.THOUGHT_END
        return self._take()

    def finish(self, complete: bool = True) -> list[Segment]:
        """End of the tokens; return what had been held back.

        complete: the model ended by itself. If not (a limit, say), an open call is left open: what is missing of its
        arguments must not look as if it had never been meant.
        """
        if not self._stopped:
            self._flush_text()
            self._end_mode(complete)
            self._end_answer()
        return self._take()

    # tokens to text and markers ---------------------------------------------------------------------------------

    def _go_on_from(self, prompt: Sequence[int]) -> None:
        """Read what the prompt has opened and not closed."""
        opening, closing = self._text.id_of(Marker.THOUGHT.value), self._text.id_of(Marker.THOUGHT_END.value)
        if opening is not None:
            ends = {closing, self._text.id_of(TURN)}
            at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == opening or prompt[i] in ends), -1)
            begun = None if at < 0 or prompt[at] in ends else self._text.decode(prompt[at + 1 :])
        else:
            tail = self._text.decode(prompt[-256:])
            before, marker, begun = tail.rpartition(Marker.THOUGHT.value)
            if not marker or Marker.THOUGHT_END.value in begun or TURN in begun:
                begun = None
        if begun is not None:
            self._on_marker(Marker.THOUGHT)
            self._on_text(begun)
            self._segments.clear()

    def _read(self, text: str) -> None:
        """Take text apart at markers that have no token of their own."""
        if not self._spelled:
            return self._on_text(text)
        self._unread += text
        while not self._stopped:
            found = [(at, spelled) for spelled in self._spelled if (at := self._unread.find(spelled)) >= 0]
            if not found:
                break
            at, spelled = min(found)
            before, self._unread = self._unread[:at], self._unread[at + len(spelled) :]
            self._on_text(before)
            self._on_marker(self._spelled[spelled])
        at = self._unread.rfind("<")
        begun = at >= 0 and any(spelled.startswith(self._unread[at:]) for spelled in self._spelled)
        at = at if begun else len(self._unread)
        before, self._unread = self._unread[:at], self._unread[at:]
        return self._on_text(before)

    def _flush_text(self) -> None:
        """Read what the detokenizer still holds: a marker ends every run of byte tokens."""
        self._read(self._decoder.finish())
        rest, self._unread = self._unread, ""
        self._on_text(rest)

    # text and markers to segments -------------------------------------------------------------------------------

    def _on_text(self, text: str) -> None:
        while text and not self._stopped:
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
                self._held, text = self._held + text, ""

    def _on_marker(self, marker: Marker) -> None:
        if self._stopped:
            return
        if self._mode is Mode.ARGUMENTS:
            if marker is Marker.QUOTE:
                return self._arguments.quote()
            if self._arguments.quoted and marker is not Marker.CALL_END:
                return self._on_text(marker.value)
        elif self._mode is Mode.POSITIONAL and marker in (Marker.THOUGHT, Marker.THOUGHT_END):
            if marker is Marker.THOUGHT:  # an empty thought in the middle of a value
                self._aside = len(self._held)
            else:
                self._held = self._held[: self._aside]
            return None
        elif marker is Marker.QUOTE:
            return self._on_text(marker.value)
        if self._mode in (Mode.CHANNEL, Mode.REASONING) and marker is Marker.CALL_END:
            return None
        self._end_mode(complete=True, marker=True)
        self._end_answer()
        self._held, self._after, self._begun = "", After.MARKER, False
        self._mode = {Marker.THOUGHT: Mode.CHANNEL, Marker.CALL: Mode.HEADER}.get(marker, Mode.ANSWER)
        return None

    def _end_mode(self, complete: bool, marker: bool = False) -> None:
        """Decide about what is held, because nothing more of its kind comes. marker: whether a marker comes next."""
        mode, held, self._held = self._mode, self._held, ""
        if mode is Mode.ARGUMENTS or mode is Mode.POSITIONAL:
            if complete:
                self._end_call(held)
            else:
                self._add("arguments", self._arguments.take())
        elif mode is Mode.CHANNEL and not CHANNEL.startswith(held):
            self._add("reasoning", held)
        elif mode is Mode.HEADER:
            named = NAME_ONLY.fullmatch(held) if complete else None
            if named:
                self._begin_call(named[1], "{", marked=True)
                self._end_call("")
            else:
                self._answer(held)
        elif mode is Mode.ANSWER and held:
            between = not held.strip(BETWEEN[self._after])
            if not between or (self._after is After.START and not marker):
                self._answer(held)
        self._mode = Mode.ANSWER

    def _in_answer(self, text: str) -> str:
        if self._after is After.TEXT:
            self._answer(text)
            return ""
        self._held += text
        candidate = self._held.lstrip(BETWEEN[self._after])
        match = HEADER.match(candidate) if candidate.startswith("call:") else None
        if match and match.end() <= MOST_HEADER and self._may_call(match[1]):
            marked, self._held = self._marked and self._after is After.CALL, ""
            self._begin_call(match[1], match[2], marked)
            return candidate[match.end() :]
        begun = not match and len(candidate) <= MOST_HEADER and HEADER_BEGUN.fullmatch(candidate)
        if not (begun and "call:".startswith(candidate[:5])):
            held, self._held = self._held, ""
            self._answer(held)
        return ""

    def _may_call(self, name: str) -> bool:
        """Whether a call of this name needs no marker of its own: it has been offered, or shares another call's."""
        return name.rstrip(":") in self._tools or (self._marked and self._after is After.CALL)

    def _in_channel(self, text: str) -> str:
        self._held += text
        if CHANNEL.startswith(self._held):
            return ""
        held, self._held = self._held, ""
        self._mode = Mode.REASONING
        return held[len(CHANNEL) :] if held.startswith(CHANNEL + "\n") else held

    def _in_reasoning(self, text: str) -> str:
        text = self._held + text if self._begun else text.lstrip("\n")
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        if shown and not self._begun:
            shown = "\n" + shown if self._thought else shown  # a second thought
            self._begun = self._thought = True
        self._add("reasoning", shown)
        return ""

    def _in_header(self, text: str) -> str:
        self._held += text
        match = HEADER.match(self._held)
        if match and match.end() <= MOST_HEADER:
            rest, self._held = self._held[match.end() :], ""
            self._begin_call(match[1], match[2], marked=True)
            return rest
        if match or not HEADER_BEGUN.fullmatch(self._held) or len(self._held) > MOST_HEADER:
            held, self._held = self._held, ""
            self._mode = Mode.ANSWER
            self._answer(held)
        return ""

    def _in_arguments(self, text: str) -> str:
        rest = self._arguments.push(text)
        self._add("arguments", self._arguments.take())
        if self._arguments.done:
            self._end_call("")
        return rest

    # segments ---------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        if self._after in (After.MARKER, After.CALL) and not self._answered:
            text = text.lstrip("\n")
        if text:
            self._after, self._answered = After.TEXT, True
            shown, self._stopped = self._stops.push(text)
            self._add("answer", shown)

    def _end_answer(self) -> None:
        if not self._stopped:
            self._add("answer", self._stops.finish())

    def _begin_call(self, name: str, opening: str, marked: bool) -> None:
        self._end_answer()
        self._name, self._marked, self._aside = name.rstrip(":"), marked, 0
        self._calls += 1
        self._segments.append(Segment("call", self._name, self._calls - 1))
        positional = opening not in CLOSING
        self._arguments = Arguments("{" if positional else opening, self._parameters())
        self._mode, self._held = (Mode.POSITIONAL, opening) if positional else (Mode.ARGUMENTS, "")

    def _end_call(self, positional: str) -> None:
        rest = ""
        if self._mode is Mode.POSITIONAL:
            values, rest = POSITIONAL.findall(positional), POSITIONAL.sub("", positional).strip()
            self._add("arguments", self._named(values))
        else:
            if not self._arguments.done:
                self._arguments.close()
            self._add("arguments", self._arguments.take())
        self._segments.append(Segment("end", "", self._calls - 1))
        self._mode, self._held, self._after = Mode.ANSWER, "", After.CALL
        self._answer(rest)

    def _parameters(self) -> Mapping[str, Any]:
        found = self._tools.get(self._name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}

    def _named(self, values: list[str]) -> str:
        """JSON of arguments given without names: the required parameters first, then the others, as declared."""
        parameters, required = self._parameters(), self._tools.get(self._name, {}).get("required")
        names = [name for name in required if name in parameters] if isinstance(required, list) else []
        names += [name for name in parameters if name not in names]
        names += [f"argument_{i}" for i in range(len(names), len(values))]
        pairs = zip(names, values, strict=False)
        return (
            "{" + ",".join(f"{_quoted(n)}:{scalar(v.strip(), parameters.get(n)) or _quoted(v)}" for n, v in pairs) + "}"
        )

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
