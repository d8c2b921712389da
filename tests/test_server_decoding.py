"""Thoughts apart from the answer, stop strings in the answer only; thinking as requests select it."""

import json
import shutil
from pathlib import Path

import pytest
from servers import TINY, chunks, running

from mlx_mtp.rows import GREEDY, TokenLogprob
from mlx_mtp.segments import Segment
from mlx_mtp.server.decoding import Decoder, joined
from mlx_mtp.server.nouns import Job
from mlx_mtp.server.openai_form import ChatForm, plain_messages
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


def job(prompt: tuple[int, ...] = (2,), **fields) -> Job:
    return Job(prompt, 99, GREEDY, **{"splits": True, **fields})


def parts_of(text: Text, job: Job, said: str) -> tuple[tuple[Segment, ...], Decoder]:
    decoder, parts = Decoder(text, job), []
    for token in text.encode_rest(said):
        parts += decoder.push([token])[0]
        if decoder.ended:
            break
    return joined(parts if decoder.ended else [*parts, *decoder.finish(complete=True)]), decoder


def test_a_thought_is_told_apart_without_its_name(text):
    parts, decoder = parts_of(text, job(), THOUGHT)
    assert parts == (Segment("reasoning", "let me see.\n\nright"), Segment("answer", "The answer"))
    inside = text.encode_rest(THOUGHT)
    assert decoder.reasoning_tok == inside.index(text.id_of("<channel|>")) + 1


def test_an_empty_thought_is_nothing(text):
    assert parts_of(text, job(), "<|channel>thought\n<channel|>Yes")[0] == (Segment("answer", "Yes"),)


def test_a_text_may_begin_inside_a_thought_and_end_there(text):
    inside = tuple(text.encode("<|turn>model\n<|channel>thought\n"))
    assert parts_of(text, job(inside), "so<channel|>yes")[0] == (Segment("reasoning", "so"), Segment("answer", "yes"))
    assert parts_of(text, job(), "<|channel>thought\nso")[0] == (Segment("reasoning", "so"),)


def test_where_nothing_is_split_all_text_is_answer(text):
    assert parts_of(text, job(splits=False), THOUGHT)[0] == (Segment("answer", text.decode(text.encode(THOUGHT))),)


def test_stop_strings_end_the_answer_and_not_a_thought(text):
    parts, decoder = parts_of(text, job(stop=("\n\n", "answ", "er")), THOUGHT)
    assert parts == (Segment("reasoning", "let me see.\n\nright"), Segment("answer", "The "))
    assert decoder.stop == "answ" and decoder.tokens < len(text.encode_rest(THOUGHT))


def test_a_text_that_is_late_ends_with_its_line(text):
    said = "a = 1\nb = 2\nc = 3"
    for hurry_s, shown, cut in ((0.0, "a = 1\n", True), (3600.0, said, False), (None, said, False)):
        decoder = Decoder(text, job(splits=False, hurry_s=hurry_s))
        parts = [*decoder.push(text.encode_rest(said))[0], *decoder.finish(complete=False)]
        assert ("".join(part.text for part in parts), decoder.cut) == (shown, cut)
        assert not decoder.ended and decoder.loop_tok is None


def test_log_probabilities_are_of_the_answers_tokens_alone(text):
    decoder, shown = Decoder(text, job()), []
    tokens = [*text.encode_rest(THOUGHT), text.id_of("<turn|>")]
    for token in tokens:
        shown += decoder.push([token], [TokenLogprob(token, -1.0)])[1]
    assert b"".join(text.spell(one.token) for one in shown) == b"The answer"


CALLS = '<|tool_call>call:look{at:<|"|>a<|"|>}<tool_call|><|tool_call>call:leave{}<tool_call|>'


def test_tool_calls_are_told_apart_and_may_be_limited_to_one(text):
    parts, decoder = parts_of(text, job(), "ok" + CALLS)
    assert [part.kind for part in parts] == ["answer", "call", "arguments", "end", "call", "arguments", "end"]
    assert decoder.calls == 2 and not decoder.ended
    parts, decoder = parts_of(text, job(one_call=True), "ok" + CALLS)
    assert parts[-1] == Segment("end", "", 0) and decoder.calls == 1 and decoder.ended and decoder.stop is None


def test_every_token_is_spelt_as_the_text_has_it(text):
    said = "def f(x):\n    return 'äß€😀'"
    assert b"".join(text.spell(token) for token in text.encode_rest(said)).decode() == said


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_every_published_template_thinks_when_asked_and_only_then(template, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY[0]) / name, tmp_path / name)
    shutil.copy(template, tmp_path / "chat_template.jinja")
    text = Text.from_dir(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    for fields, on in (({}, False), ({"reasoning_effort": "high"}, True), ({"enable_thinking": True}, True)):
        form = ChatForm.model_validate({"messages": messages, **fields})
        prompt = text.chat(plain_messages(form.messages), options=form.options())
        assert (text.id_of("<|think|>") in prompt) is on, fields
        parts, _ = parts_of(text, job(tuple(prompt)), THOUGHT if on else "The answer")
        assert parts[-1] == Segment("answer", "The answer") and len(parts) == 1 + on


# over HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinker") / "target"
    shutil.copytree(TINY[0], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    drafter = Path(TINY[0]).parent / "drafter"
    with running((str(folder), str(drafter)), max_tokens=24) as live:
        yield live


def test_thinking_is_off_unless_asked_for_by_any_of_its_names(live):
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


def test_a_thought_that_ends_is_followed_by_the_answer_in_bodies_and_streams(live):
    end = live.pair.text.id_of("<channel|>")
    fields = {"enable_thinking": True, "temperature": 1.0, "logit_bias": {str(end): 10}}
    for seed in range(8, 40):  # the first that has both with the weights of today
        message = live.chat("def f():", seed=seed, **fields).json()["choices"][0]["message"]
        if message.get("reasoning_content") and message["content"]:
            break
    else:
        raise AssertionError("no text had both")
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


def test_a_checkpoint_without_a_template_refuses_chats(tmp_path):
    shutil.copytree(TINY[0], tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    with running((str(tmp_path / "target"), None), width=0) as live:
        answer = live.chat("hello")
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
        assert live.complete("hello", max_tokens=2).status_code == 200
