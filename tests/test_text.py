"""Chat templates, encoding, incremental decoding and stop strings."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.rows import CheckpointError, RequestError
from mlx_mtp.text import Detokenizer, StopStrings, Text

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "mlx_mtp" / "data" / "tiny"
EDGE = HERE / "fixtures" / "oracle" / "seed0" / "edge" / "target"

TALK = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "  a\n b "},
    {"role": "assistant", "content": "zz"},
    {"role": "user", "content": [{"type": "text", "text": "你好 🙂 "}]},
]
# Recorded from transformers 5.22.2, AutoTokenizer.apply_chat_template.
TALK_RENDERED = (
    "<bos><|turn>system\nbe<turn|>\n<|turn>user\na\n b<turn|>\n<|turn>model\nzz<turn|>\n<|turn>user\n你好 🙂<turn|>\n"
)

# Features that templates on the hub use: trimmed blocks, namespaces, macros, loop controls, filters, training marks.
RICH_TEMPLATE = """\
{%- macro turn(role, body) -%}
<|turn>{{ role }}
{{ body }}<turn|>
{% endmacro -%}
{{ bos_token }}
{%- set ns = namespace(seen=0) %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% generation %}{{ turn(m.role, m.content) }}{% endgeneration %}
    {% if ns.seen == 2 %}{% break %}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if enable_thinking is defined and enable_thinking %}<|think|>{% endif %}
