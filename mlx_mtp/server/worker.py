"""The engine thread: it alone loads, runs and frees a pair. Jobs go in, deltas come out; only Python values cross.

A fault in the engine (an exception out of a pass) ends every open job with an error. Then the thread builds a new
engine over the same weights, which takes milliseconds, because the likely cause is one request or a lack of memory
for it, and an editor has nobody who would start a process again. Three faults within five minutes are no accident:
the state becomes "failed", everything is refused, and `on_failed` is told, so that the process can end with a code
that a supervisor sees.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from mlx_mtp.calibration import made_up
from mlx_mtp.pair import Pair, leave_thread
from mlx_mtp.rows import GREEDY, Event, Request, RequestError, Sampling, one_line
from mlx_mtp.server.decoding import Decoder, joined
from mlx_mtp.server.nouns import Delta, Finish, Job, ServerError, Settings, State, Usage, invalid
from mlx_mtp.text import Text

MAX_FAULTS, FAULT_WINDOW_S = 3, 300.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Model:
    """What the event loop may know of a loaded pair. room_tok: the most positions one row can have,
    share_tok: when all rows run at once."""

    text: Text
    sampling: Sampling
    eos: frozenset[int]
    vocab_size: int
    context_tok: int
    room_tok: int
    share_tok: int
    drafter: str | None
    family: str


class Generation:
    """The jobs of one HTTP request in the worker's hands. Iterate it for (index of the job, delta), as they come.

    Iterating raises ServerError if the engine fails, and ends when every job has ended or was cancelled.
    Belongs to the event loop that made it.
    """

    def __init__(self, jobs: Sequence[Job], worker: Worker) -> None:
        self.jobs = tuple(jobs)
        self.finishes: list[Finish | None] = [None] * len(self.jobs)
        self.begun_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.tokens = 0
        self.loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[tuple[int, Delta] | ServerError] = asyncio.Queue()
        self.delivered = 0  # jobs whose end is in the inbox
        self._worker, self._open = worker, len(self.jobs)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._open:
            raise StopAsyncIteration
        item = await self.inbox.get()
        if isinstance(item, ServerError):
            self._open = 0
            raise item
        index, delta = item
        if delta.tokens and self.first_token_s is None:
            self.first_token_s = time.perf_counter()
        self.tokens += delta.tokens
        if delta.finish:
            self.finishes[index] = delta.finish
            self._open -= 1
        return item

    def cancel(self) -> None:
        """Stop what still runs; harmless afterwards."""
        if self._open:
            self._worker.cancel(self)

    @property
    def usage(self) -> Usage:
        """Tokens so far. Choices of the same prompt count it, and what of it was cached, once."""
        stats = [f.stats if f else None for f in self.finishes]
        prompts = {job.prompt: s for job, s in zip(reversed(self.jobs), reversed(stats), strict=True)}
        return Usage(
            prompt_tok=sum(map(len, prompts)),
            cached_tok=sum(s.cached_tokens for s in prompts.values() if s),
            completion_tok=self.tokens,
            reasoning_tok=sum(f.reasoning_tok for f in self.finishes if f),
        )


@dataclass
class _Live:
    """A job that the engine has, seen from the engine thread."""

    generation: Generation
    index: int
    decoder: Decoder


@dataclass(frozen=True)
class _Submit:
    generation: Generation


@dataclass(frozen=True)
class _Cancel:
    generation: Generation


@dataclass(frozen=True)
class _Abort:
    """End all jobs with an error; with `stop` the thread too."""

    error: ServerError
    stop: bool


@dataclass(frozen=True)
class Reports:
    """Whom the worker tells, on its own thread: progress of its warm-up; that it has failed for good."""

    progress: Progress = lambda stage, done, total: None
    failed: Callable[[Exception], None] = lambda error: None


class Worker:
    """Runs jobs on a thread of its own. `submit`, `cancel` and `abort` are called from the event loop."""

    def __init__(self, load: Callable[[], Pair], settings: Settings, reports: Reports) -> None:
        """load: makes the pair, on the engine thread."""
        self._load, self._settings, self._reports = load, settings, reports
        self._width = settings.width
        self._commands: SimpleQueue[_Submit | _Cancel | _Abort] = SimpleQueue()
        self._lock = threading.Lock()  # no command may be left in the queue when the thread has gone
        self._live: dict[int, _Live] = {}
        self._faults: list[float] = []
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.state: State = "loading"
        self.model: Model | None = None
        self.error: Exception | None = None  # why it failed, or the last fault
        self.faults = 0
        self.open = 0  # jobs submitted whose end has not been delivered
        self.running = self.waiting = 0  # rows, after the last pass

    # called from the event loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> Generation:
        """Give jobs to the engine. Raises ServerError where it is not ready."""
        generation = Generation(jobs, self)
        with self._lock:
            if self.state not in ("ready", "restarting"):
                raise self.refusal()
            self.open += len(jobs)
            self._commands.put(_Submit(generation))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Take a generation's jobs out of the engine, before its next pass."""
        with self._lock:
            if self.state in ("ready", "restarting"):
                self._commands.put(_Cancel(generation))

    def abort(self, error: ServerError, stop: bool = False) -> None:
        """End all open jobs with an error; `stop`: and the thread, which frees the pair."""
        with self._lock:
            if self.state != "failed":
                self._commands.put(_Abort(error, stop))

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread's end; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def refusal(self) -> ServerError:
        """Why nothing can be submitted now."""
        if self.state == "loading":
            return ServerError(503, "loading", "the model is being loaded; try again", retry_s=2)
        if self.state == "failed":
            return ServerError(503, "engine_failed", f"the engine has failed: {_one_line(self.error)}")
        return ServerError(503, "shutting_down", "the server is shutting down")

    # the engine thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._run()
        finally:
            leave_thread()

    def _run(self) -> None:
        try:
            pair = self._load()
            self._warm_up(pair)
        except Exception as error:
            self._end("failed", error)
            return
        self.model = Model(
            pair.text,
            pair.default_sampling,
            pair.eos,
            pair.vocab_size,
            pair.context_tok,
            pair.room_tok,
            pair.share_tok,
            pair.drafter_name,
            pair.family,
        )
        self.state = "ready"
        while True:
            try:
                self._serve(pair)
                self._end("stopped", None)
                return
            except Exception as error:
                if not self._recover(pair, error):
                    return

    def _warm_up(self, pair: Pair) -> None:
        plan, auto, most = self._settings.warm_up, self._width == "auto", self._settings.rows
        batches = sorted({1, min(4, most), most}) if auto else []
        steps = len(batches) + len(plan)
        for done, rows in enumerate(batches):
            self._reports.progress("warm-up", done, steps)
            pair.calibrate(rows)
        width = "heuristic" if auto else self._width  # auto would learn from a text nobody asked for
        for done, (rows, length) in enumerate(plan, len(batches)):
            self._reports.progress("warm-up", done, steps)
            pair.generate(made_up(rows, max(1, min(length, pair.room_tok - 9))), GREEDY, width, 8)
        self._reports.progress("warm-up", steps, steps)

    def _serve(self, pair: Pair) -> None:
        while self._obey(pair):
            if not pair.idle:
                self._post([self._delta(pair, live, e) for e in pair.step() if (live := self._live.get(e.request))])
            self.running, self.waiting = pair.occupancy()

    def _obey(self, pair: Pair) -> bool:
        """Carry out all commands; waits for one where there is nothing to compute. Returns False on the last one."""
        wait = pair.idle
        if wait:
            pair.keep()
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                return True
            wait = False
            if isinstance(command, _Submit):
                self._begin(pair, command.generation)
            elif isinstance(command, _Cancel):
                self._cancel(pair, [i for i, live in self._live.items() if live.generation is command.generation])
            else:
                for request in self._live:
                    pair.cancel(request)
                self._fail_all(command.error)
                if command.stop:
                    return False

    def _begin(self, pair: Pair, generation: Generation) -> None:
        for index, job in enumerate(generation.jobs):
            eos = pair.eos if job.ends else frozenset()
            try:
                decoder = Decoder(pair.text, job)
                request = Request(
                    job.prompt, job.max_tokens, job.sampling, eos, logprobs=job.logprobs, constraint=job.constraint
                )
                self._live[pair.submit(request, self._width)] = _Live(generation, index, decoder)
            except RequestError as error:
                mine = [i for i, live in self._live.items() if live.generation is generation]
                self._cancel(pair, mine, quietly=True)
                self._send([(generation, invalid(str(error)))])
                return

    def _cancel(self, pair: Pair, requests: list[int], quietly: bool = False) -> None:
        gone = []
        for request in requests:
            live, stats = self._live.pop(request), pair.cancel(request)
            assert stats is not None, "a live job is known to the engine"
            gone.append((live, Delta(finish=Finish("cancelled", None, 0, live.decoder.reasoning_tok, stats))))
        if not quietly:
            self._post(gone)

    def _delta(self, pair: Pair, live: _Live, event: Event) -> tuple[_Live, Delta]:
        """What an event says to its client; ends the job at a stop string, and where the text is cut."""
        decoder, stats, reason = live.decoder, event.stats, event.finish_reason
        before = decoder.tokens
        parts, logprobs = decoder.push(event.tokens, event.logprobs)
        cut = decoder.cut and not reason and not decoder.ended
        if cut:
            reason, stats = "length", pair.cancel(event.request)
        if reason and not decoder.ended:
            parts += decoder.finish(reason == "stop")
        if decoder.ended:
            reason, stats = "stop", stats or pair.cancel(event.request)
        finish = None
        if reason:
            del self._live[event.request]
            assert stats is not None
            stats.generated_tokens = decoder.tokens
            looping = decoder.loop_tok if cut else None
            finish = Finish(reason, decoder.stop, decoder.calls, decoder.reasoning_tok, stats, looping)
        return live, Delta(joined(parts), decoder.tokens - before, tuple(logprobs), finish)

    # faults and the end -----------------------------------------------------------------------------------------

    def _recover(self, pair: Pair, error: Exception) -> bool:
        """Answer all open jobs with the fault and build a new engine; False if that is no use any more."""
        self.error, self.state = error, "restarting"
        self.faults += 1
        traceback.print_exception(error, file=sys.stderr)
        error.__traceback__ = None  # its frames hold arrays
        now = time.monotonic()
        self._faults = [at for at in self._faults if now - at < FAULT_WINDOW_S] + [now]
        self._fail_all(ServerError(500, "engine_error", f"the engine has failed: {_one_line(error)}"))
        if len(self._faults) >= MAX_FAULTS:
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
            if isinstance(command, _Submit):
                self._send([(command.generation, self.refusal())])
        self.running = self.waiting = 0
        if state == "failed" and error is not None:
            self._reports.failed(error)

    def _fail_all(self, error: ServerError) -> None:
        """Tell every generation that the engine has, and forget them."""
        told = {id(live.generation): live.generation for live in self._live.values()}
        self._live.clear()
        self._send([(generation, error) for generation in told.values()])

    # back to the event loop -------------------------------------------------------------------------------------

    def _post(self, deltas: Sequence[tuple[_Live, Delta]]) -> None:
        self._send([(live.generation, (live.index, delta)) for live, delta in deltas])

    def _send(self, items: list[tuple[Generation, tuple[int, Delta] | ServerError]]) -> None:
        """All items of a pass at once, so that the event loop wakes up once."""
        if not items:
            return
        try:
            items[0][0].loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            pass

    def _deliver(self, items: list[tuple[Generation, tuple[int, Delta] | ServerError]]) -> None:
        for generation, item in items:
            ended = 0
            if isinstance(item, ServerError):
                ended = len(generation.jobs) - generation.delivered
            elif item[1].finish:
                ended = 1
            generation.inbox.put_nowait(item)
            generation.delivered += ended
            self.open -= ended


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
