"""The anthropic and ollama packages, openai's responses and /infill against the server with the embedded pair.

The pair was not trained to call tools. Where a test needs a call, the request requires one and the grammar enforces it.
"""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import anthropic
import jsonschema
import ollama
import openai
import pytest
from servers import TINY, Live, running

from mlx_mtp.loops import LoopLimits
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat, stable
from mlx_mtp.server.openai_form import ChatMessage, plain_messages

HERE = Path(__file__).resolve().parent
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}}}
CITY |= {"required": ["city"], "additionalProperties": False}
CITY["properties"]["days"] |= {"minimum": 1, "maximum": 9}
ASK = [{"role": "user", "content": "def main():"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server whose checkpoint has Gemma 4's chat template, with tools and thinking."""
    target = tmp_path_factory.mktemp("pair") / "target"
    shutil.copytree(TINY[0], target)
    shutil.copy(HERE / "fixtures" / "templates" / "gemma4_v5.jinja", target / "chat_template.jinja")
    drafter = str(Path(TINY[0]).parent / "drafter")
    with running((str(target), drafter), max_num_seqs=4, sampling={"temperature": 0.0}) as live:
        yield live


@pytest.fixture(autouse=True)
def the_engine_is_empty_afterwards(live: Live):
    yield
    assert live.settled()


# anthropic --------------------------------------------------------------------------------------------------

TOOL = {"name": "get_weather", "description": "Weather", "input_schema": CITY}


@pytest.fixture(scope="module")
def claude(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def prompt_tokens(message: anthropic.types.Message) -> int:
    """A message's prompt tokens, cached or not."""
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_a_message_has_text_usage_and_a_stop_reason(claude):
    message = claude.messages.create(model="tiny", max_tokens=12, messages=ASK, system="Be brief.")
    assert message.role == "assistant" and message.stop_reason == "max_tokens"
    assert message.content[0].type == "text" and message.content[0].text
    assert message.usage.output_tokens == 12 and prompt_tokens(message) > 5


def test_a_message_stream_equals_the_message(claude):
    fields = {"model": "tiny", "max_tokens": 12, "messages": ASK}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "content_block_delta" in kinds


def test_a_required_tool_is_called_and_its_result_goes_back(claude):
    fields = {"model": "tiny", "max_tokens": 120, "tools": [TOOL], "tool_choice": {"type": "any"}}
    with claude.messages.stream(messages=ASK, **fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    call = message.content[-1]
    assert message.stop_reason == "tool_use" and call.type == "tool_use" and call.name == "get_weather"
    jsonschema.validate(call.input, CITY)
    assert json.loads("".join(pieces)) == call.input and len(pieces) > 1
    whole = claude.messages.create(messages=ASK, **fields)
    assert whole.content[-1].input == call.input and whole.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    talk = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(model="tiny", max_tokens=4, messages=talk, tools=[TOOL])
    assert prompt_tokens(answer) > prompt_tokens(message)


def test_thinking_is_a_separate_block(claude, live):
    """A grammar cannot make the model think, but a prompt that ends inside a thought can."""
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
    talk = [*ASK, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    fields = {"model": "tiny", "max_tokens": 8, "messages": talk, "tools": [TOOL], "thinking": {"type": "adaptive"}}
    with claude.messages.stream(**fields) as stream:
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking"]
    assert message.content[0].thinking and message.content[0].signature
    again = [*talk, {"role": "assistant", "content": message.content}, *ASK]
    assert claude.messages.create(model="tiny", max_tokens=2, messages=again, tools=[TOOL]).content


def test_messages_have_stop_sequences_token_counts_and_schemas(claude):
    text = claude.messages.create(model="tiny", max_tokens=12, messages=ASK).content[0].text
    stopped = claude.messages.create(model="tiny", max_tokens=12, messages=ASK, stop_sequences=[text[4:7]])
    assert stopped.content[0].text == text[:4]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[4:7])
    counted = claude.messages.count_tokens(model="tiny", messages=ASK)
    assert counted.input_tokens == prompt_tokens(claude.messages.create(model="tiny", max_tokens=1, messages=ASK))
    output = {"format": {"type": "json_schema", "schema": CITY}}
    answer = claude.messages.create(model="tiny", max_tokens=120, messages=ASK, extra_body={"output_config": output})
    jsonschema.validate(json.loads(answer.content[0].text), CITY)


def test_the_other_fields_of_claude_code_are_accepted(live):
    body = {
        "model": "tiny",
        "max_tokens": 2,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=ab12;"},
            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [*ASK, {"role": "system", "content": "reminder"}, {"role": "user", "content": "go"}],
        "context_management": {"edits": []},
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
    }
    answer = live.client.post("/v1/messages?beta=true", json=body)
    assert answer.status_code == 200, answer.text
    body["system"][0]["text"] = "x-anthropic-billing-header: cc_version=9; cch=zz99zz99;"
    again = live.client.post("/v1/messages/count_tokens", json={k: body[k] for k in ("model", "system", "messages")})
    body["system"] = body["system"][1:]
    bare = live.client.post("/v1/messages/count_tokens", json={k: body[k] for k in ("model", "system", "messages")})
    assert again.json() == bare.json()
    assert live.client.head("/").status_code == 200


def test_the_order_of_tools_does_not_change_the_prompt(live):
    other = {**FUNCTION, "function": {**FUNCTION["function"], "name": "a"}}

    def prompt(*tools: dict) -> tuple[int, ...]:
        request = GenerationRequest(messages=ASK, response_format=ResponseFormat(tools))
        return asyncio.run(live.admission.tokenize(request))

    assert prompt(FUNCTION, other) == prompt(other, FUNCTION) != prompt(FUNCTION)


def test_system_prompts_lose_only_their_volatile_line():
    line, parts = "x-anthropic-billing-header: a=1;", [{"type": "text", "text": "You"}, {"type": "other"}]
    messages = [ChatMessage(role="system", content=[{"type": "text", "text": line}, *parts])]
    messages += [ChatMessage(role="system", content=f"{line}\nYou"), ChatMessage(role="user", content=line)]
    assert [m["content"] for m in plain_messages(messages)] == [parts, "You", line]
    assert stable("x-anthropic-billing-header: a=1; b\nYou are") == "You are"
    assert stable("Say x-anthropic-billing-header: no") == "Say x-anthropic-billing-header: no"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt"}, anthropic.NotFoundError, "is not served here"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError, "no image"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError, "run at Anthropic"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, anthropic.BadRequestError, "not in"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_form(claude, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        claude.messages.create(**{"model": "tiny", "max_tokens": 4, "messages": ASK, **fields})
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"]


# prefixes of agents -------------------------------------------------------------------------------------------


def result_turn(i: int, form: str) -> list[dict]:
    """A tool call and its result, in the form of chat or messages."""
    bulk = f"line {i}: def f(x): return x\n" * 12
    if form == "chat":
        call = {"id": f"c{i}", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{i}", "content": bulk},
        ]
    call = {"type": "tool_use", "id": f"c{i}", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": f"c{i}", "content": bulk}
    return [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]


def agent_turn(form: str, turn: int) -> dict:
    """Request `turn` of an agent's conversation. The volatile line and the order of tools change every time."""
    line, system = (
        f"x-anthropic-billing-header: cc_version={turn}; cch={turn * 77:x};",
        f"For {form}, " + "be brief. " * 40,
    )
    messages = [*ASK, *(m for i in range(1, turn + 1) for m in result_turn(i, form))]
    names = ("get_weather", "apply_patch", "read")
    names = (*names[turn:], *names[:turn])
    if form == "chat":
        tools = [{**FUNCTION, "function": {**FUNCTION["function"], "name": name}} for name in names]
        system_turn = {"role": "system", "content": f"{line}\n{system}"}
        return {"messages": [system_turn, *messages], "tools": tools, "max_tokens": 2}
    blocks = [{"type": "text", "text": line}, {"type": "text", "text": system}]
    tools = [{**TOOL, "name": name} for name in names]
    return {"model": "tiny", "system": blocks, "messages": messages, "tools": tools, "max_tokens": 2}


@pytest.mark.parametrize(("form", "path"), [("chat", "/v1/chat/completions"), ("messages", "/v1/messages")])
def test_an_agents_turn_computes_only_what_it_adds(live, form, path):
    before = 0
    for turn in range(3):
        usage = live.client.post(path, json=agent_turn(form, turn)).json()["usage"]
        if form == "chat":
            prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        else:
            cached = usage["cache_read_input_tokens"]
            prompt = cached + usage["input_tokens"]
        assert prompt > before + 100
        assert cached == before if turn else cached < 20  # other tests have cached the beginning that all prompts share
        before = prompt


def test_similar_requests_at_once_share_one_prefill(live):
    """Editors send such requests: equal ones, and some with another end."""
    system = {"role": "system", "content": "Complete the code. " * 60}
    ends = ["x = 1", "x = 1", "x = 1", "x = 2"]

    async def ask_all() -> list:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            fields = {"model": "tiny", "max_tokens": 4}
            asks = [
                client.chat.completions.create(messages=[system, {"role": "user", "content": end}], **fields)
                for end in ends
            ]
            return await asyncio.gather(*asks)

    usages = [answer.usage for answer in asyncio.run(ask_all())]
    whole = max(usage.prompt_tokens for usage in usages)
    computed = sum(usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert whole > 280 and computed < whole + 12 * len(ends)


# ollama -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(live):
    with ollama.Client(host=live.url) as client:
        yield client


FUNCTION = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}


def test_ollama_lists_and_shows_the_model(client):
    assert [model.model for model in client.list().models] == ["tiny"]
    shown = client.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["gemma4.context_length"] > 100


def test_ollama_chats_whole_and_as_a_stream(client):
    whole = client.chat("tiny", ASK, options={"num_predict": 10})
    assert whole.message.content and whole.done_reason == "length" and whole.eval_count == 10
    parts = list(client.chat("tiny", ASK, options={"num_predict": 10}, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count


def test_ollama_generates_with_and_without_the_template(client, live):
    asked = client.generate("tiny", "def main():", options={"num_predict": 8, "temperature": 0})
    bare = client.generate("tiny", "def main():", raw=True, options={"num_predict": 8, "temperature": 0})
    assert asked.response == client.chat("tiny", ASK, options={"num_predict": 8}).message.content
    assert bare.response == live.text("def main():", max_tokens=8)
    assert client.generate("tiny", "").done_reason == "load"


def test_ollama_answers_follow_a_schema(client):
    answer = client.chat("tiny", ASK, format=CITY, options={"num_predict": 120})
    jsonschema.validate(json.loads(answer.message.content), CITY)
    assert isinstance(json.loads(client.generate("tiny", "x", format=CITY).response), dict)


def test_ollama_takes_tools_calls_and_results(client):
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    talk = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    talk += [{"role": "tool", "tool_name": "get_weather", "content": "sunny"}]
    answer = client.chat("tiny", talk, tools=[FUNCTION], think=True, options={"num_predict": 6})
    assert answer.message.thinking and not answer.message.content


def test_errors_have_ollamas_form(client, live):
    with pytest.raises(ollama.ResponseError, match="is not served here") as caught:
        client.chat("other", ASK)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="options.mirostat"):
        client.chat("tiny", ASK, options={"mirostat": 2})
    refused = live.client.post("/api/chat", json={"model": "tiny", "messages": ASK, "format": "xml"})
    assert refused.status_code == 400 and "expected 'json'" in refused.json()["error"]


# responses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


RESPONSE_TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather",
    "parameters": CITY,
    "strict": True,
}


def test_a_response_whole_and_as_a_stream(openai_client):
    fields = {"model": "tiny", "input": "def main():", "instructions": "Be brief.", "max_output_tokens": 12}
    whole = openai_client.responses.create(**fields)
    assert whole.output_text and whole.status == "incomplete" and whole.usage.output_tokens == 12
    with openai_client.responses.stream(**fields) as stream:
        events = list(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_a_function_is_called_and_its_output_goes_back(openai_client):
    fields = {"model": "tiny", "tools": [RESPONSE_TOOL, {"type": "web_search"}], "max_output_tokens": 120}
    with openai_client.responses.stream(input="def main():", tool_choice="required", **fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    call = final.output[0]
    assert final.status == "completed" and call.type == "function_call" and call.name == "get_weather"
    jsonschema.validate(json.loads(call.arguments), CITY)
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    back = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    talk = [{"role": "user", "content": "def main():"}, call.model_dump(), back]
    answer = openai_client.responses.create(
        model="tiny", input=talk, tools=[RESPONSE_TOOL], reasoning={"effort": "low"}, max_output_tokens=6
    )
    assert answer.output[0].type == "reasoning" and answer.output[0].content[0].text
    assert answer.usage.output_tokens_details.reasoning_tokens == 6


def test_a_response_follows_a_schema(openai_client):
    wanted = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    answer = openai_client.responses.create(model="tiny", input="x", text=wanted, max_output_tokens=120)
    jsonschema.validate(json.loads(answer.output_text), CITY)


def test_a_response_that_needs_an_earlier_one_is_refused(openai_client):
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        openai_client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


# openai's chat, response formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_chat_calls_a_required_tool(openai_client, choice):
    fields = {"model": "tiny", "messages": ASK, "tools": [FUNCTION], "tool_choice": choice, "max_tokens": 120}
    whole = openai_client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    jsonschema.validate(json.loads(whole.message.tool_calls[0].function.arguments), CITY)
    with openai_client.chat.completions.stream(**fields) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments
    assert done[0].name == "get_weather"


def test_a_tool_may_be_named_auto(openai_client):
    tool = {**FUNCTION, "function": {**FUNCTION["function"], "name": "auto"}}
    choice = {"type": "function", "function": {"name": "auto"}}
    fields = {"model": "tiny", "messages": ASK, "tools": [tool, FUNCTION], "tool_choice": choice, "max_tokens": 120}
    message = openai_client.chat.completions.create(**fields).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["auto"]


def test_chat_follows_a_schema_and_strict_tools(openai_client):
    strict = {**FUNCTION, "function": {**FUNCTION["function"], "strict": True}}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for fields in ({"response_format": wanted}, {"response_format": wanted, "tools": [strict]}):
        answer = openai_client.chat.completions.create(model="tiny", messages=ASK, max_tokens=120, **fields).choices[0]
        output = answer.message.content or answer.message.tool_calls[0].function.arguments
        jsonschema.validate(json.loads(output), CITY)
    whole = {"type": "json_object"}
    prompt = openai_client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3, response_format=whole)
    assert prompt.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "no tools are given"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [FUNCTION]}, "not in `tools`"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "Unimplemented"),
        ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
    ],
)  # fmt: skip
def test_impossible_response_formats_are_refused(openai_client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        openai_client.chat.completions.create(model="tiny", messages=ASK, **fields)


# infill -----------------------------------------------------------------------------------------------------


def test_infill_ends_where_the_suffix_begins(live):
    body = {"input_prefix": "import os\n\ndef main(", "input_suffix": "\n    return 1\n", "n_predict": 12}
    answer = live.client.post("/infill", json={**body, "t_max_predict_ms": 500, "samplers": ["top_k"]})
    assert answer.status_code == 200, answer.text
    filled = answer.json()
    assert filled["stop"] and filled["content"] and filled["tokens_predicted"] <= 12 and "timings" in filled
    cut = filled["content"].strip()[:8]
    again = live.client.post("/infill", json={**body, "stop": [cut]}).json()
    assert again["stopping_word"] == cut and cut not in again["content"]
    assert live.client.post("/infill", json={"input_extra": [{"text": "x"}], "n_predict": 0}).json()["content"] == ""


def test_infill_returns_only_the_requested_fields(live):
    paths = ["content", "timings/prompt_n", "timings/predicted_per_second", "timings/none", "content/x", ""]
    body = {"input_prefix": "import sys\n\ndef main(", "n_predict": 8, "response_fields": paths}
    some = live.client.post("/infill", json=body).json()
    assert list(some) == paths[:3] and some["content"]
    assert some["timings/prompt_n"] > 1 and some["timings/predicted_per_second"] > 0
    whole = live.client.post("/infill", json={**body, "response_fields": []}).json()
    assert whole["tokens_cached"] == whole["timings"]["cache_n"] > 0
    assert whole["timings"]["prompt_n"] == whole["tokens_evaluated"] - whole["tokens_cached"]


def test_infill_past_its_time_limit_ends_with_its_line(live):
    body = {"input_prefix": "import os\n\ndef main(", "n_predict": 48, "top_k": 1}
    whole = live.client.post("/infill", json={**body, "t_max_predict_ms": 0}).json()
    late = live.client.post("/infill", json={**body, "t_max_predict_ms": 1}).json()
    assert "\n" in late["content"] and late["stop_type"] == "limit"
    assert whole["content"].startswith(late["content"]) and late["tokens_predicted"] < whole["tokens_predicted"]


def test_suffix_equals_infill_in_completions_and_generate(live, client):
    body = {"prompt": "import os\n\ndef main(", "suffix": "\n    return 1\n", "max_tokens": 12}
    filled = live.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    infill = {"input_prefix": body["prompt"], "input_suffix": body["suffix"], "n_predict": 12}
    assert filled == live.client.post("/infill", json=infill).json()["content"]
    assert filled == client.generate("tiny", body["prompt"], body["suffix"], options={"num_predict": 12}).response
    refused = live.client.post("/v1/completions", json={"prompt": [3, 4], "suffix": "x"})
    assert refused.status_code == 400 and "suffix" in refused.json()["error"]["message"]


def test_the_loop_guard_ends_a_chat_that_repeats_itself(live):
    admission, fields = live.admission, {"logit_bias": {"400": 100}, "max_tokens": 40}
    unguarded, before = live.chat("x", **fields).json(), admission.settings
    admission.settings = replace(before, loop_guard=LoopLimits(period_tok=4, repeats=2, least_tok=4))
    try:
        guarded, completion = live.chat("x", **fields).json(), live.complete("x", **fields).json()
        ignoring = live.chat("x", ignore_eos=True, **fields).json()
    finally:
        admission.settings = before
    assert guarded["choices"][0]["finish_reason"] == "length" and guarded["usage"]["completion_tokens"] < 12
    assert {a["usage"]["completion_tokens"] for a in (unguarded, completion, ignoring)} == {40}
