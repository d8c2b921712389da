"""What a client asks for, in one form for all dialects. Knows no dialect's JSON.

Messages and tools have the form of OpenAI's chat completions, which chat templates take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_mtp.grammar import Grammars, Thought, Tool
from mlx_mtp.rows import Constraint
from mlx_mtp.server.nouns import invalid

# The first line of Claude Code's system prompt. It changes with every conversation, so no prefix could be reused.
VOLATILE = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)


@dataclass(frozen=True)
class ResponseFormat:
    """The form that an output must have."""

    tools: tuple[dict[str, Any], ...] = ()  # the tools that the model may call
    tool_choice: Literal["auto", "required"] = "auto"
    tool_name: str | None = None  # the one tool that the model must call
    parallel_tool_calls: bool = True  # whether more than one call may come
    schema: Any = None  # JSON schema of the answer; True is any object, None is any text

    @property
    def functions(self) -> tuple[Tool, ...]:
        """The tools as grammars take them."""
        functions = [tool["function"] for tool in self.tools]
        return tuple(Tool(f["name"], f.get("parameters") or {}, bool(f.get("strict"))) for f in functions)

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.tool_name is not None

    @property
    def any_text(self) -> bool:
        """Whether no grammar is needed."""
        return self.schema is None and not self.must_call and not any(f.strict for f in self.functions)

    def check(self) -> None:
        """Raises ServerError if `tool_choice` does not fit the tools."""
        if self.must_call and not self.tools:
            raise invalid("tool_choice requires a call, but no tools are given; add `tools`", "tool_choice")
        if self.tool_name is not None and self.tool_name not in {f.name for f in self.functions}:
            raise invalid(f"tool_choice names {self.tool_name[:100]!r}, which is not in `tools`", "tool_choice")

    def compile(self, grammars: Grammars, thought: Thought) -> Constraint:
        """The grammar of the output. thought: whether reasoning may come first. Raises RequestError."""
        if self.must_call:
            functions = [f for f in self.functions if self.tool_name in (None, f.name)]
            several = self.parallel_tool_calls and self.tool_name is None
            return grammars.calls(functions, thought, must=True, several=several)
        if not self.tools:
            return grammars.json(self.schema, thought)
        return grammars.calls(self.functions, thought, several=self.parallel_tool_calls, answer=self.schema)


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for, in any dialect. `Admission.prepare` makes the engine's requests from it."""

    messages: Sequence[dict[str, Any]] | None = None  # a chat; None continues `prompt`
    prompt: str | Sequence[int] = ""  # text or token ids
    reply_prefix: str = ""  # the reply to `messages` begins with this text
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    thinking: bool = False  # whether the model may reason before it answers
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the fields of `Sampling` that the client sets
    stop: tuple[str, ...] = ()  # strings that end the answer
    max_tokens: int | None = None
    n: int = 1  # choices
    logprobs: int | None = None  # alternatives a token; None is no log-probabilities
    stop_at_eos: bool = True
    time_limit_s: float | None = None  # this long after its first token, the output ends with its line

    @property
    def parse_output(self) -> bool:
        """Whether reasoning, answer and tool calls are separated. If not, all text is answer."""
        return self.messages is not None and not self.reply_prefix

    def template_options(self) -> dict[str, Any]:
        """The chat template's variables.

        Tools are sorted by name. Some clients list them in a new order each time, and no cached prefix would match.
        """
        options = {**self.template_variables, "enable_thinking": self.thinking}
        if self.response_format.tools:
            options["tools"] = sorted(self.response_format.tools, key=lambda tool: tool["function"]["name"])
        return options


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool = False
) -> dict[str, Any]:
    """A tool as chat templates take it. strict: its arguments must match the schema."""
    function = {"name": name, "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": function | ({"strict": True} if strict else {})}


def stable(system: str) -> str:
    """A system prompt without the line that changes with every conversation."""
    return VOLATILE.sub("", system)
