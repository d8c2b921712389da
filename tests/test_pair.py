"""The public Python API: prompts of every kind, streams, stop strings, conversations, a look inside, bad input."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FIXTURES
from engines import fixture, full_pass, goldens, request, solo

from mlx_mtp import GREEDY, Event, Pair, RequestError, Sampling, load

EDGE = FIXTURES / "edge"
SEEDED = Sampling(0.9, top_k=30, seed=11)
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(str(EDGE / "target"), str(EDGE / "assistant_fit"), dtype="float32")


@pytest.fixture(scope="module")
def plain() -> Pair:
    return load(str(EDGE / "target"), None, dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After every test the pair has no rows and no events, and what it kept of earlier ones is forgotten."""
    yield
    for name in {"pair", "plain"} & set(request.fixturenames):
        engine, inbox = (one := request.getfixturevalue(name))._engine, one._inbox
        assert engine.idle and not engine.cache.bounds and not inbox
        engine.scheduler.prefixes.clear()


def short() -> list[int]:
    return goldens("edge")["short/ids"].tolist()


def long() -> list[int]:
    return goldens("edge")["long/ids"].tolist()


def told(events: list[Event]) -> tuple[list[int], str]:
    """All tokens and all text of events; only the last may carry a reason and statistics, and it must."""
    assert [bool(e.finish_reason) for e in events] == [False] * (len(events) - 1) + [True]
    assert [bool(e.stats) for e in events] == [False] * (len(events) - 1) + [True]
    assert len({e.request for e in events}) == 1
    return list(itertools.chain(*(e.tokens for e in events))), "".join(e.text for e in events)


# prompts ----------------------------------------------------------------------------------------------------


def test_text_messages_and_token_ids_are_the_same_prompt(pair):
    text = pair.text.render(HELLO)
    ids = pair.text.chat(HELLO)
    same = [text, HELLO, ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)]
    one = pair.generate(text, GREEDY, 3, 12)[0]
    for completion in pair.generate(same, GREEDY, 3, 12):
        assert completion.tokens == one.tokens and completion.text == one.text
    for prompt in same:
        assert told(list(pair.stream(prompt, GREEDY, 2, 12)))[0] == one.tokens
    assert one.stats.prompt_tokens == len(ids) and ids[0] == 2


def test_one_prompt_of_token_ids_is_one_prompt(pair):
    (completion,) = pair.generate(short(), GREEDY, 3, 48)
    greedy = goldens("edge")["short/greedy"].tolist()
    assert completion.tokens == greedy[: len(completion.tokens)]


def test_several_prompts_come_back_in_order_each_as_if_alone(pair):
    prompts = [long(), short(), "one two", HELLO, short()[:3], long()[:20], "x", [2], [2, 7], long()[:11]]
    for sampling, widths in ((GREEDY, (3, "auto")), (SEEDED, ("heuristic",))):
        alone = [pair.generate([p], sampling, 0, 8)[0] for p in prompts]
        for width in widths:
            together = pair.generate(prompts, sampling, width, 8)
            assert [c.tokens for c in together] == [c.tokens for c in alone]
            assert [c.text for c in together] == [c.text for c in alone]
            assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]


def test_a_pair_without_a_drafter_has_the_same_texts_at_any_width(pair, plain):
    prompts = [short(), long()]
    want = [c.tokens for c in pair.generate(prompts, GREEDY, 3, 16)]
    for width in (0, 5, "auto", "heuristic"):
        completions = plain.generate(prompts, GREEDY, width, 16)
        assert [c.tokens for c in completions] == want
        assert all(c.stats.drafted == 0 for c in completions)


