"""The OpenAI dialect: /v1/chat/completions, /v1/completions, /v1/models. JSON to jobs, deltas to chunks and bodies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.rows import TokenLogprob
from mlx_mtp.segments import Segment
from mlx_mtp.server import infill
from mlx_mtp.server.asking import constraint_of
from mlx_mtp.server.nouns import Delta, Finish, Job, ServerError, Usage, invalid
from mlx_mtp.server.openai_form import ChatForm, Common, CompletionForm, error_body, plain_messages
from mlx_mtp.server.respond import Body, Json, Text, dumps, read_body, respond
from mlx_mtp.server.service import Prompt, Service
from mlx_mtp.text import Text as Tokenizer


def router(service: Service) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter(prefix="/v1")

    async def form(request: Request, kind: type[Body]) -> Body:
        return await read_body(request, kind, service.settings.body_bytes)

    @routes.post("/chat/completions", openapi_extra=_takes(ChatForm))
    async def chat(request: Request) -> Response:
        return await _chat(request, service, await form(request, ChatForm))

    @routes.post("/completions", openapi_extra=_takes(CompletionForm))
    async def complete(request: Request) -> Response:
        return await _complete(request, service, await form(request, CompletionForm))

    @routes.get("/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [_card(service)]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_name(name)
        return Json(_card(service))

    return routes


async def _chat(request: Request, service: Service, form: ChatForm) -> Response:
    form.check_extras()
    service.check_name(form.model)
    options = form.options()
    prompt = await service.chat(plain_messages(form.messages), options)
    jobs = _jobs(service, form, [prompt], form.limit(), form.alternatives())
    must = form.must()
    constraint = await constraint_of(service, prompt, must, options["enable_thinking"])
    tools = {tool.name: dict(tool.parameters) for tool in must.tools}
    one_call = not must.several
    loops = None if form.ignore_eos else service.settings.loop_guard
    changes = {"splits": True, "tools": tools, "one_call": one_call, "constraint": constraint, "loops": loops}
    jobs = [replace(job, **changes) for job in jobs]
    writer = ChatWriter(service, form)
    return await respond(request, service, jobs, writer, form.stream)


async def _complete(request: Request, service: Service, form: CompletionForm) -> Response:
    form.check_extras()
    service.check_name(form.model)
    prompts = []
    for prompt in form.prompts():
        if form.suffix and isinstance(prompt, str):
            prompts.append(await infill.prompt_of(service, infill.Hole(prompt, form.suffix)))
        elif form.suffix:
            raise invalid("suffix is given with a prompt of token ids; expected text", "suffix")
        else:
            prompts.append(await service.text(prompt) if isinstance(prompt, str) else service.ids(prompt))
    jobs = _jobs(service, form, prompts, form.max_tokens, form.logprobs)
    if form.suffix:
        jobs = [replace(job, stop=(*job.stop, *infill.stops_of(form.suffix))) for job in jobs]
    return await respond(request, service, jobs, CompletionWriter(service, form, len(jobs)), form.stream)


def _jobs(
    service: Service,
    form: Common,
    prompts: Sequence[Prompt],
    limit: int | None,
    logprobs: int | None,
) -> list[Job]:
    """A job for every choice of every prompt. With a seed, choice i has seed + i: the first is what n=1 gives."""
    changes, stops, jobs = form.changes(), form.stops(), []
    for prompt in prompts:
        for i in range(form.n):
            if i and "seed" in changes:
                changes = {**changes, "seed": (changes["seed"] + 1) % 2**64}
            sampling = service.sampling(changes)
            most = service.limit(prompt, limit)
            jobs.append(Job(prompt.tokens, most, sampling, stops, logprobs, ends=not form.ignore_eos))
        changes = form.changes()
    return jobs


def _card(service: Service) -> dict[str, Any]:
    """A model as /v1/models lists it; `max_model_len` is vLLM's, and Continue reads it."""
    name, context = service.settings.name, service.model.room_tok
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mlx-mtp",
        "max_model_len": context,
        "context_length": context,
    }


