"""The Ollama dialect: /api/version, tags, show, chat and generate. Streams are lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import StrictBool, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.segments import Segment
from mlx_mtp.server import infill
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat, function_tool
from mlx_mtp.server.forms import Form, stop_strings
from mlx_mtp.server.nouns import FinishInfo, ServerError, StreamChunk, Usage, invalid
from mlx_mtp.server.respond import CompletionText, DialectWriter, Json, ToolCall, dumps, read_body, respond
from mlx_mtp.server.service import Admission

VERSION = "0.12.6"  # of Ollama; clients check it before they send tools or thinking
RENAMED = {"repeat_penalty": "repetition_penalty"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
# Options for memory, threads and the context, which this server decides by itself.
NO_EFFECT = frozenset("num_ctx num_batch num_gpu main_gpu num_thread num_keep use_mmap use_mlock numa low_vram".split())


class CommonForm(Form):
    """The fields that chat and generate share."""

    model: StrictStr
    stream: StrictBool = True
    format: StrictStr | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: StrictBool | Literal["low", "medium", "high"] | None = None

    def request(self) -> GenerationRequest:
        """The request without its prompt. Raises ServerError."""
        given = {k: v for k, v in (self.options or {}).items() if v is not None and k not in NO_EFFECT}
        options = {RENAMED.get(name, name): value for name, value in given.items()}
        limit, stop = options.pop("num_predict", None), options.pop("stop", None)
        sampling = {name: options.pop(name) for name in (*SAMPLING, "repetition_penalty") if name in options}
        if options:
            raise invalid(f"not supported: options.{sorted(options)[0]}; remove it", "options")
        if limit is not None and type(limit) is not int:
            raise invalid("options.num_predict must be an integer", "options")
        return GenerationRequest(
            response_format=ResponseFormat(schema=self._schema()),
            thinking=bool(self.think),
            sampling=sampling,
            stop=stop_strings(stop, "options.stop"),
            max_tokens=limit if limit is not None and limit > 0 else None,  # -1 and -2: as far as there is room
        )

    def _schema(self) -> Any:
        if isinstance(self.format, str):
            if self.format not in ("", "json"):
                raise invalid(f"format is {self.format!r}; expected 'json' or a JSON schema", "format")
            return True if self.format else None
        return self.format


class ChatMessage(Form):
    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr | None = None
    thinking: StrictStr | None = None
    images: list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: StrictStr | None = None
    tool_call_id: StrictStr | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it. Raises ServerError."""
        if self.images:
            raise invalid("images are not supported; send text", "messages")
        out = self.model_dump(exclude_none=True, exclude={"images", "thinking"})
        thought = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"content": "", **out, **thought}


class ChatForm(CommonForm):
    """The body of /api/chat."""

    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        base, tools = super().request(), []
        for tool in self.tools or ():
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise invalid('a tool has no name; expected {"type": "function", "function": {"name": ...}}', "tools")
            parameters = function.get("parameters")
            parameters = parameters if isinstance(parameters, dict) else {}
            tools.append(function_tool(function["name"], function.get("description"), parameters))
        messages = [message.plain() for message in self.messages or ()]
        return replace(base, messages=messages, response_format=replace(base.response_format, tools=tuple(tools)))


class GenerateForm(CommonForm):
    """The body of /api/generate."""

    prompt: StrictStr = ""
    system: StrictStr | None = None
    suffix: StrictStr | None = None
    raw: StrictBool = False
    images: list[Any] | None = None
    template: StrictStr | None = None
    context: list[int] | None = None

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        for name in ("images", "template", "context"):
            if vars(self)[name]:
                raise invalid(f"{name} is not supported; remove it", name)
        base = super().request()
        if self.suffix:
            return infill.fill(base, infill.Hole(self.prompt, self.suffix))
        if not self.raw:
            system = [{"role": "system", "content": self.system}] if self.system else []
            return replace(base, messages=[*system, {"role": "user", "content": self.prompt}])
        if not base.response_format.any_text:
            raise invalid("format needs the chat template; remove raw", "raw")
        return replace(base, prompt=self.prompt)


class ShowForm(Form):
    model: StrictStr | None = None
    name: StrictStr | None = None


