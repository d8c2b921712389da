"""A target with its drafter, ready for prompts: the public Python API over the engine.

    pair = mlx_mtp.load("google/gemma-4-E2B-it")
    for event in pair.stream([{"role": "user", "content": "Hello"}]):
        print(event.text, end="")

One thread loads, runs and frees a pair: MLX's streams belong to the thread that made them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib import metadata, resources
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_mtp import inside, mlx_setup
from mlx_mtp.chat import Chat
from mlx_mtp.cost_profile import BATCHES, CostProfiler, file_of
from mlx_mtp.doctor import memory_bytes, on_gpu
from mlx_mtp.draft_length import MAX_WIDTH, PRIOR_PROFILE, DraftLengthPolicy, GoodputPolicy, make_policy
from mlx_mtp.few_rows import Trial
from mlx_mtp.kept import own_cache
from mlx_mtp.kernels.self_test import summary
from mlx_mtp.load import LoadedPair, load_pair
from mlx_mtp.memory_budget import Budget, Room, budget, check
from mlx_mtp.mlx_setup import Setup, Tuned
from mlx_mtp.pairs import poor_acceptance
from mlx_mtp.processors import check_ids
from mlx_mtp.prompt_chunks import fitted
from mlx_mtp.provenance import chip
from mlx_mtp.rows import Completion, Event, FinishReason, Request, RequestError, Sampling, Stats, TokenLogprob
from mlx_mtp.scheduler import Limits
from mlx_mtp.text import StoppedText, Text

Prompt = str | Sequence[int] | Sequence[dict]
"""Text to continue, token ids, or a conversation as [{"role": ..., "content": ...}, ...]."""

TINY = "tiny"  # names the embedded pair
PREFIX_SHARE = 0.5  # of the memory for keys and values, what kept prefixes may take of it while no row needs it
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(
    target: str,
    drafter: str | None = "auto",
    *,
    quantize_drafter: int | None = None,
    dtype: str | None = None,
    limits: Limits | None = None,
    prefix_bytes: int | None = None,
    report: Callable[[str, int, int], None] | None = None,
    setup: Setup | None = None,
) -> Pair:
    """Load a target and its drafter.

    target: a checkpoint folder, a hub id, or "tiny", the small pair that comes with this package.
    drafter: a folder or hub id; "auto" finds the one made for the target; None or "none" decodes plainly; "lookup"
    copies from prompt and text, alone or, as in "auto+lookup", before another drafter.
    quantize_drafter: 4 or 8 bits, at load.
    dtype: "float32", "bfloat16" or "float16"; None takes the checkpoint's on a GPU and float32 on a CPU.
    limits: on rows and memory; without kv_bytes they take what weights and passes leave. Fewer rows run at once where
    each would not hold a useful context (8,192 tokens, or the model's own).
    prefix_bytes: memory for what has been computed of earlier prompts and replies, so that a later prompt that begins
    the same costs only the rest; None is half of that for all keys and values, which running requests take back as they
    need it; 0 keeps nothing. report: called with (stage, done bytes, total bytes) while weights are read. setup: how
    a Mac's GPU is used.
    Raises CheckpointError, DownloadError, PairingError or RequestError, before weights are read where possible; a pair
    that does not fit into the memory is refused before.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    if prefix_bytes is not None and (type(prefix_bytes) is not int or prefix_bytes < 0):
        raise RequestError(f"prefix_bytes is {prefix_bytes!r}; expected a number of bytes, 0 to keep nothing")
    setup = setup or Setup()
    trial = Trial.of(setup.kernels)
    if setup.tuning:
        mlx_setup.prepare()
    if target == TINY:
        target = str(resources.files("mlx_mtp") / "data" / "tiny" / "target")
    room = _room(limits or Limits())
    loaded = load_pair(
        target,
        drafter,
        dtype=DTYPES[dtype] if dtype else None,
        quantize=quantize_drafter,
        admit=lambda size: check(size, budget(size, room), target),
        report=report,
        trial=trial,
    )
    pair = Pair(loaded, Text.from_dir(loaded.target.path), limits, prefix_bytes)
    pair._tuned = Tuned() if setup.tuning else None
    return pair


class Pair:
    """A loaded target with its drafter (or none), its tokenizer, and one engine for all requests."""

    def __init__(
        self, loaded: LoadedPair, text: Text, limits: Limits | None = None, prefix_bytes: int | None = None
    ) -> None:
        """limits, prefix_bytes: as in `load`."""
        target, asked = loaded.target, limits or Limits()
        self.budget = budget(loaded.size, _room(asked))
        self.text, self.default_sampling = text, target.sampling
        self.warnings = (*loaded.notes, *self.budget.warnings(asked.max_rows))
        self.target_name, self.drafter_name, self.family = target.name, loaded.drafter_name, target.family
        self.context_tok = target.model.config.max_positions
        self._model, self._eos = target.model, target.eos
        self._loaded = loaded
        self._limits, self._profile = limits_of(loaded, self.budget, asked, prefix_bytes), False
        self._tuned: Tuned | None = None
        self._costs = PRIOR_PROFILE
        self._profiler = profiler_of(loaded)
        self.restart()

    def restart(self) -> None:
        """Forget all requests and all cached keys and values, and begin with a new engine over the same weights."""
        self._policies: dict[str, DraftLengthPolicy] = {}  # by width as it is written: True and 1.0 are equal to 1
        self._engine = self._loaded.new_engine(make_policy(0), self._limits)
        self._engine.profile = self._profile
        self._inbox: dict[int, deque[Event]] = {}

    def close(self) -> None:
        """Undo what loading has set of MLX. The pair can still be used."""
        if self._tuned:
            self._tuned.close()
        self._tuned = None

    @property
    def kernels(self) -> str | None:
        """Which kernels run, by how much they win, and which do not and why, in a line; None without Metal."""
        return summary(self._loaded.kernels) if self._loaded.kernels else None

    def profile(self) -> None:
        """From now on `Stats.draft_s` tells drafting from verifying, at the cost of a wait a round."""
        self._profile = self._engine.profile = True

    def measure_costs(self, batch: int = 1) -> bool:
        """Have width "auto" know what rounds of this pair cost on this machine, for one request or for several at once.

        Measured once, in at least 40 rounds a batch size, and stored in the user's cache folder; returns whether it
        had to be. `generate` and `stream` call it themselves, a server does when it starts. Nothing is measured while
        requests run, nor without a drafter.
        """
        if not self.drafter_name or not self.idle:
            return False
        most = self._limits.max_rows
        batches = {min(size, most) for size in BATCHES} if batch > 1 else {1}
        limits, room = replace(self._limits, prefix_bytes=0), self.budget.fair_share_len if batch > 1 else self.room_tok
        profile, measured = self._profiler.profile(
            batches, lambda: self._loaded.new_engine(make_policy(0), limits), room
        )
        policy, self._costs = self._policy("auto"), profile or self._costs
        assert isinstance(policy, GoodputPolicy)
        policy.profile = self._costs
        return measured

    @property
    def doubt(self) -> str | None:
        """A warning if the first rounds have shown that the drafter hardly fits the target; None until then."""
        loaded, engine = self._loaded, self._engine
        if loaded.drafter is None:
            return None
        names = (loaded.target.name, loaded.drafter.name)
        return poor_acceptance(engine.first_kept, engine.first_drafts, self._model.config, names)

    # generating -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        width: int | str = "auto",
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
    ) -> list[Completion]:
        """Complete one or several prompts, up to eight at a time; one Completion each, in order.

        sampling: None takes the checkpoint's own defaults (`default_sampling`).
        width: tokens drafted per round, 0 (plain decoding) to 15, "heuristic", or "auto": what pays. All requests
        that run at the same time share one width. max_tokens: None takes a fair share of the memory.
        stop: strings that end the text (they are not part of it). logprobs: 0 to 20, every token's log-probability
        with those of so many best ones. Raises RequestError before anything runs.
        """
        runs = [_Run(self, p, sampling, width, max_tokens, stop, logprobs) for p in _as_list(prompts)]
        try:
            if width == "auto":
                self.measure_costs(len(runs))
            for run in runs:
                run.submit()
            while not all(run.reason for run in runs):
                for run in runs:
                    run.collect()
                self._pump()
            return [run.completion() for run in runs]
        finally:
            self._close(*runs)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        width: int | str = "auto",
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Generator[Event, None, None]:
        """Complete one prompt as a stream of events; arguments as in `generate`.

        The last event carries finish_reason and stats. Closing the iterator cancels the request. Several streams
        may be open at once; their requests then share every pass.
        """
        return self._events(_Run(self, prompt, sampling, width, max_tokens, stop, logprobs))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that keeps its cache from turn to turn."""
        return Chat(self, system)

    def _events(self, run: _Run) -> Generator[Event, None, None]:
        try:
            if run.width == "auto":
                self.measure_costs()
            run.submit()
            while True:
                yield from run.collect()
                if run.reason:
                    return
                self._pump()
        finally:
            self._close(run)

    def _close(self, *runs: _Run) -> None:
        for run in runs:
            run.close()
        if self.idle:
            self.free_buffers()

    def _pump(self) -> None:
        """One step of the engine; events wait for whoever reads their request."""
        for event in self.step():
            if event.request in self._inbox:
                self._inbox[event.request].append(event)

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt of any kind. Raises RequestError."""
        if isinstance(prompt, str):
            return tuple(self.text.encode(prompt))
        if len(prompt) == 0:
            raise RequestError("the prompt is empty; expected at least one token")
        if isinstance(prompt[0], dict):
            return tuple(self.text.chat(cast(list[dict], list(prompt))))
        ids = np.asarray(prompt)
        size = self._model.config.vocab_size
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("the prompt is neither text, token ids nor messages; expected one of them")
        if ids.min() < 0 or ids.max() >= size:
            bad = int(ids[(ids < 0) | (ids >= size)][0])
            raise RequestError(f"token id {bad} is out of range; the vocabulary has {size} tokens, 0 to {size - 1}")
        return tuple(ids.tolist())

    # a level lower: who drives the engine itself, as a server does -----------------------------------------------

    @property
    def eos(self) -> frozenset[int]:
        """The checkpoint's end tokens."""
        return self._eos

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def room_tok(self) -> int:
        """The most positions one row can have: the context, or what the memory for keys and values holds."""
        return self.budget.max_seq_len

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return self._engine.idle

    def occupancy(self) -> tuple[int, int]:
        """Requests that run, and requests that wait."""
        return len(self._engine.scheduler.rows), len(self._engine.scheduler.waiting)

    def submit(self, request: Request, width: int | str = "auto") -> int:
        """Queue a request of token ids; `step` returns its events, without text. Raises RequestError."""
        self._engine.policy = self._policy(width)
        return self._engine.submit(request)

    def step(self) -> list[Event]:
        """One pass of the engine over everything that runs; returns all its events."""
        try:
            return self._engine.step()
        except RuntimeError as error:
            if all(outcome.reason for outcome in self._loaded.kernels):
                raise
            self._give_kernels_up(error)
            return []

    def _give_kernels_up(self, error: RuntimeError) -> None:
        """A pass has failed, and a kernel may be why: all requests go on without kernels, after their output so far."""
        reason = f"a pass failed: {' '.join(str(error).split())[:200]}"
        logging.getLogger("mlx_mtp").warning("%s; running on without kernels (--kernels off)", reason)
        failed, self._loaded = self._engine, self._loaded.without_kernels(reason)
        self._model = self._loaded.target.model
        self._engine = self._loaded.new_engine(failed.policy, self._limits)
        self._engine.profile = self._profile
        self._engine.take_over(failed)

    def cancel(self, request: int) -> Stats | None:
        """Forget a request; its row is free before the next pass. Returns what it had cost, None if it had ended."""
        return self._engine.cancel(request)

    def free_buffers(self) -> None:
        """Give back the memory of buffers that no array uses; for a moment when nothing runs."""
        if self._tuned:
            self._tuned.idle()

    def _policy(self, width: int | str) -> DraftLengthPolicy:
        """The policy for a width, each made once. Raises RequestError."""
        key = repr(width)
        if key not in self._policies:
            self._policies[key] = make_policy(width, self._costs)
        return self._policies[key]

    # looking inside ---------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence) -> mx.array:
        """The target's logits after every position, by a plain full pass: tokens [L] or [B, L] -> [B, L, V] float32."""
        return inside.logits(self._loaded.target, self._batch(tokens))

    def draft(self, tokens: Sequence, width: int) -> tuple[mx.array, mx.array]:
        """What the drafter proposes, greedily, to follow the target's own greedy token after a prompt.

        tokens [L] or [B, L] -> (tokens [B, K] int32, logits [B, K, V] float32). A clustered head scores few tokens;
        the others get the least of a row's scores minus 1, as in transformers. Raises RequestError without a drafter.
        """
        if self._loaded.drafter is None:
            raise RequestError("this pair has no drafter; load it with drafter='auto' or a path")
        if not isinstance(width, int) or not 1 <= width <= MAX_WIDTH:
            raise RequestError(f"width is {width!r}; expected 1 to {MAX_WIDTH}")
        return inside.draft(self._loaded, self._batch(tokens), width)

    def _batch(self, tokens: Sequence) -> mx.array:
        """[B, L] int32 of checked token ids."""
        try:
            rows = np.atleast_2d(np.asarray(tokens))
        except ValueError:
            raise RequestError("rows of different lengths given; expected the same length for all") from None
        rows = [self._tokens(row) for row in rows]
        if len(rows[0]) > self.context_tok:
            raise RequestError(f"{len(rows[0])} tokens given; the model's context is {self.context_tok}")
        return mx.array(rows, mx.int32)


