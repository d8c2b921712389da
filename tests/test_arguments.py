"""Tool arguments in Gemma 4's format are converted to JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.arguments import QUOTE, ArgumentsParser, json_scalar


def parse(text: str, opening: str = "{", parameters: dict | None = None, size: int = 1000) -> tuple[str, str]:
    """(JSON, text after the arguments), parsed `size` characters at a time. Open arguments are closed at the end."""
    arguments, out, after = ArgumentsParser(opening, parameters), "", ""
    for i, part in enumerate(text.split(QUOTE)):
        if i and not arguments.done:
            arguments.quote_token()
        for at in range(0, len(part), size):
            after += arguments.push(part[at : at + size])
            out += arguments.take()
    if not arguments.done:
        arguments.close()
    return out + arguments.take(), after


Q = QUOTE
VALID = {
    "}": {},
    "a:1}": {"a": 1},
    f"city:{Q}Paris, {{x}}{Q},days:-3.5e1,metric:true,none:null}}": {
        "city": "Paris, {x}",
        "days": -35.0,
        "metric": True,
        "none": None,
    },
    f"a:[1,{Q}x{Q},[],{{b:{Q}{Q}}}],c:{{d:{{}}}}}}": {"a": [1, "x", [], {"b": ""}], "c": {"d": {}}},
    f'text:{Q}"quoted" \\ back\nslash{Q}}}': {"text": '"quoted" \\ back\nslash'},
}
MALFORMED = {
    "file-path:/a/b.c,x.y:1}": {"file-path": "/a/b.c", "x.y": 1},
    f"{Q}a{Q}:1,{Q}b c{Q}:{Q}x{Q}}}": {"a": 1, "b c": "x"},
    '"a":"x\\n\\"q\\" \\u00e9 \\d", "b" : 2 }': {"a": 'x\n"q" é \\d', "b": 2},
    "a:'it\\'s',b:'\\d+'}": {"a": "it's", "b": "\\d+"},
    f"pattern:':\\s*\\w+'{Q},n:1}}": {"pattern": ":\\s*\\w+", "n": 1},  # closed by another quote
    f"content:\n# Title, {{x}}\n{Q},path:{Q}p{Q}}}": {"content": "# Title, {x}\n", "path": "p"},
    f"a:{Q}x{Q} and more ,b:1}}": {"a": "x and more", "b": 1},
    "a:New York, NY,b:2}": {"a": "New York, NY", "b": 2},
    "code:if (x) { return },n:3}": {"code": "if (x) { return }", "n": 3},
    'a:"say "hi" now",b:1}': {"a": 'say "hi" now', "b": 1},
    f"a:foo,{Q}b{Q}:1}}": {"a": "foo", "b": 1},
    "a:1,,b:2,}": {"a": 1, "b": 2},
    "a:,b}": {"a": None, "b": None},
    "a:[1,2,]}": {"a": [1, 2]},
    "a:True,b:None,c:False}": {"a": True, "b": None, "c": False},
    "zip:007,v:1.,w:+5}": {"zip": "007", "v": "1.", "w": "+5"},  # not JSON numbers
    "a:{b:[1,2}}": {"a": {"b": [1, 2]}},
    "a: b : c }": {"a": "b : c"},
    "a:{x:1} ,b:2}": {"a": {"x": 1}, "b": 2},
}


@pytest.mark.parametrize("text", [*VALID, *MALFORMED])
def test_arguments_become_json_for_every_split(text):
    expected = (VALID | MALFORMED)[text]
    for size in (1, 2, 3, 1000):
        out, after = parse(text + "after", size=size)
        assert (json.loads(out), after) == (expected, "after")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a", {"a": None}),
        ("a:", {"a": None}),
        ("a:12", {"a": 12}),
        (f"a:{Q}x", {"a": "x"}),
        (f"a:{Q}x{Q}", {"a": "x"}),
        (f"{Q}a", {"a": None}),
        (f"{Q}a{Q}", {"a": None}),
        ('a:"x\\', {"a": "x\\"}),
        ('a:"x\\u12', {"a": "x\\u12"}),
        ("a:[1,{b:[", {"a": [1, {"b": []}]}),
    ],
)
def test_open_arguments_are_closed_at_the_end(text, expected):
    out, after = parse(text)
    assert (json.loads(out), after) == (expected, "")


def test_python_call_syntax_is_accepted():
    out, after = parse(f'path=a.py, n: 3, text={Q}(x, y){Q}, s="b=c") done', "(")
    assert json.loads(out) == {"path": "a.py", "n": 3, "text": "(x, y)", "s": "b=c"}
    assert after == " done"


def test_schema_decides_ambiguous_values():
    parameters = {"zip": {"type": "string"}, "note": {}, "n": {"type": "integer"}}
    out, _ = parse("zip:10115,note:at ten, room: 4,n:2}", parameters=parameters)
    assert json.loads(out) == {"zip": "10115", "note": "at ten, room: 4", "n": 2}
    assert json.loads(parse("zip:10115,note:at ten, room: 4,n:2}")[0]) == {
        "zip": 10115,
        "note": "at ten",
        "room": 4,
        "n": 2,
    }
    assert json_scalar("12") == "12" and json_scalar("12", {"type": "string"}) is None


def test_strings_are_streamed():
    arguments = ArgumentsParser()
    arguments.push("a:")
    arguments.quote_token()
    assert arguments.take() == '{"a":"'
    assert arguments.in_token_string
    arguments.push('x "y')
    assert arguments.take() == 'x \\"y'
    arguments.quote_token()
    arguments.push(",n:12")
    assert arguments.take() == '","n":'  # 12 may still become 123
    assert arguments.push("}") == "" and arguments.done
    assert arguments.take() == "12}"


def test_very_long_number_becomes_a_string():
    out, _ = parse("n:" + "7" * 5000 + "}")
    assert json.loads(out) == {"n": "7" * 5000}


PIECES = [Q, Q, *"{}[](),,::='", '"', "\\", "\\u", "00e9", " ", "\n", "a", "b-c", "12", "true", "é🙂"]


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join), st.sampled_from("{("))
def test_any_input_becomes_one_json_object(text, opening):
    out, after = parse(text, opening)
    assert isinstance(json.loads(out), dict)
    assert parse(text, opening, size=1) == (out, after)
