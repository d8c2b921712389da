"""The Ollama dialect: /api/version, tags, show, chat and generate, answers as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.grammar import Tool
from mlx_mtp.segments import Segment
from mlx_mtp.server import infill
from mlx_mtp.server.asking import Ask, Must, function_tool, job_of
from mlx_mtp.server.forms import Flag, Lenient, Word
from mlx_mtp.server.nouns import Delta, Finish, Job, ServerError, Usage, invalid
from mlx_mtp.server.respond import Call, Json, Text, dumps, read_body, respond
from mlx_mtp.server.service import Service

VERSION = "0.12.6"  # of Ollama, whose interface this is; clients ask before they send tools or thoughts
RENAMED = {"repeat_penalty": "repetition_penalty"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
# Of memory, threads and the context, which are this server's own affair.
NO_EFFECT = frozenset("num_ctx num_batch num_gpu main_gpu num_thread num_keep use_mmap use_mlock numa low_vram".split())


class Common(Lenient):
    """What chat and generate take."""

    model: Word
    stream: Flag = True
    format: Word | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: Flag | Literal["low", "medium", "high"] | None = None

    def ask(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> Ask:
        """Raises ServerError."""
        options = {
            RENAMED.get(k, k): v for k, v in (self.options or {}).items() if v is not None and k not in NO_EFFECT
        }
        limit, stop = options.pop("num_predict", None), options.pop("stop", None)
        changes = {name: options.pop(name) for name in (*SAMPLING, "repetition_penalty") if name in options}
        if options:
            raise invalid(f"not supported by this server: options.{sorted(options)[0]}; leave it out", "options")
        if limit is not None and type(limit) is not int:
            raise invalid("options.num_predict must be an integer", "options")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise invalid("options.stop must be a list of texts of at least one character", "options")
        functions = [tool["function"] for tool in tools]
        return Ask(
            messages=messages,
            tools=tools,
            must=Must(tuple(Tool(f["name"], f["parameters"]) for f in functions), schema=self._schema()),
            thinking=bool(self.think),
            changes=changes,
            stops=tuple(stops),
            limit=limit if limit is not None and limit > 0 else None,  # -1 and -2: as far as there is room
        )

    def _schema(self) -> Any:
        if isinstance(self.format, str):
            if self.format not in ("", "json"):
                raise invalid(f"format is {self.format!r}; expected 'json' or a JSON schema", "format")
            return True if self.format else None
        return self.format


class Message(Lenient):
    role: Literal["system", "user", "assistant", "tool"]
    content: Word | None = None
    thinking: Word | None = None
    images: list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: Word | None = None
    tool_call_id: Word | None = None

    def plain(self) -> dict[str, Any]:
        """As templates take it. Raises ServerError."""
        if self.images:
            raise invalid("images are not supported; send text", "messages")
        out = self.model_dump(exclude_none=True, exclude={"images", "thinking"})
        thought = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"content": "", **out, **thought}


class ChatForm(Common):
    """The body of /api/chat."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None

    def offered(self) -> list[dict[str, Any]]:
        """Raises ServerError."""
        out = []
        for tool in self.tools or ():
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise invalid('a tool has no name; expected {"type": "function", "function": {"name": ...}}', "tools")
            parameters = function.get("parameters")
            description = function.get("description")
            out.append(function_tool(function["name"], description, parameters if isinstance(parameters, dict) else {}))
        return out


class GenerateForm(Common):
    """The body of /api/generate."""

    prompt: Word | None = None
    system: Word | None = None
    suffix: Word | None = None
    raw: Flag = False
    images: list[Any] | None = None
    template: Word | None = None
    context: list[int] | None = None


class ShowForm(Lenient):
    model: Word | None = None
    name: Word | None = None


def router(service: Service) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter(prefix="/api")
    most = service.settings.body_bytes

    @routes.get("/version")
    async def version() -> Response:
        return Json({"version": VERSION})

    @routes.get("/tags")
    async def tags() -> Response:
        name = service.settings.name
        card = {"name": name, "model": name, "modified_at": _time(service.created), "size": 0, "digest": ""}
        return Json({"models": [{**card, "details": _details(service)}]})

    @routes.post("/show")
    async def show(request: Request) -> Response:
        form = await read_body(request, ShowForm, most)
        service.check_name(_bare(service, form.model or form.name or ""))
        return Json(_shown(service))

    @routes.post("/chat")
    async def chat(request: Request) -> Response:
        form = await read_body(request, ChatForm, most)
        service.check_name(_bare(service, form.model))
        writer = Writer(service, "chat")
        if not form.messages:  # asks to load the model, which it is
            return Json(writer.loaded())
        ask = form.ask([message.plain() for message in form.messages], form.offered())
        return await respond(request, service, [await job_of(service, ask)], writer, form.stream)

    @routes.post("/generate")
    async def generate(request: Request) -> Response:
        form = await read_body(request, GenerateForm, most)
        service.check_name(_bare(service, form.model))
        writer = Writer(service, "generate")
        if not form.prompt:
            return Json(writer.loaded())
        return await respond(request, service, [await _generated(service, form)], writer, form.stream)

    return routes


