"""What a text must look like: JSON schemas and tool calls as grammars, and where a text stands in one. Host side only.

The work is llguidance's (https://github.com/guidance-ai/llguidance): an Earley parser over bytes with a lexer of
derivatives, and a trie of the vocabulary to say which tokens may come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlx_mtp.call_grammar import CallGrammar, Marks
from mlx_mtp.rows import RequestError, one_line
from mlx_mtp.text import Text

Thought = Literal["none", "may", "open"]
"""Whether reasoning may come before what the grammar is about, or has been opened by the prompt."""

# One way to write white space: what is not a choice need not be computed, and no text can lose itself in blanks.
SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class Tool:
    """A tool on offer. strict: its arguments must follow the schema to the letter."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class Grammar:
    """A compiled grammar. Requests share it; each follows its own text with `begin`. A `rows.Constraint`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def begin(self) -> Follower:
        return Follower(self._matcher.deep_copy(), self._tokenizer)


class Follower:
    """Where one text stands in its grammar. A `rows.Follower`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._made: dict[tuple[int, ...], np.ndarray] = {}  # masks after the text and so much of a draft
        self._eos = frozenset(tokenizer.eos_tokens)
        self._words = (tokenizer.vocab_size + 31) // 32
        self._ends = np.zeros(self._words, np.uint32)
        for token in self._eos:
            self._ends[token // 32] |= np.uint32(1 << token % 32)

    @property
    def failed(self) -> bool:
        """Whether the grammar has become too complex to follow; then the text can only end."""
        return self._matcher.is_error()

    def forced(self, most: int) -> list[int]:
        """The tokens that come next whatever the model says, at most so many."""
        if most < 1 or self._matcher.is_stopped():
            return []
        return self._matcher.compute_ff_tokens()[:most]

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        """[len(draft) + 1, ceil(V / 32)] uint32: bit t of row j says whether token t may follow the text and draft[:j].

        Rows after a draft that may not come itself are all ones: what stands there is never kept.
        """
        out = np.full((len(draft) + 1, self._words), 0xFFFFFFFF, np.uint32)
        taken = 0
        for j in range(len(draft) + 1):
            out[j] = self._mask(tuple(draft[:j]))
            if j == len(draft) or draft[j] in self._eos or not out[j, draft[j] // 32] >> (draft[j] % 32) & 1:
                break
            if not self._matcher.consume_token(draft[j]):
                break
            taken += 1
        if taken:
            self._matcher.rollback(taken)
        return out

    def advance(self, tokens: Sequence[int]) -> None:
        """The text has grown by these; an end token at their end is no part of it."""
        said, self._made = [token for token in tokens if token not in self._eos], {}
        if said:
            self._matcher.consume_tokens(said)

    def _mask(self, taken: tuple[int, ...]) -> np.ndarray:
        """The next mask after those tokens of a draft, which the matcher has taken. A round asks for some twice, first
        for the drafter: at 262,144 tokens one is most of a millisecond."""
        if taken not in self._made:
            stopped = self._matcher.is_stopped()
            self._made[taken] = self._ends if stopped else np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return self._made[taken][: self._words]


class Grammars:
    """Compiles grammars for one tokenizer. Making it takes about two seconds for a vocabulary of 262,144, in which no
    other thread runs (not measured on a Mac); a grammar takes milliseconds, and the last ones are kept."""

    KEPT = 64

    def __init__(self, text: Text, vocabulary: int, eos: frozenset[int]) -> None:
        """vocabulary: how many logits the model gives, which may be more than there are tokens. Raises RequestError
        for a tokenizer that llguidance does not take."""
        self._text = text
        try:
            self._tokenizer = LLTokenizer(text.tokenizer_json(), n_vocab=vocabulary, eos_token=sorted(eos))
        except ValueError as error:
            raise RequestError(f"this tokenizer cannot be used for grammars: {one_line(error, 200)}") from None
        self._made: dict[str, Grammar] = {}

    def json(self, schema: Any = None, thought: Thought = "none") -> Grammar:
        """A JSON value that a schema describes; None: any object. Raises RequestError where it cannot be honoured."""
        return self._compile(self._after_thought("answer", thought), [self._json_rule(schema)], "the JSON schema")

    def _json_rule(self, schema: Any) -> str:
        schema = {"type": "object"} if schema is None or schema is True else schema
        if not isinstance(schema, dict):
            raise RequestError(f"the JSON schema is a {type(schema).__name__}; expected an object")
        return f"answer: %json {json.dumps({**schema, 'x-guidance': SPACING}, ensure_ascii=False)}"

    def calls(
        self,
        tools: Sequence[Tool],
        thought: Thought = "none",
        must: bool = False,
        several: bool = True,
        answer: Any = None,
    ) -> Grammar:
        """Calls of some tools in Gemma's notation. must: at least one and nothing else; otherwise text may come before
        and after, or alone. several: more than one may come. answer: the JSON schema of what may come instead of
        calls. Raises RequestError."""
        ids = [self._text.id_of(name) for name in ("<|tool_call>", "<tool_call|>", '<|"|>')]
        if any(i is None for i in ids):
            raise RequestError("this tokenizer has no tokens for tool calls, so calls cannot be held to a schema")
        grammar = CallGrammar(Marks(*(i for i in ids if i is not None)))
        call = " | ".join(grammar.call(tool.name, tool.parameters, tool.strict) for tool in tools)
        rules = [f"call: {call}", *grammar.rules]
        if answer is not None and not must:
            start = "answer | call+" if several else "answer | call"
            return self._compile(
                self._after_thought(f"({start})", thought), [self._json_rule(answer), *rules], "the tools"
            )
        if must:
            start = "call+" if several else "call"
        else:
            start = f"{ANY_TEXT} (call {ANY_TEXT})*" if several else f"{ANY_TEXT} (call {ANY_TEXT})?"
        return self._compile(self._after_thought(start, thought), rules, "the tools")

    def _after_thought(self, start: str, thought: Thought) -> str:
        opening, closing = self._text.id_of("<|channel>"), self._text.id_of("<channel|>")
        if thought == "none" or opening is None or closing is None:
            return start
        if thought == "open":
            return f"{ANY_TEXT} <[{closing}]> {start}"
        return f"(<[{opening}]> {ANY_TEXT} <[{closing}]>)? {start}"

    def _compile(self, start: str, rules: list[str], what: str) -> Grammar:
        lark = "\n".join([f"start: {start}", *rules])
        if lark not in self._made:
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
            if matcher.is_error():
                raise RequestError(f"{what} cannot be honoured: {_one_line(matcher.get_error())}")
            while len(self._made) >= self.KEPT:
                del self._made[next(iter(self._made))]
            self._made[lark] = Grammar(matcher, self._tokenizer)
        return self._made[lark]


def _one_line(error: str) -> str:
    """llguidance's message without the place in a grammar that the user has not written."""
    line = one_line(error)
    return re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", line)[:300]
