"""What goes over the wire: streams, bodies of every kind, inputs that break other servers."""

import json
import socket
import threading
from dataclasses import replace

import pytest
from servers import EDGE, Live, chunks, running, until

from mlx_mtp.rows import Stats
from mlx_mtp.server.asking import GenerationRequest
from mlx_mtp.server.decoding import OutputDecoder
from mlx_mtp.server.nouns import StreamChunk, Usage
from mlx_mtp.server.openai import ChatWriter
from mlx_mtp.server.openai_form import ChatForm
from mlx_mtp.server.respond import CompletionText

LONG = list(range(3, 700)) * 4  # token ids; several prompt chunks
ENDLESS = {"ignore_eos": True, "max_tokens": 1200, "temperature": 0}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALLS = '<|tool_call>call:look{at:<|"|>a, b<|"|>}<tool_call|><|tool_call>call:leave.it{}<tool_call|>'
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def live():
    with running(EDGE, max_num_seqs=2, max_queued=2, keepalive_s=0.02, max_tokens=6, body_bytes=200_000) as live:
        yield live


@pytest.fixture(autouse=True)
def the_engine_is_empty_afterwards(live: Live):
    yield
    assert live.settled() and live.engine_thread.faults == 0


def post(live: Live, body: bytes, path: str = TEXT):
    return live.client.post(path, content=body, headers={"content-type": "application/json"})


# streams ----------------------------------------------------------------------------------------------------


