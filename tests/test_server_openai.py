"""The openai package and `llm` against the server with the embedded pair."""

import asyncio
import json
import math
import os
import subprocess
import sys

import openai
import pytest
from servers import TINY, Live, running, until

PROMPT = "def read(path):\n"
HELLO = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def live():
    with running(TINY, max_num_seqs=4) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def the_engine_is_empty_afterwards(live: Live):
    yield
    assert live.settled()


def ask(client: openai.OpenAI, **fields):
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 0, **fields}
    return client.chat.completions.create(**fields)


def test_a_chat_body_has_text_usage_and_a_finish_reason(client):
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16
    assert answer.model == "tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_a_stream_equals_the_body(client):
    whole = ask(client)
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices


def test_the_packages_streaming_helper_accumulates_the_answer(client):
    text = ask(client).choices[0].message.content
    fields = {"max_tokens": 16, "temperature": 0, "stop": text[20:24]}  # ended by length, the helper raises
    with client.chat.completions.stream(model="tiny", messages=HELLO, **fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion().choices[0].message.content
    assert whole == "".join(deltas) == text[:20]


def test_log_probabilities_match_the_tokens_of_the_output(client):
    choice = ask(client, logprobs=True, top_logprobs=5).choices[0]
    content = choice.logprobs.content
    assert len(content) == 16
    assert b"".join(bytes(t.bytes) for t in content).decode() == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 5 and token.logprob <= 0
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1.0001
        assert token.token == token.top_logprobs[0].token and token.logprob == values[0]  # greedy
    plain = ask(client, logprobs=True).choices[0]
    assert [t.logprob for t in plain.logprobs.content] == [t.logprob for t in content]
    assert all(t.top_logprobs == [] for t in plain.logprobs.content)


def test_streams_have_the_same_log_probabilities(client):
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0]
    streamed = []
    for piece in ask(client, logprobs=True, top_logprobs=2, stream=True):
        if piece.choices[0].logprobs:
            streamed += piece.choices[0].logprobs.content
    assert [t.token for t in streamed] == [t.token for t in whole.logprobs.content]
    assert all(
        a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in zip(streamed, whole.logprobs.content, strict=True)
    )


def test_completions_have_log_probabilities_in_their_form(client):
    choice = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3).choices[0]
    got = choice.logprobs
    assert "".join(got.tokens) == choice.text and len(got.token_logprobs) == len(got.top_logprobs) == 8
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(8)]
    for token, logprob, top in zip(got.tokens, got.token_logprobs, got.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) and len(top) == 3
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2).choices[0].logprobs is None


def test_an_output_ends_before_a_stop_string_inside_a_token(client):
    text = ask(client, max_tokens=16).choices[0].message.content
    for cut in (3, 8, 13):
        stop = text[cut : cut + 4]
        answer = ask(client, max_tokens=16, stop=[stop, "never written"]).choices[0]
        assert answer.message.content == text[: text.index(stop)] and answer.finish_reason == "stop"
    streamed = ask(client, max_tokens=16, stop=stop, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in streamed) == text[: text.index(stop)]


def test_a_seed_repeats_an_output(client):
    def text(**fields):
        return ask(client, temperature=1.0, max_tokens=12, **fields).choices[0].message.content

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text(seed=-1) == text(seed=-1)
    assert len({text() for _ in range(3)}) > 1


def test_choices_differ_and_the_first_equals_n_1(client):
    answer = ask(client, n=3, temperature=1.0, seed=5, max_tokens=12)
    texts = [c.message.content for c in answer.choices]
    assert [c.index for c in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == ask(client, temperature=1.0, seed=5, max_tokens=12).choices[0].message.content
    assert texts[1] == ask(client, temperature=1.0, seed=6, max_tokens=12).choices[0].message.content
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == ask(client, max_tokens=1).usage.prompt_tokens


def test_choices_stream_at_the_same_time(client):
    want = [c.message.content for c in ask(client, n=2, temperature=1.0, seed=5, max_tokens=12).choices]
    got, reasons = ["", ""], [None, None]
    for piece in ask(client, n=2, temperature=1.0, seed=5, max_tokens=12, stream=True):
        for choice in piece.choices:
            got[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert got == want and reasons == ["length", "length"]


def test_a_completion_takes_strings_or_token_ids_one_or_several(client, live):
    ids = live.pair.text.encode(PROMPT)
    texts = {}
    for name, prompt in {"text": PROMPT, "texts": [PROMPT, "abc"], "ids": ids, "lists": [ids, ids[:3]]}.items():
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        texts[name] = [c.text for c in answer.choices]
        assert [c.index for c in answer.choices] == list(range(len(texts[name])))
    assert [len(texts[name]) for name in ("text", "texts", "ids", "lists")] == [1, 2, 1, 2]
    assert len({t[0] for t in texts.values()}) == 1


def test_penalties_and_bias_change_the_output(client, live):
    plain = ask(client, max_tokens=12).choices[0].message.content
    word = live.pair.text.encode(plain[:3])[-1]
    forced = ask(client, max_tokens=5, logit_bias={str(word): 100}).choices[0].message.content
    banned = ask(client, max_tokens=12, logit_bias={str(word): -100}).choices[0].message.content
    assert forced == 5 * live.pair.text.decode([word]) and not banned.startswith(plain[:3])
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 1.5}}):
        assert ask(client, max_tokens=12, **fields).choices[0].message.content != plain
    same = {"extra_body": {"repetition_penalty": 1.0, "min_p": 0.0, "top_k": 0}}
    assert ask(client, max_tokens=12, presence_penalty=0, **same).choices[0].message.content == plain


def test_errors_arrive_as_the_packages_exceptions(client):
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, max_tokens=0)
    assert bad.value.param == "max_tokens" and "greater than or equal to 1" in str(bad.value)
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, messages=[{"role": "user", "content": "x" * 20000}])
    assert bad.value.code == "context_length_exceeded" and "4096" in bad.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="gpt-4")
    assert unknown.value.code == "model_not_found" and "'tiny'" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, extra_body={"guided_regex": "a+"})
    assert "guided_regex" in bad.value.message


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_closing_a_stream_ends_its_output(client, live):
    stream = ask(client, max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
    seen = 0
    for piece in stream:
        seen += bool(piece.choices[0].delta.content)
        if seen == 3:
            break
    assert live.engine_thread.open == 1
    stream.close()
    until(lambda: live.engine_thread.open == 0)


def test_cancelling_a_task_ends_its_output(live):
    async def cancel():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            fields = {"model": "tiny", "messages": HELLO, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
            task = asyncio.create_task(client.chat.completions.create(**fields))
            while not live.engine_thread.running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    until(lambda: live.engine_thread.open == 0)


@pytest.mark.parametrize("more", [[], pytest.param(["--no-stream"], marks=pytest.mark.slow)])
def test_llm_talks_to_the_server(live, client, tmp_path, more):
    entry = {"model_id": "served", "model_name": "tiny", "api_base": f"{live.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    want = ask(client, max_tokens=10).choices[0].message.content
    command = [sys.executable, "-W", "ignore", "-m", "llm", "-m", "served", "-o", "max_tokens", "10"]
    command += ["-o", "temperature", "0", "import os", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == want.strip()
