"""What rounds of a pair cost on this machine, measured with made-up texts before the first that somebody asks for.

A policy that begins with nothing has to draft to find that out, and a short text is over before what that may lose has
come in again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_mtp.auto import Auto
from mlx_mtp.engine import Engine
from mlx_mtp.rows import Request

WIDTHS = 1, 2, 4  # what a width between or beyond costs is inferred
ROUNDS, PLAIN = 4, 3  # of a width, and those of width 0 behind it, to compare them with
PROMPT_TOK, TEXT_TOK = 8, 96  # a text has room for all rounds


class Script:
    """A Depth of given widths, whose rounds over so many rows only tell policies what they take. None wider are run
    where no drafts could pay. Of rounds of a width that follow each other the first and the last do not count: kernels
    are built, what was missed is made up for, a round of another width is built beside."""

    drafts, resting = True, False

    def __init__(self, rows: int, policies: Sequence[Auto]) -> None:
        self._rows, self._policies = rows, policies
        self._widths, self._chosen, self._before = self._plan(), 0, 0
        self.done = False

    def choose(self, outlook: Sequence[int], owed: int = 0) -> int:
        if len(outlook) < self._rows:  # others are still on their way
            return 0
        following = next(self._widths, None)
        self._chosen, self.done = following or 0, following is None
        return self._chosen

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int], owed: int = 0) -> None:
        if len(kept) == self._rows:
            counts = self._before == width == self._chosen
            self._before = width
            for policy in self._policies:
                policy.timed(self._rows, width, seconds if counts else None)

    def _plan(self) -> Iterator[int]:
        yield from [0] * ROUNDS
        for width in WIDTHS:
            yield from [width] * ROUNDS + [0] * PLAIN
            if not any(policy.can_pay(self._rows) for policy in self._policies):
                return


def calibrate(engine: Engine, rows: int, policies: Sequence[Auto], most_tok: int) -> None:
    """Tell policies what rounds of so many rows cost, by running a new engine. most_tok: that a row has room for."""
    engine.depth = script = Script(rows, policies)
    for prompt in made_up(rows, PROMPT_TOK):
        engine.submit(Request(prompt, max(1, min(TEXT_TOK, most_tok - PROMPT_TOK))))
    while not (engine.idle or script.done):
        engine.step()


def made_up(rows: int, length_tok: int) -> list[tuple[int, ...]]:
    """Prompts of so many tokens, for texts that nobody reads."""
    return [tuple(3 + (i + row) % 32 for i in range(length_tok)) for row in range(rows)]
