"""The OpenAI dialect: /v1/chat/completions, /v1/completions, /v1/models."""

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
from mlx_mtp.server.asking import GenerationRequest
from mlx_mtp.server.nouns import FinishInfo, ServerError, StreamChunk, Usage, invalid
from mlx_mtp.server.openai_form import ChatForm, CommonForm, CompletionForm, error_body
from mlx_mtp.server.respond import CompletionText, DialectWriter, Json, read_body, respond, sse
from mlx_mtp.server.service import Admission
from mlx_mtp.text import Text as Tokenizer


def router(admission: Admission) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        form = await read_body(request, ChatForm, admission)
        admission.check_model(form.model)
        return await respond(request, admission, [form.request()], ChatWriter(admission, form), form.stream)

    @routes.post("/completions")
    async def complete(request: Request) -> Response:
        form = await read_body(request, CompletionForm, admission)
        admission.check_model(form.model)
        wanted = _completions(form)
        writer = CompletionWriter(admission, form, len(wanted) * form.n)
        return await respond(request, admission, wanted, writer, form.stream)

    @routes.get("/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [_model_card(admission)]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        admission.check_model(name)
        return Json(_model_card(admission))

    return routes


def _completions(form: CompletionForm) -> list[GenerationRequest]:
    """A request for each prompt. Raises ServerError."""
    base = replace(form.request(), logprobs=form.logprobs)
    if not form.suffix:
        return [replace(base, prompt=prompt) for prompt in form.prompts()]
    wanted = []
    for prompt in form.prompts():
        if not isinstance(prompt, str):
            raise invalid("suffix needs a prompt of text, not token ids", "suffix")
        wanted.append(infill.fill(base, infill.Hole(prompt, form.suffix)))
    return wanted


def _model_card(admission: Admission) -> dict[str, Any]:
    """A model as /v1/models lists it. `max_model_len` is vLLM's; Continue reads it."""
    context = admission.pair.room_tok
    return {
        "id": admission.settings.name,
        "object": "model",
        "created": admission.created,
        "owned_by": "mlx-mtp",
        "max_model_len": context,
        "context_length": context,
    }


# writing ----------------------------------------------------------------------------------------------------


class OpenAIWriter(DialectWriter):
    """What the chunks and bodies of both endpoints share."""

    kind, prefix = "", ""

    def __init__(self, admission: Admission, form: CommonForm, choices: int) -> None:
        self._text, self._choices = admission.pair.text, choices
        self._with_usage = bool(form.stream_options and form.stream_options.include_usage)
        model = admission.settings.name
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def end(self, usage: Usage) -> Iterable[bytes]:
        if self._with_usage:
            yield self._event({"choices": [], "usage": _usage(usage)})
        yield b"data: [DONE]\n\n"

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield sse(error_body(error))

    def _event(self, content: dict[str, Any]) -> bytes:
        if self._with_usage:
            content = {"usage": None, **content}
        return sse({**self._head, "object": self.kind, **content})


class ChatWriter(OpenAIWriter):
    """chat.completion and chat.completion.chunk."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, admission: Admission, form: ChatForm) -> None:
        super().__init__(admission, form, form.n)

    def begin(self, usage: Usage) -> Iterable[bytes]:
        for index in range(self._choices):
            yield self._choice(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, chunk: StreamChunk) -> Iterable[bytes]:
        logprobs = _chat_logprobs(self._text, chunk.logprobs) if chunk.logprobs else None
        for segment in chunk.segments:
            if (delta := _delta(segment)) is not None:
                yield self._choice(index, delta, logprobs)
                logprobs = None
        if logprobs:
            yield self._choice(index, {"content": ""}, logprobs)
        if chunk.finish:
            yield self._choice(index, {}, finish=_finish_reason(chunk.finish))

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        choices = [self._whole(i, output) for i, output in enumerate(outputs)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": _usage(usage)}

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event({"choices": [choice]})

    def _whole(self, index: int, output: CompletionText) -> dict[str, Any]:
        assert output.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": output.answer}
        if output.reasoning:
            message["reasoning_content"] = output.reasoning
        if output.calls:
            message["tool_calls"] = [_call(call.name, call.arguments) for call in output.calls]
            message["content"] = output.answer or None
        logprobs = _chat_logprobs(self._text, output.logprobs) if output.logprobs else None
        reason = _finish_reason(output.finish)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


class CompletionWriter(OpenAIWriter):
    """text_completion, whole and in chunks."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, admission: Admission, form: CompletionForm, choices: int) -> None:
        super().__init__(admission, form, choices)
        self._wants_logprobs = form.logprobs is not None
        self._offsets = [0] * choices  # characters of a choice's tokens so far

    def chunk(self, index: int, chunk: StreamChunk) -> Iterable[bytes]:
        text = "".join(segment.text for segment in chunk.segments)
        if text or chunk.logprobs or chunk.finish:
            yield self._event({"choices": [self._choice(index, text, chunk.logprobs, chunk.finish)]})

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(i, one.answer, one.logprobs, one.finish) for i, one in enumerate(outputs)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": _usage(usage)}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishInfo | None
    ) -> dict[str, Any]:
        shown = self._logprobs(index, logprobs) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish.reason if finish else None}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        out: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            token = _spell(self._text, entry.token)
            out["tokens"].append(token)
            out["token_logprobs"].append(_finite(entry.logprob))
            # Single bytes can share a spelling. The most probable token comes last, so its value stands.
            out["top_logprobs"].append({_spell(self._text, t): _finite(value) for t, value in reversed(entry.top)})
            out["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token)
        return out


def _delta(segment: Segment) -> dict[str, Any] | None:
    """A segment as a chunk's delta; None for the end of a call."""
    if segment.kind == "reasoning":
        return {"reasoning_content": segment.text}
    if segment.kind == "answer":
        return {"content": segment.text}
    if segment.kind == "call":
        return {"tool_calls": [{"index": segment.call, **_call(segment.text, "")}]}
    if segment.kind == "arguments":
        return {"tool_calls": [{"index": segment.call, "function": {"arguments": segment.text}}]}
    return None


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _finish_reason(finish: FinishInfo) -> str:
    """Clients run tool calls only if this says so."""
    return "tool_calls" if finish.calls and finish.reason == "stop" else finish.reason


def _spell(text: Tokenizer, token: int) -> str:
    return text.spell(token).decode("utf-8", "replace")


def _chat_logprobs(text: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": _spell(text, token), "logprob": _finite(logprob), "bytes": list(text.spell(token))}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(other, value) for other, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999."""
    return max(logprob, -9999.0)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tok,
        "completion_tokens": usage.completion_tok,
        "total_tokens": usage.prompt_tok + usage.completion_tok,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tok},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tok},
    }