def test_a_chat_stream_has_the_form_that_clients_parse(live):
    lines = live.lines(CHAT, messages=HELLO, temperature=0, stream_options={"include_usage": True})
    data = chunks(lines)
    assert {(d["object"], d["id"], d["model"]) for d in data} == {
        ("chat.completion.chunk", data[0]["id"], "tiny")
    } and all(isinstance(d["created"], int) for d in data)
    first, *middle, last, usage = data
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(set(d["choices"][0]["delta"]) == {"content"} for d in middle)
    assert all(d["choices"][0]["finish_reason"] is None and d["usage"] is None for d in (first, *middle))
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"] == {
        "prompt_tokens": usage["usage"]["prompt_tokens"],
        "completion_tokens": 6,
        "total_tokens": usage["usage"]["prompt_tokens"] + 6,
        "prompt_tokens_details": {"cached_tokens": usage["usage"]["prompt_tokens_details"]["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert not any("usage" in d for d in chunks(live.lines(CHAT, messages=HELLO, stream_options={})))


def test_headers_and_keepalives_come_before_the_prompt_has_run(live):
    lines = live.lines(CHAT, messages=[{"role": "user", "content": "ab " * 1000}], max_tokens=1)
    assert "assistant" in lines[0] and lines[1] == ": keepalive"
    assert chunks(lines)[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_completion_stream_has_the_form_that_clients_parse(live):
    data = chunks(live.lines(TEXT, prompt="hello", temperature=0))
    assert all(d["object"] == "text_completion" for d in data)
    assert all(set(d["choices"][0]) == {"index", "text", "logprobs", "finish_reason"} for d in data)
    assert "".join(d["choices"][0]["text"] for d in data) == live.text("hello", temperature=0)
    assert [d["choices"][0]["finish_reason"] for d in data[-2:]][-1] == "length"


def test_tool_calls_have_the_form_that_clients_parse(live):
    """The tiny models call no tools, so the test supplies the output."""
    tokenizer = live.pair.text
    form = ChatForm.model_validate({"messages": HELLO})
    writer, output = ChatWriter(live.admission, form), OutputDecoder(tokenizer, GenerationRequest(messages=HELLO), (2,))
    sent, whole = [], CompletionText()
    chunks_ = [output.push([token]) for token in tokenizer.encode_rest("so" + CALLS)]
    for chunk in (*chunks_, StreamChunk(finish=output.finish(Stats(), "stop"))):
        sent += writer.chunk(0, chunk)
        whole.add(chunk)
    choices = [json.loads(line[6:])["choices"][0] for line in sent]
    calls = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert choices[-1]["finish_reason"] == "tool_calls" and choices[-1]["delta"] == {}
    opened = [call for call in calls if "id" in call]
    assert [(c["index"], c["type"], c["function"]) for c in opened] == [
        (0, "function", {"name": "look", "arguments": ""}),
        (1, "function", {"name": "leave.it", "arguments": ""}),
    ]
    for i, arguments in enumerate(({"at": "a, b"}, {})):
        pieces = [c["function"]["arguments"] for c in calls if c["index"] == i]
        assert json.loads("".join(pieces)) == arguments
    message = writer.body([whole], Usage(1, 0, 9, 0))["choices"][0]["message"]
    assert message["content"] == "so" and len({c["id"] for c in message["tool_calls"]}) == 2
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["look", "leave.it"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"at": "a, b"}


# bodies -----------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
EMPTY_CALL = {**CALL, "function": {"name": "f", "arguments": ""}}
DEEP = b'{"prompt":' + b"[" * 90_000 + b"]" * 90_000 + b"}"
REFUSED = {
    "not JSON": (TEXT, b"{"),
    "a list": (TEXT, b"[]"),
    "nothing": (TEXT, b""),
    "not UTF-8": (TEXT, b'{"prompt":"\xff\xfe"}'),
    "NaN": (TEXT, b'{"prompt":"a","temperature":NaN}'),
    "nested deeply": (TEXT, DEEP),
    "a number of many digits": (TEXT, b'{"prompt":"a","seed":' + b"9" * 9000 + b"}"),
    "no messages": (CHAT, {}),
    "no prompt": (TEXT, {"max_tokens": 3}),
    "messages empty": (CHAT, {"messages": []}),
    "messages that are a string": (CHAT, {"messages": "hello"}),
    "a message that is a string": (CHAT, {"messages": ["hello"]}),
    "an unknown role": (CHAT, {"messages": [{"role": "root", "content": "a"}]}),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}),
    "tool arguments that are not JSON": (CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL]}]}),
    "tool calls that are a number": (CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": 5}]}),
    "tool arguments nested deeply": (
        CHAT,
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 60_000}}]},
            ]
        },
    ),
    "a role that is an object": (CHAT, {"messages": [{"role": {}, "content": "a"}]}),
    "tools that are a string": (CHAT, {"messages": HELLO, "tools": "all"}),
    "reserved template variables": (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}),
    "max_tokens negative": (TEXT, {"prompt": "a", "max_tokens": -1}),
    "max_tokens 0": (TEXT, {"prompt": "a", "max_tokens": 0}),
    "max_tokens true": (TEXT, {"prompt": "a", "max_tokens": True}),
    "temperature negative": (TEXT, {"prompt": "a", "temperature": -1}),
    "temperature is a string": (TEXT, {"prompt": "a", "temperature": "hot"}),
    "top_p 0": (TEXT, {"prompt": "a", "top_p": 0}),
    "too many log-probabilities": (TEXT, {"prompt": "a", "logprobs": 21}),
    "top_logprobs without logprobs": (CHAT, {"messages": HELLO, "top_logprobs": 2}),
    "a schema without end tokens": (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_object"}, "ignore_eos": True, "stream": True},
    ),
    "n 0": (TEXT, {"prompt": "a", "n": 0}),
    "n too many": (TEXT, {"prompt": "a", "n": 5}),
    "a schema": (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {}}}),
    "echo": (TEXT, {"prompt": "a", "echo": True}),
    "best_of": (TEXT, {"prompt": "a", "best_of": 2}),
    "an empty prompt": (TEXT, {"prompt": ""}),
    "an empty prompt among others": (TEXT, {"prompt": ["a", ""]}),
    "an empty list": (TEXT, {"prompt": []}),
    "an empty list of ids": (TEXT, {"prompt": [[]]}),
    "strings and ids": (TEXT, {"prompt": ["a", 1]}),
    "ids and a boolean": (TEXT, {"prompt": [1, True]}),
    "an id out of range": (TEXT, {"prompt": [1, 999_999]}),
    "a negative id": (TEXT, {"prompt": [-1]}),
    "half a character": (TEXT, b'{"prompt":"\\ud800"}'),
    "stop of ids": (TEXT, {"prompt": "a", "stop": [1]}),
    "stop a number": (TEXT, {"prompt": "a", "stop": 5}),
    "stop empty": (TEXT, {"prompt": "a", "stop": ""}),
    "a bias out of the vocabulary": (TEXT, {"prompt": "a", "logit_bias": {"999999": 5}}),
    "a bias for a word": (TEXT, {"prompt": "a", "logit_bias": {"the": 5}}),
    "a bias too strong": (TEXT, {"prompt": "a", "logit_bias": {"5": 1e9}}),
    "a seed that is no integer": (TEXT, {"prompt": "a", "seed": 1e23}),
    "a seed too large": (TEXT, {"prompt": "a", "seed": 2**64}),
    "a prompt too long": (TEXT, {"prompt": LONG * 2}),
    "contradictory thinking": (CHAT, {"messages": HELLO, "enable_thinking": False, "reasoning_effort": "high"}),
    "an unknown field": (TEXT, {"prompt": "a", "\ud83d": 1}),
}
# Legal, but refused or fatal in other servers.
ACCEPTED = {
    "nulls": (
        CHAT,
        {"messages": HELLO, "max_tokens": None, "temperature": None, "stop": None, "tools": None, "n": None},
    ),
    "two log-probabilities": (TEXT, {"prompt": "a", "logprobs": 2}),
    "20 log-probabilities": (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 20}),
    "two prompts": (TEXT, {"prompt": ["abc", "def"]}),
    "two choices": (TEXT, {"prompt": "a", "n": 2}),
    "a negative seed": (TEXT, {"prompt": "a", "seed": -1}),
    "tool arguments that are empty": (
        CHAT,
        {
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "done"},
            ]
        },
    ),
    "bookkeeping fields": (TEXT, {"prompt": "a", "user": "me", "metadata": {}, "store": False}),
    "unsupported fields at values that change nothing": (
        TEXT,
        {"prompt": "a", "echo": False, "best_of": 1, "suffix": None},
    ),
    "tool_choice none": (CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}),
    "no tools": (CHAT, {"messages": HELLO, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False}),
    "content parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}),
    "max_tokens beyond the context": (TEXT, {"prompt": [5] * 4090, "max_tokens": 32000}),
    "an alias of max_tokens": (CHAT, {"messages": HELLO, "max_completion_tokens": 3}),
    "a developer's message": (CHAT, {"messages": [{"role": "developer", "content": "be brief"}, *HELLO]}),
}


