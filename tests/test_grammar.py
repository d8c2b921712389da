"""Grammars for JSON and tool calls: all output is valid, and computing masks does not change the state."""

import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from mlx_mtp.grammar import Follower, Grammar, Grammars, Tool
from mlx_mtp.rows import RequestError
from mlx_mtp.segments import Segmenter
from mlx_mtp.text import Text

HERE = Path(__file__).resolve().parent
TOOLS = json.loads((HERE / "fixtures" / "schemas" / "tools.json").read_text())
VOCABULARY, EOS = 2048, frozenset({1, 50, 106})
CALL, CALL_END, THOUGHT, THOUGHT_END = 48, 49, 100, 101


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.from_dir(HERE.parent / "mlx_mtp" / "data" / "tiny" / "target")


@pytest.fixture(scope="module")
def grammars(text) -> Grammars:
    return Grammars(text, VOCABULARY, EOS)


def allowed(mask: np.ndarray) -> list[int]:
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCABULARY])[0].tolist()


def may_follow(follower: Follower) -> list[int]:
    return allowed(follower.masks([])[0])


def follows(grammar: Grammar, tokens: list[int]) -> bool:
    """Whether the grammar accepts these tokens and may end after them."""
    follower = grammar.begin()
    for token in tokens:
        if token not in may_follow(follower):
            return False
        follower.advance([token])
    return bool(EOS & set(may_follow(follower)))


def walk(grammar: Grammar, seed: int, most: int = 600) -> list[int] | None:
    """Random output that the grammar allows, or None if it does not end within `most` tokens."""
    choose, follower, out = random.Random(seed), grammar.begin(), []
    for _ in range(most):
        tokens = may_follow(follower)
        if EOS & set(tokens) and choose.random() < 0.7:
            return out
        # Prefer closing markers, so that strings stay short.
        closing = [token for token in tokens if token in (52, CALL_END, 364)]
        out.append(choose.choice(closing if closing and choose.random() < 0.3 else tokens))
        follower.advance(out[-1:])
    return None


@pytest.mark.parametrize("name", TOOLS)
def test_all_output_of_a_grammar_is_valid(text, grammars, name):
    schema = TOOLS[name]
    calls = grammars.calls([Tool(name, schema, strict=True)], must=True, several=False)
    answer, ended = grammars.json(schema), 0
    for seed in range(2):
        if (tokens := walk(calls, seed)) is not None:
            segmenter = Segmenter(text)
            segments = segmenter.push(tokens) + segmenter.finish()
            assert [s.text for s in segments if s.kind == "call"] == [name]
            written = "".join(s.text for s in segments if s.kind == "arguments")
            jsonschema.validate(json.loads(written), schema)
            ended += 1
        if (tokens := walk(answer, seed)) is not None:
            jsonschema.validate(json.loads(text.decode(tokens)), schema)
            ended += 1
    assert ended >= 2


VALUES = {
    "type": "object",
    "properties": {
        "any": True,
        "list": {"type": "array", "maxItems": 2},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        "tree": {"$ref": "#/$defs/tree"},
        "one": {"enum": ['say "hi"\\\n', 3, None, [1, "x"], {"k": True, "a": ""}]},
        "x:y, z": {"const": "<{[,:]}>"},
        "code": {"type": "string", "pattern": "^a+/b$"},
        "all": {"allOf": [{"type": "boolean"}]},
        "no": False,
    },
    "required": ["one"],
    "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "n": {"type": "null"}}}},
}


def test_all_kinds_of_values_are_generated_and_parsed_back(text, grammars):
    grammar, ended = grammars.calls([Tool("f", VALUES, strict=True)], must=True, several=False), set()
    for seed in range(30):
        tokens = walk(grammar, seed, 250)
        if tokens is None:
            continue
        segmenter = Segmenter(text)
        segments = segmenter.push(tokens) + segmenter.finish()
        for call in range(segmenter.calls):
            value = json.loads("".join(s.text for s in segments if s.kind == "arguments" and s.call == call))
            jsonschema.validate(value, VALUES)
            ended |= value.keys()
    assert ended == set(VALUES["properties"]) - {"no"}


def test_draft_masks_equal_masks_token_by_token(text, grammars):
    grammar = grammars.json(TOOLS["get_weather"])
    tokens = text.encode_rest('{"city": "Oslo", "unit": "celsius"}')
    follower, one_by_one = grammar.begin(), []
    for token in [*tokens, 106]:
        one_by_one.append(follower.masks([])[0].copy())
        follower.advance([token])
    for begin in (0, 3):
        follower = grammar.begin()
        follower.advance(tokens[:begin])
        masks = follower.masks([*tokens[begin:], 106])
        assert [allowed(m) for m in masks[:-1]] == [allowed(m) for m in one_by_one[begin:]]
        assert len(allowed(masks[-1])) == VOCABULARY  # after the end
        assert may_follow(follower) == allowed(one_by_one[begin])  # the state has not changed
    assert set(allowed(one_by_one[-1])) == EOS and not follower.failed


