"""Reasoning, answers and tool calls are parsed from generated tokens, well-formed or not."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.segments import Marker, Segment, Segmenter
from mlx_mtp.text import Text

TINY = Path(__file__).resolve().parent.parent / "mlx_mtp" / "data" / "tiny" / "target"
MARKERS = re.compile("(" + "|".join(re.escape(marker.value) for marker in Marker) + ")")
TOOLS = {
    "read": {"properties": {"path": {"type": "string"}, "line": {"type": "integer"}}, "required": ["path"]},
    "fs.write-file": {},
}


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.from_dir(TINY)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Text:
    """A tokenizer without tokens for Gemma's markers."""
    folder = tmp_path_factory.mktemp("plain")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    raw = json.loads((TINY / "tokenizer.json").read_text())
    gone = {marker.value for marker in Marker} | {"<|turn>"}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in gone]
    raw["model"]["vocab"] = {f"gone{i}" if t in gone else t: i for t, i in raw["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return Text.from_dir(folder)


def tokens_of(text: Text, written: str, size: int = 1000) -> list[int]:
    """Token ids of model output. Ordinary text is encoded `size` characters at a time."""
    out = []
    for part in MARKERS.split(written):
        marker = text.id_of(part) if MARKERS.fullmatch(part) else None
        pieces = [part[i : i + size] for i in range(0, len(part), size)]
        out += [marker] if marker is not None else [t for piece in pieces for t in text.encode_rest(piece)]
    return out


def joined(segments: list[Segment]) -> list[tuple[str, str]]:
    """(kind, text), with adjacent segments joined. A call is ("name", arguments), or ("name!", ...) if still open."""
    out: list[tuple[str, str]] = []
    for segment in segments:
        if segment.kind == "call":
            out.append((segment.text + "!", ""))
        elif segment.kind == "end":
            out[-1] = (out[-1][0].removesuffix("!"), out[-1][1])
        elif segment.kind == "arguments" or (out and out[-1][0] == segment.kind):
            out[-1] = (out[-1][0], out[-1][1] + segment.text)
        else:
            out.append((segment.kind, segment.text))
    return out


def parse(
    text: Text, written: str, cuts: tuple[int, ...] = (), size: int = 1000, complete: bool = True, **options
) -> list[tuple[str, str]]:
    segmenter, tokens, out = Segmenter(text, **options), tokens_of(text, written, size), []
    borders = [0, *sorted({min(cut, len(tokens)) for cut in cuts}), len(tokens)]
    for begin, end in zip(borders, borders[1:], strict=False):
        out += segmenter.push(tokens[begin:end])
    return joined(out + segmenter.finish(complete))


CALL = '<|tool_call>call:read{path:<|"|>a b<|"|>,line:3}<tool_call|>'
READ = ("read", '{"path":"a b","line":3}')
CASES = {
    "an answer": ("Hello\n there ", [("answer", "Hello\n there ")]),
    "a thought and an answer": (
        "<|channel>thought\nHm, yes.\n<channel|>Hi",
        [("reasoning", "Hm, yes."), ("answer", "Hi")],
    ),
    "stray line breaks": (
        "<|channel>thought\n\n\na\n\nb\n\n<channel|>\n\nHi\n",
        [("reasoning", "a\n\nb"), ("answer", "Hi\n")],
    ),
    "an empty thought": ("<|channel>thought\n<channel|>Hi", [("answer", "Hi")]),
    "an empty thought without a line break": ("<|channel>thought<channel|>Hi", [("answer", "Hi")]),
    "a thought without a name": ("<|channel>though I say<channel|>", [("reasoning", "though I say")]),
    "a longer channel name": ("<|channel>thoughtful\n<channel|>", [("reasoning", "thoughtful")]),
    "an open thought": ("<|channel>thought\nand then", [("reasoning", "and then")]),
    "two thoughts": ("<|channel>thought\na<|channel>thought\nb<channel|>c", [("reasoning", "a\nb"), ("answer", "c")]),
    "a thought end without a thought": ("a<channel|>b", [("answer", "ab")]),
    "a call": (CALL, [READ]),
    "text, a call, text": (f"I look.\n{CALL}\nSo", [("answer", "I look.\n"), READ, ("answer", "\nSo")]),
    "two calls": (f"{CALL}\n{CALL}", [READ, READ]),
    "two calls between one pair of markers": (
        "<|tool_call>call:read{path:a},\ncall:other{}<tool_call|>",
        [("read", '{"path":"a"}'), ("other", "{}")],
    ),
    "a thought, then a call": (f"<|channel>thought\nx\n<channel|>{CALL}", [("reasoning", "x"), READ]),
    "a call inside an open thought": (f"<|channel>thought\nLet's go.{CALL}", [("reasoning", "Let's go."), READ]),
    "a call inside a thought": (
        f"<|channel>thought\nx{CALL}\n<channel|>done",
        [("reasoning", "x"), READ, ("answer", "done")],
    ),
    "no opening marker after a thought": (
        '<|channel>thought\nx<channel|>call:read{path:<|"|>a b<|"|>,line:3}',
        [("reasoning", "x"), READ],
    ),
    "no opening marker at all": ("\n call:fs.write-file{a-b:1}<tool_call|>", [("fs.write-file", '{"a-b":1}')]),
    "no opening marker, unknown tool": ("call:f{x:1}", [("answer", "call:f{x:1}")]),
    "prose about calls": ("I call:read{x} it", [("answer", "I call:read{x} it")]),
    "almost a call": ("call:read me", [("answer", "call:read me")]),
    "no word call": ("<|tool_call>read{line:1}<tool_call|>", [("read", '{"line":1}')]),
    "a colon without the word": ("<|tool_call>:read{line:1}<tool_call|>", [("read", '{"line":1}')]),
    "a tool named call": ("<|tool_call>call{a:1}<tool_call|>", [("call", '{"a":1}')]),
    "dots, hyphens and colons in names": ("<|tool_call>call:a.b:c-d{}<tool_call|>", [("a.b:c-d", "{}")]),
    "a colon before the arguments": ("<|tool_call>call:read:{line:1}<tool_call|>", [("read", '{"line":1}')]),
    "round brackets": (
        '<|tool_call>call:read(path="a", line=2)<tool_call|>',
        [("read", '{"path":"a","line":2}')],
    ),
    "a call without arguments": ("<|tool_call>call:read<tool_call|>", [("read", "{}")]),
    "an extra bracket": ("<|tool_call>call:read{line:1}}<tool_call|>Hi", [("read", '{"line":1}'), ("answer", "Hi")]),
    "an open call": ('<|tool_call>call:read{path:<|"|>a', [("read", '{"path":"a"}')]),
    "an open string": ('<|tool_call>call:read{path:<|"|>a<tool_call|>', [("read", '{"path":"a"}')]),
    "a call inside an open call": (f"<|tool_call>call:f{{a:[1{CALL}", [("f", '{"a":[1]}'), READ]),
    "text without quotes": ("<|tool_call>call:f{a:it is, well, so}<tool_call|>", [("f", '{"a":"it is, well, so"}')]),
    "not a call": ("<|tool_call>I would call it<tool_call|>", [("answer", "I would call it")]),
    "an object that is not a call": ('<|tool_call>{"name":1}<tool_call|>', [("answer", '{"name":1}')]),
    "a marker within a string": (
        '<|tool_call>call:f{a:<|"|>x<|channel>y<|tool_call>z<|"|>}<tool_call|>',
        [("f", '{"a":"x<|channel>y<|tool_call>z"}')],
    ),
    "a quotation mark in an answer": ('say <|"|>x<|"|>', [("answer", 'say <|"|>x<|"|>')]),
    "arguments by position": (
        "call:read:\nBEGIN_ARG:\n<|channel>thought\n<channel|>ls -l\nEND_ARG\n<|channel>thought\n<channel|>"
        "BEGIN_ARG:\n12\nEND_ARG\n<|tool_call>call:f:\nBEGIN_ARG:\nx\ny\nEND_ARG",
        [("read", '{"path":"ls -l","line":12}'), ("f", '{"argument_0":"x\\ny"}')],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_model_output_is_parsed(text, plain, name):
    written, expected = CASES[name]
    assert parse(text, written, tools=TOOLS) == expected
    every = tuple(range(1000))
    assert parse(text, written, every, 1, tools=TOOLS) == expected
    assert parse(plain, written, tools=TOOLS) == expected
    assert parse(plain, written, every, 1, tools=TOOLS) == expected


def test_text_that_spells_a_marker_stays_text(text):
    tokens = [t for char in CALL + "<|channel>thought\n" for t in text.encode_rest(char)]
    assert not set(tokens) & {48, 49, 52, 100}
    segmenter = Segmenter(text, tools=TOOLS)
    assert joined(segmenter.push(tokens) + segmenter.finish()) == [("answer", CALL + "<|channel>thought\n")]


@pytest.mark.parametrize("which", ["text", "plain"])
def test_prompt_may_end_inside_a_thought(request, which):
    text = request.getfixturevalue(which)
    for prompt, expected in {
        "<|turn>model\n<|channel>thought\n": [("reasoning", "yes"), ("answer", "a")],
        "<|turn>model\n<|channel>": [("reasoning", "yes"), ("answer", "a")],
        "<|turn>user\n<|channel>thought\n<turn|>\n<|turn>model\n": [("answer", "yesa")],
        "<|turn>model\n<|channel>thought\n<channel|>": [("answer", "yesa")],
        "hello": [("answer", "yesa")],
    }.items():
        assert (
            parse(text, "yes\n<channel|>a" if len(expected) == 2 else "yes<channel|>a", prompt=text.encode(prompt))
            == expected
        )


def test_truncated_call_stays_open(text):
    for written, expected in {
        '<|tool_call>call:read{path:<|"|>rm -rf /a': ("read!", '{"path":"rm -rf /a'),
        "<|tool_call>call:read{line:12": ("read!", '{"line":'),
        "<|tool_call>call:re": ("answer", "call:re"),
        CALL: READ,
    }.items():
        assert parse(text, written, complete=False, tools=TOOLS) == [expected]


def test_calls_are_numbered_and_arguments_are_streamed(text):
    segmenter = Segmenter(text, tools=TOOLS)
    seen = []
    for token in tokens_of(text, CALL + "<|tool_call>call:f{}"):
        seen += segmenter.push([token])
    assert [(s.kind, s.call) for s in seen if s.kind in ("call", "end")] == [
        ("call", 0),
        ("end", 0),
        ("call", 1),
        ("end", 1),
    ]
    assert len([s for s in seen if s.kind == "arguments" and s.call == 0]) > 3
    assert segmenter.calls == 2


def test_stop_strings_apply_to_answer_text_only(text):
    written = f"<|channel>thought\nSTOP<channel|>a ST{CALL.replace('a b', 'STOP')}OP one STOP two{CALL}"
    segmenter = Segmenter(text, stops=("STOP",), tools=TOOLS)
    out = segmenter.push(tokens_of(text, written))
    assert segmenter.stop == "STOP"
    assert joined(out + segmenter.finish()) == [
        ("reasoning", "STOP"),
        ("answer", "a ST"),
        ("read", '{"path":"STOP","line":3}'),
        ("answer", "OP one "),
    ]
    assert segmenter.push(tokens_of(text, "more")) == []


def test_reasoning_tokens_are_counted(text):
    written = "<|channel>thought\nso it is<channel|>Hello"
    segmenter = Segmenter(text)
    segmenter.push(tokens_of(text, written))
    assert segmenter.reasoning_tok == len(tokens_of(text, written)) - len(tokens_of(text, "Hello"))


WORDS = ["thought\n", "call:", "read", "f", "BEGIN_ARG:", "END_ARG", "path", "12", " ", "\n", "€", "🙂", "<", "<|", "x"]
SOUP = st.lists(st.sampled_from([*(m.value for m in Marker), *WORDS, *"{}():,=[]\"'\\"]), max_size=24).map("".join)


@given(SOUP, st.lists(st.integers(0, 60), max_size=8), st.sampled_from([(), ("12x",), ("<|", "\n")]), st.booleans())
def test_parse_does_not_depend_on_the_split(text, plain, written, cuts, stops, complete):
    for one in (text, plain):
        whole = parse(one, written, complete=complete, stops=stops, tools=TOOLS)
        assert parse(one, written, tuple(cuts), complete=complete, stops=stops, tools=TOOLS) == whole
        assert parse(one, written, tuple(cuts), 1, complete=complete, stops=stops, tools=TOOLS) == whole


@given(SOUP)
def test_every_complete_call_has_an_arguments_object(text, written):
    for kind, arguments in parse(text, written, tools=TOOLS):
        if kind not in ("answer", "reasoning"):
            assert not kind.endswith("!") and isinstance(json.loads(arguments), dict)


LOSSLESS = st.lists(
    st.sampled_from([*(m.value for m in Marker), "thought\n", "call:", "f{", "read{", "}", ":", "W", "W"]), max_size=16
)


@given(LOSSLESS)
def test_no_word_is_lost(text, pieces):
    words = iter(f" w{i}e " for i in range(100))
    written = "".join(next(words) if piece == "W" else piece for piece in pieces)
    shown = "".join(kind + part for kind, part in parse(text, written, tools=TOOLS))
    assert [w for w in re.findall(r"w\d+e", written) if w not in shown] == []
