"""The round: draft, verify, commit, for any number of rows. One loop serves every drafter, batch size and draft length.

While a pass runs on the device, the graph of the next one is built. Shapes do not depend on what is accepted. The host
then reads the finished pass once (`_read`, the only place where it waits) and dispatches the next one at once. So
nothing is in flight at a dispatch, which lets MLX write the cache in place.

The price: a row's end is seen one pass late. Its last pass is wasted, or undone if no other row needs it.

On a CPU a dispatch takes as long as its pass, so there the caller gets the events first (`hands_over_first`).

Nothing is built ahead of the end of a pass with prompt chunks. A request that comes meanwhile is in the very next pass.

A round with a grammar or with prompt lookup is built ahead too. What it reads from the host is filled in before it is
sent. Its draft is read while the target's pass runs. If a grammar forces so much that another round is called for, the
one that was built is undone.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_mtp import logprobs
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, DraftLengthPolicy, DraftRound
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.lookup import LookupDraft, PromptLookup
from mlx_mtp.guide import Guide, Plan
from mlx_mtp.model_runner import ModelRunner, scores_of
from mlx_mtp.models.families import Target
from mlx_mtp.passes import PackedOutput, Pass, PassTime, RoundTimer
from mlx_mtp.prefixes import Prefix
from mlx_mtp.processors import check_ids
from mlx_mtp.rows import Event, Request, Stats
from mlx_mtp.sampling import RowSampler
from mlx_mtp.scheduler import Chunk, Limits, Row, Scheduler, neighbours

JUDGED = 200  # drafts by which a drafter is judged to fit its target or not


class Engine:
    """Runs requests to their end, a pass at a time. All calls come from one thread."""

    def __init__(
        self,
        target: Target,
        cache: Cache,
        drafter: Drafter,
        policy: DraftLengthPolicy,
        limits: Limits,
        match_tokens: int = 0,
    ) -> None:
        """match_tokens: how many last tokens of a text prompt lookup must find before it drafts; 0 is no lookup."""
        self.target, self.cache, self.drafter, self.policy = target, cache, drafter, policy
        self.runner, self.timer = ModelRunner(target, cache, drafter), RoundTimer()
        self.scheduler = Scheduler(
            limits, lambda n: cache.row_bytes(n) + drafter.row_bytes(n), cache.back(0), cache.tail
        )
        self.host_reads = 0
        self.total = Stats()  # of all requests that have ended
        self.first_drafts = self.first_kept = 0  # of the first JUDGED rounds: drafts that were its drafter's own guess
        self.profile = False  # wait for every draft, to tell its time from the verifying pass's
        self._match_tokens = match_tokens
        self.hands_over_first = mx.default_device().type == mx.cpu  # there a dispatch takes as long as its pass
        self._held: Pass | None = None  # built ahead, to be dispatched when the caller has the events before it
        self._work = (0, 0)  # passes read, and the columns in them
        self._ids = itertools.count()
        self._running: Pass | None = None
        self._late: RuntimeError | None = None  # of a dispatch; the caller has the events before it first

    # requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Its tokens come as events of `step`.

        Raises RequestError for what can never run here.
        """
        check_ids(request.sampling, self.target.config.vocab_size)
        follower = request.constraint.begin() if request.constraint is not None else None
        row = Row(next(self._ids), request, RowSampler.of(request.sampling), follower=follower)
        row.stats.prompt_tokens, row.arrived = len(request.prompt), self._work
        self.scheduler.submit(row)
        return row.id

    def cancel(self, request: int) -> Stats | None:
        """Forget a request, waiting or live; it gets no further events. Returns what it had cost."""
        row = self.scheduler.find(request)
        if row is None:
            return None
        if self._held is not None:
            self._dispatch(self._held)
        if row.index < 0:
            self.scheduler.waiting.remove(row)
        else:
            self._end(row, self.timer.clock())
            self._drop_done()
        return row.stats

    def take_over(self, failed: Engine) -> None:
        """Go on with all requests of an engine that has failed; each computes its prompt and its output again."""
        self._ids, self._work, self.total, self.host_reads = failed._ids, failed._work, failed.total, failed.host_reads
        for row in sorted([*failed.scheduler.rows, *failed.scheduler.waiting], key=lambda row: row.id):
            if not row.done:
                self.scheduler.submit(row.again())

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.rows

    def step(self) -> list[Event]:
        """Finish the pass under way, start the next, and return what the finished one brought."""
        self.timer.enter()
        if self._late is not None:
            raise self._late
        if self._running is None:
            if self._held is None:
                self._held = self._build()
                if self._held is None:
                    return []
                self._held.fill()
            self._dispatch(self._held)
        running, undo = self._running, self.runner.state()
        assert running is not None
        ahead = None if running.chunks else self._build()
        events, kept, time = self._read(running)
        if ahead is not None and ahead.wanted():
            del undo  # MLX copies a buffer that is still referred to instead of writing into it
            ahead.fill()  # before rows leave, whose prefixes are computed through it
            if self.hands_over_first:
                self._running, self._held = None, ahead
            else:
                try:
                    self._dispatch(ahead)
                except RuntimeError as error:
                    self._late = error
        else:
            self._undo(ahead, undo)
        self._learn(running, kept, time)
        self._drop_done()
        self.timer.leave()
        return events

    # building ---------------------------------------------------------------------------------------------------

    def _build(self) -> Pass | None:
        """The graph of the next pass, on top of whatever has been dispatched; nothing runs yet."""
        for row in self.scheduler.admit():
            row.started_s = row.started_s or self.timer.clock()
            if self._match_tokens:
                row.lookup = PromptLookup(row.request.prompt, row.request.max_tokens, self._match_tokens)
                row.lookup.extend(row.tokens)
            self.runner.join(row)
        decoded = self.scheduler.decoding()
        if not any(r.room > 0 for r in decoded if r.decoding):
            decoded = []  # what is under way brings every row to its limit
        groups = neighbours(self.scheduler.chunks(), self.cache.spare)
        if not decoded and not groups:
            return None
        active = [r for r in decoded if r.decoding and not r.done]
        matched, chunks = [r.matched for r in active], [chunk for group in groups for chunk in group]
        ends = [c.row for c in chunks if c.last]
        most = max((r.request.logprobs or 0 for r in (*active, *ends)), default=0)
        most = min(most, self.target.config.vocab_size)
        parts: dict[str, mx.array] = {}
        draft, guide, copied, width = None, None, None, 0
        if decoded:
            planned = self._width(active, matched)
            guide = self._guide(decoded, active, planned)
            texts = [r.lookup for r in decoded if r.lookup is not None]
            copied = LookupDraft(texts, planned) if texts and planned else None
            draft, parts = self.runner.round(decoded, active, planned, guide, copied, most)
            width = parts["tokens"].shape[1] - 1
        firsts = []
        for group in groups:
            first, scores = self.runner.prefill(group, most)
            firsts.append(first)
            parts |= scores
        if firsts:
            parts["first_tokens"] = mx.concatenate(firsts)
        prefixes = [self._marked(c) for c in chunks if c.row.stops and c.row.stops[0] == c.row.prefilled]
        packed = PackedOutput.of(parts)
        return Pass(decoded, active, width, chunks, prefixes, draft, guide, copied, packed, matched)

    def _width(self, active: list[Row], matched: list[bool]) -> int:
        """The policy's draft length, but no longer than the longest row can still use."""
        useful = max((r.room for r in active), default=1) - 1
        return max(0, min(self.policy.choose(matched, sum(r.lag for r in active)), useful))

    def _guide(self, decoded: list[Row], active: list[Row], width: int) -> Guide | None:
        """What constrains a round; None where nothing does."""
        if not any(r.follower is not None for r in active):
            return None
        most = max(width, min(MAX_WIDTH, max(r.room for r in active) - 1)) if self.policy.drafts else 0
        return Guide(decoded, active, Plan(width, most, self.target.config.vocab_size, settled=self._running is None))

    def _marked(self, chunk: Chunk) -> Prefix:
        """What a row has computed of its prompt, after all passes that are built, of which the last over it is this
        chunk's: nothing else writes to it then."""
        row = chunk.row
        row.marked = row.stops.pop(0)
        own = row.marked - row.stats.cached_tokens  # nobody knows how far the row that it continues had run on
        return self._prefix(row, row.prompt[: row.marked], min(own, self.cache.back(chunk.count)))

    def _prefix(self, row: Row, tokens: np.ndarray, back: int) -> Prefix:
        n = len(tokens)
        return Prefix(tokens, self.cache.snapshot(row.index, n), self.drafter.snapshot(row.index, n), back)

    # running ----------------------------------------------------------------------------------------------------

    def _dispatch(self, built: Pass) -> None:
        self._running, self._held, drafted_s = built, None, 0.0
        waited_s = self.timer.send()
        if built.draft is not None:
            mx.async_eval(built.draft)
        if self.profile and built.draft is not None:  # a second wait, only to tell drafting from verifying
            mx.eval(built.draft)
            drafted_s = self.timer.since_sent_s
        reads = self._tell(built.guide) if built.guide is not None else 0
        snapshots = [a for prefix in built.prefixes for a in prefix.arrays]  # first: done before the next pass writes
        mx.async_eval(snapshots, built.output.vector, self.runner.state())
        for prefix in built.prefixes:
            self.scheduler.keep(prefix)
        for row in built.active:
            if not row.done:
                row.stats.host_reads += reads
                row.stats.draft_s += drafted_s
                row.stats.host_s += waited_s

    def _tell(self, guide: Guide) -> int:
        """Tell a round's constraints what was drafted, while the target's pass is on its way; returns reads it took."""
        mx.async_eval(guide.draft, guide.logits)
        reads = int(not guide.certain)
        guide.judge(cast(list[list[int]], guide.draft.tolist()) if reads else guide.known())
        self.host_reads += reads
        return reads

    def _undo(self, built: Pass | None, state: tuple[Any, ...]) -> None:
        """Take back a pass that nobody needs; rows that it admitted stay, as if new."""
        self._running = None
        self.timer.idle()
        if built is None:
            return
        self.runner.restore(state)
        for row in built.decoded:
            if row.index >= 0:
                self.cache.settle(row.index, built.width + 1)
        for row in built.active:
            row.pending -= 1

    def _read(self, done: Pass) -> tuple[list[Event], list[int], PassTime]:
        """Wait for a pass, and turn what it brought into events; with how many columns every decoded row kept."""
        values = done.output.unpack(cast(list[int], done.output.vector.tolist()))
        self.host_reads += 1
        time = self.timer.read()
        self._work = self._work[0] + 1, self._work[1] + done.columns
        events, kept = [], values["kept"].tolist() if done.decoded else []
        for i, row in enumerate(done.decoded):
            if row.index >= 0:
                self.cache.settle(row.index, done.width + 1 - kept[i])
            if row in done.active and not row.done:
                row.stats.device_s += time.device_s
                row.stats.experts += values["experts"].item() / len(self.target.layers) if "experts" in values else 0.0
                events.append(self._emit(row, values["tokens"][i, : kept[i]].tolist(), done.width, time.now_s, values))
        for i, chunk in enumerate(done.chunks):
            row = chunk.row
            if chunk.last and not row.done:
                if not row.resumed:
                    row.first_token_s, row.stats.prefill_s = time.now_s, time.now_s - row.started_s
                    row.stats.first_passes = self._work[0] - row.arrived[0]
                    row.stats.first_columns = self._work[1] - row.arrived[1]
                events.append(self._emit(row, [values["first_tokens"][i].item()], None, time.now_s, values))
            elif not row.done:
                row.stats.host_reads += 1
        return events, kept, time

    def _emit(
        self, row: Row, tokens: list[int], drafted: int | None, now_s: float, values: dict[str, np.ndarray]
    ) -> Event:
        """Append new text to a row; ends it at an end token or at its limit. drafted: how many tokens were;
        None for the first token. values: of the pass, with log-probabilities if the row asks for them."""
        row.pending -= 1
        row.stats.host_reads += 1
        kept, request = len(tokens), row.request
        tokens = tokens[: request.max_tokens - len(row.tokens)]
        end = next((i for i, t in enumerate(tokens) if t in request.eos), None)
        if end is not None:
            tokens = tokens[: end + 1]
        row.tokens += tokens
        if row.lookup is not None:
            row.lookup.extend(tokens)
        if row.follower is not None:
            row.follower.advance(tokens)
        stats, reason, scores = row.stats, None, ()
        stats.generated_tokens = len(row.tokens)
        if drafted is not None:
            stats.count_round(drafted, kept, len(tokens))
        if request.logprobs is not None:
            scores = logprobs.unpack(values[scores_of(row)], tokens, request.logprobs)
        failed = row.follower is not None and row.follower.failed
        if end is not None or failed or len(row.tokens) == request.max_tokens:
            reason = "stop" if end is not None else "length"
            self._end(row, now_s)
        return Event(row.id, tuple(tokens), "", reason, stats if reason else None, scores)

    def _end(self, row: Row, now: float) -> None:
        row.done = True
        row.stats.decode_s = now - row.first_token_s if row.tokens else 0.0
        row.stats.peak_memory_bytes = mx.get_peak_memory()
        self.total.add(row.stats)

    def _learn(self, done: Pass, kept: list[int], time: PassTime) -> None:
        """Learn from a pass what later ones are chosen by; the next one does not wait for that. kept: columns."""
        if done.chunks:
            self.scheduler.timed_chunks(time.device_s, done.chunks, bool(done.decoded))
        elif time.round_s is not None:
            self.scheduler.timed_round(time.round_s)
        forced = done.guide is not None and done.guide.certain and done.width > 0
        for row in done.active:
            row.lag = row.lag + 1 if forced or not done.width else 0
        if not done.decoded or forced:  # forced drafts say nothing about the drafter
            return
        accepted = [kept[i] - 1 for i, r in enumerate(done.decoded) if r in done.active]
        self.policy.record(DraftRound(done.width, accepted, done.matched, None if done.chunks else time.round_s))
        if done.width and self.first_drafts < JUDGED:
            guessed = [n > 0 for n, matched in zip(accepted, done.matched, strict=True) if not matched]
            self.first_drafts, self.first_kept = self.first_drafts + len(guessed), self.first_kept + sum(guessed)

    def _drop_done(self) -> None:
        done = [r for r in self.scheduler.rows if r.done]
        left = [self._left(row) for row in done]  # first: where all rows leave, the cuts below are never computed
        for row in reversed(done):  # so that none takes the place of another that leaves too
            index = row.index
            self.runner.leave(index, self.scheduler.leave(row))
        for prefix in left:
            self.scheduler.keep(prefix)

    def _left(self, row: Row) -> Prefix | None:
        """All that a row that leaves has computed, if it is to be kept and is not yet."""
        n = row.committed
        if not self.scheduler.keeps or n == row.marked:
            return None
        said = np.array(row.tokens[row.resumed :], np.int32)
        prefix = self._prefix(row, np.concatenate([row.prompt[: row.prefilled], said])[:n], 0)
        mx.async_eval(prefix.arrays)
        return prefix
