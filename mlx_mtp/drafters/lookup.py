"""Prompt lookup: where the text repeats something said before, what followed there is the draft. No network.

Knows tokens alone. It stands over another drafter, which drafts for the rows that repeat nothing; over plain decoding
it has nothing for them. The device looks for matches when a draft is asked for, with what the host has not read yet;
whether one should be asked for is found on the host (`NgramIndex`).
After Saxena, "Prompt Lookup Decoding" (2023) and transformers'
`PromptLookupCandidateGenerator`, with the longest match instead of the first of a fixed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.cache import Cache
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.kinds import Kind
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.drafters.texts import Texts
from mlx_mtp.rows import Candidates, Draft, Forward
from mlx_mtp.sampling import Sampler

LONGEST = 16  # tokens of a match that are counted
GATE = 3  # the least match that drafts where nothing else would
# Matches from here on go before a network's drafts: on the embedded pair's code a
# draft of 8 kept 7.4 from such a match, and 4.9 by MTP at the same places; from one of 3 to 9, 3.0 against 3.4.
SURE = 10


class LookupDrafter:
    """Drafts the continuation of the longest match of a row's last tokens with any place before; of several the
    latest. A draft that would reach the text's end goes around, as the text of a loop does."""

    def __init__(self, under: Drafter, cache: Cache, gate: int | None = None) -> None:
        """under: drafts for rows whose match is shorter than `gate`. cache: the target's."""
        self._under, self.taps = under, under.taps
        self._gate = gate or match_tokens(alone=isinstance(under, PlainDrafter))
        self._texts = Texts(cache)

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        other = self._under.propose(rows, bonus, sampler, width)
        width, newest = other.width or width, self._texts.lengths(rows)
        match = longest_match(self._texts.written()[rows], newest)
        length, at = match[:, 0], match[:, 1:]
        period = mx.maximum(newest[:, None] - at, 1)
        tokens = self._texts.at(rows, at + 1 + mx.arange(width) % period)
        if not other.width:
            return Draft(tokens)
        looked = (length >= self._gate)[:, None]
        source = other.source and certain(other.source, tokens, looked)
        return Draft(mx.where(looked, tokens, other.tokens), source)

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        self._under.observe(fwd, kept)
        self._texts.observe(fwd, kept)

    def begin(self, row: int, length: int, state: Any) -> None:
        under, tokens = state or (None, None)
        self._under.begin(row, length, under)
        self._texts.begin(row, length, tokens)

    def snapshot(self, row: int, length: int) -> Any:
        return self._under.snapshot(row, length), self._texts.snapshot(row, length)

    def row_bytes(self, positions: int) -> int:
        return self._under.row_bytes(positions) + self._texts.row_bytes(positions)

    def leave(self, row: int, last: int) -> None:
        self._under.leave(row, last)
        self._texts.leave(row, last)

    def state(self) -> Any:
        return self._under.state(), self._texts.state()

    def restore(self, state: Any) -> None:
        under, texts = state
        self._under.restore(under)
        self._texts.restore(texts)


def match_tokens(alone: bool) -> int:
    """The least match that drafts, alone or before a network."""
    return GATE if alone else SURE


class NgramIndex:
    """Which runs of n tokens a text has had, on the host; so that no round without a draft needs the device for it."""

    def __init__(self, prompt: Sequence[int], n: int) -> None:
        self._n, self._last = n, tuple(prompt[-n:])
        self._seen = {hash(tuple(prompt[i : i + n])) for i in range(len(prompt) - n + 1)}

    def extend(self, tokens: Sequence[int]) -> bool:
        """The text has grown by these; whether its last n tokens are found before."""
        found = False
        for token in tokens:
            self._last = (*self._last, token)[-self._n :]
            run = hash(self._last)
            found = run in self._seen
            if len(self._last) == self._n:
                self._seen.add(run)
        return found


def longest_match(tokens: mx.array, length: mx.array) -> mx.array:
    """tokens [B, T] int32 with the newest at position length [B] -> [B, 2] int32: how many of the last tokens, at most
    LONGEST, another place before them has as well, and where that place ends; of equals the latest. (0, 0) if none."""
    rows, room = tokens.shape
    padded = mx.concatenate([mx.full((rows, LONGEST - 1), -1, mx.int32), tokens], axis=1)
    ends = mx.arange(room)
    back = mx.arange(LONGEST)
    # Every place's last tokens beside the text's, newest first: the first that differs says how long the match is.
    windows = mx.as_strided(padded, (rows, room, LONGEST), (room + LONGEST - 1, 1, 1), 0)
    last = mx.take_along_axis(padded, (length[:, None] + LONGEST - 1) - back, axis=1)
    last = mx.where(back <= length[:, None], last, -2)
    agrees = windows[:, :, ::-1] == last[:, None]
    most = mx.array(LONGEST, mx.uint8)
    matched = mx.min(mx.where(agrees, most, back.astype(mx.uint8)), axis=2).astype(mx.int32)
    matched = mx.where(ends < length[:, None], matched, 0)
    best = mx.max(matched * room + ends * (matched > 0), axis=1)
    return mx.stack([best // room, best % room], axis=1)


def certain(source: Candidates, tokens: mx.array, rows: mx.array) -> Candidates:
    """The source with, in the rows [B, 1] bool, all probability on the tokens [B, K] that were drafted."""
    chosen = tokens[..., None]
    ids = mx.arange(source.logits.shape[-1])[None, None] if source.ids is None else source.ids
    hit = ids == chosen
    if source.ids is not None:  # where the token is no candidate, it takes the first one's place
        first = (mx.arange(ids.shape[-1]) == 0) & ~mx.any(hit, axis=-1, keepdims=True)
        hit = hit | first
        ids = mx.where(rows[..., None] & first, chosen, ids)
    logits = mx.where(rows[..., None], mx.where(hit, 0.0, -mx.inf), source.logits)
    return Candidates(logits, None if source.ids is None else ids)


KIND = Kind("lookup", lambda parts: LookupDrafter(parts.under, parts.cache))
