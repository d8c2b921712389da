"""What a request of any dialect asks for, in one form: messages, tools, what the text must be. Knows no dialect's JSON.

Messages and tools are in the form of OpenAI's chat completions, which chat templates take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.grammar import Grammars, Thought, Tool
from mlx_mtp.rows import Constraint
from mlx_mtp.segments import Segmenter
from mlx_mtp.server.nouns import Job, invalid
from mlx_mtp.server.service import Prompt, Service

# What Claude Code puts before its system prompt; it changes with every conversation, and no prefix could be reused.
VOLATILE = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)


@dataclass(frozen=True)
class Must:
    """What a text has to be.

    tools: those on offer. choice: "auto", "required", or the name of the tool to call. several: whether more than one
    call may come. schema: of an answer in JSON; True is any object, None any text.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    named: bool = False
    several: bool = True
    schema: Any = None

    @property
    def free(self) -> bool:
        """Whether any text will do."""
        return self.schema is None and self.choice == "auto" and not any(tool.strict for tool in self.tools)

    def compile(self, grammars: Grammars, thought: Thought) -> Constraint:
        """Raises RequestError."""
        tools = [tool for tool in self.tools if not self.named or tool.name == self.choice]
        if self.choice != "auto":
            return grammars.calls(tools, thought, must=True, several=self.several and not self.named)
        if not tools:
            return grammars.json(self.schema, thought)
        return grammars.calls(tools, thought, several=self.several, answer=self.schema)


@dataclass(frozen=True)
class Ask:
    """One conversation to go on with.

    options: template variables. changes: fields of `Sampling` that the request names. limit: the most tokens.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    must: Must = field(default_factory=Must)
    thinking: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    limit: int | None = None


async def job_of(service: Service, ask: Ask) -> Job:
    """The job that an ask comes to. Raises ServerError."""
    prompt = await prompt_of(service, ask)
    return Job(
        prompt.tokens,
        service.limit(prompt, ask.limit),
        service.sampling(ask.changes),
        ask.stops,
        splits=True,
        tools={tool.name: dict(tool.parameters) for tool in ask.must.tools},
        one_call=not ask.must.several,
        constraint=await constraint_of(service, prompt, ask.must, ask.thinking),
        loops=service.settings.loop_guard,
    )


async def prompt_of(service: Service, ask: Ask) -> Prompt:
    """Raises ServerError."""
    options: dict[str, Any] = {"enable_thinking": ask.thinking}
    if ask.tools:
        options["tools"] = list(ask.tools)
    return await service.chat(list(ask.messages), options)


async def constraint_of(service: Service, prompt: Prompt, must: Must, thinking: bool) -> Constraint | None:
    """What holds a text to what it must be; None where any will do. Raises ServerError."""
    if must.free:
        return None
    if must.choice != "auto":
        if not must.tools:
            raise invalid("tool_choice asks for a call, and no tools are given", "tool_choice")
        if must.named and must.choice not in {tool.name for tool in must.tools}:
            raise invalid(f"tool_choice names {must.choice[:100]!r}, which is none of the tools", "tool_choice")
    text = service.model.text
    if thinking and not text.segmented:
        raise invalid(
            "this checkpoint writes its thoughts in a notation that is not read here, so that a schema would hold for "
            "them too; send the request without thinking, or without a schema"
        )
    inside = text.segmented and Segmenter(text, prompt.tokens).thinking
    thought: Thought = "open" if inside else "may" if thinking else "none"
    return await service.constraint(lambda grammars: must.compile(grammars, thought))


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A tool as templates take it."""
    function = {"name": name, "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": function}


def stable(system: str) -> str:
    """A system prompt without lines that change from request to request and say nothing to the model."""
    return VOLATILE.sub("", system)
