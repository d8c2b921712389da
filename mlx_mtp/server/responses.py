"""OpenAI's /v1/responses without stored state: every request brings its whole conversation. Codex speaks only this."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.server.asking import GenerationRequest, ResponseFormat, function_tool
from mlx_mtp.server.forms import Form
from mlx_mtp.server.nouns import FinishInfo, ServerError, Usage, invalid
from mlx_mtp.server.respond import BlockWriter, CompletionText, read_body, respond, sse
from mlx_mtp.server.service import Admission

# Tools that OpenAI would run. Codex always offers some; the model does not see them.
HOSTED_TOOLS = frozenset({"web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation"})


class ResponsesForm(Form):
    """The body of /v1/responses. Other fields have no effect: they are hints for caches, and bookkeeping."""

    model: StrictStr | None = None
    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    stream: StrictBool = False
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: StrictStr | None = None
    background: StrictBool = False

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        if self.previous_response_id is not None or self.background:
            name = "background" if self.background else "previous_response_id"
            raise invalid(f"{name} is not supported: responses are not stored; send the whole conversation", name)
        effort = (self.reasoning or {}).get("effort")
        return GenerationRequest(
            messages=messages_of(self.instructions, self.input),
            response_format=self._response_format(),
            thinking=effort is not None and effort != "none",
            sampling=self.given("temperature", "top_p"),
            max_tokens=self.max_output_tokens,
        )

    def _response_format(self) -> ResponseFormat:
        choice = self.tool_choice
        functions = [] if choice == "none" else _functions(self.tools or ())
        return ResponseFormat(
            tools=tuple(
                function_tool(f["name"], f.get("description"), f.get("parameters"), bool(f.get("strict")))
                for f in functions
            ),
            tool_choice="required" if choice == "required" else "auto",
            tool_name=str(choice["name"]) if isinstance(choice, dict) and "name" in choice else None,
            parallel_tool_calls=self.parallel_tool_calls,
            schema=self._schema(),
        )

    def _schema(self) -> Any:
        wanted = (self.text or {}).get("format") or {"type": "text"}
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind == "json_schema" and isinstance(wanted.get("schema"), dict):
            return wanted["schema"]
        if kind not in ("text", "json_object"):
            message = "text.format.type must be text, json_object, or json_schema with a schema"
            raise invalid(message, "text.format")
        return True if kind == "json_object" else None


def _functions(tools: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The tools of type function, also those in namespaces. Raises ServerError for types that cannot be offered."""
    for tool in tools:
        kind = tool.get("type")
        named = isinstance(tool.get("name"), str) and isinstance(tool.get("parameters") or {}, dict)
        if kind == "namespace":
            yield from _functions(tool.get("tools") or ())
        elif kind == "function" and named:
            yield tool
        elif kind not in HOSTED_TOOLS:
            raise invalid(f"a tool has the type {str(kind)[:60]!r} or no name; expected a named function", "tools")


def router(admission: Admission) -> APIRouter:
    """The dialect's route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/responses")
    async def responses(request: Request) -> Response:
        form = await read_body(request, ResponsesForm, admission)
        admission.check_model(form.model)
        return await respond(request, admission, [form.request()], ResponseWriter(admission, form), form.stream)

    return routes


# items in ---------------------------------------------------------------------------------------------------


def messages_of(instructions: str | None, given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as chat templates take it. Raises ServerError."""
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
            last = _assistant_turn(out)
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
        last = _assistant_turn(out)
        last["content"] = "\n".join(part for part in (last["content"], text) if part)
    elif role in ("system", "developer") and out and all(m["role"] == "system" for m in out):
        out[-1]["content"] += "\n" + text  # chat templates allow one system turn, at the beginning
    elif role in ("system", "developer", "user"):
        out.append({"role": "system" if role == "developer" and not out else role, "content": text})
    else:
        raise invalid(f"input has a message of role {str(role)[:60]!r}; expected user, assistant or system", "input")


def _assistant_turn(out: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that is being built: its reasoning, text and calls are separate items here."""
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


class ResponseWriter(BlockWriter):
    """A response, whole and as the stream of its items."""

    BLOCKS = {"reasoning": "reasoning", "answer": "message", "call": "function_call", "arguments": "function_call"}

    def __init__(self, admission: Admission, form: ResponsesForm) -> None:
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": admission.settings.name,
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

    def begin(self, usage: Usage) -> Iterable[bytes]:
        yield self._event("response.created", response=self._response("in_progress", None))
        yield self._event("response.in_progress", response=self._response("in_progress", None))

    def open_block(self, kind: str, name: str) -> Iterable[bytes]:
        item = _item(kind, name)
        self._items.append(item)
        shown = {**item, "content": []} if kind != "function_call" else item
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)
        if kind == "message":
            yield self._event("response.content_part.added", **self._place(), part=item["content"][0])

    def add_to_block(self, kind: str, text: str) -> bytes:
        item = self._items[-1]
        if kind == "function_call":
            item["arguments"] += text
            return self._event("response.function_call_arguments.delta", **self._place(), delta=text)
        item["content"][0]["text"] += text
        if kind == "message":
            return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])
        return self._event("response.reasoning_text.delta", **self._place(), delta=text)

    def close_block(self, status: str = "completed") -> Iterable[bytes]:
        if not self.block:
            return
        item, place = self._items[-1], self._place()
        if self.block == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **done)
        elif self.block == "message":
            part = item["content"][0]
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **place, part=part)
        else:
            yield self._event("response.reasoning_text.done", **place, text=item["content"][0]["text"])
        if "status" in item:
            item["status"] = status
        self.block = None
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def end(self, usage: Usage) -> Iterable[bytes]:
        status = _status(self.finish)
        yield from self.close_block(status)
        yield self._event(f"response.{status}", response=self._response(status, usage))

    def error(self, error: ServerError) -> Iterable[bytes]:
        failed = {"error": {"code": error.code or "server_error", "message": error.message}}
        yield self._event("response.failed", response={**self._response("failed", None), **failed})

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        output = outputs[0]
        for kind, content in (("reasoning", output.reasoning), ("message", output.answer)):
            if content or (kind == "message" and not output.calls):
                self._items.append(_item(kind, ""))
                self._items[-1]["content"][0]["text"] = content
        for call in output.calls:
            self._items.append({**_item("function_call", call.name), "arguments": call.arguments})
        status = _status(output.finish)
        for item in self._items:
            if "status" in item:
                item["status"] = status if item is self._items[-1] else "completed"
        return self._response(status, usage)

    def _place(self) -> dict[str, Any]:
        """Where the open block is in the response."""
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if self.block == "function_call" else {**place, "content_index": 0}

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(self._items) if usage else [],
            "usage": _usage(usage) if usage else None,
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **content}, kind)


def _item(kind: str, name: str) -> dict[str, Any]:
    unique = uuid.uuid4().hex
    if kind == "function_call":
        call = {"id": f"fc_{unique}", "type": kind, "status": "in_progress", "call_id": f"call_{unique[:24]}"}
        return {**call, "name": name, "arguments": ""}
    if kind == "reasoning":
        return {"id": f"rs_{unique}", "type": kind, "summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": f"msg_{unique}", "type": kind, "status": "in_progress", "role": "assistant", "content": [part]}


def _status(finish: FinishInfo | None) -> Literal["completed", "incomplete"]:
    return "completed" if finish is not None and finish.reason == "stop" else "incomplete"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tok,
        "input_tokens_details": {"cached_tokens": usage.cached_tok},
        "output_tokens": usage.completion_tok,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tok},
        "total_tokens": usage.prompt_tok + usage.completion_tok,
    }
