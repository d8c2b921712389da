"""This package as one of the runtimes compared. The draft length policy stays for all runs, as it does in a Pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import mlx.core as mx

from mlx_mtp.cache import Cache
from mlx_mtp.compare.cases import Prompt
from mlx_mtp.compare.runs import Drafts
from mlx_mtp.cost_profile import BATCHES
from mlx_mtp.draft_length import MAX_WIDTH, PRIOR_PROFILE, make_policy
from mlx_mtp.engine import Engine
from mlx_mtp.loaded import LoadedPair
from mlx_mtp.memory_budget import GPU_CHUNK
from mlx_mtp.pair import profiler_of
from mlx_mtp.prompt_chunks import fitted
from mlx_mtp.rows import GREEDY, Request
from mlx_mtp.scheduler import Limits


class Ours:
    """One width of a loaded pair."""

    batches = True

    def __init__(self, loaded: LoadedPair, width: int | str) -> None:
        profile, self._limits = PRIOR_PROFILE, fitted(Limits(), GPU_CHUNK, loaded)
        if width == "auto" and loaded.drafter_name:
            room = loaded.target.model.config.max_positions
            found, _ = profiler_of(loaded).profile(
                BATCHES, lambda: loaded.new_engine(make_policy(0), self._limits), room
            )
            profile = found or profile
        self._loaded, self._policy, self._drafts = loaded, make_policy(width, profile), Drafts()

    def open(self) -> OurSession:
        return OurSession(self._loaded.new_engine(self._policy, self._limits), self._drafts)

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        session = self.open()
        session.submit(prompt, tokens)
        while not session.engine.idle:
            yield from (new for _, new in session.step())

    def drafts(self) -> Drafts:
        taken, self._drafts = self._drafts, Drafts()
        return taken


class OurSession:
    """An engine without end tokens."""

    def __init__(self, engine: Engine, drafts: Drafts) -> None:
        self.engine, self._drafts = engine, drafts

    def submit(self, prompt: Prompt, tokens: int) -> int:
        return self.engine.submit(Request(prompt, tokens, GREEDY, frozenset()))

    def step(self) -> list[tuple[int, list[int]]]:
        out = []
        for event in self.engine.step():
            out.append((event.request, list(event.tokens)))
            if event.stats:
                self._drafts.add(event.stats.rounds, event.stats.drafted_at, event.stats.kept_at)
        return out

    def close(self) -> None:
        pass


def margin(loaded: LoadedPair, tokens: list[int]) -> float:
    """By how much the target prefers its best next token to the second, in logits."""
    target = loaded.target
    cache = Cache(target.model.specs, MAX_WIDTH, target.dtype)
    cache.join(len(tokens))
    pass_ = cache.open(slice(0, 1), len(tokens))
    hidden, _ = target.model.forward(mx.array([tokens], mx.int32), pass_)
    best = mx.sort(target.model.logits(hidden[:, -1])[0])[-2:]
    return cast(float, (best[1] - best[0]).item())