def test_bad_requests_are_refused_and_do_not_change_a_running_output(live):
    want, got = live.text("hello", **{**ENDLESS, "max_tokens": 60}), []
    other = threading.Thread(
        target=lambda: got.append(live.text("hello", **{**ENDLESS, "max_tokens": 60})),
    )
    other.start()
    for name, (path, body) in REFUSED.items():
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = post(live, raw, path)
        error = answer.json()["error"]
        assert answer.status_code == 400, (name, answer.text)
        assert error["message"] and error["type"] == "invalid_request_error", name
        assert len(answer.content) < 600, name
    other.join()
    assert got == [want]


def test_legal_requests_are_accepted(live):
    for name, (path, body) in ACCEPTED.items():
        answer = post(live, json.dumps(body).encode(), path)
        assert answer.status_code == 200, (name, answer.text)
        assert answer.json()["usage"]["completion_tokens"] > 0, name


def test_errors_name_the_field_at_fault(live):
    for body, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 7}, "top_p"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop"),
    ):
        assert live.complete("a", **body).json()["error"]["param"].startswith(param)


def test_the_error_for_a_long_prompt_has_both_numbers(live):
    error = live.complete([5] * 5000).json()["error"]
    assert error["code"] == "context_length_exceeded" and "5000" in error["message"] and "4096" in error["message"]


def test_a_prompt_may_end_with_an_earlier_output(live):
    first = live.text("hello", temperature=0)
    assert live.complete("hello" + first, temperature=0).status_code == 200
    assert live.complete("hello" + first, temperature=0).status_code == 200


def test_a_turn_that_appends_reuses_the_prompt_before_it(live):
    messages = [{"role": "user", "content": "look at this: " + "abc " * 60}]
    first = live.client.post(CHAT, json={"messages": messages, "temperature": 0}).json()
    prompt = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 40
    messages += [{"role": "assistant", "content": "", "tool_calls": [EMPTY_CALL]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "done"}]
    second = live.client.post(CHAT, json={"messages": messages, "temperature": 0}).json()["usage"]
    assert second["prompt_tokens"] > prompt
    assert prompt - 40 < second["prompt_tokens_details"]["cached_tokens"] <= prompt + 6