"""
RICH_OPTIONS = {"enable_thinking": True, "tools": [{"name": "a<b>&'é", "n": 1}]}
RICH_TALK = [{"role": "system", "content": "s"}] + [{"role": "user", "content": f"u{i}"} for i in range(3)]
# Recorded from transformers 5.22.2 too.
RICH_RENDERED = (
    "<bos><|turn>user\nu0<turn|>\n<|turn>user\nu1<turn|>\n"
    """[{"name": "a<b>&'é", "n": 1}]<|think|>"""
)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.from_dir(TINY / "target")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tokenizer files that a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "target" / name, tmp_path / name)
    return tmp_path


def set_config(checkpoint, **changes):
    file = checkpoint / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_encode_adds_exactly_one_bos(text):
    assert text.encode("hi") == [2, 345, 346]
    assert text.encode("<bos>hi") == [2, 345, 346]
    assert text.encode("hi<bos>") == [2, 345, 346, 2]


def test_conversation_renders_as_in_transformers(text):
    assert text.render(TALK, add_generation_prompt=False) == TALK_RENDERED
    assert text.render(TALK) == TALK_RENDERED + "<|turn>model\n"
    ids = text.chat(TALK)
    assert ids.count(2) == 1 and ids[0] == 2
    assert ids.count(105) == 5 and ids.count(106) == 4


def test_recorded_reference_conversation_is_reproduced():
    example = json.loads((EDGE.parent / "meta.json").read_text())["tokenizer_example"]
    text = Text.from_dir(EDGE)
    assert text.render(example["chat"]) == example["rendered"]
    assert text.chat(example["chat"]) == example["chat_ids"]
    assert text.encode(example["text"]) == [2, *example["ids"]]
    assert text.decode(example["ids"]) == example["text"]


def test_templates_have_the_environment_of_transformers(checkpoint):
    (checkpoint / "chat_template.jinja").write_text(RICH_TEMPLATE)
    rich = Text.from_dir(checkpoint)
    assert rich.render(RICH_TALK, options=RICH_OPTIONS) == RICH_RENDERED


def test_template_is_found_in_every_supported_place(checkpoint):
    set_config(checkpoint, chat_template="C")
    assert Text.from_dir(checkpoint).render(TALK, add_generation_prompt=False) == TALK_RENDERED
    (checkpoint / "chat_template.jinja").unlink()
    set_config(checkpoint, chat_template="C")
    assert Text.from_dir(checkpoint).render(TALK) == "C"
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    set_config(checkpoint, chat_template=named)
    assert Text.from_dir(checkpoint).render(TALK) == "D"
    set_config(checkpoint, chat_template=None)
    (checkpoint / "chat_template.json").write_text('{"chat_template": "J"}')
    assert Text.from_dir(checkpoint).render(TALK) == "J"


def test_special_tokens_may_be_objects(checkpoint):
    set_config(checkpoint, bos_token={"content": "<mask>", "special": True})
    assert Text.from_dir(checkpoint).encode("hi") == [4, 345, 346]


def test_base_model_without_template_rejects_chat(checkpoint):
    (checkpoint / "chat_template.jinja").unlink()
    set_config(checkpoint, chat_template=None)
    base = Text.from_dir(checkpoint)
    assert not base.has_template
    with pytest.raises(RequestError, match="no chat template"):
        base.chat(TALK)
    assert base.encode("hi") == [2, 345, 346]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty"),
        (["hi"], "message 0 is a str"),
        ([{"content": "x"}], "role None"),
        ([{"role": "king", "content": "x"}], "role 'king'; expected one of assistant"),
        ([{"role": "user"}], "content None; expected text"),
        ([{"role": "user", "content": 3}], "content 3; expected text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "type 'image'"),
    ],
)
def test_invalid_messages_raise_one_line_errors(text, messages, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        text.render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["", None, "\ud800"])
def test_invalid_prompts_are_rejected(text, prompt):
    with pytest.raises(RequestError):
        text.encode(prompt)


def test_template_errors_become_request_errors(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        Text.from_dir(checkpoint).render(TALK)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", '{"model": ', "cannot be read"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("chat_template.jinja", "{% for", "chat template is broken"),
    ],
)
def test_broken_tokenizer_files_raise_one_line_errors(checkpoint, file, content, complaint):
    (checkpoint / file).unlink() if content is None else (checkpoint / file).write_text(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Text.from_dir(checkpoint).render(TALK)
    assert "\n" not in str(caught.value)


def test_templates_cannot_access_python_objects(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError):
        Text.from_dir(checkpoint).render(TALK)


TOKEN_GROUPS = [[*range(5), 105], range(240, 256), range(2048)]  # special tokens, byte tokens, all tokens


@given(st.lists(st.lists(st.one_of(*map(st.sampled_from, TOKEN_GROUPS)), max_size=6), max_size=12))
def test_incremental_decoding_equals_decoding_at_once(text, pieces):
    stream = Detokenizer(text)
    shown = [stream.push(piece) for piece in pieces] + [stream.finish()]
    assert "".join(shown) == text.decode([token for piece in pieces for token in piece])
    assert stream.finish() == ""


def test_multi_token_character_is_shown_whole(text):
    ids = text.encode("a€ b")[1:]
    assert len(ids) > 4
    stream = Detokenizer(text)
    shown = [stream.push([token]) for token in ids] + [stream.finish()]
    assert [part for part in shown if part] == ["a", "€ b"]


def test_special_tokens_are_never_shown(text):
    stream = Detokenizer(text)
    assert stream.push([2, 105, 345, 106, 1]) + stream.finish() == "h"
    assert text.decode([2, 105, 345, 106, 1]) == "h"


class CountingText(Text):
    """Counts the tokens that it checks and decodes."""

    checked = decoded = 0

    def depends_on_next(self, token: int) -> bool:
        self.checked += 1
        return super().depends_on_next(token)

    def decode(self, tokens) -> str:
        self.decoded += len(tokens)
        return super().decode(tokens)


@pytest.mark.parametrize("piece", ["h", "\0", "a€ b"])
def test_every_token_is_decoded_once(piece):
    text = CountingText.from_dir(TINY / "target")
    tokens = text.encode(piece)[1:] * 1000
    stream = Detokenizer(text)
    for token in tokens:
        stream.push([token])
    stream.finish()
    assert text.decoded == text.checked == len(tokens)


def test_final_text_is_shown_immediately(text):
    ids = text.encode("return self._value\n    €")[1:]
    stream = Detokenizer(text)
    assert stream.push(ids) == "return self._value\n    "
    assert stream.finish() == "€"


def test_unknown_decoder_shows_all_text_at_the_end(checkpoint):
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["decoder"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = Text.from_dir(checkpoint)
    ids = other.encode("def f(x): return x")
    stream = Detokenizer(other)
    assert "".join(stream.push([token]) for token in ids) + stream.finish() == other.decode(ids)


def first_stop(whole: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Reference: read character by character and cut at the stop string that is completed first."""
    for end in range(1, len(whole) + 1):
        starts = [end - len(stop) for stop in stops if whole[:end].endswith(stop)]
        if starts:
            return whole[: min(starts)], True
    return whole, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=2, max_size=4), max_size=3).map(tuple),
)
def test_stop_position_does_not_depend_on_the_split(pieces, stops):
    stream = StopStrings(stops)
    shown, stopped = "", False
    for piece in pieces:
        safe, stopped = stream.push(piece)
        shown += safe
        if stopped:
            break
    shown += stream.finish()
    assert (shown, stopped) == first_stop("".join(pieces), stops)


def test_text_waits_only_while_a_stop_string_may_complete():
    stream = StopStrings(("\n\n",))
    assert stream.push("a\n") == ("a", False)
    assert stream.push("b") == ("\nb", False)
    assert stream.push("c\n\nd") == ("c", True)
    assert stream.finish() == ""
    assert StopStrings(()).push("anything") == ("anything", False)


@pytest.mark.parametrize("stops", [("",), (3,)])
def test_stop_strings_must_be_nonempty_strings(stops):
    with pytest.raises(RequestError, match="stop is"):
        StopStrings(stops)
