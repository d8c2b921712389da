"""Prompt lookup: the longest match, its continuation, and what drafts where there is none."""

import random

import mlx.core as mx
import numpy as np
import pytest
from engines import Listed, engine_of, fixture, request, run

import mlx_mtp
from mlx_mtp.draft_length import DraftRound, GoodputPolicy
from mlx_mtp.drafters import lookup
from mlx_mtp.drafters.lookup import LONGEST, LookupDraft, PromptLookup, certain, longest_match
from mlx_mtp.rows import GREEDY, Candidates, Draft, Sampling


def slow_match(text: list[int]) -> tuple[int, int]:
    """What `longest_match` finds, by looking at every place."""
    newest, best = len(text) - 1, (0, 0)
    for end in range(newest):
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[newest - length]:
            length += 1
        if length and length >= best[0]:
            best = (length, end)
    return best


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8])
def test_the_longest_match_is_found_and_of_equals_the_latest(vocabulary):
    rng = random.Random(vocabulary)
    for _ in range(100):
        text = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 60))]
        assert longest_match(np.array(text, np.int32)) == slow_match(text)


def told(text: list[int], least: int = 3, prompt: int = 1) -> PromptLookup:
    """A text that came token by token after its prompt."""
    found = PromptLookup(text[:prompt], len(text), least)
    for token in text[prompt:]:
        found.extend([token])
    return found


@pytest.mark.parametrize("least", [1, 3, LONGEST])
def test_a_text_is_matched_if_so_many_of_its_last_tokens_stand_before(least):
    rng = random.Random(least)
    for _ in range(20):
        text = [rng.randrange(2) for _ in range(90)]
        found = PromptLookup(text[:40], 50, least)
        for end in range(40, len(text)):
            found.extend([text[end]])
            assert found.matched == (slow_match(text[: end + 1])[0] >= least)


def test_the_draft_is_what_followed_the_match():
    assert told([5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7]).draft(4).tolist() == [8, 9, 10, 11]


def test_a_draft_that_reaches_the_end_goes_around():
    assert told([9, 1, 2, 3, 1, 2, 3]).draft(8).tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_text_without_repetition_has_no_draft():
    assert told([5, 6, 7]).draft(2).tolist() == [-1, -1]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_long_match_goes_on_where_it_stands(count):
    once = [*range(100, 140)]
    text = [*once, 7, *once[:LONGEST]]
    found = PromptLookup(text, 60, 3)
    for at in range(LONGEST, 32, count):
        assert found.draft(4).tolist() == once[at : at + 4]
        found.extend(once[at : at + count])
    found.extend([3])
    assert not found.matched


@pytest.mark.parametrize("place", [-1, 1])
def test_a_match_that_is_off_by_one_is_caught(place, monkeypatch):
    def shifted(tokens: np.ndarray) -> tuple[int, int]:
        length, end = longest_match(tokens)
        return length, end + place

    monkeypatch.setattr(lookup, "longest_match", shifted)
    for test in (test_the_draft_is_what_followed_the_match, test_a_draft_that_reaches_the_end_goes_around):
        with pytest.raises(AssertionError):
            test()


# in a round -------------------------------------------------------------------------------------------------

REPEATS, ENDS_ALIKE, AGAIN = [1, 2, 3, 4, 1, 2, 3], [1, 2, 3, 4, 5, 6, 3], [7, 8, 9, 1, 7, 8, 9]


def test_rows_that_repeat_are_copied_for_and_others_are_left_to_the_drafter():
    draft = LookupDraft([told(REPEATS), told(ENDS_ALIKE), told(AGAIN)], 5)
    made = draft.over(Draft(mx.full((3, 2), 40, mx.int32)))  # a drafter may draft less than it was asked for
    draft.fill()
    assert made.tokens.tolist() == [[4, 1], [40, 40], [1, 7]]


def test_without_a_drafter_a_row_copies_from_any_match():
    draft = LookupDraft([told(REPEATS), told(ENDS_ALIKE), told([1, 2])], 3)
    made = draft.over(Draft(mx.zeros((3, 0), mx.int32)))
    draft.fill()
    assert made.tokens.tolist() == [[4, 1, 2], [4, 5, 6], [0, 0, 0]]


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


# in the engine ----------------------------------------------------------------------------------------------


def rounds(prompt: list[int], text: list[int], width: int) -> int:
    """How many rounds a text takes if every draft is made from all that was said before it."""
    said, count = [*prompt, text[0]], 0
    while len(said) < len(prompt) + len(text):
        rest = text[len(said) - len(prompt) :]
        draft = told(said, prompt=len(prompt)).draft(width).tolist()
        right = next((i for i, (a, b) in enumerate(zip(draft, rest, strict=False)) if a != b), width)
        said += rest[: right + 1]
        count += 1
    return count


@pytest.mark.parametrize("width", [1, 4])
def test_a_draft_is_made_from_all_that_was_said_until_its_round_is_sent(width):
    """Also where other rows end meanwhile, whose prefixes are computed through the next round."""
    pair = mlx_mtp.load("tiny", "lookup")
    code = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"
    prompts = [pair.text.encode(code), pair.text.encode(2 * code), pair.text.encode("class Stack:\n")]
    for prompt, done in zip(prompts, pair.generate(prompts, GREEDY, width, max_tokens=60), strict=True):
        assert done.stats.rounds == rounds(prompt, done.tokens, width) < 59


def test_what_rows_that_match_accept_is_learned_for_itself():
    """A row alternates between stretches that repeat and those that do not; the policy sees which, a round late."""
    policy, drafted = GoodputPolicy(), {True: [], False: []}
    for n in range(600):
        matched = n // 50 % 2 == 1
        k = policy.choose([matched])
        drafted[matched].append(k)
        policy.record(DraftRound(k, [k if matched else 0], [matched], 1 + 0.3 * k))
    assert sum(drafted[False][50:]) < 20 and min(drafted[True][-20:]) >= 4


def test_mixed_settings_beside_each_other_are_drafted_for(shape="edge"):
    models = fixture(shape)
    wanted = [request((5, 6, 7, 8) * 4, 12, s) for s in (GREEDY, Sampling(seed=1), Sampling())]
    outcomes = run(engine_of(models, "fit+lookup", Listed([3, 0, 5])), wanted)
    assert all(o.stats.generated_tokens == 12 and o.stats.drafted for o in outcomes)