def test_sampling_is_by_default_the_checkpoints_own(pair):
    assert pair.default_sampling == Sampling(1.0, top_k=64, top_p=0.95)
    texts = {tuple(pair.generate(short(), None, 3, 12)[0].tokens) for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.slow
def test_generation_goes_up_to_the_context_where_no_limit_is_given(pair):
    prompt = (short() * 500)[: pair.context_tok - 6]
    (completion,) = pair.generate(prompt, GREEDY, 3)
    assert len(completion.tokens) <= 6 and completion.finish_reason in ("length", "stop")


# streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stream_tells_the_same_as_a_completion(pair, sampling):
    (completion,) = pair.generate(short(), sampling, 3, 20)
    events = list(pair.stream(short(), sampling, 4, 20))
    assert told(events) == (completion.tokens, completion.text)
    assert events[-1].finish_reason == completion.finish_reason
    assert events[-1].stats.generated_tokens == len(completion.tokens)


def test_several_streams_run_beside_each_other_however_they_are_read(pair):
    want = [pair.generate(p, GREEDY, 0, 14)[0].tokens for p in (short(), long(), "abc")]
    streams = [pair.stream(p, GREEDY, 3, 14) for p in (short(), long(), "abc")]
    got: list[list[int]] = [[], [], []]
    for which in [0, 1, 1, 2, 0, 2, 2, 1] + [0] * 20 + [2] * 20 + [1] * 20:
        event = next(streams[which], None)
        got[which] += event.tokens if event else ()
    assert got == want


def test_closing_a_stream_frees_its_row_and_leaves_the_others_alone(pair):
    want = pair.generate(long(), GREEDY, 0, 14)[0].tokens
    first, second = pair.stream(short(), GREEDY, 3, 40), pair.stream(long(), GREEDY, 3, 14)
    begun = [next(first), next(second), next(first)]
    assert len(pair._engine.cache.bounds) == 2
    first.close()
    assert len(pair._engine.cache.bounds) == 1
    assert told([begun[1], *second])[0] == want


def test_an_error_in_the_readers_loop_frees_the_row(pair):
    def reads_and_fails():
        for _ in pair.stream(short(), GREEDY, 3, 40):
            raise KeyError("the reader's own")

    with pytest.raises(KeyError):
        reads_and_fails()


def test_a_stream_that_is_never_read_costs_nothing(pair):
    stream = pair.stream(short(), GREEDY, 3, 40)
    assert pair._engine.idle
    stream.close()


# stop strings -----------------------------------------------------------------------------------------------


def stops_in(text: str) -> list[str]:
    """Pieces of a text: within a token, across borders, its beginning and its end."""
    return [text[:3], text[5:14], text[-7:]]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stop_string_cuts_tokens_and_text_at_the_same_place_at_every_width(pair, sampling):
    whole = pair.generate(short(), sampling, 0, 24)[0]
    for stop in stops_in(whole.text):
        cut = [pair.generate(short(), sampling, width, 24, stop=[stop, "\0never"])[0] for width in (0, 3, 7)]
        assert {tuple(c.tokens) for c in cut} == {tuple(cut[0].tokens)}
        assert {c.text for c in cut} == {whole.text[: whole.text.index(stop)]}
        assert {c.finish_reason for c in cut} == {"stop"}
        assert cut[0].tokens == whole.tokens[: len(cut[0].tokens)]
        assert stop in pair.text.decode(cut[0].tokens) and stop not in pair.text.decode(cut[0].tokens[:-1])
        assert all(c.stats.generated_tokens == len(c.tokens) for c in cut)
        tokens, text = told(list(pair.stream(short(), sampling, 3, 24, stop=stop)))
        assert (tokens, text) == (cut[0].tokens, cut[0].text)


def test_a_stop_string_in_one_text_of_several_ends_only_that_one(pair):
    whole = pair.generate([short(), long()], GREEDY, 3, 20)
    stop = whole[0].text[4:12]
    assert stop not in whole[1].text
    cut = pair.generate([short(), long()], GREEDY, 3, 20, stop=[stop])
    assert cut[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert cut[1].tokens == whole[1].tokens and cut[1].text == whole[1].text


def test_text_that_might_have_become_a_stop_string_is_told_in_the_end(pair):
    whole = pair.generate(short(), GREEDY, 3, 9)[0]
    almost = whole.text[-4:] + "\0"
    assert pair.generate(short(), GREEDY, 3, 9, stop=[almost])[0].text == whole.text


def test_a_stop_string_is_found_in_a_text_that_ended_before_it_was_read(pair):
    whole = pair.generate(short(), GREEDY, 0, 20)[0]
    stop = whole.text[14:20]
    late = pair.stream(short(), GREEDY, 0, 20, stop=[stop])
    events = [next(late)]
    assert events[0].finish_reason is None
    for _ in range(30):  # others read theirs; this one's wait
        list(pair.stream(long(), GREEDY, 3, 1))
    assert pair._engine.idle
    events += late
    tokens, text = told(events)
    assert text == whole.text[: whole.text.index(stop)]
    assert events[-1].finish_reason == "stop" and events[-1].stats.generated_tokens == len(tokens)


# conversations ----------------------------------------------------------------------------------------------


def say(chat, text: str, **options) -> list[Event]:
    events = list(chat.send(text, GREEDY, max_tokens=12, **options))
    told(events)
    return events


def test_a_conversation_continues_its_cache_and_says_what_a_fresh_run_would(pair):
    chat, cached, prompts = pair.chat("be brief"), [], []
    for i, text in enumerate(("hello there", "and then?", "more of it", "the end")):
        events = say(chat, text, width=i)
        said, shown = told(events)
        prompt = list(chat._said[: len(chat._said) - len([t for t in said if t not in pair._eos])])
        fresh = pair.generate(prompt, GREEDY, 0, 12)[0]
        assert said == fresh.tokens and shown == fresh.text
        assert chat.messages[-1] == {"role": "assistant", "content": shown}
        cached.append(events[-1].stats.cached_tokens)
        prompts.append(events[-1].stats.prompt_tokens)
    assert [m["role"] for m in chat.messages] == ["system"] + ["user", "assistant"] * 4
    assert cached[0] == 0 and prompts == sorted(prompts)
    for i in range(1, 4):
        assert cached[i] >= prompts[i - 1]  # all of the turn before but its newest token


def test_a_reply_that_is_interrupted_is_kept_as_far_as_it_was_told(pair):
    chat = pair.chat()
    reply = chat.send("hello there", GREEDY, 3, 40)
    told_ = [next(reply), next(reply)]
    reply.close()
    assert chat.messages[-1]["content"] == "".join(e.text for e in told_)
    events = say(chat, "go on", width=3)
    assert events[-1].stats.cached_tokens > 0
    prompt = list(chat._said)[: events[-1].stats.prompt_tokens]
    assert told(events)[0] == pair.generate(prompt, GREEDY, 0, 12)[0].tokens


def test_a_conversation_can_begin_anew(pair):
    chat = pair.chat("be brief")
    first = told(say(chat, "hello there"))
    say(chat, "more")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    events = say(chat, "hello there")
    stats = events[-1].stats  # what was said before is known, but for the last token of the prompt
    assert told(events) == first and stats.cached_tokens == stats.prompt_tokens - 1


def test_two_conversations_do_not_meet(pair):
    one, other = pair.chat(), pair.chat()
    a = one.send("hello there", GREEDY, 3, 10)
    b = other.send("goodbye", GREEDY, 3, 10)
    mixed = [e for both in itertools.zip_longest(a, b) for e in both if e]
    for chat, text in ((one, "hello there"), (other, "goodbye")):
        alone = pair.generate([{"role": "user", "content": text}], GREEDY, 0, 10)[0]
        assert chat.messages[-1]["content"] == alone.text
    assert len({e.request for e in mixed}) == 2


def test_an_empty_message_is_refused_and_changes_nothing(pair):
    chat = pair.chat()
    with pytest.raises(RequestError, match="^the message is empty; expected some text$"):
        chat.send("  \n")
    assert chat.messages == []


# what is kept of earlier prompts ------------------------------------------------------------------------------


def test_whatever_begins_like_an_earlier_prompt_or_reply_costs_only_the_rest(pair):
    (first,) = pair.generate(short(), GREEDY, 3, 12)
    prompt = [*short(), *first.tokens, 9, 8, 7]
    cached = []
    for ids in (short(), prompt, [*short()[:-2], 5, 6, 7]):
        events = list(pair.stream(ids, GREEDY, 2, 5))
        tokens, _ = told(events)
        cached.append(len(ids) - events[-1].stats.cached_tokens)
        assert tokens == alone(ids, 5)
    assert cached == [1, 4, 3]  # the newest token of a reply has not been computed


def alone(ids: list[int], count: int) -> list[int]:
    """The greedy text of a prompt in an engine that knows nothing else."""
    return solo(fixture("edge"), request(ids, count))


def test_a_budget_for_prefixes_is_half_of_the_memory_for_keys_and_values_or_what_is_asked_for(pair):
    limits = pair._engine.scheduler.limits
    assert limits.prefix_bytes == limits.kv_bytes // 2 > 2**26
    none = load(str(EDGE / "target"), None, dtype="float32", prefix_bytes=0)
    for _ in range(2):
        assert none.generate(short(), GREEDY, 0, 3)[0].stats.cached_tokens == 0
    assert load(str(EDGE / "target"), None, prefix_bytes=12345)._engine.scheduler.limits.prefix_bytes == 12345


# looking inside ---------------------------------------------------------------------------------------------


def test_logits_are_those_of_a_full_pass_with_or_without_a_batch_axis(pair):
    ids = short()
    want = full_pass(fixture("edge"), ids)
    one, many = pair.logits(ids), pair.logits([ids, ids[::-1]])
    assert one.shape == (1, len(ids), 768) and many.shape == (2, len(ids), 768)
    assert one.dtype == mx.float32
    np.testing.assert_allclose(np.array(one[0]), np.array(want), atol=1e-4)
    np.testing.assert_allclose(np.array(many[0]), np.array(want), atol=1e-4)


@pytest.mark.parametrize("width", [1, 4])
def test_drafts_are_the_references(pair, width):
    g = goldens("edge")
    tokens, logits = pair.draft(short(), width)
    assert tokens.shape == (1, width) and logits.shape == (1, width, 768)
    assert tokens.dtype == mx.int32 and logits.dtype == mx.float32
    assert tokens[0].tolist() == g["short/fit/n_wp1/draft_tokens"][:width].tolist()
    assert mx.argmax(logits[0], axis=-1).tolist() == tokens[0].tolist()
    np.testing.assert_allclose(np.array(logits[0, 0]), g["short/fit/n_wp1/draft_logits"][0], atol=1e-3)
    both, _ = pair.draft([short(), short()[::-1]], width)
    assert both.shape == (2, width) and both[0].tolist() == tokens[0].tolist()


def test_a_look_inside_does_not_disturb_a_running_stream(pair):
    want = pair.generate(short(), GREEDY, 0, 12)[0].tokens
    stream = pair.stream(short(), GREEDY, 3, 12)
    events = [next(stream)]
    pair.logits(long()), pair.draft(long(), 3)
    assert told([*events, *stream])[0] == want


def test_a_pair_tells_what_it_is(pair, plain):
    assert pair.target_name == str(EDGE / "target") and pair.drafter_name == str(EDGE / "assistant_fit")
    assert plain.drafter_name is None and pair.context_tok > 100


# bad input --------------------------------------------------------------------------------------------------

RAGGED = [[5, 6], [7]]
BAD_PROMPTS = {
    "empty text": ("", "the prompt is empty; expected at least one character"),
    "no tokens": ((), "expected at least one"),
    "none at all": ([], "no prompt given; expected at least one"),
    "one of several empty": ([[5], []], "the prompt is empty; expected at least one token"),
    "negative id": ([5, -1], "token id -1 is out of range; the vocabulary has 768 tokens, 0 to 767"),
    "id too large": ([5, 768], "token id 768 is out of range"),
    "huge id": ([5, 2**40], "token id 1099511627776 is out of range"),
    "fractions": ([1.0, 2.0], "neither text, token ids nor messages"),
    "booleans": ([True, False], "neither text, token ids nor messages"),
    "a number": (5, "neither text, token ids nor messages"),
    "nothing": (None, "neither text, token ids nor messages"),
    "nested too deep": ([[[5]]], "neither text, token ids nor messages"),
    "no role": ([{"content": "x"}], "role"),
    "unknown role": ([{"role": "judge", "content": "x"}], "judge"),
    "lone surrogate": ("\ud800", "not valid Unicode"),
    "too long": ([5] * 5000, "tokens; the model's context is"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_used_is_refused_in_one_line(pair, case):
    prompt, said = BAD_PROMPTS[case]
    with pytest.raises(RequestError) as error:
        pair.generate(prompt, GREEDY, 0, 4)
    assert said in str(error.value) and "\n" not in str(error.value)


BAD_OPTIONS = {
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; expected an integer of at least 1"),
    "negative tokens": ({"max_tokens": -3}, "max_tokens is -3"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    "true tokens": ({"max_tokens": True}, "max_tokens is True"),
    "more than the context": ({"max_tokens": 10**9}, "the model's context is"),
    "negative width": ({"width": -1}, "width is -1; expected 0 to 15, 'auto' or 'heuristic'"),
    "width too large": ({"width": 16}, "width is 16"),
    "no width": ({"width": None}, "width is None"),
    "true width": ({"width": True}, "width is True"),
    "width of fractions": ({"width": 1.0}, "width is 1.0"),
    "unknown width": ({"width": "wide"}, "width is 'wide'"),
    "empty stop": ({"stop": [""]}, "stop is ''"),
    "stop of bytes": ({"stop": [b"x"]}, "stop is b'x'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_cannot_be_honoured_is_refused_in_one_line(pair, case):
    options, said = BAD_OPTIONS[case]
    pair.generate([5], GREEDY, 1, 1)  # a width of 1 is known by now
    for call in (pair.generate, pair.stream):
        with pytest.raises(RequestError) as error:
            call([5, 6], GREEDY, **({"width": 0, "max_tokens": 3} | options))
        assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tokens, said",
    [([], "empty"), (RAGGED, "length"), ([[[5]]], "neither"), ([0.5], "neither"), ([768], "out of range")],
    ids=["empty", "ragged", "deep", "fractions", "large"],
)
def test_tokens_that_cannot_be_looked_at_are_refused(pair, tokens, said):
    for look in (pair.logits, lambda t: pair.draft(t, 2)):
        with pytest.raises(RequestError, match=said):
            look(tokens)


def test_draft_widths_that_make_no_sense_and_pairs_without_a_drafter_are_refused(pair, plain):
    for width in (0, -1, 16, 1.5, "auto"):
        with pytest.raises(RequestError, match="expected 1 to 15"):
            pair.draft(short(), width)
    with pytest.raises(RequestError, match="no drafter"):
        plain.draft(short(), 2)


def test_nothing_runs_where_one_of_several_prompts_is_bad(pair):
    before = pair._engine.host_reads
    with pytest.raises(RequestError):
        pair.generate([short(), [5, -1]], GREEDY, 3, 5)
    assert pair._engine.host_reads == before


def test_an_unknown_dtype_is_refused_before_anything_is_read():
    with pytest.raises(RequestError, match="dtype is 'int8'; expected float32, bfloat16, float16"):
        load("no/such", dtype="int8")


@pytest.mark.parametrize(("drafter", "doubted"), [("assistant", True), ("assistant_fit", False)])
def test_a_drafter_whose_drafts_are_not_kept_is_doubted_with_the_figure(drafter, doubted):
    pair = load(str(EDGE / "target"), str(EDGE / drafter))
    assert pair.doubt is None
    ids = goldens("edge")["short/ids"].tolist()
    done = pair.generate([ids], GREEDY, width=2, max_tokens=40)[0].stats
    assert (pair.doubt is not None) == doubted
    if doubted:
        assert f"({done.kept_at[0]} of" in pair.doubt and str(EDGE / drafter) in pair.doubt


def test_a_model_may_draft_for_itself_and_the_user_hears_that_it_is_as_large():
    pair = load(str(EDGE / "target"), str(EDGE / "target"))
    assert len(pair.warnings) == 1 and "name a smaller drafter" in pair.warnings[0]
    stats = pair.generate([[3, 4, 5]], GREEDY, width=3, max_tokens=17)[0].stats
    assert stats.kept == stats.drafted == 12


def test_lookup_needs_no_checkpoint_and_goes_over_any():
    plain = load(str(EDGE / "target"), None)
    for name in ("lookup", "none+lookup", f"{EDGE / 'assistant_fit'}+lookup"):
        pair = load(str(EDGE / "target"), name)
        assert pair.drafter_name == name.removeprefix("none+") and pair.warnings == ()
        texts = [p.generate([[3, 4, 5] * 4], GREEDY, 3, max_tokens=12)[0].tokens for p in (pair, plain)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("value", [-1, 1.5, True, "1 GB"])
def test_an_impossible_prefix_budget_is_refused_before_anything_is_read(value):
    with pytest.raises(RequestError, match="^prefix_bytes is .*; expected a number of bytes, 0 to keep nothing$"):
        load("no/such", prefix_bytes=value)
