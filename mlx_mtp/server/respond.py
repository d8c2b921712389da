"""Where HTTP meets the engine thread: request bodies in, event streams and JSON bodies out. Knows no dialect.

A client that disconnects cancels its generation before the engine's next pass. It does not matter whether it was
streaming, waiting for a body, in the queue or in its prompt: a task watches the connection all the time.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_mtp.rows import TokenLogprob, one_line
from mlx_mtp.segments import Segment
from mlx_mtp.server.asking import GenerationRequest
from mlx_mtp.server.metrics import log_fields
from mlx_mtp.server.nouns import FinishInfo, ServerError, StreamChunk, Usage, invalid
from mlx_mtp.server.service import Admission
from mlx_mtp.server.worker import GenerationStream

THREAD_BYTES = 2**16  # a longer body is parsed on another thread, so that it does not stop the event loop
Body = TypeVar("Body", bound=BaseModel)


# bodies in --------------------------------------------------------------------------------------------------


async def read_body(request: Request, form: type[Body], admission: Admission) -> Body:
    """A JSON body as a model. `null` counts as absent. Raises ServerError: 413 if too long, 400 if not as expected."""
    raw = await _read(request, admission.settings.body_bytes)
    if len(raw) > THREAD_BYTES:
        return await asyncio.to_thread(parse, raw, form)
    return parse(raw, form)


def parse(raw: bytes, form: type[Body]) -> Body:
    """JSON bytes as a model. Raises ServerError."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
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
    """The body, chunked or not. Raises ServerError."""
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most_bytes:
                chunks.append(chunk)
            elif size > 4 * most_bytes:  # read on until then: a client sees the answer only after it has sent its body
                break
    except ClientDisconnect:
        raise _client_gone() from None
    if size > most_bytes:
        raise ServerError(413, "request_too_large", f"the body has more than {most_bytes} bytes")
    return b"".join(chunks)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _client_gone() -> ServerError:
    return ServerError(499, "client_gone", "the client has disconnected")


# JSON out ---------------------------------------------------------------------------------------------------


def dumps(value: Any) -> bytes:
    """JSON bytes. A lone surrogate, which UTF-8 cannot hold, is escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    return (b"" if event is None else b"event: " + event.encode() + b"\n") + b"data: " + dumps(value) + b"\n\n"


class Json(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


# outputs ----------------------------------------------------------------------------------------------------


@dataclass
class ToolCall:
    """A complete tool call. arguments: JSON text."""

    name: str
    arguments: str = ""

    def parsed(self) -> dict[str, Any]:
        """The arguments as an object; empty if a limit cut them short."""
        try:
            return json.loads(self.arguments or "{}")
        except ValueError:
            return {}


@dataclass
class CompletionText:
    """One complete choice."""

    reasoning: str = ""
    answer: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishInfo | None = None

    def add(self, chunk: StreamChunk) -> None:
        for segment in chunk.segments:
            if segment.kind == "reasoning":
                self.reasoning += segment.text
            elif segment.kind == "answer":
                self.answer += segment.text
            elif segment.kind == "call":
                self.calls.append(ToolCall(segment.text))
            elif segment.kind == "arguments":
                self.calls[segment.call].arguments += segment.text
        self.logprobs += chunk.logprobs
        self.finish = chunk.finish


class DialectWriter(ABC):
    """Writes a generation in a dialect's form. Every bytes value is what goes over the wire."""

    media_type = "text/event-stream"
    keepalive = b": keepalive\n\n"
    finish: FinishInfo | None = None  # of the last choice that has ended

    def begin(self, usage: Usage) -> Iterable[bytes]:
        """Before anything has been computed. usage: of the prompts alone."""
        return ()

    def chunk(self, index: int, chunk: StreamChunk) -> Iterable[bytes]:
        """What a round added to a choice."""
        for segment in chunk.segments:
            yield from self.segment(segment)
        self.finish = chunk.finish or self.finish

    def segment(self, segment: Segment) -> Iterable[bytes]:
        """A segment of the one choice that the dialect has."""
        return ()

    @abstractmethod
    def end(self, usage: Usage) -> Iterable[bytes]:
        """After the last choice has ended."""

    @abstractmethod
    def error(self, error: ServerError) -> Iterable[bytes]:
        """In place of `end`, if the engine has failed."""

    @abstractmethod
    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> Any:
        """The whole generation as one JSON value."""


class BlockWriter(DialectWriter):
    """For dialects that stream typed blocks: each run of segments of one kind opens a block, fills it and closes it."""

    BLOCKS: ClassVar[dict[str, str]] = {}  # kind of segment -> kind of block
    block: str | None = None  # the kind of the open block

    def segment(self, segment: Segment) -> Iterable[bytes]:
        if segment.kind == "end":
            yield from self.close_block()
            return
        kind = self.BLOCKS[segment.kind]
        if kind != self.block or segment.kind == "call":
            yield from self.close_block()
            self.block = kind
            yield from self.open_block(kind, segment.text)
        if segment.kind != "call":
            yield self.add_to_block(kind, segment.text)

    @abstractmethod
    def open_block(self, kind: str, name: str) -> Iterable[bytes]:
        """name: of the tool that a call is for."""

    @abstractmethod
    def add_to_block(self, kind: str, text: str) -> bytes: ...

    @abstractmethod
    def close_block(self) -> Iterable[bytes]:
        """Close the open block, if there is one."""


# responses --------------------------------------------------------------------------------------------------


async def respond(
    request: Request, admission: Admission, wanted: Sequence[GenerationRequest], writer: DialectWriter, stream: bool
) -> Response:
    """Generate and answer in a dialect's form. Raises ServerError before anything has been sent."""
    generation = await admission.submit(wanted)
    if stream:
        return StreamResponse(admission, generation, writer)
    outputs = [CompletionText() for _ in generation.choices]
    async with _watched(admission, generation, request.receive, request.state.log):
        async for index, chunk in generation:
            outputs[index].add(chunk)
    if any(output.finish is None or output.finish.reason == "cancelled" for output in outputs):
        raise _client_gone()
    return Json(writer.body(outputs, generation.usage))


class StreamResponse(Response):
    """A generation as a stream. Headers go out before anything is computed, and keepalives while nothing comes."""

    def __init__(self, admission: Admission, generation: GenerationStream, writer: DialectWriter) -> None:
        super().__init__(media_type=writer.media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies would collect the stream
        self._admission, self._generation, self._writer = admission, generation, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        log = scope["state"]["log"]
        async with _watched(self._admission, self._generation, receive, log):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._frames(log):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, log: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"".join(self._writer.begin(self._generation.usage))
        try:
            while True:
                try:
                    async with asyncio.timeout(self._admission.settings.keepalive_s):
                        index, chunk = await anext(self._generation)
                except TimeoutError:
                    yield self._writer.keepalive
                    continue
                if data := b"".join(self._writer.chunk(index, chunk)):
                    yield data
        except StopAsyncIteration:
            yield b"".join(self._writer.end(self._generation.usage))
        except ServerError as error:
            log["error"] = error.message
            yield b"".join(self._writer.error(error))


@asynccontextmanager
async def _watched(
    admission: Admission, generation: GenerationStream, receive: Receive, log: dict[str, Any]
) -> AsyncIterator[None]:
    """Cancel a generation when its client disconnects. Count and log it at its end, however it ended."""

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
        admission.metrics.generation(generation)
        log.update(log_fields(generation))
