"""The graph of a pass: draft, verify and commit for the rows that decode, and prompt chunks for those that do not yet.

Owns every array that outlives a pass: the cache, the drafter's state, each row's newest token and its token counts.
Nothing runs here; the engine dispatches what is built, and takes back what is not needed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mtp import logprobs
from mlx_mtp.accept import Judge, verdict
from mlx_mtp.buffers import put
from mlx_mtp.cache import Cache
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.lookup import LookupDraft
from mlx_mtp.guide import Guide, beginning
from mlx_mtp.models.experts import distinct_experts
from mlx_mtp.models.families import Target
from mlx_mtp.processors import History
from mlx_mtp.rows import Draft, Forward
from mlx_mtp.sampling import Sampler
from mlx_mtp.scheduler import Chunk, Row, feed


class ModelRunner:
    """Builds passes over a target, its cache and a drafter."""

    def __init__(self, target: Target, cache: Cache, drafter: Drafter) -> None:
        self._target, self._cache, self._drafter = target, cache, drafter
        self.judge: Judge = verdict  # what decides which drafts a round keeps; benchmarks give another
        self._bonus = mx.zeros((0,), mx.int32)  # [R] newest token of every row
        self._history = History(target.config.vocab_size)
        self._samplers: dict[tuple, Sampler] = {}

    def round(
        self,
        decoded: list[Row],
        active: list[Row],
        width: int,
        guide: Guide | None,
        copied: LookupDraft | None,
        most: int,
    ) -> tuple[mx.array | None, dict[str, mx.array]]:
        """Draft, verify, commit. Returns the draft [B, K], None where nothing was drafted (K may be less than width),
        and what the host will read, as of `Pass.output`.

        most: log-probabilities of so many tokens go with each where they are asked for.
        """
        rows, bonus = slice(0, len(decoded)), self._bonus[: len(decoded)]
        asking = {i: r for i, r in enumerate(decoded) if r in active and r.request.logprobs is not None}
        sampler = self._sampler(decoded, rows)
        draft = self._draft(rows, bonus, sampler, width, guide, copied)
        width = draft.width
        tokens = mx.concatenate([bonus[:, None], draft.tokens], axis=1)
        still = frozenset() if active == decoded else frozenset(i for i, r in enumerate(decoded) if r not in active)
        pass_ = self._cache.open(rows, width + 1, still)
        hidden, taps = self._target.forward(tokens, pass_, self._drafter.taps)
        logits = self._target.logits(hidden, capped=bool(asking) or not sampler.order_decides)
        if guide is not None:
            sampler = guide.judging(sampler, draft.tokens, logits)
        judged = self.judge(draft, logits, pass_.start, sampler, hidden)
        kept = judged.kept
        if still:  # rows that are feeding their prompt, or have ended
            kept = kept * mx.array([int(i not in still) for i in range(len(decoded))], mx.int32)
        self._cache.commit(rows, kept, width + 1)
        newest = mx.where(kept > 0, judged.bonus, bonus)
        forced = width - guide.own if guide is not None else 0
        self._drafter.observe(Forward(rows, tokens, hidden, taps, width, judged.picked, newest, still, forced), kept)
        self._history.add(rows, judged.tokens, kept)
        self._bonus = mx.concatenate([newest, self._bonus[len(decoded) :]])
        for row in active:
            row.pending += 1
        parts = {"tokens": judged.tokens, "kept": kept} | _scores(logits, judged.tokens, asking, most)
        if pass_.routed:
            parts["experts"] = distinct_experts(pass_.routed)
        return draft.tokens if width else None, parts

    def _draft(
        self,
        rows: slice,
        bonus: mx.array,
        sampler: Sampler,
        width: int,
        guide: Guide | None,
        copied: LookupDraft | None,
    ) -> Draft:
        if guide is not None and guide.certain:
            return Draft(mx.array(guide.known(), mx.int32).reshape(bonus.shape[0], guide.width))
        if not width:
            return Draft(mx.zeros((bonus.shape[0], 0), mx.int32))
        draft = self._drafter.propose(rows, bonus, sampler if guide is None else guide.hinting(sampler), width)
        if copied is not None:
            draft = copied.over(draft)
        return draft if guide is None else guide.completed(draft)

    def prefill(self, chunks: list[Chunk], most: int) -> tuple[mx.array, dict[str, mx.array]]:
        """One pass over the prompt chunks of neighbouring rows, B of them. Returns the token after each, [B] int32,
        which counts only at its prompt's end, and log-probabilities as of `Pass.output`."""
        members, counts = [c.row for c in chunks], [c.count for c in chunks]
        rows, columns = slice(members[0].index, members[-1].index + 1), max(counts)
        tokens, newest, kept = *map(mx.array, feed(chunks)), mx.array(counts, mx.int32)
        pass_, taps = self._cache.open(rows, columns, settles=True), self._drafter.taps
        hidden, tapped = self._target.forward(tokens, pass_, taps, None if taps else kept - 1)
        self._cache.commit(rows, kept, columns)
        for row, count in zip(members, counts, strict=True):
            self._cache.settle(row.index, columns - count)
        scores: dict[str, mx.array] = {}
        if any(c.last for c in chunks):
            ends = hidden if hidden.shape[1] == 1 else mx.take_along_axis(hidden, (kept - 1)[:, None, None], axis=1)
            firsts, scores = self._firsts(chunks, ends, pass_.start + (kept - 1), most)
            newest = mx.where(mx.array([c.last for c in chunks]), firsts, newest)
            self._bonus = put(self._bonus, rows, newest)  # of a row that goes on feeding it is never used
        for b, (row, count) in enumerate(zip(members, counts, strict=True)):  # to a drafter every prompt is its own
            own, upto, first = slice(b, b + 1), slice(0, count), b * columns
            seen = {i: tap[first : first + count] for i, tap in tapped.items()}
            where = slice(row.index, row.index + 1)
            fwd = Forward(where, tokens[own, upto], hidden[own, upto], seen, 0, newest=newest[own])
            self._drafter.observe(fwd, kept[own])
        return newest, scores

    def _firsts(
        self, chunks: list[Chunk], hidden: mx.array, start: mx.array, most: int
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The token after every chunk [B], from the hidden states [B, 1, H] of the chunks' last columns at positions
        start [B]; counts only where a prompt ends."""
        members, last = [c.row for c in chunks], [c.last for c in chunks]
        rows = slice(members[0].index, members[-1].index + 1)
        asking = {b: c.row for b, c in enumerate(chunks) if c.last and c.row.request.logprobs is not None}
        sampler = self._sampler(members, rows)
        followers = [c.row.follower if c.last else None for c in chunks]
        if any(followers):
            sampler = beginning(sampler, followers, self._target.config.vocab_size)
        nothing = Draft(mx.zeros((len(chunks), 0), mx.int32))
        logits = self._target.logits(hidden, capped=bool(asking) or not sampler.order_decides)
        judged = verdict(nothing, logits, start, sampler, hidden)
        self._history.add(rows, judged.tokens, judged.kept * mx.array(last))
        return judged.tokens[:, 0], _scores(logits, judged.tokens, asking, most)

    def _sampler(self, rows: list[Row], where: slice) -> Sampler:
        """The rows' settings as arrays, built once for a set of rows, with what their texts do to the next logits."""
        key = tuple(r.id for r in rows)
        if key not in self._samplers:
            if len(self._samplers) > 64:
                self._samplers.clear()
            self._samplers[key] = Sampler([r.sampler for r in rows])
        return self._samplers[key].steered(self._history.processors(where))

    # rows -------------------------------------------------------------------------------------------------------

    def join(self, row: Row) -> None:
        """A row joined as the last, with what is known of its prompt's beginning."""
        prompt, most, n = len(row.prompt), row.request.max_tokens - row.resumed, row.prefilled
        begin, row.begin = row.begin, None
        self._cache.join(prompt + min(most, 256), begin and begin.cache, n, most=prompt + most)
        self._drafter.begin(row.index, n, begin and begin.drafter)
        self._history.join(row.request, row.tokens)
        self._bonus = mx.concatenate([self._bonus, mx.zeros((1,), mx.int32)])

    def leave(self, index: int, last: int) -> None:
        """The row at an index leaves, and the last one gets its index."""
        self._drafter.leave(index, last)
        self._cache.leave(index)
        self._history.leave(index)
        order = list(range(last))
        if index != last:
            order[index] = last
        self._bonus = self._bonus[mx.array(order, mx.int32)] if order else self._bonus[:0]

    def state(self) -> tuple[Any, ...]:
        """All arrays of all rows: what a dispatch must evaluate."""
        return self._cache.state(), self._drafter.state(), self._bonus, self._history.state()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to what `state` returned; everything since was built but never dispatched."""
        cache, drafter, self._bonus, history = state
        self._history.restore(history)
        self._cache.restore(cache)
        self._drafter.restore(drafter)


def scores_of(row: Row) -> str:
    """The name of a row's log-probabilities in `Pass.output`."""
    return f"logprobs of {row.id}"


def _scores(logits: mx.array, tokens: mx.array, asking: dict[int, Row], most: int) -> dict[str, mx.array]:
    """Log-probabilities of the rows that ask for them, packed, by name. asking: place in the batch -> row."""
    if not asking:
        return {}
    some = mx.array(list(asking), mx.int32)
    packed = logprobs.pack(logits[some], tokens[some], most)
    return {scores_of(row): packed[i] for i, row in enumerate(asking.values())}
