"""Prompt lookup: the longest match, its continuation, and what drafts where there is none."""

import random

import mlx.core as mx
import numpy as np
import pytest
from engines import Listed, engine_of, fixture, request, run, smallest

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, DraftRound, GoodputPolicy
from mlx_mtp.drafters import Drafter, lookup
from mlx_mtp.drafters.lookup import LONGEST, SURE, LookupDrafter, NgramIndex, certain, longest_match
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.drafters.texts import Texts
from mlx_mtp.rows import GREEDY, Candidates, Draft, Forward, Sampling
from mlx_mtp.sampling import RowSampler, Sampler

SAMPLER = Sampler([RowSampler.of(GREEDY)])


def slow_match(text: list[int]) -> list[int]:
    """What `longest_match` finds, by looking at every place."""
    newest, best = len(text) - 1, (0, 0)
    for end in range(newest):
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[newest - length]:
            length += 1
        if length and length >= best[0]:
            best = (length, end)
    return list(best)


@pytest.mark.parametrize("vocabulary", [2, 3, 8])
def test_the_longest_match_is_found_and_of_equals_the_latest(vocabulary):
    rng = random.Random(vocabulary)
    for _ in range(40):
        texts = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 60))] for _ in range(3)]
        behind = [text + [rng.randrange(vocabulary) for _ in range(64 - len(text))] for text in texts]
        found = longest_match(mx.array(behind, mx.int32), mx.array([len(t) - 1 for t in texts], mx.int32))
        assert found.tolist() == [slow_match(text) for text in texts]


class Said:
    """A lookup drafter that has been told texts as an engine would tell them: chunks, then rounds."""

    def __init__(self, rows: int, under: Drafter | None = None, gate: int | None = None) -> None:
        self.cache = Cache(smallest().target.specs, MAX_WIDTH, mx.float32)
        self.drafter = LookupDrafter(under or PlainDrafter(), self.cache, gate)
        for row in range(rows):
            self.cache.join(1)
            self.drafter.begin(row, 0, None)

    def hear(self, row: int, tokens: list[int], kept: int | None = None, drafted: int = 0) -> None:
        """A pass over all tokens but the last, which is the newest."""
        rows, columns = slice(row, row + 1), len(tokens) - 1
        keep = mx.array([columns if kept is None else kept], mx.int32)
        self.cache.commit(rows, keep, columns)
        newest = mx.array(tokens[-1:], mx.int32)
        hidden = mx.zeros((1, 1, 1))
        ids = mx.array([tokens[:-1]], mx.int32)
        self.drafter.observe(Forward(rows, ids, hidden, {}, drafted, None, newest), keep)

    def draft(self, row: int, width: int) -> list[int]:
        draft = self.drafter.propose(slice(row, row + 1), mx.zeros((1,), mx.int32), SAMPLER, width)
        assert draft.source is None
        return draft.tokens.tolist()[0]


def test_the_draft_is_what_followed_the_match():
    said = Said(1)
    said.hear(0, [5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7])
    assert said.draft(0, 4) == [8, 9, 10, 11]


