"""The Anthropic dialect: /v1/messages and its count_tokens, as Claude Code and the anthropic packages speak it.

Fields that this server does not know are ignored, as clients of this API expect: they send many that only steer
Anthropic's own service (cache_control, context_management, a thought's budget, betas).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.grammar import Tool
from mlx_mtp.segments import Segment
from mlx_mtp.server.asking import Ask, Must, function_tool, job_of, prompt_of, stable
from mlx_mtp.server.forms import Flag, Integer, Lenient, Number, Word
from mlx_mtp.server.nouns import Delta, Finish, ServerError, Usage, invalid
from mlx_mtp.server.respond import Json, Text, dumps, read_body, respond
from mlx_mtp.server.service import Service

SIGNATURE = "bWx4LW10cA=="  # clients send a thought back with it; nothing is signed here, and nothing is checked


class Message(Lenient):
    role: Literal["user", "assistant", "system"]
    content: Word | list[dict[str, Any]]


class ToolForm(Lenient):
    name: Word
    type: Word | None = None
    description: Word | None = None
    input_schema: dict[str, Any] | None = None
    strict: Flag | None = None


class Choice(Lenient):
    type: Literal["auto", "any", "tool", "none"]
    name: Word | None = None
    disable_parallel_tool_use: Flag | None = None


class Thinking(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]


class Format(Lenient):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)
    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Lenient):
    format: Format | None = None


class CountForm(Lenient):
    """The body of /v1/messages/count_tokens."""

    model: Word | None = None
    messages: list[Message]
    system: Word | list[dict[str, Any]] | None = None
    tools: list[ToolForm] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None

    def ask(self) -> Ask:
        """Raises ServerError."""
        choice = self.tool_choice or Choice(type="auto")
        offered = [] if choice.type == "none" else list(self.tools or ())
        for tool in offered:
            if tool.input_schema is None:
                raise invalid(
                    f"the tool {tool.name!r} of type {tool.type!r} would run at Anthropic; leave it out", "tools"
                )
        output = self.output_format or (self.output_config.format if self.output_config else None)
        named = choice.type == "tool"
        must = Must(
            tools=tuple(Tool(tool.name, tool.input_schema or {}, bool(tool.strict)) for tool in offered),
            choice=(choice.name or "") if named else "required" if choice.type == "any" else "auto",
            named=named,
            several=not choice.disable_parallel_tool_use,
            schema=output.definition if output else None,
        )
        return Ask(
            messages=messages_of(self.system, self.messages),
            tools=[function_tool(tool.name, tool.description, tool.input_schema) for tool in offered],
            must=must,
            thinking=self.thinking is not None and self.thinking.type != "disabled",
            changes=self.changes(),
        )

    def changes(self) -> dict[str, Any]:
        return {}


class MessagesForm(CountForm):
    """The body of /v1/messages."""

    max_tokens: Annotated[Integer, Field(ge=1)]
    stream: Flag = False
    stop_sequences: list[Word] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None

    def changes(self) -> dict[str, Any]:
        return {name: value for name in ("temperature", "top_p", "top_k") if (value := vars(self)[name]) is not None}


def router(service: Service) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(request: Request) -> Response:
        form = await read_body(request, MessagesForm, service.settings.body_bytes)
        service.check_name(form.model)
        if "" in (form.stop_sequences or ()):
            raise invalid("stop_sequences holds an empty text; expected at least one character", "stop_sequences")
        ask = replace(form.ask(), stops=tuple(form.stop_sequences or ()), limit=form.max_tokens)
        job = await job_of(service, ask)
        return await respond(request, service, [job], MessageWriter(service, len(job.prompt)), form.stream)

    @routes.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        form = await read_body(request, CountForm, service.settings.body_bytes)
        service.check_name(form.model)
        return Json({"input_tokens": len((await prompt_of(service, form.ask())).tokens)})

    @routes.head("/")
    async def alive() -> Response:
        return Response()

    return routes


# messages in ------------------------------------------------------------------------------------------------


def messages_of(system: str | list[dict[str, Any]] | None, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as templates take it. Raises ServerError for what a text model cannot read."""
    out: list[dict[str, Any]] = []
    blocks = [system] if isinstance(system, str) else [_text(block, "system") for block in system or ()]
    # Each block by itself: the volatile one is its own, and would leave an empty line behind.
    if told := "\n".join(text for block in blocks if (text := stable(block))):
        out.append({"role": "system", "content": told})
    for i, message in enumerate(messages):
        content = message.content
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.role == "assistant":
            out.append(_assistant(parts, f"messages.{i}"))
        else:
            out += _user(message.role, parts, f"messages.{i}")
    return out


