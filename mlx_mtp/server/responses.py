"""OpenAI's /v1/responses, without state: every request brings its whole conversation. Codex speaks nothing else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.grammar import Tool
from mlx_mtp.segments import Segment
from mlx_mtp.server.asking import Ask, Must, function_tool, job_of
from mlx_mtp.server.forms import Flag, Integer, Lenient, Number, Word
from mlx_mtp.server.nouns import Delta, Finish, ServerError, Usage, invalid
from mlx_mtp.server.respond import Text, dumps, read_body, respond
from mlx_mtp.server.service import Service

ELSEWHERE = frozenset({"web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation"})
"""Tools that OpenAI would run. Codex always offers some; the model is not told of them."""


class ResponsesForm(Lenient):
    """The body of /v1/responses. Fields that are not here have no effect: hints for caches, and bookkeeping."""

    model: Word | None = None
    input: Word | list[dict[str, Any]]
    instructions: Word | None = None
    stream: Flag = False
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Word | dict[str, Any] | None = None
    parallel_tool_calls: Flag = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: Word | None = None
    background: Flag = False

    def ask(self) -> Ask:
        """Raises ServerError."""
        if self.previous_response_id is not None or self.background:
            name = "background" if self.background else "previous_response_id"
            raise invalid(f"{name} needs a server that keeps responses; send the whole conversation as input", name)
        functions = list(_functions(self.tools or ())) if self.tool_choice != "none" else []
        choice = self.tool_choice if self.tool_choice in ("auto", "required") else "auto"
        named = isinstance(self.tool_choice, dict) and "name" in self.tool_choice
        strict = [Tool(f["name"], f.get("parameters") or {}, bool(f.get("strict"))) for f in functions]
        effort = (self.reasoning or {}).get("effort")
        return Ask(
            messages=messages_of(self.instructions, self.input),
            tools=[function_tool(f["name"], f.get("description"), f.get("parameters")) for f in functions],
            must=Must(
                tools=tuple(strict),
                choice=str(self.tool_choice["name"]) if named and isinstance(self.tool_choice, dict) else str(choice),
                named=named,
                several=self.parallel_tool_calls,
                schema=self._schema(),
            ),
            thinking=effort is not None and effort != "none",
            changes={n: v for n in ("temperature", "top_p") if (v := vars(self)[n]) is not None},
            limit=self.max_output_tokens,
        )

    def _schema(self) -> Any:
        wanted = (self.text or {}).get("format") or {"type": "text"}
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind == "json_schema" and isinstance(wanted.get("schema"), dict):
            return wanted["schema"]
        if kind not in ("text", "json_object"):
            raise invalid(
                "text.format must have the type text, json_object, or json_schema with a schema", "text.format"
            )
        return True if kind == "json_object" else None


def _functions(tools: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Tools of type function, those inside namespaces too. Raises ServerError for kinds that cannot be offered."""
    for tool in tools:
        kind = tool.get("type")
        if kind == "namespace":
            yield from _functions(tool.get("tools") or ())
        elif (
            kind == "function" and isinstance(tool.get("name"), str) and isinstance(tool.get("parameters") or {}, dict)
        ):
            yield tool
        elif kind not in ELSEWHERE:
            raise invalid(f"a tool has the type {str(kind)[:60]!r} or lacks a name; expected a function", "tools")


def router(service: Service) -> APIRouter:
    """The dialect's route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/responses")
    async def respond_to(request: Request) -> Response:
        form = await read_body(request, ResponsesForm, service.settings.body_bytes)
        service.check_name(form.model)
        job = await job_of(service, form.ask())
        return await respond(request, service, [job], ResponseWriter(service, form), form.stream)

    return routes


# items in ---------------------------------------------------------------------------------------------------


def messages_of(instructions: str | None, given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as templates take it. Raises ServerError."""
    out: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(out, item)
        elif kind == "reasoning":
            parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            thought = next((p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)), "")
            out.append({"role": "assistant", "content": "", "reasoning_content": thought})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or {}}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last = _turn(out)
            last["tool_calls"] = [*last.get("tool_calls", ()), call]
        elif kind == "function_call_output":
            text = _text(item.get("output"))
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        else:
            raise invalid(f"input has an item of type {str(kind)[:60]!r}; expected a message, call or output", "input")
    return out


def _add_message(out: list[dict[str, Any]], item: dict[str, Any]) -> None:
    role, text = item.get("role"), _text(item.get("content"))
    if role == "assistant":
        last = _turn(out)
        last["content"] = "\n".join(part for part in (last["content"], text) if part)
    elif role in ("system", "developer") and out and all(m["role"] == "system" for m in out):
        out[-1]["content"] += "\n" + text  # templates know one system turn, at the beginning
    elif role in ("system", "developer", "user"):
        out.append({"role": "system" if role == "developer" and not out else role, "content": text})
    else:
        raise invalid(f"input has a message of role {str(role)[:60]!r}; expected user, assistant or system", "input")


