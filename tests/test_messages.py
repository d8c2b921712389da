"""Conversations with tools, rendered by every published Gemma 4 template."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_mtp.messages import for_template
from mlx_mtp.rows import RequestError
from mlx_mtp.text import Text

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "mlx_mtp" / "data" / "tiny" / "target"
TEMPLATES = sorted((HERE / "fixtures" / "templates").glob("gemma4*.jinja"))
FIRST, NEWEST = "gemma4_v2", "gemma4_v5"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "Time in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DECLARED = (
    '<|tool>declaration:get_time{description:<|"|>Time in a city<|"|>,parameters:{properties:{city:{type:<|"|>STRING'
    '<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
CALLED = '<|tool_call>call:get_time{b:1,city:<|"|>Oslo<|"|>}<tool_call|>'
ANSWERED = '<|tool_response>response:get_time{value:<|"|>9 pm<|"|>}<tool_response|>'


def conversation(arguments: object, name: str | None = None) -> list[dict]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "9 pm"}
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        result | ({"name": name} if name else {}),
    ]


@pytest.fixture(params=TEMPLATES, ids=lambda file: file.stem)
def template(request, tmp_path) -> Text:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    shutil.copy(request.param, tmp_path / "chat_template.jinja")
    return Text.from_dir(tmp_path)


def test_all_five_published_templates_are_tested():
    assert len(TEMPLATES) == 5 and {FIRST, NEWEST} < {file.stem for file in TEMPLATES}


@pytest.mark.parametrize("arguments", [{"city": "Oslo", "b": 1}, '{"city": "Oslo", "b": 1}'])
def test_call_and_result_render_as_one_model_turn(template, arguments):
    rendered = template.render(conversation(arguments), options={"tools": TOOLS})
    assert rendered == (
        f"<bos><|turn>system\nBe brief.\nBe kind.{DECLARED}<turn|>\n<|turn>user\nWhen?<turn|>\n"
        f"<|turn>model\n{CALLED}{ANSWERED}"
    )


def test_reply_after_a_result_ends_the_turn(template):
    reply = [{"role": "assistant", "content": "It is nine."}, {"role": "user", "content": "Thanks"}]
    rendered = template.render(conversation({"b": 1, "city": "Oslo"}) + reply, options={"tools": TOOLS})
    after = rendered.partition(CALLED + ANSWERED)[2]
    assert after == "It is nine.<turn|>\n<|turn>user\nThanks<turn|>\n<|turn>model\n"


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}, None])
def test_empty_arguments_are_accepted_in_any_form(template, arguments):
    assert "<|tool_call>call:get_time{}<tool_call|>" in template.render(conversation(arguments))


def test_results_are_matched_to_calls_by_id(template):
    messages = conversation({})
    messages[2]["tool_calls"].append({"id": "c2", "function": {"name": "other", "arguments": "{}"}})
    messages.insert(3, {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]})
    rendered = template.render(messages)
    assert 'response:other{value:<|"|>two<|"|>}' in rendered and 'response:get_time{value:<|"|>9 pm<|"|>}' in rendered


def test_results_without_id_are_matched_in_call_order():
    messages = conversation({})
    messages[2]["tool_calls"].append({"function": {"name": "other"}})
    del messages[3]["tool_call_id"]
    messages.append({"role": "tool", "content": "x"})
    assert [m["name"] for m in for_template(messages) if m["role"] == "tool"] == ["get_time", "other"]
    assert "name" not in messages[3]  # the input is not modified


def test_template_option_enables_thinking(template):
    assert "enable_thinking" in template.template_variables and "tools" in template.template_variables
    messages = [{"role": "user", "content": "hi"}]
    assert "<|think|>" in template.render(messages, options={"enable_thinking": True})
    assert "<|think|>" not in template.render(messages, options={"enable_thinking": False})


def test_newest_template_opens_a_thought_after_a_result(template, tmp_path):
    rendered = template.render(conversation({}), options={"enable_thinking": True})
    newest = "Canonical" in (tmp_path / "chat_template.jinja").read_text()
    assert rendered.endswith("<|channel>thought\n") == newest


@pytest.mark.parametrize("arguments", ["[1]", "{", "null", 3, [1]])
def test_arguments_must_be_a_json_object(arguments):
    with pytest.raises(RequestError, match="message 2 calls get_time with invalid arguments; expected a JSON object"):
        for_template(conversation(arguments))


@pytest.mark.parametrize("calls", [["x"], [{}], [{"function": {"arguments": "{}"}}]])
def test_call_without_a_name_is_rejected(calls):
    messages = conversation({})
    messages[2]["tool_calls"] = calls
    with pytest.raises(RequestError, match="message 2 has a tool call without a name"):
        for_template(messages)


def test_result_without_a_call_is_rejected():
    messages = conversation({})
    del messages[2]
    with pytest.raises(RequestError, match="message 2 is a tool result; expected an assistant message"):
        for_template(messages)


def test_tools_are_rejected_if_the_template_does_not_support_them():
    with pytest.raises(RequestError, match="does not support tools"):
        Text.from_dir(TINY).render([{"role": "user", "content": "x"}], options={"tools": TOOLS})
    assert "enable_thinking" not in Text.from_dir(TINY).template_variables


@pytest.mark.parametrize("tools", ["x", ["x"], 3])
def test_tools_must_be_a_list_of_objects(template, tools):
    with pytest.raises(RequestError, match="expected a"):
        template.render([{"role": "user", "content": "x"}], options={"tools": tools})


def test_rendered_calls_are_parsed_back(template):
    from mlx_mtp.segments import Segmenter

    arguments = {"a": [1, {"b": "x, {y}"}], "c-d": "\"quoted\" 'text'\n", "e.f": None, "g": True, "h": -1.5}
    rendered = template.render(conversation(arguments))
    call = rendered[rendered.index("<|tool_call>") : rendered.index("<|tool_response>")]
    segmenter = Segmenter(template)
    segments = segmenter.push(template.encode_rest(call)) + segmenter.finish()
    assert json.loads("".join(s.text for s in segments if s.kind == "arguments")) == arguments
