"""The round: draft, verify, commit, for any number of rows. One loop serves every drafter, batch size and width.

While one pass runs on the device the graph of the next is built, for shapes do not depend on what will be kept. The
host then reads the finished pass once (`_read`, the only place where it waits), and at once dispatches the next. So
nothing is in flight when a pass is dispatched, which is what lets MLX write the cache in place, and the device waits
for a read and a dispatch but never for Python to build anything, nor for what the policy and the drafters' listeners
make of the texts (`_heed`).

The price: a row's end is seen one pass late, and its last pass is wasted, unless no row is left that needs the pass;
then the pass is undone before it was ever dispatched.

On a CPU a dispatch takes as long as its pass, so there the caller has the events first (`hands_over_first`).

Nothing is built ahead of the end of a pass with prompt chunks: it takes long beside what that would hide, and a request
that comes meanwhile is in the very next pass.

A round with a constrained row is built ahead like any other; what its constraints say is filled in when it is sent.
They must know what is drafted, so its draft is read beside its verdict, while the target's pass runs. Where constraints
force so much that another round is called for, the one built is undone and the other built in its place, with a draft
that is known without a drafter and without a read.
"""

from __future__ import annotations

import itertools
import time
from itertools import islice
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_mtp import logprobs
from mlx_mtp.accept import Judge, Verdict, verdict
from mlx_mtp.buffers import put
from mlx_mtp.cache import Cache
from mlx_mtp.depth import MAX_WIDTH, Depth
from mlx_mtp.drafters import Drafter
from mlx_mtp.guide import Guide, Plan, beginning
from mlx_mtp.models.experts import distinct_experts
from mlx_mtp.models.families import Target
from mlx_mtp.passes import Heard, Pass, Round
from mlx_mtp.prefixes import Prefix
from mlx_mtp.processors import History, check_ids
from mlx_mtp.rows import DRAWN, USUAL, Draft, Event, Forward, Request, Stats, TokenLogprob
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Chunk, Limits, Row, Scheduler, feed, neighbours

JUDGED = 200  # drafts by which a drafter is judged to fit its target or not


