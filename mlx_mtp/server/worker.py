"""The engine thread: it alone loads, runs and frees a pair. Requests go in, stream chunks come out.

A fault (an exception from the engine) ends every open request with an error. The thread then builds a new engine over
the same weights, which takes milliseconds. The likely cause is one request, or too little memory for it. An editor has
no supervisor that would start the process again. The third fault within five minutes is final: the state becomes
"failed" and the process ends with a code that a supervisor sees.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from mlx_mtp.cost_profile import dummy_prompts
from mlx_mtp.grammar import Grammars
from mlx_mtp.pair import Pair, leave_thread
from mlx_mtp.rows import Event, Request, RequestError, one_line
from mlx_mtp.server.decoding import OutputDecoder
from mlx_mtp.server.nouns import FinishInfo, ServerError, Settings, State, StreamChunk, Usage, invalid, shutting_down

MAX_FAULTS, FAULT_WINDOW_S = 3, 300.0
Progress = Callable[[str, int, int], None]


class GenerationStream:
    """The choices of one HTTP request. Iterate it for (index of the choice, chunk) as they come.

    Iterating ends when every choice has ended or was cancelled. It raises ServerError if the engine fails.
    Belongs to the event loop that made it.
    """

    def __init__(self, choices: Sequence[tuple[Request, OutputDecoder]], engine_thread: EngineThread) -> None:
        self.choices = tuple(choices)
        self.finishes: list[FinishInfo | None] = [None] * len(self.choices)
        self.start_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.tokens = 0
        self.loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[tuple[int, StreamChunk] | ServerError] = asyncio.Queue()
        self.delivered = 0  # choices whose end is in the inbox
        self._engine_thread, self._open = engine_thread, len(self.choices)

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> tuple[int, StreamChunk]:
        if not self._open:
            raise StopAsyncIteration
        item = await self.inbox.get()
        if isinstance(item, ServerError):
            self._open = 0
            raise item
        index, chunk = item
        if chunk.tokens and self.first_token_s is None:
            self.first_token_s = time.perf_counter()
        self.tokens += chunk.tokens
        if chunk.finish:
            self.finishes[index] = chunk.finish
            self._open -= 1
        return item

    def cancel(self) -> None:
        """Stop the choices that still run."""
        if self._open:
            self._engine_thread.cancel(self)

    @property
    def usage(self) -> Usage:
        """Tokens so far. A prompt that choices share counts once, with its cached tokens."""
        stats = [finish.stats if finish else None for finish in self.finishes]
        prompts = {request.prompt: s for (request, _), s in zip(reversed(self.choices), reversed(stats), strict=True)}
        return Usage(
            prompt_tok=sum(map(len, prompts)),
            cached_tok=sum(s.cached_tokens for s in prompts.values() if s),
            completion_tok=self.tokens,
            reasoning_tok=sum(finish.reasoning_tok for finish in self.finishes if finish),
        )


@dataclass
class _Choice:
    """A choice that the engine runs."""

    stream: GenerationStream
    index: int
    output: OutputDecoder


@dataclass(frozen=True)
class _Cancel:
    stream: GenerationStream


@dataclass(frozen=True)
class _Abort:
    error: ServerError
    stop: bool


class EngineThread:
    """Runs requests on a thread of its own. The event loop calls `submit`, `cancel` and `abort`."""

    def __init__(
        self,
        load: Callable[[], Pair],
        settings: Settings,
        progress: Progress = lambda stage, done, total: None,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """The callbacks run on the engine thread. load: makes the pair. failed: the engine will not recover."""
        self._load, self._settings, self._progress, self._failed = load, settings, progress, failed
        self._commands: SimpleQueue[GenerationStream | _Cancel | _Abort] = SimpleQueue()  # a stream is to be started
        self._lock = threading.Lock()  # so that no command is queued after the thread has ended
        self._choices: dict[int, _Choice] = {}  # by the engine's request id
        self._fault_times: list[float] = []
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.state: State = "loading"
        self.pair: Pair | None = None
        self.grammars: Grammars | None = None  # of a pair whose tokenizer can be used for them
        self.error: Exception | None = None  # why the engine failed, or the last fault
        self.faults = 0
        self.open = 0  # choices whose end has not been delivered
        self.running = self.waiting = 0  # sequences, after the last pass

    # called from the event loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, choices: Sequence[tuple[Request, OutputDecoder]]) -> GenerationStream:
        """Queue an HTTP request's choices. Raises ServerError if the engine is not ready."""
        stream = GenerationStream(choices, self)
        with self._lock:
            if self.state not in ("ready", "restarting"):
                raise self.refusal()
            self.open += len(choices)
            self._commands.put(stream)
        return stream

    def cancel(self, stream: GenerationStream) -> None:
        """Take a stream's choices out of the engine before its next pass."""
        with self._lock:
            if self.state in ("ready", "restarting"):
                self._commands.put(_Cancel(stream))

    def abort(self, error: ServerError, stop: bool = False) -> None:
        """End all open choices with an error. stop: end the thread too, which frees the pair."""
        with self._lock:
            if self.state != "failed":
                self._commands.put(_Abort(error, stop))

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def refusal(self) -> ServerError:
        """Why nothing can be submitted now."""
        if self.state == "loading":
            return ServerError(503, "loading", "the model is loading; try again", retry_s=2)
        if self.state == "failed":
            return ServerError(503, "engine_failed", f"the engine has failed: {_describe(self.error)}")
        return shutting_down()

    # the engine thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._run()
        finally:
            self.pair = None  # its arrays are freed on this thread
            leave_thread()

    def _run(self) -> None:
        try:
            pair = self._load()
            self.grammars = self._build_grammars(pair)
            self._warm_up(pair)
        except Exception as error:
            self._end("failed", error)
            return
        self.pair, self.state = pair, "ready"
        while True:
            try:
                self._serve(pair)
                self._end("stopped", None)
                pair.close()
                return
            except Exception as error:
                if not self._recover(pair, error):
                    return

    def _build_grammars(self, pair: Pair) -> Grammars | None:
        """Build the grammar tokenizer before the first request, since no other thread runs for the two seconds that
        262,144 tokens take; None if it cannot be built."""
        self._progress("grammar tokenizer", 0, 1)
        try:
            return Grammars(pair.text, pair.vocab_size, pair.eos)
        except RequestError as error:
            print(f"warning: {error}; requests with a schema or strict tools are refused", file=sys.stderr)
            return None

    def _warm_up(self, pair: Pair) -> None:
        settings = self._settings
        auto, steps = settings.num_draft_tokens == "auto", len(settings.warm_up) + 1
        self._progress("warm-up", 0, steps)
        if auto:
            pair.measure_costs(pair.budget.num_seqs)
        width = "heuristic" if auto else settings.num_draft_tokens  # auto would learn from dummy prompts
        for done, (batch, length) in enumerate(settings.warm_up, 1):
            self._progress("warm-up", done, steps)
            prompts = dummy_prompts(batch, max(1, min(length, pair.room_tok - 9)))
            pair.generate(prompts, pair.default_sampling, width, 8)  # MLX builds what sampling takes too
        self._progress("warm-up", steps, steps)

    def _serve(self, pair: Pair) -> None:
        while self._run_commands(pair):
            if not pair.idle:
                open_ = ((self._choices.get(event.request), event) for event in pair.step())
                self._post([(choice, self._chunk(pair, choice, event)) for choice, event in open_ if choice])
            self.running, self.waiting = pair.occupancy()

    def _run_commands(self, pair: Pair) -> bool:
        """Run all queued commands; an idle engine waits for one. Returns False after the last."""
        wait = pair.idle
        if wait:
            pair.free_buffers()
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                return True
            wait = False
            if isinstance(command, GenerationStream):
                self._start(pair, command)
            elif isinstance(command, _Cancel):
                self._post(self._take_out(pair, command.stream))
            else:
                for request in self._choices:
                    pair.cancel(request)
                self._fail_all(command.error)
                if command.stop:
                    return False

    def _start(self, pair: Pair, stream: GenerationStream) -> None:
        for index, (request, output) in enumerate(stream.choices):
            try:
                number = pair.submit(request, self._settings.num_draft_tokens)
            except RequestError as error:
                self._take_out(pair, stream)
                self._send([(stream, invalid(str(error)))])
                return
            self._choices[number] = _Choice(stream, index, output)

    def _take_out(self, pair: Pair, stream: GenerationStream) -> list[tuple[_Choice, StreamChunk]]:
        """Cancel a stream's choices; returns the last chunk of each."""
        out = []
        for request in [number for number, choice in self._choices.items() if choice.stream is stream]:
            choice, stats = self._choices.pop(request), pair.cancel(request)
            assert stats is not None, "an open choice is known to the engine"
            out.append((choice, StreamChunk(finish=choice.output.finish(stats, "cancelled"))))
        return out

    def _chunk(self, pair: Pair, choice: _Choice, event: Event) -> StreamChunk:
        """An event as a chunk. An output that ends before the engine's request does cancels it."""
        output = choice.output
        chunk = output.push(event.tokens, event.logprobs, event.finish_reason)
        if output.reason is None:
            return chunk
        stats = event.stats or pair.cancel(event.request)
        assert stats is not None, "an open choice is known to the engine"
        del self._choices[event.request]
        stats.generated_tokens = output.tokens
        return replace(chunk, finish=output.finish(stats, output.reason))

    # faults and the end -----------------------------------------------------------------------------------------

    def _recover(self, pair: Pair, error: Exception) -> bool:
        """Answer all open choices with the fault and build a new engine; returns False if the fault is final."""
        self.error, self.state = error, "restarting"
        self.faults += 1
        traceback.print_exception(error, file=sys.stderr)
        error.__traceback__ = None  # its frames hold arrays
        now = time.monotonic()
        self._fault_times = [at for at in self._fault_times if now - at < FAULT_WINDOW_S] + [now]
        self._fail_all(ServerError(500, "engine_error", f"the engine has failed: {_describe(error)}"))
        if len(self._fault_times) >= MAX_FAULTS:
            self._end("failed", error)
            return False
        try:
            pair.restart()
        except Exception as again:
            self._end("failed", again)
            return False
        self.state = "ready"
        return True

    def _end(self, state: State, error: Exception | None) -> None:
        with self._lock:
            self.state, self.error = state, error or self.error
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, GenerationStream):
                self._send([(command, self.refusal())])
        self.running = self.waiting = 0
        if state == "failed" and error is not None:
            self._failed(error)

    def _fail_all(self, error: ServerError) -> None:
        """End every open stream with an error."""
        streams = {id(choice.stream): choice.stream for choice in self._choices.values()}
        self._choices.clear()
        self._send([(stream, error) for stream in streams.values()])

    # back to the event loop -------------------------------------------------------------------------------------

    def _post(self, chunks: Sequence[tuple[_Choice, StreamChunk]]) -> None:
        self._send([(choice.stream, (choice.index, chunk)) for choice, chunk in chunks])

    def _send(self, items: list[tuple[GenerationStream, tuple[int, StreamChunk] | ServerError]]) -> None:
        """Send all items of a pass at once, so that the event loop wakes up once."""
        if not items:
            return
        try:
            items[0][0].loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:  # the event loop has closed
            pass

    def _deliver(self, items: list[tuple[GenerationStream, tuple[int, StreamChunk] | ServerError]]) -> None:
        for stream, item in items:
            ended = 0
            if isinstance(item, ServerError):
                ended = len(stream.choices) - stream.delivered
            elif item[1].finish:
                ended = 1
            stream.inbox.put_nowait(item)
            stream.delivered += ended
            self.open -= ended


def _describe(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