class _Run:
    """One request from prompt to completion: tokens in, text out, stop strings cut."""

    def __init__(
        self,
        pair: Pair,
        prompt: Prompt,
        sampling: Sampling | None,
        width: int | str,
        max_tokens: int | None,
        stop: Sequence[str],
        logprobs: int | None = None,
    ) -> None:
        ids, room = pair._tokens(prompt), pair.context_tok
        if len(ids) >= room:
            raise RequestError(f"the prompt has {len(ids)} tokens; the model's context is {room}, text included")
        if max_tokens is not None and (
            not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1
        ):
            raise RequestError(f"max_tokens is {max_tokens!r}; expected an integer of at least 1")
        if max_tokens is not None and len(ids) + max_tokens > room:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}; the model's context is {room}"
            )
        if sampling is not None and not isinstance(sampling, Sampling):
            raise RequestError(f"sampling is a {type(sampling).__name__}; expected mlx_mtp.Sampling")
        if isinstance(stop, str) or stop is None:
            stop = (stop,) if stop else ()
        if not isinstance(stop, (list, tuple)):
            raise RequestError(f"stop is a {type(stop).__name__}; expected a list of strings")
        sampling = sampling or pair.default_sampling
        check_ids(sampling, pair._model.config.vocab_size)
        most = max_tokens or pair.budget.default_max_tokens(len(ids))
        self.request = Request(ids, most, sampling, pair._eos, logprobs=logprobs)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.pieces: list[str] = []
        self.reason: FinishReason | None = None
        self.stats: Stats | None = None
        self._pair, self.width, self._id = pair, width, -1
        pair._policy(width)
        self._shown = StoppedText(pair.text, tuple(stop))

    def submit(self) -> None:
        pair = self._pair
        pair._engine.policy = pair._policy(self.width)
        self._id = pair._engine.submit(self.request)
        pair._inbox[self._id] = deque()

    def collect(self) -> list[Event]:
        """Events that have arrived, with their text."""
        out, inbox = [], self._pair._inbox[self._id]
        while inbox and not self.reason:
            out.append(self._finish(inbox.popleft()))
        return out

    def _finish(self, event: Event) -> Event:
        """Add text to an event, or end the request where a stop string is complete."""
        shown, taken, reason, stats = [], [], event.finish_reason, event.stats
        for token in event.tokens:
            taken.append(token)
            shown.append(self._shown.push([token]))
            if self._shown.stop:
                inbox = self._pair._inbox[self._id]  # holds the end already if others read before this one
                stats = self._pair.cancel(self._id) or stats or inbox[-1].stats
                reason = "stop"
                break
        else:
            if reason:
                shown.append(self._shown.finish())
                reason = "stop" if self._shown.stop else reason
        logprobs = event.logprobs[: len(taken)]
        self.tokens += taken
        self.logprobs += logprobs
        self.pieces += shown
        if reason and stats:
            stats.generated_tokens = len(self.tokens)
        self.reason, self.stats = reason, stats if reason else None
        return Event(self._id, tuple(taken), "".join(shown), reason, self.stats, logprobs)

    def completion(self) -> Completion:
        assert self.reason is not None and self.stats is not None
        return Completion(self.tokens, "".join(self.pieces), self.reason, self.stats, tuple(self.logprobs))

    def close(self) -> None:
        """Cancel the request if it still runs, and forget it."""
        if self._id >= 0 and not self.reason:
            self._pair.cancel(self._id)
        self._pair._inbox.pop(self._id, None)