class Engine:
    """Runs requests to their end, a pass at a time. All calls come from one thread."""

    def __init__(
        self,
        target: Target,
        cache: Cache,
        drafter: Drafter,
        depth: Depth,
        limits: Limits,
        profile: bool = False,
    ) -> None:
        """profile: wait for every draft, to tell its time from the verifying pass's; costs a host wait a round."""
        self.target, self.cache, self.drafter, self.depth = target, cache, drafter, depth
        self.judge: Judge = verdict  # what decides which drafts a round keeps; benchmarks give another
        self.clock = time.perf_counter  # all that tells it time, in seconds; tests and benchmarks give another
        self.scheduler = Scheduler(
            limits, lambda n: cache.row_bytes(n) + drafter.row_bytes(n), cache.back(0), cache.tail
        )
        self.host_reads = 0
        self.total = Stats()  # of all requests that have ended
        self.first_drafts = self.first_kept = 0  # of the first JUDGED rounds: drafts that were its drafter's own guess
        self.profile, self._sent_s, self._left_s = profile, 0.0, 0.0
        self.hands_over_first = mx.default_device().type == mx.cpu  # there a dispatch takes as long as its pass
        self._held: Pass | None = None  # built ahead, to be dispatched when the caller has the events before it
        self._work = (0, 0)  # passes read, and the columns in them
        self._ids = itertools.count()
        self._bonus = mx.zeros((0,), mx.int32)  # [R] newest token of every row
        self._history = History(target.config.vocab_size)
        self._running: Pass | None = None
        self._samplers: dict[tuple, Sampler] = {}
        self._news: Any = ()  # what is new in the drafter's state since the last dispatch; None: it may be all
        self._last: float | None = None  # when the pass before was read, if the device has been busy since

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
            self._end(row, self.clock())
            self._drop_done()
        return row.stats

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.rows

    def step(self) -> list[Event]:
        """Finish the pass under way, start the next, and return what the finished one brought."""
        away_s = self.clock() - self._left_s
        if self._running is None:
            built = self._held or self._build()
            if built is None:
                return []
            self._dispatch(built)
        running, undo = self._running, self._state()
        assert running is not None
        ahead = None if running.chunks else self._build()
        events, heard = self._read(running, away_s)
        if ahead is not None and ahead.wanted():
            del undo  # MLX copies a buffer that is still referred to instead of writing into it
            if self.hands_over_first:
                self._running, self._held = None, ahead
            else:
                self._dispatch(ahead)
        else:
            self._undo(ahead, undo)
        self._heed(running, heard)
        self._drop_done()
        self._left_s = self.clock()
        return events

    # building ---------------------------------------------------------------------------------------------------

    def _build(self) -> Pass | None:
        """The graph of the next pass, on top of whatever has been dispatched; nothing runs yet."""
        for row in self.scheduler.admit():
            self._join(row)
        decoded = self.scheduler.decoding()
        if not any(r.room > 0 for r in decoded if r.decoding):
            decoded = []  # what is under way brings every row to its limit
        groups = neighbours(self.scheduler.chunks(), self.cache.spare)
        if not decoded and not groups:
            return None
        active = [r for r in decoded if r.decoding and not r.done]
        known, chunks = tuple(r.prospect for r in active), [chunk for group in groups for chunk in group]
        begun = _asking([c.row for c in chunks if c.last])
        most = max((r.request.logprobs or 0 for r in (*active, *begun)), default=0)
        most = min(most, self.target.config.vocab_size)
        owed = self.drafter.owed(slice(0, len(decoded)))
        outs, scores, draft, guide, width, experts = [], [], None, None, 0, []
        if decoded:
            planned = self._width(active, known, owed)
            guide = self._guide(decoded, active, planned)
            round_ = self._round(decoded, active, planned, guide, most)
            draft, experts, width = round_.draft, round_.experts, round_.judged.tokens.shape[1] - 1
            outs += [round_.judged.tokens.reshape(-1), round_.judged.kept]
            scores += round_.scores
        for group in groups:
            first, score = self._chunks(group, most)
            outs.append(first)
            scores += score
        prefixes = [self._marked(c) for c in chunks if c.row.stops and c.row.stops[0] == c.row.prefilled]
        scored = [*((r, width + 1) for r in _asking(active)), *((r, 1) for r in begun)]
        out = mx.concatenate([*outs, *experts, *scores])
        counted = bool(experts)
        return Pass(decoded, active, width, chunks, prefixes, draft, guide, out, known, owed, counted, scored, most)

    def _join(self, row: Row) -> None:
        prompt, most, n = len(row.request.prompt), row.request.max_tokens, row.prefilled
        begin, row.begin, row.started_s, self._news = row.begin, None, self.clock(), None
        self.cache.join(prompt + min(most, 256), begin and begin.cache, n, most=prompt + most)
        self.drafter.begin(row.index, n, begin and begin.drafter)
        row.listener = self.drafter.listener(row.request.prompt)
        self._history.join(row.request)
        self._bonus = mx.concatenate([self._bonus, mx.zeros((1,), mx.int32)])

    def _width(self, active: list[Row], prospects: tuple[int, ...], owed: int) -> int:
        """The depth policy's width, but no wider than the longest row can still use."""
        useful = max((r.room for r in active), default=1) - 1
        return max(0, min(self.depth.choose(prospects, owed), useful))

    def _round(self, decoded: list[Row], active: list[Row], width: int, guide: Guide | None, most: int) -> Round:
        """Draft, verify, commit. most: log-probabilities of so many tokens go with each where they are asked for."""
        rows, wanted = slice(0, len(decoded)), _asking(active)
        asking = [i for i, r in enumerate(decoded) if r in wanted]
        bonus = self._bonus[rows]
        asks = width and (guide is None or not guide.certain)
        sampler = self._sampler(decoded, rows)
        draft = self._draft(rows, bonus, sampler, width, guide)
        width = draft.width
        tokens = mx.concatenate([bonus[:, None], draft.tokens], axis=1)
        still = frozenset() if active == decoded else frozenset(i for i, r in enumerate(decoded) if r not in active)
        pass_ = self.cache.open(rows, width + 1, still)
        hidden, taps = self.target.forward(tokens, pass_, self.drafter.taps)
        logits = self.target.logits(hidden, capped=bool(asking) or not sampler.order_decides)
        if guide is not None:
            sampler = guide.judging(sampler, draft.tokens, logits)
        judged = self.judge(draft, logits, pass_.start, sampler, hidden)
        kept = judged.kept
        if still:  # rows that are feeding their prompt, or have ended
            kept = kept * mx.array([int(i not in still) for i in range(len(decoded))], mx.int32)
        self.cache.commit(rows, kept, width + 1)
        newest = mx.where(kept > 0, judged.bonus, bonus)
        forced = width - guide.own if guide is not None else 0
        resting = self.depth.resting and not width
        fwd = Forward(rows, tokens, hidden, taps, width, judged.picked, newest, still, forced, resting)
        new = self.drafter.observe(fwd, kept)
        self._news = None if asks or self._news is None else new
        self._history.add(rows, judged.tokens, kept)
        self._bonus = mx.concatenate([newest, self._bonus[len(decoded) :]])
        for row in active:
            row.pending += 1
        experts = [distinct_experts(pass_.routed)[None]] if pass_.routed else []
        scores = logprobs.packed_rows(logits, judged.tokens, asking, most)
        return Round(draft.tokens if width else None, Verdict(judged.tokens, kept), experts, scores)

    def _guide(self, decoded: list[Row], active: list[Row], width: int) -> Guide | None:
        """What constrains a round; None where nothing does."""
        if not any(r.follower is not None for r in active):
            return None
        most = max(width, min(MAX_WIDTH, max(r.room for r in active) - 1)) if self.depth.drafts else 0
        return Guide(decoded, active, Plan(width, most, self.target.config.vocab_size, settled=self._running is None))

    def _draft(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int, guide: Guide | None) -> Draft:
        if guide is not None and guide.certain:
            return Draft(mx.array(guide.known(), mx.int32).reshape(bonus.shape[0], guide.width))
        if not width:
            return Draft(mx.zeros((bonus.shape[0], 0), mx.int32))
        if guide is None:
            return self.drafter.propose(rows, bonus, sampler, width)
        return guide.completed(self.drafter.propose(rows, bonus, guide.hinting(sampler), width))

    def _chunks(self, chunks: list[Chunk], most: int) -> tuple[mx.array, list[mx.array]]:
        """One pass over the prompt chunks of neighbouring rows, B of them; returns the token after each, [B] int32,
        which counts only at its prompt's end, and scores as in `Round`."""
        members, counts = [c.row for c in chunks], [c.count for c in chunks]
        rows, columns = slice(members[0].index, members[-1].index + 1), max(counts)
        tokens, newest, kept = *map(mx.array, feed(chunks)), mx.array(counts, mx.int32)
        pass_, taps = self.cache.open(rows, columns), self.drafter.taps
        hidden, tapped = self.target.forward(tokens, pass_, taps, None if taps else kept - 1)
        self.cache.commit(rows, kept, columns)
        for row, count in zip(members, counts, strict=True):
            self.cache.settle(row.index, columns - count)
        scores = []
        if any(c.last for c in chunks):
            ends = hidden if hidden.shape[1] == 1 else mx.take_along_axis(hidden, (kept - 1)[:, None, None], axis=1)
            newest, scores = self._firsts(chunks, ends, pass_.start + (kept - 1), newest, most)
        for b, (row, count) in enumerate(zip(members, counts, strict=True)):  # to a drafter every prompt is its own
            own, upto, first = slice(b, b + 1), slice(0, count), b * columns
            seen = {i: tap[first : first + count] for i, tap in tapped.items()}
            where = slice(row.index, row.index + 1)
            fwd = Forward(where, tokens[own, upto], hidden[own, upto], seen, 0, newest=newest[own])
            self.drafter.observe(fwd, kept[own])
        self._news = None
        return newest, scores

    def _firsts(
        self, chunks: list[Chunk], hidden: mx.array, start: mx.array, newest: mx.array, most: int
    ) -> tuple[mx.array, list[mx.array]]:
        """The tokens after the prompts that end with their chunk, among the others' `newest` [B], from the hidden
        states [B, 1, H] of the chunks' last columns at positions start [B]; and their scores."""
        members = [c.row for c in chunks]
        rows, asking = slice(members[0].index, members[-1].index + 1), _asking([c.row for c in chunks if c.last])
        sampler = self._sampler(members, rows)
        followers = [c.row.follower if c.last else None for c in chunks]
        if any(followers):
            sampler = beginning(sampler, followers, self.target.config.vocab_size)
        nothing = Draft(mx.zeros((len(chunks), 0), mx.int32))
        logits = self.target.logits(hidden, capped=bool(asking) or not sampler.order_decides)
        judged = verdict(nothing, logits, start, sampler, hidden)
        last = mx.array([c.last for c in chunks])
        self._history.add(rows, judged.tokens, judged.kept * last)
        newest = mx.where(last, judged.tokens[:, 0], newest)
        self._bonus = put(self._bonus, rows, mx.where(last, newest, self._bonus[rows]))
        where = [b for b, row in enumerate(members) if row in asking]
        return newest, logprobs.packed_rows(logits, judged.tokens, where, most)

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

    def _sampler(self, rows: list[Row], where: slice) -> Sampler:
        """The rows' settings as arrays, built once for a set of rows, with what their texts do to the next logits."""
        key = tuple(r.id for r in rows)
        if key not in self._samplers:
            if len(self._samplers) > 64:
                self._samplers.clear()
            self._samplers[key] = Sampler([r.sampler for r in rows])
        return self._samplers[key].steered(self._history.processors(where))

    # running ----------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[Any, ...]:
        return self.cache.state(), self.drafter.state(), self._bonus, self._history.state()

    def _dispatch(self, built: Pass) -> None:
        if built.guide is not None:
            built.guide.hint()
        self._running, self._held, drafted_s, self._sent_s = built, None, 0.0, self.clock()
        if built.draft is not None:
            mx.async_eval(built.draft)
        if self.profile and built.draft is not None:  # a second wait, only to tell drafting from verifying
            mx.eval(built.draft)
            drafted_s = self.clock() - self._sent_s
        reads = self._tell(built.guide) if built.guide is not None else 0
        kept = [a for prefix in built.prefixes for a in prefix.arrays]  # first: done with before the next pass writes
        # To evaluate an array again is not free: MLX has the device wait for every one that it is given.
        drafter, self._news = self.drafter.state() if self._news is None else self._news, ()
        mx.async_eval(kept, built.out, self.cache.state(), drafter, self._bonus, self._history.state())
        for prefix in built.prefixes:
            self.scheduler.keep(prefix)
        for row in built.active:
            if not row.done:
                row.stats.host_reads += reads
                row.stats.draft_s += drafted_s
                row.stats.host_s += 0.0 if self._last is None else self._sent_s - self._last

    def _tell(self, guide: Guide) -> int:
        """Tell a round's constraints what was drafted, while the target's pass is on its way; returns reads it took."""
        mx.async_eval(guide.draft, guide.logits)
        reads = int(not guide.certain)
        guide.judge(cast(list[list[int]], guide.draft.tolist()) if reads else guide.known())
        self.host_reads += reads
        return reads

    def _undo(self, built: Pass | None, state: tuple[Any, ...]) -> None:
        """Take back a pass that nobody needs; rows that it admitted stay, as if new."""
        self._running = self._last = self._news = None
        if built is None:
            return
        cache, drafter, self._bonus, history = state
        self._history.restore(history)
        self.cache.restore(cache)
        self.drafter.restore(drafter)
        for row in built.decoded:
            if row.index >= 0:
                self.cache.settle(row.index, built.width + 1)
        for row in built.active:
            row.pending -= 1

    def _read(self, done: Pass, away_s: float) -> tuple[list[Event], Heard]:
        """Wait for a pass, and turn what it brought into events. away_s: how long the caller had kept us waiting."""
        values = iter(cast(list[int], done.out.tolist()))
        self.host_reads += 1
        now, columns = self.clock(), done.width + 1
        self._work = self._work[0] + 1, self._work[1] + done.columns
        tokens = [list(islice(values, columns)) for _ in done.decoded]
        kept = list(islice(values, len(done.decoded)))
        firsts = list(islice(values, len(done.chunks)))
        experts = next(values) / len(self.target.layers) if done.counted else 0.0
        size = logprobs.packed_size(done.most)
        scores = {row.id: list(islice(values, count * size)) for row, count in done.scored}
        events, said = [], []
        for i, row in enumerate(done.decoded):
            if row.index >= 0:
                self.cache.settle(row.index, columns - kept[i])
            if row in done.active and not row.done:
                row.stats.host_reads += 1
                row.stats.device_s += now - self._sent_s
                row.stats.experts += experts
                own = tokens[i][: kept[i]]
                events.append(self._emit(row, own, done.width, now, _told(row, scores, own, done.most)))
                said.append((row, events[-1].tokens))
        for chunk, first in zip(done.chunks, firsts, strict=True):
            row = chunk.row
            row.stats.host_reads += 1
            if chunk.last and not row.done:
                row.first_token_s, row.stats.prefill_s = now, now - row.started_s
                row.stats.first_passes = self._work[0] - row.arrived[0]
                row.stats.first_columns = self._work[1] - row.arrived[1]
                events.append(self._emit(row, [first], None, now, _told(row, scores, [first], done.most)))
                said.append((row, events[-1].tokens))
        seconds = None if self._last is None or away_s > 0.2 * (now - self._last) else now - self._last
        self._last = now
        return events, Heard(said, kept, now - self._sent_s, seconds)

    def _emit(
        self, row: Row, tokens: list[int], drafted: int | None, now: float, scores: tuple[TokenLogprob, ...]
    ) -> Event:
        """Append new text to a row; ends it at an end token or at its limit. drafted: how many tokens were;
        None for the first token."""
        row.pending -= 1
        kept, request = len(tokens), row.request
        tokens = tokens[: request.max_tokens - len(row.tokens)]
        end = next((i for i, t in enumerate(tokens) if t in request.eos), None)
        if end is not None:
            tokens = tokens[: end + 1]
        row.tokens += tokens
        if row.follower is not None:
            row.follower.advance(tokens)
        stats, reason = row.stats, None
        stats.generated_tokens = len(row.tokens)
        if drafted is not None:
            stats.count_round(drafted, kept, len(tokens))
        failed = row.follower is not None and row.follower.failed
        if end is not None or failed or len(row.tokens) == request.max_tokens:
            reason = "stop" if end is not None else "length"
            self._end(row, now)
        return Event(row.id, tuple(tokens), "", reason, stats if reason else None, scores[: len(tokens)])

    def _end(self, row: Row, now: float) -> None:
        row.done = True
        row.stats.decode_s = now - row.first_token_s if row.tokens else 0.0
        row.stats.peak_memory_bytes = mx.get_peak_memory()
        self.total.add(row.stats)

    def _heed(self, done: Pass, heard: Heard) -> None:
        """Learn from a pass what the passes after the next are chosen by; nobody waits for that."""
        for row, tokens in heard.said:
            if row.listener is not None and not row.done:
                row.outlook = row.listener.hear(tokens)
        if done.chunks:
            self.scheduler.timed_chunks(heard.took_s, done.chunks, bool(done.decoded))
        elif heard.seconds is not None:
            self.scheduler.timed_round(heard.seconds)
        if done.decoded:
            self._judge_drafts(done, heard, None if done.chunks else heard.seconds)

    def _judge_drafts(self, done: Pass, heard: Heard, alone_s: float | None) -> None:
        """Tell whoever decides about drafts what a round kept, and what it took if its time is its own."""
        if done.width and done.guide is not None and done.guide.certain:
            return  # forced drafts say nothing about the drafter
        own = [i for i, r in enumerate(done.decoded) if r in done.active]
        kept = [heard.kept[i] for i in own]
        self.depth.record(done.width, kept, alone_s, done.outlook, done.owed)
        if not done.width:
            return
        if self.first_drafts < JUDGED:
            guessed = [k > 1 for k, o in zip(kept, done.outlook, strict=True) if o in (USUAL, USUAL + DRAWN)]
            self.first_drafts, self.first_kept = self.first_drafts + len(guessed), self.first_kept + sum(guessed)

    def _drop_done(self) -> None:
        done = [r for r in self.scheduler.rows if r.done]
        left = [self._left(row) for row in done]  # first: where all rows leave, the cuts below are never computed
        for row in reversed(done):  # so that none takes the place of another that leaves too
            index = row.index
            last, self._news = self.scheduler.leave(row), None
            self.drafter.leave(index, last)
            self.cache.leave(index)
            self._history.leave(index)
            order = list(range(last))
            if index != last:
                order[index] = last
            self._bonus = self._bonus[mx.array(order, mx.int32)] if order else self._bonus[:0]
        for prefix in left:
            self.scheduler.keep(prefix)

    def _left(self, row: Row) -> Prefix | None:
        """All that a row that leaves has computed, if it is to be kept and is not yet."""
        n = row.committed
        if not self.scheduler.keeps or n == row.marked:
            return None
        said = np.array(row.tokens, np.int32)
        prefix = self._prefix(row, np.concatenate([row.prompt[: row.prefilled], said])[:n], 0)
        mx.async_eval(prefix.arrays)
        return prefix


def _asking(rows: list[Row]) -> list[Row]:
    """Those of the rows whose tokens' log-probabilities are asked for."""
    return [r for r in rows if r.request.logprobs is not None]


def _told(row: Row, scores: dict[int, list[int]], tokens: list[int], most: int) -> tuple[TokenLogprob, ...]:
    """What a pass brought of the log-probabilities that a row has asked for."""
    wanted = row.request.logprobs
    return () if wanted is None else logprobs.unpack(scores[row.id], tokens, most, wanted)
