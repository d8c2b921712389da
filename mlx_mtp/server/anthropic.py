"""The Anthropic dialect: /v1/messages and its count_tokens, as Claude Code and the anthropic packages speak it.

Unknown fields are ignored, as clients of this API expect. They send many that only steer Anthropic's own service:
cache_control, context_management, a thinking budget, betas.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.server.asking import GenerationRequest, ResponseFormat, function_tool, stable
from mlx_mtp.server.forms import Form, stop_strings
from mlx_mtp.server.nouns import FinishInfo, ServerError, Usage, invalid
from mlx_mtp.server.respond import BlockWriter, CompletionText, Json, read_body, respond, sse
from mlx_mtp.server.service import Admission

SIGNATURE = "bWx4LW10cA=="  # clients send it back with the thought; nothing is signed or checked here


class InputMessage(Form):
    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[dict[str, Any]]


class ToolForm(Form):
    name: StrictStr
    type: StrictStr | None = None
    description: StrictStr | None = None
    input_schema: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolChoice(Form):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class Thinking(Form):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Form):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)
    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Form):
    format: OutputFormat | None = None


class CountForm(Form):
    """The body of /v1/messages/count_tokens."""

    model: StrictStr | None = None
    messages: list[InputMessage]
    system: StrictStr | list[dict[str, Any]] | None = None
    tools: list[ToolForm] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        return GenerationRequest(
            messages=messages_of(self.system, self.messages),
            response_format=self._response_format(),
            thinking=self.thinking is not None and self.thinking.type != "disabled",
        )

    def _response_format(self) -> ResponseFormat:
        choice, tools = self.tool_choice or ToolChoice(type="auto"), []
        for tool in self.tools or () if choice.type != "none" else ():
            if tool.input_schema is None:
                message = f"the tool {tool.name!r} of type {tool.type!r} would run at Anthropic; remove it"
                raise invalid(message, "tools")
            tools.append(function_tool(tool.name, tool.description, tool.input_schema, bool(tool.strict)))
        output = self.output_format or (self.output_config.format if self.output_config else None)
        return ResponseFormat(
            tools=tuple(tools),
            tool_choice="required" if choice.type == "any" else "auto",
            tool_name=(choice.name or "") if choice.type == "tool" else None,
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            schema=output.definition if output else None,
        )


class MessagesForm(CountForm):
    """The body of /v1/messages."""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    stream: StrictBool = False
    stop_sequences: list[StrictStr] | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        return replace(
            super().request(),
            sampling=self.given("temperature", "top_p", "top_k"),
            stop=stop_strings(self.stop_sequences, "stop_sequences"),
            max_tokens=self.max_tokens,
        )


def router(admission: Admission) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter()

    @routes.post("/v1/messages")
    async def messages(request: Request) -> Response:
        form = await read_body(request, MessagesForm, admission)
        admission.check_model(form.model)
        return await respond(request, admission, [form.request()], MessageWriter(admission), form.stream)

    @routes.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        form = await read_body(request, CountForm, admission)
        admission.check_model(form.model)
        return Json({"input_tokens": len(await admission.tokenize(form.request()))})

    @routes.head("/")
    async def alive() -> Response:
        return Response()

    return routes


# messages in ------------------------------------------------------------------------------------------------


def messages_of(system: str | list[dict[str, Any]] | None, messages: Sequence[InputMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it. Raises ServerError for images and documents."""
    out: list[dict[str, Any]] = []
    blocks = [system] if isinstance(system, str) else [_text(block, "system") for block in system or ()]
    # The volatile line is a block of its own. Joined first, it would leave an empty line.
    if joined := "\n".join(text for block in blocks if (text := stable(block))):
        out.append({"role": "system", "content": joined})
    for i, message in enumerate(messages):
        content = message.content
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.role == "assistant":
            out.append(_assistant(blocks, f"messages.{i}"))
        else:
            out += _user(message.role, blocks, f"messages.{i}")
    return out


def _user(role: str, blocks: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Tool results, which must follow their calls, and then the text."""
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
        elif kind != "redacted_thinking":  # another server's, and unreadable
            texts.append(_text(block, where))
    out: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        out["reasoning_content"] = "\n".join(thoughts)
    if calls:
        out["tool_calls"] = calls
    return out


def _text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    if kind != "text" or not isinstance(block.get("text"), str):
        raise invalid(f"{where} has a block of type {kind!r}; expected text (no image or document support)", where)
    return block["text"]


# writing ----------------------------------------------------------------------------------------------------


class MessageWriter(BlockWriter):
    """A message, whole and as the stream of its blocks."""

    BLOCKS = {"reasoning": "thinking", "answer": "text", "call": "tool_use", "arguments": "tool_use"}
    keepalive = sse({"type": "ping"}, "ping")

    def __init__(self, admission: Admission) -> None:
        unique, model = uuid.uuid4().hex[:24], admission.settings.name
        self._head = {"id": f"msg_{unique}", "type": "message", "role": "assistant", "model": model}
        self._index = -1  # of the newest block

    def begin(self, usage: Usage) -> Iterable[bytes]:
        counts = {"input_tokens": usage.prompt_tok, "output_tokens": 0}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": counts}
        yield _event("message_start", message=message)

    def open_block(self, kind: str, name: str) -> Iterable[bytes]:
        self._index += 1
        yield _event("content_block_start", index=self._index, content_block=_block(kind, name))

    def add_to_block(self, kind: str, text: str) -> bytes:
        if kind == "tool_use":
            return self._change(type="input_json_delta", partial_json=text)
        return self._change(type=f"{kind}_delta", **{kind: text})

    def close_block(self) -> Iterable[bytes]:
        if self.block == "thinking":
            yield self._change(type="signature_delta", signature=SIGNATURE)
        if self.block:
            yield _event("content_block_stop", index=self._index)
        self.block = None

    def _change(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield from self.close_block()
        yield _event("message_delta", delta=_stop(self.finish), usage=_usage(usage))
        yield _event("message_stop")

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield sse(error_body(error), "error")

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        output = outputs[0]
        content: list[dict[str, Any]] = []
        if output.reasoning:
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": SIGNATURE})
        if output.answer or not (output.reasoning or output.calls):
            content.append({"type": "text", "text": output.answer})
        content += [_block("tool_use", call.name) | {"input": call.parsed()} for call in output.calls]
        return {**self._head, "content": content, **_stop(output.finish), "usage": _usage(usage)}


def _block(kind: str, name: str) -> dict[str, Any]:
    if kind == "tool_use":
        return {"type": kind, "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
    return {"type": kind, "thinking": "", "signature": ""} if kind == "thinking" else {"type": kind, "text": ""}


def _stop(finish: FinishInfo | None) -> dict[str, Any]:
    """Why a message ended."""
    if finish is None or finish.reason != "stop":
        reason = "max_tokens"
    elif finish.stop is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if finish.calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": finish.stop if finish else None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic's input_tokens leave out the cached ones."""
    return {
        "input_tokens": usage.prompt_tok - usage.cached_tok,
        "cache_read_input_tokens": usage.cached_tok,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tok,
    }


def _event(kind: str, **content: Any) -> bytes:
    return sse({"type": kind, **content}, kind)


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in Anthropic's form."""
    types = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    kind = types.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