def _user(role: str, blocks: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Results of tools, which must follow their calls, and then the text."""
    out, texts = [], []
    for block in blocks:
        if block.get("type") == "tool_result":
            inner = block.get("content") or ""
            parts = [inner] if isinstance(inner, str) else [_text(part, where) for part in inner]
            out.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": "\n".join(parts)})
        else:
            texts.append(_text(block, where))
    return [*out, {"role": role, "content": "\n".join(texts)}] if texts or not out else out


def _assistant(blocks: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # of another server: nothing that can be read
            texts.append(_text(block, where))
    out: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    return (
        out
        | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})
        | ({"tool_calls": calls} if calls else {})
    )


def _text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    if kind != "text" or not isinstance(block.get("text"), str):
        raise invalid(f"{where} has a block of type {kind!r}; expected text (no image or document support)", where)
    return block["text"]


# writing ----------------------------------------------------------------------------------------------------


class MessageWriter:
    """A message, whole and as the stream of its blocks."""

    media_type = "text/event-stream"
    keepalive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, service: Service, prompt_tok: int) -> None:
        self._prompt_tok = prompt_tok
        self._head = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": service.settings.name,
        }
        self._blocks = 0  # begun so far
        self._open: str | None = None  # the kind of the block under way
        self._finish: Finish | None = None

    def begin(self) -> Iterable[bytes]:
        usage = {"input_tokens": self._prompt_tok, "output_tokens": 0}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        for part in delta.parts:
            yield from self._part(part)
        self._finish = delta.finish or self._finish

    def _part(self, part: Segment) -> Iterable[bytes]:
        if part.kind == "end":
            yield from self._close()
            return
        kind = {"reasoning": "thinking", "answer": "text"}.get(part.kind, "tool_use")
        if kind != self._open or part.kind == "call":
            yield from self._close()
            self._open, self._blocks = kind, self._blocks + 1
            yield _event("content_block_start", index=self._blocks - 1, content_block=_block(kind, part.text))
        if part.kind == "reasoning":
            yield self._change(type="thinking_delta", thinking=part.text)
        elif part.kind == "answer":
            yield self._change(type="text_delta", text=part.text)
        elif part.kind == "arguments":
            yield self._change(type="input_json_delta", partial_json=part.text)

    def _close(self) -> Iterable[bytes]:
        if self._open == "thinking":
            yield self._change(type="signature_delta", signature=SIGNATURE)
        if self._open:
            yield _event("content_block_stop", index=self._blocks - 1)
        self._open = None

    def _change(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield from self._close()
        yield _event("message_delta", delta=_stop(self._finish), usage=_usage(usage))
        yield _event("message_stop")

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield b"event: error\ndata: " + dumps(error_body(error)) + b"\n\n"

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        text = texts[0]
        content: list[dict[str, Any]] = []
        if text.reasoning:
            content.append({"type": "thinking", "thinking": text.reasoning, "signature": SIGNATURE})
        if text.answer or not (text.reasoning or text.calls):
            content.append({"type": "text", "text": text.answer})
        content += [_block("tool_use", call.name) | {"input": call.value()} for call in text.calls]
        return {**self._head, "content": content, **_stop(text.finish), "usage": _usage(usage)}


def _block(kind: str, name: str) -> dict[str, Any]:
    if kind == "tool_use":
        return {"type": kind, "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
    return {"type": kind, "thinking": "", "signature": ""} if kind == "thinking" else {"type": kind, "text": ""}


def _stop(finish: Finish | None) -> dict[str, Any]:
    """Why a message ended."""
    if finish is None or finish.reason != "stop":
        reason = "max_tokens"
    elif finish.stop is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if finish.calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": finish.stop if finish else None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what came from a cache by itself."""
    return {
        "input_tokens": usage.prompt_tok - usage.cached_tok,
        "cache_read_input_tokens": usage.cached_tok,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tok,
    }


def _event(kind: str, **content: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + dumps({"type": kind, **content}) + b"\n\n"


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