def test_another_models_name_is_refused(live):
    answer = live.complete("a", model="mlx-community/something")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert live.complete("a", model="tiny").status_code == live.complete("a", model=None).status_code == 200


def test_a_body_may_be_chunked_but_not_too_long(live):
    whole = json.dumps({"prompt": "hello", "temperature": 0}).encode()
    answer = live.client.post(TEXT, content=iter([whole[:7], whole[7:]]))
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == live.text("hello", temperature=0)
    for content in (b" " * 300_000, iter([b" " * 100_000] * 3)):
        answer = live.client.post(TEXT, content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_unknown_paths_and_methods_are_refused_in_json(live):
    assert live.client.get("/v1/nothing").json()["error"]["message"] == "/v1/nothing does not exist"
    answer = live.client.get(TEXT)
    assert answer.status_code == 405 and answer.json()["error"] and answer.headers["allow"] == "POST"


def test_models_and_metrics_can_be_read(live):
    (model,) = live.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["max_model_len"] == 4096
    live.complete("hello", max_tokens=4)
    until(lambda: 'path="/v1/completions",status="200"' in live.client.get("/metrics").text)
    page = live.client.get("/metrics").text
    assert "mlx_mtp_ready 1.0" in page and 'mlx_mtp_outputs{state="running"} 0.0' in page
    assert float(page.split('mlx_mtp_tokens_total{kind="generated"} ')[1].split()[0]) >= 4


def test_every_request_leaves_one_log_line(live, capfd):
    shown = ""

    def both() -> bool:
        nonlocal shown
        shown += capfd.readouterr().err
        return shown.count("\n") == 2

    live.complete("hello", max_tokens=5, temperature=0, ignore_eos=True)
    live.complete("hello", max_tokens=0)
    until(both)
    done, refused = map(json.loads, shown.splitlines())
    assert done["path"] == TEXT and done["status"] == 200 and done["finish"] == "length"
    assert done["generated_tok"] == 5 and done["prompt_tok"] > 0 and done["cached_tok"] >= 0
    assert done["rounds"] > 0 and done["mean_accepted_length"] >= 1 and done["decode_tok_s"] > 0
    assert 0 < done["ttft_s"] <= done["seconds"] and done["outputs"] == 1
    assert done["ttft_passes"] == 1 and done["ttft_positions"] == done["prompt_tok"] - done["cached_tok"]
    assert refused["status"] == 400 and "max_tokens" in refused["error"]


# a full queue -----------------------------------------------------------------------------------------------


def dial(live: Live, body: dict) -> socket.socket:
    """Send a request on a socket of its own."""
    raw = json.dumps(body).encode()
    line = socket.create_connection(("127.0.0.1", live.client.base_url.port))
    line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
    return line


def test_a_short_request_waits_one_pass_for_a_long_prompt(live, capfd, monkeypatch):
    engine, noted = live.pair._engine, []
    take, begin = live.engine_thread.submit, live.pair.submit
    monkeypatch.setattr(
        live.engine_thread, "submit", lambda choices: (noted.append(engine.host_reads), take(choices))[1]
    )
    monkeypatch.setattr(live.pair, "submit", lambda *request: (noted.append(engine.host_reads), begin(*request))[1])
    monkeypatch.setattr(engine.scheduler, "limits", replace(engine.scheduler.limits, alone_tok=16))
    before = engine.host_reads
    line = dial(live, {"prompt": [7, *LONG], **ENDLESS})
    until(lambda: engine.host_reads > before + 2)
    live.complete([9, 8, 7, 6, 5], max_tokens=1)
    line.close()
    until(lambda: live.engine_thread.open == 0)
    came, taken = noted[-2:]
    assert taken - came <= 1
    logged = [json.loads(one) for one in capfd.readouterr().err.splitlines()]
    (short,) = [one for one in logged if one.get("prompt_tok") == 5]
    assert short["ttft_passes"] == 1 and short["ttft_positions"] <= 5 + 16


def test_a_full_queue_says_when_to_retry(live):
    lines = [dial(live, {"prompt": "hello", "stream": True, **ENDLESS}) for _ in range(4)]
    until(lambda: live.engine_thread.open == 4)
    answer = live.complete("hello")
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 30 and answer.headers["x-should-retry"] == "true"
    for line in lines:
        line.close()
    until(lambda: live.engine_thread.open == 0)
    assert live.complete("hello").status_code == 200