def router(admission: Admission) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter(prefix="/api")

    @routes.get("/version")
    async def version() -> Response:
        return Json({"version": VERSION})

    @routes.get("/tags")
    async def tags() -> Response:
        name = admission.settings.name
        card = {"name": name, "model": name, "modified_at": _time(admission.created), "size": 0, "digest": ""}
        return Json({"models": [{**card, "details": _details(admission)}]})

    @routes.post("/show")
    async def show(request: Request) -> Response:
        form = await read_body(request, ShowForm, admission)
        _check_model(admission, form.model or form.name or "")
        return Json(_model_card(admission))

    @routes.post("/chat")
    async def chat(request: Request) -> Response:
        form = await read_body(request, ChatForm, admission)
        return await _answer(request, admission, form, OllamaWriter(admission, "chat"), bool(form.messages))

    @routes.post("/generate")
    async def generate(request: Request) -> Response:
        form = await read_body(request, GenerateForm, admission)
        return await _answer(request, admission, form, OllamaWriter(admission, "generate"), bool(form.prompt))

    return routes


async def _answer(
    request: Request, admission: Admission, form: CommonForm, writer: OllamaWriter, has_prompt: bool
) -> Response:
    _check_model(admission, form.model)
    if not has_prompt:  # a request to load the model, which is loaded
        return Json(writer.loaded())
    return await respond(request, admission, [form.request()], writer, form.stream)


def _check_model(admission: Admission, name: str) -> None:
    """Clients add the tag `latest` to a model's name."""
    own = admission.settings.name
    admission.check_model(own if name == f"{own}:latest" else name)


def _details(admission: Admission) -> dict[str, Any]:
    name = admission.pair.family
    family = {"format": "mlx", "family": name, "families": [name]}
    return {"parent_model": "", **family, "parameter_size": "", "quantization_level": ""}


def _model_card(admission: Admission) -> dict[str, Any]:
    text, family = admission.pair.text, admission.pair.family
    variables = text.template_variables if text.has_template and text.segmented else frozenset()
    can = [word for word, name in (("tools", "tools"), ("thinking", "enable_thinking")) if name in variables]
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(admission),
        "model_info": {"general.architecture": family, f"{family}.context_length": admission.pair.room_tok},
        "capabilities": ["completion", *can],
        "modified_at": _time(admission.created),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class OllamaWriter(DialectWriter):
    """One line of JSON for every change, or one for the whole. Tool calls are written when they are complete."""

    media_type = "application/x-ndjson"

    def __init__(self, admission: Admission, kind: Literal["chat", "generate"]) -> None:
        self._model, self._kind = admission.settings.name, kind
        self._start_ns, self._first_ns = time.perf_counter_ns(), 0
        self._call = ToolCall("")
        self.keepalive = self._line()  # a line without text, as JSON has no comments

    def chunk(self, index: int, chunk: StreamChunk) -> Iterable[bytes]:
        self._first_ns = self._first_ns or time.perf_counter_ns()
        yield from super().chunk(index, chunk)

    def segment(self, segment: Segment) -> Iterable[bytes]:
        if segment.kind == "call":
            self._call = ToolCall(segment.text)
        elif segment.kind == "arguments":
            self._call.arguments += segment.text
        elif segment.kind == "end":
            yield self._line(calls=[self._call])
        elif segment.kind == "reasoning":
            yield self._line(thought=segment.text)
        else:
            yield self._line(segment.text)

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield dumps({**self._message(), **self._done(self.finish, usage)}) + b"\n"

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield dumps({"error": error.message}) + b"\n"

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        output = outputs[0]
        return {**self._message(output.answer, output.reasoning, output.calls), **self._done(output.finish, usage)}

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt."""
        return {**self._message(), "done": True, "done_reason": "load"}

    def _line(self, answer: str = "", thought: str = "", calls: Sequence[ToolCall] = ()) -> bytes:
        return dumps({**self._message(answer, thought, calls), "done": False}) + b"\n"

    def _message(self, answer: str = "", thought: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        head = {"model": self._model, "created_at": _time(time.time())}
        thinking = {"thinking": thought} if thought else {}
        if self._kind == "generate":
            return {**head, "response": answer, **thinking}
        called = [{"function": {"name": call.name, "arguments": call.parsed()}} for call in calls]
        message = {"role": "assistant", "content": answer, **thinking}
        return {**head, "message": message | ({"tool_calls": called} if called else {})}

    def _done(self, finish: FinishInfo | None, usage: Usage) -> dict[str, Any]:
        """How it ended; times in nanoseconds."""
        now = time.perf_counter_ns()
        first = self._first_ns or now
        return {
            "done": True,
            "done_reason": "stop" if finish and finish.reason == "stop" else "length",
            "total_duration": now - self._start_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tok,
            "prompt_eval_duration": first - self._start_ns,
            "eval_count": usage.completion_tok,
            "eval_duration": now - first,
        }
