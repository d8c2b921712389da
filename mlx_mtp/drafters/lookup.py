"""Prompt lookup: where a text repeats itself, what followed there is the draft. No network; the host finds matches.

After Saxena, "Prompt Lookup Decoding" (2023), transformers' `PromptLookupCandidateGenerator` and vLLM's
`NgramProposer`, with the longest match instead of the first of a fixed length.
A round's graph is built before the host knows the text, so it reads the copied tokens from a `Slot`, which is filled
when the round before it has been read.
Shapes: B rows of the round, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.buffers import Slot
from mlx_mtp.rows import Candidates, Draft

NAME = "lookup"  # as --drafter takes it
LONGEST = 10  # tokens of a match that are counted
ALONE = 3  # the least match that is worth a round with draft tokens, where nothing else drafts
# The least match that goes before a network's draft: on the embedded pair's code a draft of 8 kept 7.4 from one of 10
# or more, and 4.9 by MTP at the same places; from one of 3 to 9, 3.0 against 3.4.
OVER_NETWORK = 10


class PromptLookup:
    """One text, and where its last tokens stand before: 4 bytes a token."""

    def __init__(self, prompt: Sequence[int], max_tokens: int, least: int) -> None:
        """max_tokens: by how much the text may grow. least: how long a match must be, in tokens."""
        self._tokens = np.empty(len(prompt) + max_tokens, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._length, self._least = len(prompt), least
        self._match: tuple[int, int] | None = None  # as `longest_match` says; None: not searched for yet

    def extend(self, tokens: Sequence[int]) -> None:
        """The text has grown by these."""
        old, count = self._length, len(tokens)
        self._tokens[old : old + count] = tokens
        self._length += count
        matched, end = self._match or (0, 0)
        if matched == LONGEST and np.array_equal(self._tokens[end + 1 : end + 1 + count], tokens):
            self._match = matched, end + count  # the text goes on as it did there
        else:
            self._match = None

    @property
    def matched(self) -> bool:
        """Whether as many of its last tokens as are asked for stand before."""
        return self._found()[0] >= self._least

    def draft(self, count: int) -> np.ndarray:
        """[count] int32: what followed the longest match, -1 where no token matches. Past the text's end it goes
        around, as the text of a loop does."""
        matched, end = self._found()
        if not matched:
            return np.full(count, -1, np.int32)
        following = self._tokens[end + 1 : self._length]
        return np.resize(following, count)

    def _found(self) -> tuple[int, int]:
        if self._match is None:
            self._match = longest_match(self._tokens[: self._length])
        return self._match


def longest_match(tokens: np.ndarray) -> tuple[int, int]:
    """tokens [N] -> how many of the last ones, at most LONGEST, another place before them has as well, and where that
    place ends; of equals the latest. (0, 0) if none."""
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    if not len(ends):
        return 0, 0
    for length in range(1, LONGEST):
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            return length, int(ends[-1])
        ends = longer
    return LONGEST, int(ends[-1])


class LookupDraft:
    """The draft tokens of a round that are copied from its texts."""

    def __init__(self, texts: Sequence[PromptLookup], count: int) -> None:
        """texts: of the B rows. count: draft tokens, K at most."""
        self._texts, self._slot, self._alone = texts, Slot(np.full((len(texts), count), -1, np.int32)), False

    def over(self, draft: Draft) -> Draft:
        """Copied tokens [B, K] for rows with a match, and a drafter's for the others. Without a drafter (K = 0) a row
        copies from any match, and one without gets token 0."""
        copied, self._alone = self._slot.array, not draft.width
        if self._alone:
            return Draft(mx.maximum(copied, 0))
        copied = copied[:, : draft.width]
        found = copied >= 0
        source = draft.source and certain(draft.source, copied, found[:, :1])
        return Draft(mx.where(found, copied, draft.tokens), source)

    def fill(self) -> None:
        """Find what `over` reads, before the round is sent."""
        for row, text in zip(self._slot.host, self._texts, strict=True):
            if self._alone or text.matched:
                row[:] = text.draft(len(row))


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