def test_a_draft_that_reaches_the_end_goes_around():
    said = Said(1)
    said.hear(0, [9, 1, 2, 3, 1, 2, 3])
    assert said.draft(0, 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_rejected_columns_are_not_part_of_the_text():
    said = Said(1)
    said.hear(0, [5, 6, 7, 30, 31, 32, 33, 1, 5, 6, 7])
    said.hear(0, [7, 30, 31, 9, 9, 40], kept=3, drafted=4)  # 30 and 31 are kept, and 40 follows; 9 and 9 never were
    said.hear(0, [40, 7, 30, 31], kept=3)
    assert said.draft(0, 3) == [40, 7, 30]


@pytest.mark.parametrize("place", [-1, 1])
def test_a_match_that_is_off_by_one_is_caught(place, monkeypatch):
    def shifted(tokens: mx.array, length: mx.array) -> mx.array:
        return longest_match(tokens, length) + mx.array([0, place])

    monkeypatch.setattr(lookup, "longest_match", shifted)
    for test in (test_the_draft_is_what_followed_the_match, test_a_draft_that_reaches_the_end_goes_around):
        with pytest.raises(AssertionError):
            test()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_text_that_is_off_by_one_behind_a_rejection_is_caught(more, monkeypatch):
    observe = Texts.observe

    def shifted(self: Texts, fwd: Forward, kept: mx.array) -> object:
        return observe(self, fwd, kept + (more if fwd.drafted else 0))

    monkeypatch.setattr(Texts, "observe", shifted)
    with pytest.raises(AssertionError):
        test_rejected_columns_are_not_part_of_the_text()


@pytest.mark.parametrize("n", [1, 3, 4, SURE])
def test_the_index_finds_what_a_slow_search_finds_after_every_token(n):
    rng = random.Random(n)
    for _ in range(20):
        text = [rng.randrange(2) for _ in range(90)]
        index = NgramIndex(text[:40], n)
        for end in range(40, len(text)):
            assert index.extend(text[end : end + 1]) == (slow_match(text[: end + 1])[0] >= n)


@pytest.mark.parametrize("n", [1, 3, 4, SURE])
def test_the_index_does_not_depend_on_how_the_text_comes(n):
    rng = random.Random(n)
    for _ in range(50):
        text = [rng.randrange(3) for _ in range(30)]
        found = set()
        for prompt in (1, 2, n, 20):
            index = NgramIndex(text[:prompt], n)
            found.add((index.extend(text[prompt:25]), index.extend(text[25:])))
        assert len(found) == 1


def test_rows_move_and_return_with_what_they_said():
    said = Said(2)
    said.hear(0, [1, 2, 3, 4])
    said.hear(1, [20, 21, 22, 23, 24, 20, 21, 22])
    kept = said.drafter.snapshot(1, 7)
    said.drafter.leave(0, 1)
    said.cache.leave(0)
    assert said.draft(0, 2) == [23, 24]
    said.cache.join(1)
    said.cache.lengths = mx.array([7, 7], mx.int32)
    said.drafter.begin(1, 7, kept)
    said.hear(1, [22, 23])
    assert said.draft(1, 3) == [24, 20, 21]


def test_what_was_built_and_not_run_is_forgotten():
    said = Said(1)
    said.hear(0, [5, 6, 7, 8, 9, 5, 6, 7])
    cache, state = said.cache.state(), said.drafter.state()
    said.hear(0, [7, 1, 1, 1])
    said.cache.restore(cache)
    said.drafter.restore(state)
    assert said.draft(0, 2) == [8, 9]


# over another drafter ---------------------------------------------------------------------------------------


def test_the_source_of_a_copied_draft_is_certain_of_it_and_of_others_as_it_was():
    logits = mx.random.normal((2, 2, 4), key=mx.random.key(1))
    tokens, rows = mx.array([[7, 3], [7, 3]], mx.int32), mx.array([[True], [False]])
    ids = mx.broadcast_to(mx.array([1, 3, 5, 6], mx.int32), (2, 2, 4))
    for which in (ids, None):
        drafted = tokens if which is not None else mx.minimum(tokens, 3)
        source = certain(Candidates(logits, which), drafted, rows)
        share = np.array(mx.softmax(source.logits, axis=-1))
        columns = np.array(source.ids) if source.ids is not None else np.broadcast_to(np.arange(4), (2, 2, 4))
        for place in range(2):
            here = columns[0, place] == drafted[0, place].item()
            assert here.sum() == 1 and share[0, place][here] == 1
        assert mx.array_equal(source.logits[1], logits[1])
        assert source.ids is None or mx.array_equal(source.ids[1], ids[1])


class Fixed(PlainDrafter):
    """Drafts one token, again and again."""

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        return Draft(mx.full((bonus.shape[0], width), 40, mx.int32))


def test_rows_that_repeat_are_copied_for_and_others_are_left_to_the_drafter_below():
    said = Said(3, under=Fixed(), gate=3)
    for row, text in enumerate(([1, 2, 3, 4, 1, 2, 3], [1, 2, 3, 4, 5, 6, 3], [7, 8, 9, 1, 7, 8, 9])):
        said.hear(row, text)
    draft = said.drafter.propose(slice(0, 3), mx.zeros((3,), mx.int32), SAMPLER, 2)
    assert draft.tokens.tolist() == [[4, 1], [40, 40], [1, 7]]


def test_what_rows_that_match_accept_is_learned_for_itself():
    """A row alternates between stretches that repeat and those that do not; the policy sees which, a round late."""
    policy, drafted = GoodputPolicy(), {True: [], False: []}
    for n in range(600):
        matched = n // 50 % 2 == 1
        k = policy.choose([matched])
        drafted[matched].append(k)
        policy.record(DraftRound(k, [k if matched else 0], [matched], 1 + 0.3 * k))
    assert sum(drafted[False][50:]) < 10 and min(drafted[True][-20:]) >= 4


def test_mixed_settings_beside_each_other_are_drafted_for(shape="edge"):
    models = fixture(shape)
    wanted = [request((5, 6, 7, 8) * 4, 12, s) for s in (GREEDY, Sampling(seed=1), Sampling())]
    outcomes = run(engine_of(models, "fit+lookup", Listed([3, 0, 5])), wanted)
    assert all(o.stats.generated_tokens == 12 and o.stats.drafted for o in outcomes)