def leave_thread() -> None:
    """End this thread's MLX streams; a thread that ran a pair must, or MLX 0.32 aborts the process at its exit."""
    mx.clear_streams()


def _room(limits: Limits) -> Room:
    """What this machine gives a pair. A CPU's prompt chunks are what the limits say."""
    if on_gpu():
        return Room(memory_bytes(), limits.max_rows, kv_bytes=limits.kv_bytes)
    chunk = max(limits.chunk_tok, limits.alone_tok)
    return Room(memory_bytes(), limits.max_rows, chunk, chunk, limits.kv_bytes)


def limits_of(loaded: LoadedPair, found: Budget, limits: Limits, prefix_bytes: int | None = None) -> Limits:
    """The engine's limits within a budget; of the memory for keys and values a share is for prefixes."""
    return replace(
        fitted(limits, found.chunk, loaded),
        max_rows=found.num_seqs,
        kv_bytes=found.kv_bytes,
        prefix_bytes=int(PREFIX_SHARE * found.kv_bytes) if prefix_bytes is None else prefix_bytes,
    )


def profiler_of(loaded: LoadedPair) -> CostProfiler:
    """Of a pair with these kernels, on this machine and version of MLX."""
    parts = [loaded.target, *([loaded.drafter] if loaded.drafter else [])]
    how = [str(loaded.target.dtype), *(part.weight_bytes for part in parts), loaded.lookup]
    usable = [(o.kernel, o.shape) for o in loaded.kernels if o.reason is None]
    file = file_of(own_cache(), [part.path for part in parts], how, chip(), metadata.version("mlx"), usable)
    return CostProfiler(file, loaded.catch_up)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of prompts. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (Sequence, np.ndarray, mx.array)):
        raise RequestError("the prompt is neither text, token ids nor messages; expected one of them")
    if len(prompts) == 0:
        raise RequestError("no prompt given; expected at least one")
    one = not isinstance(prompts[0], (str, list, tuple, np.ndarray, mx.array))
    return cast(list[Prompt], [prompts] if one else list(prompts))