async def _generated(service: Service, form: GenerateForm) -> Job:
    """Raises ServerError."""
    for name in ("images", "template", "context"):
        if vars(form)[name]:
            raise invalid(f"{name} is not supported by this server; leave it out", name)
    if form.suffix:
        ask = form.ask([])
        prompt = await infill.prompt_of(service, infill.Hole(form.prompt or "", form.suffix))
        return infill.job_of(service, prompt, form.suffix, ask)
    system = [{"role": "system", "content": form.system}] if form.system else []
    ask = form.ask([*system, {"role": "user", "content": form.prompt}])
    if not form.raw:
        return await job_of(service, ask)
    prompt = await service.text(form.prompt or "")
    if not ask.must.free:
        raise invalid("format needs the chat template; leave out raw", "raw")
    return Job(prompt.tokens, service.limit(prompt, ask.limit), service.sampling(ask.changes), ask.stops)


def _bare(service: Service, name: str) -> str:
    """A model's name without the tag that clients add."""
    return service.settings.name if name == f"{service.settings.name}:latest" else name


def _details(service: Service) -> dict[str, Any]:
    name = service.model.family
    family = {"format": "mlx", "family": name, "families": [name]}
    return {"parent_model": "", **family, "parameter_size": "", "quantization_level": ""}


def _shown(service: Service) -> dict[str, Any]:
    text, family = service.model.text, service.model.family
    known = text.template_variables if text.has_template and text.segmented else frozenset()
    can = [word for word, name in (("tools", "tools"), ("thinking", "enable_thinking")) if name in known]
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(service),
        "model_info": {"general.architecture": family, f"{family}.context_length": service.model.room_tok},
        "capabilities": ["completion", *can],
        "modified_at": _time(service.created),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class Writer:
    """A line of JSON for every change, or one for the whole. Calls of tools are told when they are complete."""

    media_type = "application/x-ndjson"

    def __init__(self, service: Service, kind: Literal["chat", "generate"]) -> None:
        self._model, self._kind = service.settings.name, kind
        self._begun_ns, self._first_ns = time.perf_counter_ns(), 0
        self._finish: Finish | None = None
        self._call: Call | None = None
        self.keepalive = self._line("", "", None)  # a line without text: there are no comments here

    def begin(self) -> Iterable[bytes]:
        return ()

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        self._first_ns = self._first_ns or time.perf_counter_ns()
        for part in delta.parts:
            yield from self._part(part)
        self._finish = delta.finish or self._finish

    def _part(self, part: Segment) -> Iterable[bytes]:
        if part.kind == "call":
            self._call = Call(part.text)
        elif part.kind == "arguments" and self._call:
            self._call.arguments += part.text
        elif part.kind == "end" and self._call:
            yield self._line("", "", [self._call])
            self._call = None
        elif part.kind in ("answer", "reasoning"):
            yield self._line(*(("", part.text) if part.kind == "reasoning" else (part.text, "")), None)

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield dumps({**self._message("", "", None), **self._done(self._finish, usage)}) + b"\n"

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield dumps({"error": error.message}) + b"\n"

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        text = texts[0]
        return {**self._message(text.answer, text.reasoning, text.calls), **self._done(text.finish, usage)}

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt."""
        return {**self._message("", "", None), "done": True, "done_reason": "load"}

    def _line(self, answer: str, thought: str, calls: Sequence[Call] | None) -> bytes:
        return dumps({**self._message(answer, thought, calls), "done": False}) + b"\n"

    def _message(self, answer: str, thought: str, calls: Sequence[Call] | None) -> dict[str, Any]:
        head = {"model": self._model, "created_at": _time(time.time())}
        thinking = {"thinking": thought} if thought else {}
        if self._kind == "generate":
            return {**head, "response": answer, **thinking}
        called = [{"function": {"name": call.name, "arguments": call.value()}} for call in calls or ()]
        message = {"role": "assistant", "content": answer, **thinking}
        return {**head, "message": message | ({"tool_calls": called} if called else {})}

    def _done(self, finish: Finish | None, usage: Usage) -> dict[str, Any]:
        """How it ended; times in nanoseconds."""
        now = time.perf_counter_ns()
        first = self._first_ns or now
        return {
            "done": True,
            "done_reason": "stop" if finish and finish.reason == "stop" else "length",
            "total_duration": now - self._begun_ns,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tok,
            "prompt_eval_duration": first - self._begun_ns,
            "eval_count": usage.completion_tok,
            "eval_duration": now - first,
        }