def _turn(out: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn under way: thought, text and calls are items of their own here."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise invalid(f"input has a part of type {str(kind)[:60]!r}; expected text (no image support)", "input")
    return "\n".join(part["text"] for part in parts)


# writing ----------------------------------------------------------------------------------------------------


class ResponseWriter:
    """A response, whole and as the stream of its items."""

    media_type = "text/event-stream"
    keepalive = b": keepalive\n\n"

    def __init__(self, service: Service, form: ResponsesForm) -> None:
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.settings.name,
            "parallel_tool_calls": form.parallel_tool_calls,
            "tool_choice": form.tool_choice or "auto",
            "tools": form.tools or [],
            "instructions": form.instructions,
            "temperature": form.temperature,
            "top_p": form.top_p,
            "store": False,
            "previous_response_id": None,
            "metadata": {},
        }
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open = False  # whether the last item is under way
        self._finish: Finish | None = None

    def begin(self) -> Iterable[bytes]:
        yield self._event("response.created", response=self._response("in_progress", None))
        yield self._event("response.in_progress", response=self._response("in_progress", None))

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        for part in delta.parts:
            yield from self._part(part)
        self._finish = delta.finish or self._finish

    def _part(self, part: Segment) -> Iterable[bytes]:
        if part.kind == "end":
            yield from self._close("completed")
            return
        kind = {"reasoning": "reasoning", "answer": "message"}.get(part.kind, "function_call")
        if part.kind == "call" or not self._open or self._items[-1]["type"] != kind:
            yield from self._close("completed")
            yield from self._begin(kind, part.text)
        if part.kind == "call":
            return
        item, place = self._items[-1], self._place()
        if kind == "function_call":
            item["arguments"] += part.text
            del place["content_index"]
            yield self._event("response.function_call_arguments.delta", **place, delta=part.text)
        elif kind == "message":
            item["content"][0]["text"] += part.text
            yield self._event("response.output_text.delta", **place, delta=part.text, logprobs=[])
        else:
            item["content"][0]["text"] += part.text
            yield self._event("response.reasoning_text.delta", **place, delta=part.text)

    def _begin(self, kind: str, name: str) -> Iterable[bytes]:
        item = _item(kind, name)
        self._items.append(item)
        self._open = True
        shown = {**item, "content": []} if kind != "function_call" else item
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)
        if kind == "message":
            yield self._event("response.content_part.added", **self._place(), part=item["content"][0])

    def _close(self, status: str) -> Iterable[bytes]:
        if not self._open:
            return
        self._open, item, place = False, self._items[-1], self._place()
        if item["type"] == "function_call":
            del place["content_index"]
            yield self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            )
        elif item["type"] == "message":
            text = item["content"][0]["text"]
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=item["content"][0])
        else:
            yield self._event("response.reasoning_text.done", **place, text=item["content"][0]["text"])
        if "status" in item:
            item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def end(self, usage: Usage) -> Iterable[bytes]:
        status = _status(self._finish)
        yield from self._close(status)
        yield self._event(f"response.{status}", response=self._response(status, usage))

    def error(self, error: ServerError) -> Iterable[bytes]:
        failed = {"error": {"code": error.code or "server_error", "message": error.message}}
        yield self._event("response.failed", response={**self._response("failed", None), **failed})

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        text = texts[0]
        self._finish = text.finish
        status = _status(text.finish)
        for kind, content in (("reasoning", text.reasoning), ("message", text.answer)):
            if content or (kind == "message" and not text.calls):
                self._items.append(_item(kind, ""))
                self._items[-1]["content"][0]["text"] = content
        for call in text.calls:
            self._items.append({**_item("function_call", call.name), "arguments": call.arguments})
        for item in self._items:
            if "status" in item:
                item["status"] = status if item is self._items[-1] else "completed"
        return self._response(status, usage)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": list(self._items) if usage else [],
            "usage": _usage(usage) if usage else None,
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        event = {"type": kind, "sequence_number": self._number - 1, **content}
        return b"event: " + kind.encode() + b"\ndata: " + dumps(event) + b"\n\n"


def _item(kind: str, name: str) -> dict[str, Any]:
    unique = uuid.uuid4().hex
    if kind == "function_call":
        call = {"id": f"fc_{unique}", "type": kind, "status": "in_progress", "call_id": f"call_{unique[:24]}"}
        return {**call, "name": name, "arguments": ""}
    if kind == "reasoning":
        return {"id": f"rs_{unique}", "type": kind, "summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": f"msg_{unique}", "type": kind, "status": "in_progress", "role": "assistant", "content": [part]}


def _status(finish: Finish | None) -> Literal["completed", "incomplete"]:
    return "completed" if finish is not None and finish.reason == "stop" else "incomplete"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tok,
        "input_tokens_details": {"cached_tokens": usage.cached_tok},
        "output_tokens": usage.completion_tok,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tok},
        "total_tokens": usage.prompt_tok + usage.completion_tok,
    }
