"""A generation as an event stream or as one body, and bodies read: where HTTP meets the worker. Knows no dialect.

A client that goes away cancels its generation before the engine's next pass, whether it was streaming, waiting for a
body, in the queue or in its prompt: a task waits for the disconnect all the while.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_mtp.rows import TokenLogprob, one_line
from mlx_mtp.server.metrics import facts
from mlx_mtp.server.nouns import Delta, Finish, Job, ServerError, Usage, invalid
from mlx_mtp.server.service import Service
from mlx_mtp.server.worker import Generation

THREAD_BYTES = 2**16  # a longer body is parsed beside the event loop
Body = TypeVar("Body", bound=BaseModel)


# bodies in --------------------------------------------------------------------------------------------------


async def read_body(request: Request, form: type[Body], most_bytes: int) -> Body:
    """A JSON body as a model. `null` counts as absent. Raises ServerError: 413 if too long, 400 if not as expected."""
    raw = await _read(request, most_bytes)
    if len(raw) > THREAD_BYTES:
        return await asyncio.to_thread(parse, raw, form)
    return parse(raw, form)


def parse(raw: bytes, form: type[Body]) -> Body:
    """JSON bytes as a model. Raises ServerError."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise invalid(f"the body is a JSON {type(value).__name__}; expected an object")
    try:
        return form.model_validate({name: item for name, item in value.items() if item is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise invalid(f"{param or 'the body'}: {first['msg']}", param) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


async def _read(request: Request, most_bytes: int) -> bytes:
    """The body, chunked or not. What is too long is read to its end, within reason, or no answer could be seen."""
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most_bytes:
                chunks.append(chunk)
            elif size > 4 * most_bytes:
                break
    except ClientDisconnect:
        raise ServerError(499, "client_gone", "the client has gone") from None
    if size > most_bytes:
        raise ServerError(413, "request_too_large", f"the body has more than {most_bytes} bytes")
    return b"".join(chunks)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def dumps(value: Any) -> bytes:
    """JSON bytes; a lone surrogate, which UTF-8 cannot hold, is written as its escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class Json(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


# generations out --------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A tool call as a whole; arguments are JSON text."""

    name: str
    arguments: str = ""

    def value(self) -> dict[str, Any]:
        """The arguments as an object; empty where a limit has cut them short."""
        try:
            return json.loads(self.arguments or "{}")
        except ValueError:
            return {}


@dataclass
class Text:
    """One choice as a whole."""

    reasoning: str = ""
    answer: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        for part in delta.parts:
            if part.kind == "reasoning":
                self.reasoning += part.text
            elif part.kind == "answer":
                self.answer += part.text
            elif part.kind == "call":
                self.calls.append(Call(part.text))
            elif part.kind == "arguments":
                self.calls[part.call].arguments += part.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish = delta.finish


class Writer(Protocol):
    """A dialect's form of a stream and of a body. Every bytes value is what goes over the wire."""

    media_type: str
    keepalive: bytes

    def begin(self) -> Iterable[bytes]:
        """Before anything has been computed."""
        ...

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        """What a round added to a choice."""
        ...

    def end(self, usage: Usage) -> Iterable[bytes]:
        """After the last choice has ended."""
        ...

    def error(self, error: ServerError) -> Iterable[bytes]:
        """In place of `end`, when the engine has failed."""
        ...

    def body(self, texts: Sequence[Text], usage: Usage) -> Any:
        """The whole as one JSON value."""
        ...


async def respond(request: Request, service: Service, jobs: Sequence[Job], writer: Writer, stream: bool) -> Response:
    """Run jobs and answer in a dialect's form. Raises ServerError before anything has been sent."""
    generation = service.open(jobs)
    if stream:
        return Stream(service, generation, writer)
    texts = [Text() for _ in jobs]
    async with _followed(service, generation, request.receive, request.state.log):
        async for index, delta in generation:
            texts[index].add(delta)
    if any(t.finish is None or t.finish.reason == "cancelled" for t in texts):
        raise ServerError(499, "client_gone", "the client has gone")
    return Json(writer.body(texts, generation.usage))


class Stream(Response):
    """A generation as it comes. Headers are sent before anything is computed; comments while nothing comes."""

    def __init__(self, service: Service, generation: Generation, writer: Writer) -> None:
        super().__init__(media_type=writer.media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies would collect the stream
        self._service, self._generation, self._writer = service, generation, writer
        self._log: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._log = scope["state"]["log"]
        async with _followed(self._service, self._generation, receive, self._log):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._frames():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self) -> AsyncIterator[bytes]:
        yield b"".join(self._writer.begin())
        try:
            while True:
                try:
                    async with asyncio.timeout(self._service.settings.keepalive_s):
                        index, delta = await anext(self._generation)
                except TimeoutError:
                    yield self._writer.keepalive
                    continue
                if data := b"".join(self._writer.delta(index, delta)):
                    yield data
        except StopAsyncIteration:
            yield b"".join(self._writer.end(self._generation.usage))
        except ServerError as error:
            self._log["error"] = error.message
            yield b"".join(self._writer.error(error))


@asynccontextmanager
async def _followed(
    service: Service, generation: Generation, receive: Receive, log: dict[str, Any]
) -> AsyncIterator[None]:
    """While a generation is read: its client is watched; afterwards it is stopped and counted, however it ended."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        log["gone"] = True
        generation.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        generation.cancel()
        service.metrics.generation(generation)
        log.update(facts(generation))
