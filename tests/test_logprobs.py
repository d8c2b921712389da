"""Log-probabilities: packed beside the tokens, and those of a plain pass whatever was drafted, sampled or steered."""

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    Job,
    assert_true_logprobs,
    engine_of,
    fixture,
    goldens,
    logprobs_of,
    prompts,
    request,
    run,
    smallest,
    texts,
)

from mlx_mtp import GREEDY, RequestError, Sampling, load
from mlx_mtp.logprobs import pack, unpack
from mlx_mtp.rows import Request
from mlx_mtp.scheduler import Limits

STEERED = Sampling(0.0, repetition_penalty=1.5, logit_bias=((5, 2.0),))
SEEDED = Sampling(0.8, top_k=5, seed=3, frequency_penalty=0.8)
ASKED = ((GREEDY, 3), (SEEDED, 0), (Sampling(), 20), (STEERED, 1), (GREEDY, None))


def asking(prompt, tokens: int, sampling: Sampling, logprobs: int | None, eos=()) -> Request:
    return Request(tuple(int(t) for t in prompt), tokens, sampling, frozenset(eos), logprobs=logprobs)


# packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 4, 9])
def test_what_is_packed_is_unpacked(most):
    logits = mx.random.normal((2, 3, 9), key=mx.random.key(1)) * 4
    tokens = mx.array([[3, 0, 8], [1, 1, 2]])
    true = np.array(logits, np.float64)
    true -= np.log(np.exp(true).sum(-1, keepdims=True))
    packed = pack(logits, tokens, most)
    assert packed.dtype == mx.int32 and packed.shape == (2, 3, 1 + 2 * most)
    for b, row in enumerate(np.array(packed)):
        for wanted in range(most + 1):
            for j, one in enumerate(unpack(row, tokens[b].tolist(), wanted)):
                assert one.token == tokens[b, j].item()
                assert one.logprob == pytest.approx(true[b, j, one.token], abs=1e-5)
                assert [i for i, _ in one.top] == np.argsort(-true[b, j])[:wanted].tolist()
                assert [v for _, v in one.top] == pytest.approx(np.sort(true[b, j])[::-1][:wanted].tolist(), abs=1e-5)


@pytest.mark.parametrize("most", [1, 5])
def test_a_greedy_choice_that_ties_with_others_is_the_first_of_the_best(most):
    logits = mx.zeros((1, 1, 30))
    (one,) = unpack(np.array(pack(logits, mx.array([[0]]), most)[0]), [0], most)
    assert len(one.top) == most and one.top[0] == (0, one.logprob)


def test_tokens_that_did_not_come_have_none():
    packed = np.array(pack(mx.zeros((1, 4, 5)), mx.zeros((1, 4), mx.int32), 2)[0])
    assert len(unpack(packed, [0, 0], 2)) == 2 and unpack(packed, [], 2) == ()


# engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, width", [("plain", 0), ("near", 1), ("self", 3), ("near", 7)])
def test_every_row_has_the_log_probabilities_it_asked_for_at_any_width_and_no_others(kind, width):
    models = smallest()
    drawn = prompts(models, (4, 19, 7, 26, 11), seed=6)
    wanted = [asking(p, 12, s, n) for p, (s, n) in zip(drawn, ASKED, strict=True)]
    jobs = [Job(r, at) for r, at in zip(wanted, (0, 0, 2, 4, 5), strict=True)]
    outcomes = run(engine_of(models, kind, width, Limits(alone_tok=9, chunk_tok=9, first_chunk_tok=6)), jobs)
    assert not logprobs_of(outcomes[-1])
    for one, outcome in zip(wanted[:-1], outcomes, strict=False):
        assert_true_logprobs(models, one, outcome)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_asking_changes_no_token(sampling):
    models, ids = fixture("edge"), goldens("edge")["short/ids"]
    silent, told = (run(engine_of(models, "fit", 3), [asking(ids, 10, sampling, n)])[0] for n in (None, 2))
    assert texts([silent]) == texts([told])
    assert_true_logprobs(models, asking(ids, 10, sampling, 2), told)


@pytest.mark.parametrize("width", [0, 4])
def test_a_text_that_is_cut_has_log_probabilities_for_what_is_left(width):
    models = smallest()
    (plain,) = run(engine_of(models, "self", width), [request((5, 6, 7), 12)])
    for wanted in (
        asking((5, 6, 7), 12, GREEDY, 2, eos=[plain.tokens[5]]),
        asking((5, 6, 7), 7, GREEDY, 2),
        asking((5, 6, 7), 1, GREEDY, 2),
    ):
        (outcome,) = run(engine_of(models, "self", width), [wanted])
        assert len(outcome.tokens) < 12
        assert_true_logprobs(models, wanted, outcome)


def test_a_vocabulary_smaller_than_what_is_asked_for_is_given_whole():
    models = smallest(vocab=16)
    (outcome,) = run(engine_of(models, "near", 2), [asking((5, 6), 5, GREEDY, 20)])
    assert {len(one.top) for one in logprobs_of(outcome)} == {16}


# the public API ---------------------------------------------------------------------------------------------


def test_a_pair_gives_log_probabilities_with_every_token_and_cuts_them_with_the_text():
    pair = load("tiny")
    code = "def read_lines(path):\n"
    (done,) = pair.generate(code, GREEDY, 3, 16, logprobs=2)
    ids = pair.text.encode(code)
    logits = np.array(pair.logits([*ids, *done.tokens])[0, len(ids) - 1 : -1], np.float64)
    true = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [one.token for one in done.logprobs] == done.tokens
    for one, row in zip(done.logprobs, true, strict=True):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-4)
        assert one.top[0] == (one.token, one.logprob) and len(one.top) == 2
    stop = done.text[8:11]
    events = list(pair.stream(code, GREEDY, 3, 16, (stop,), 0))
    assert events[-1].finish_reason == "stop"
    assert all([one.token for one in event.logprobs] == list(event.tokens) for event in events)
    assert pair.generate(code, GREEDY, 3, 4)[0].logprobs == ()


@pytest.mark.parametrize("count", [-1, 21, True, "2", 1.0])
def test_a_number_that_cannot_be_honoured_is_refused(count):
    with pytest.raises(RequestError, match="^logprobs is "):
        asking((5, 6), 3, GREEDY, count)
