"""Tokens to reasoning, answer and tool calls; stop strings; how requests turn on thinking."""

import json
import shutil
from pathlib import Path

import pytest
from servers import TINY, chunks, running

from mlx_mtp.rows import Stats, TokenLogprob
from mlx_mtp.segments import Segment
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat
from mlx_mtp.server.decoding import OutputDecoder
from mlx_mtp.server.openai_form import ChatForm
from mlx_mtp.text import Text

THOUGHT = "<|channel>thought\nlet me see.\n\nright<channel|>The answer"
TEMPLATES = sorted((Path(__file__).parent / "fixtures" / "templates").glob("*.jinja"))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}<|turn>model\n"
    "{% if enable_thinking %}<|channel>thought\n{% endif %}{{ mark | default('') }}"
)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.from_dir(Path(TINY[0]))


def decoder_of(text: Text, prompt: tuple[int, ...] = (2,), **fields) -> OutputDecoder:
    """Of a chat, unless `messages` is None."""
    return OutputDecoder(text, GenerationRequest(**{"messages": (), **fields}), prompt)


def segments_of(decoder: OutputDecoder, text: Text, output: str) -> tuple[Segment, ...]:
    """The segments of an output that ends with an end token."""
    return decoder.push(text.encode_rest(output), reason="stop").segments


def test_reasoning_and_answer_are_separated(text):
    decoder = decoder_of(text)
    segments = segments_of(decoder, text, THOUGHT)
    assert segments == (Segment("reasoning", "let me see.\n\nright"), Segment("answer", "The answer"))
    inside = text.encode_rest(THOUGHT)
    assert decoder.finish(Stats(), "stop").reasoning_tok == inside.index(text.id_of("<channel|>")) + 1


def test_segments_do_not_depend_on_how_tokens_arrive(text):
    decoder, answer = decoder_of(text), ""
    for token in text.encode_rest(THOUGHT):
        answer += "".join(s.text for s in decoder.push([token]).segments if s.kind == "answer")
    assert answer + "".join(s.text for s in decoder.push([], reason="stop").segments) == "The answer"


def test_empty_reasoning_leaves_no_segment(text):
    assert segments_of(decoder_of(text), text, "<|channel>thought\n<channel|>Yes") == (Segment("answer", "Yes"),)


def test_an_output_may_begin_or_end_inside_reasoning(text):
    inside = tuple(text.encode("<|turn>model\n<|channel>thought\n"))
    reasoning = Segment("reasoning", "so")
    assert segments_of(decoder_of(text, inside), text, "so<channel|>yes") == (reasoning, Segment("answer", "yes"))
    assert segments_of(decoder_of(text), text, "<|channel>thought\nso") == (reasoning,)


def test_outside_of_chats_all_text_is_answer(text):
    plain = (Segment("answer", text.decode(text.encode(THOUGHT))),)
    assert segments_of(decoder_of(text, messages=None), text, THOUGHT) == plain
    assert segments_of(decoder_of(text, reply_prefix="so"), text, THOUGHT) == plain


def test_stop_strings_end_the_answer_but_not_the_reasoning(text):
    decoder = decoder_of(text, stop=("\n\n", "answ", "er"))
    segments = segments_of(decoder, text, THOUGHT)
    assert segments == (Segment("reasoning", "let me see.\n\nright"), Segment("answer", "The "))
    assert decoder.finish(Stats(), "stop").stop == "answ" and decoder.tokens < len(text.encode_rest(THOUGHT))


def test_after_its_time_limit_an_output_ends_with_its_line(text):
    output = "a = 1\nb = 2\nc = 3"
    for limit_s, shown, reason in ((0.0, "a = 1\n", "length"), (3600.0, output, None), (None, output, None)):
        decoder = decoder_of(text, messages=None, time_limit_s=limit_s)
        segments = decoder.push(text.encode_rest(output)).segments
        assert decoder.reason == reason
        segments += () if reason else decoder.push([], reason="length").segments
        assert "".join(segment.text for segment in segments) == shown
        assert decoder.finish(Stats(), "length").loop_tok is None