def _takes(form: type[Common]) -> dict[str, Any]:
    """What the OpenAPI page says of a body that is read by hand."""
    schema = form.model_json_schema(ref_template="#/$defs/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# writing ----------------------------------------------------------------------------------------------------


class _Writer:
    """What both endpoints' chunks and bodies share."""

    media_type = "text/event-stream"
    keepalive = b": keepalive\n\n"
    kind, prefix = "", ""

    def __init__(self, service: Service, form: Common, choices: int) -> None:
        self._model, self._text, self._choices = service.settings.name, service.model.text, choices
        self._with_usage = bool(form.stream_options and form.stream_options.include_usage)
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._model}

    def begin(self) -> Iterable[bytes]:
        return ()

    def end(self, usage: Usage) -> Iterable[bytes]:
        if self._with_usage:
            yield self._event({"choices": [], "usage": _usage(usage)})
        yield b"data: [DONE]\n\n"

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield b"data: " + dumps(error_body(error)) + b"\n\n"

    def _event(self, content: dict[str, Any]) -> bytes:
        if self._with_usage:
            content = {"usage": None, **content}
        return b"data: " + dumps({**self._head, "object": self.kind, **content}) + b"\n\n"


class ChatWriter(_Writer):
    """chat.completion and chat.completion.chunk."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, form: ChatForm) -> None:
        super().__init__(service, form, form.n)

    def begin(self) -> Iterable[bytes]:
        for index in range(self._choices):
            yield self._choice(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        logprobs = _chat_logprobs(self._text, delta.logprobs) if delta.logprobs else None
        for part in delta.parts:
            if (change := _change(part)) is not None:
                yield self._choice(index, change, logprobs)
                logprobs = None
        if logprobs:
            yield self._choice(index, {"content": ""}, logprobs)
        if delta.finish:
            yield self._choice(index, {}, finish=_reason(delta.finish))

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        choices = [self._whole(i, text) for i, text in enumerate(texts)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": _usage(usage)}

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event({"choices": [choice]})

    def _whole(self, index: int, text: Text) -> dict[str, Any]:
        assert text.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": text.answer}
        if text.reasoning:
            message["reasoning_content"] = text.reasoning
        if text.calls:
            message["tool_calls"] = [_call(i, call.name, call.arguments) for i, call in enumerate(text.calls)]
            for call in message["tool_calls"]:
                del call["index"]
            message["content"] = text.answer or None
        logprobs = _chat_logprobs(self._text, text.logprobs) if text.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _reason(text.finish)}


class CompletionWriter(_Writer):
    """text_completion, whole and in chunks."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, service: Service, form: CompletionForm, choices: int) -> None:
        super().__init__(service, form, choices)
        self._wants_logprobs = form.logprobs is not None
        self._offsets = [0] * choices  # characters of a choice's tokens so far

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        text = "".join(part.text for part in delta.parts)
        if text or delta.logprobs or delta.finish:
            reason = delta.finish.reason if delta.finish else None
            yield self._event({"choices": [self._choice(index, text, delta.logprobs, reason)]})

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(i, text.answer, text.logprobs, text.finish.reason if text.finish else None)
            for i, text in enumerate(texts)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": _usage(usage)}

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        shown = self._logprobs(index, logprobs) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        out: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            token = _read(self._text, entry.token)
            out["tokens"].append(token)
            out["token_logprobs"].append(_finite(entry.logprob))
            # Tokens that read alike, such as single bytes, share a name: the most probable one's value stands.
            out["top_logprobs"].append({_read(self._text, t): _finite(value) for t, value in reversed(entry.top)})
            out["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token)
        return out


def _change(part: Segment) -> dict[str, Any] | None:
    """A segment as a chunk's delta; the end of a call is none."""
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    if part.kind == "answer":
        return {"content": part.text}
    if part.kind == "call":
        return {"tool_calls": [_call(part.call, part.text, "")]}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    return None


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _reason(finish: Finish) -> str:
    """Clients run the calls only where this says so."""
    return "tool_calls" if finish.calls and finish.reason == "stop" else finish.reason


def _read(text: Tokenizer, token: int) -> str:
    return text.spell(token).decode("utf-8", "replace")


def _chat_logprobs(text: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": _read(text, token), "logprob": _finite(logprob), "bytes": list(text.spell(token))}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(other, value) for other, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for it."""
    return max(logprob, -9999.0)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tok,
        "completion_tokens": usage.completion_tok,
        "total_tokens": usage.prompt_tok + usage.completion_tok,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tok},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tok},
    }