def test_everything_is_allowed_after_an_invalid_draft_token(text, grammars):
    follower = grammars.json(TOOLS["get_weather"]).begin()
    masks = follower.masks([*text.encode_rest("{"), CALL, *text.encode_rest("x")])
    assert [len(allowed(m)) == VOCABULARY for m in masks] == [False, False, True, True]


def test_forced_tokens_are_the_only_allowed_tokens(text, grammars):
    follower = grammars.calls([Tool("read_file", TOOLS["read_file"])], must=True, several=False).begin()
    follower.advance([CALL])
    forced = follower.forced(100)
    assert text.decode(forced).startswith("call:read_file{")
    for mask, token in zip(follower.masks(forced), forced, strict=False):
        assert allowed(mask) == [token]
    assert follower.forced(2) == forced[:2] and follower.forced(0) == []


def test_reasoning_may_come_first_if_the_prompt_allows_it(text, grammars):
    thought, answer = [THOUGHT, *text.encode_rest("thought\nhm"), THOUGHT_END], text.encode_rest('{"a": 1}')
    for kind, fits in {
        "none": (True, False, False),
        "may": (True, True, False),
        "open": (False, False, True),
    }.items():
        grammar = grammars.json(None, kind)
        seen = [follows(grammar, t) for t in (answer, thought + answer, thought[1:] + answer)]
        assert tuple(seen) == fits


def test_calls_may_be_required_or_optional(text, grammars):
    tools = [Tool("f", TOOLS["classify"], strict=True), Tool("g", {})]
    written = '<|tool_call>call:f{confidence:1,label:<|"|>ham<|"|>}<tool_call|>'
    call, words = text.encode_rest(written), text.encode_rest("I think")
    wrong = text.encode_rest(written.replace("ham", "eggs"))
    other = text.encode_rest("<|tool_call>call:g{}<tool_call|>")
    for options, fits in {
        (True, True): (False, True, True, False, False),
        (True, False): (False, True, False, False, False),
        (False, True): (True, True, True, True, False),
        (False, False): (True, True, False, True, False),
    }.items():
        grammar = grammars.calls(tools, must=options[0], several=options[1])
        seen = [follows(grammar, t) for t in (words, call, call + other, words + call + words, words + wrong)]
        assert tuple(seen) == fits


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "array", "uniqueItems": True}, "has uniqueItems, which is not supported in strict mode"),
        ({"not": {}, "type": "string"}, "has not,"),
        ({"pattern": "^a|b", "type": "string"}, "pattern with an anchor"),
        ({"pattern": "a", "maxLength": 3, "type": "string"}, "pattern together with"),
        ({"$ref": "#/$defs/nothing"}, "'#/\\$defs/nothing' not found"),
        ({"pattern": "(?=x)", "type": "string"}, "the tools cannot be honoured: .*look-around"),
        ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "has allOf"),
    ],
)
def test_strict_tools_reject_unsupported_keywords(grammars, schema, complaint):
    tool = Tool("f", {"type": "object", "properties": {"a": schema}}, strict=True)
    with pytest.raises(RequestError, match=complaint) as caught:
        grammars.calls([tool], must=True)
    assert "\n" not in str(caught.value)


def test_other_tools_ignore_unsupported_keywords(text, grammars):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "null"}}}}
    grammar = grammars.calls([Tool("f", schema)], must=True)
    assert follows(grammar, text.encode_rest("<|tool_call>call:f{a:[null,null]}<tool_call|>"))
    assert not follows(grammar, text.encode_rest("<|tool_call>call:f{a:[1]}<tool_call|>"))


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"not": {}}, 'the JSON schema cannot be honoured: Unimplemented keys: \\["not"\\]'),
        ({"type": "strin"}, "Invalid type: strin"),
        ([], "is a list; expected an object"),
    ],
)
def test_invalid_json_schema_raises_a_one_line_error(grammars, schema, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        grammars.json(schema)
    assert "\n" not in str(caught.value)


def test_grammar_is_compiled_once(grammars):
    assert grammars.json(TOOLS["edit"]) is grammars.json(dict(TOOLS["edit"]))
    assert grammars.json(TOOLS["edit"]) is not grammars.json(TOOLS["edit"], "may")