def test_log_probabilities_belong_to_the_answer_only(text):
    decoder, shown = decoder_of(text), []
    tokens = [*text.encode_rest(THOUGHT), text.id_of("<turn|>")]
    for token in tokens:
        shown += decoder.push([token], [TokenLogprob(token, -1.0)]).logprobs
    assert b"".join(text.spell(one.token) for one in shown) == b"The answer"


CALLS = '<|tool_call>call:look{at:<|"|>a<|"|>}<tool_call|><|tool_call>call:leave{}<tool_call|>'


def test_tool_calls_are_separated_and_can_be_limited_to_one(text):
    decoder = decoder_of(text)
    segments = decoder.push(text.encode_rest("ok" + CALLS)).segments
    assert [segment.kind for segment in segments] == ["answer", "call", "arguments", "end", "call", "arguments", "end"]
    assert decoder.finish(Stats(), "stop").calls == 2 and decoder.reason is None
    decoder = decoder_of(text, response_format=ResponseFormat(parallel_tool_calls=False))
    segments = decoder.push(text.encode_rest("ok" + CALLS)).segments
    finish = decoder.finish(Stats(), "stop")
    assert segments[-1] == Segment("end", "", 0) and finish.calls == 1
    assert decoder.reason == "stop" and finish.stop is None


def test_the_spellings_of_tokens_join_to_the_text(text):
    output = "def f(x):\n    return 'äß€😀'"
    assert b"".join(text.spell(token) for token in text.encode_rest(output)).decode() == output


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_published_templates_think_only_when_a_request_says_so(template, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY[0]) / name, tmp_path / name)
    shutil.copy(template, tmp_path / "chat_template.jinja")
    text = Text.from_dir(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    for fields, on in (({}, False), ({"reasoning_effort": "high"}, True), ({"enable_thinking": True}, True)):
        request = ChatForm.model_validate({"messages": messages, **fields}).request()
        prompt = tuple(text.chat(list(request.messages), options=request.template_options()))
        assert (text.id_of("<|think|>") in prompt) is on, fields
        segments = segments_of(OutputDecoder(text, request, prompt), text, THOUGHT if on else "The answer")
        assert segments[-1] == Segment("answer", "The answer") and len(segments) == 1 + on


# over HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinker") / "target"
    shutil.copytree(TINY[0], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    drafter = Path(TINY[0]).parent / "drafter"
    with running((str(folder), str(drafter)), max_tokens=24) as live:
        yield live


def test_thinking_is_off_unless_one_of_its_fields_turns_it_on(live):
    for fields, on in (
        ({}, False),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "high"}, True),
    ):
        answer = live.chat("def f():", max_tokens=6, temperature=0, **fields).json()
        message = answer["choices"][0]["message"]
        assert ("reasoning_content" in message) is on and (message["content"] == "") is on, fields
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == (6 if on else 0)


def test_bodies_and_streams_have_reasoning_then_answer(live):
    end = live.pair.text.id_of("<channel|>")
    fields = {"enable_thinking": True, "temperature": 1.0, "logit_bias": {str(end): 10}}
    for seed in range(8, 40):
        message = live.chat("def f():", seed=seed, **fields).json()["choices"][0]["message"]
        if message.get("reasoning_content") and message["content"]:
            break
    else:
        raise AssertionError("no output had both")
    body = {"messages": [{"role": "user", "content": "def f():"}], "seed": seed, **fields}
    deltas = [c["choices"][0]["delta"] for c in chunks(live.lines("/v1/chat/completions", **body))]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    kinds = [next(iter(delta)) for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, key=["reasoning_content", "content"].index)


def test_template_variables_reach_the_template(live):
    plain, marked = (
        live.chat("a", max_tokens=1, chat_template_kwargs=more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"mark": "hello hello"})
    )
    assert marked > plain


def test_a_checkpoint_without_a_chat_template_refuses_chats(tmp_path):
    shutil.copytree(TINY[0], tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    with running((str(tmp_path / "target"), None), num_draft_tokens=0) as live:
        answer = live.chat("hello")
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
        assert live.complete("hello", max_tokens=2).status_code == 200
