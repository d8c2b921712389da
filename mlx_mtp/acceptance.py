"""How many drafts are kept, of rows of every outlook by itself. Plain numbers; knows no time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from mlx_mtp.round_times import within
from mlx_mtp.rows import DRAWN, NOTHING

AT_ONCE = 32  # rounds without drafts that are reckoned with together: what is decided for each costs time


class Acceptance:
    """How many drafts are kept, by position, at two speeds: counts that fade with every round, over a slow mean that
    remembers. Pooled over rows of one outlook."""

    FADE = 0.96  # per round of a row: about 25 count, which eight rows have in three
    SLOW = 1 / 64  # least weight of a round in the slow mean, in which the first drafts of all rows weigh the same
    PRIOR, PRIOR_WEIGHT = 0.7, 2.0  # of a draft being kept, before there is evidence; and of the slow mean
    HOPELESS = 0.02  # the same of rows whose drafter has nothing: not worth a try

    def __init__(self, most: int, outlook: int) -> None:
        """most: positions that are kept apart."""
        self._prior = self.HOPELESS if outlook % DRAWN == NOTHING else self.PRIOR
        self._hits, self._tries = [0.0] * most, [0.0] * most
        self._slow, self._judged = [self._prior] * most, [0] * most
        self._unfaded = 0  # rounds since the counts were faded
        self._expected: list[float] = []  # none: to be reckoned anew

    def record(self, width: int, kept: Sequence[int]) -> None:
        """A round in which these rows kept so many columns of width + 1."""
        self._unfaded += 1
        if not width and self._unfaded < AT_ONCE:
            return
        fade, self._unfaded, self._expected = self.FADE ** (self._unfaded * len(kept)), 0, []
        self._hits, self._tries = [x * fade for x in self._hits], [x * fade for x in self._tries]
        for i in range(min(width, len(self._hits))):
            judged = [columns - 1 > i for columns in kept if columns > i]  # all drafts before i were kept
            if judged:
                share = sum(judged) / len(judged)
                weight = len(judged) / len(kept)
                self._hits[i] += share * weight
                self._tries[i] += weight
                self._judged[i] += len(judged)
                rate = max(self.SLOW * weight, len(judged) / (self._judged[i] + 2))
                self._slow[i] += rate * (share - self._slow[i])

    def state(self) -> Any:
        """What it has counted, as plain numbers."""
        return [self._hits, self._tries, self._slow, self._judged]

    def restore(self, state: Any) -> None:
        """Go on with what another one of as many positions had counted. Raises as `within`, or IndexError."""
        hits, tries, slow, judged = state
        for i in range(len(self._hits)):
            self._tries[i] = within(tries[i], 0.0, math.inf)
            self._hits[i] = within(hits[i], 0.0, self._tries[i])
            self._slow[i], self._judged[i] = within(slow[i], 0.0, 1.0), int(within(judged[i], 0.0, sys.maxsize))

    @property
    def tokens(self) -> list[float]:
        """Tokens a row is expected to gain from a round, by width."""
        if not self._expected:
            self._expected = self._expect()
        return self._expected

    @property
    def judged(self) -> bool:
        """Whether any draft has been kept or not."""
        return self._judged[0] > 0

    @property
    def lasting(self) -> list[float]:
        """The same once the counts have faded."""
        return self._expect(faded=True)

    def _expect(self, faded: bool = False) -> list[float]:
        totals, alive, last, level = [1.0], 1.0, self._prior, 1.0
        for i in range(len(self._hits)):
            # Positions rise and fall together: what the slow mean says is scaled by how the position before fares.
            prior = min(0.97, self._slow[i] * level) if self._judged[i] else last
            hits, tries = (0.0, 0.0) if faded else (self._hits[i], self._tries[i])
            last = (hits + self.PRIOR_WEIGHT * prior) / (tries + self.PRIOR_WEIGHT)
            level = last / max(self._slow[i], 0.02) if self._judged[i] else level
            alive *= last
            totals.append(totals[-1] + alive)
        return totals


class Acceptances:
    """Of rows of every outlook by itself."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: dict[int, Acceptance] = {}

    def record(self, width: int, kept: Sequence[int], outlook: Sequence[int]) -> None:
        """A round in which rows of these outlooks kept so many columns of width + 1."""
        for one in set(outlook):
            self._known(one).record(width, [k for k, o in zip(kept, outlook, strict=True) if o == one])

    def tokens(self, outlook: Sequence[int], lasting: bool = False) -> list[float]:
        """Tokens a row is expected to gain from a round, by width; mean over rows. lasting: as in `Acceptance`."""
        kinds = set(outlook)
        of = {one: self._known(one).lasting if lasting else self._known(one).tokens for one in kinds}
        if len(kinds) == 1:
            return of[outlook[0]]
        return [sum(of[one][w] for one in outlook) / len(outlook) for w in range(self._most + 1)]

    def judged(self, outlook: Sequence[int]) -> bool:
        """Whether any draft of rows of these outlooks has been kept or not."""
        return any(self._known(one).judged for one in set(outlook))

    def state(self) -> dict[str, Any]:
        """What was counted, as plain values of JSON."""
        return {str(outlook): acceptance.state() for outlook, acceptance in self._of.items()}

    def restore(self, state: Any) -> None:
        """Go on with what another one had counted. Raises as `Acceptance.restore`."""
        for outlook, acceptance in dict(state).items():
            self._known(int(outlook)).restore(acceptance)

    def _known(self, outlook: int) -> Acceptance:
        if outlook not in self._of:
            self._of[outlook] = Acceptance(self._most, outlook)
        return self._of[outlook]
