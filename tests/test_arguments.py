"""arguments.py: Gemma 4's notation for values, rewritten as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.arguments import QUOTE, Arguments, scalar


def read(text: str, opening: str = "{", parameters: dict | None = None, size: int = 1000) -> tuple[str, str]:
    """JSON of arguments read `size` characters at a time, and the text after them; closed at the end if open."""
    arguments, out, rest = Arguments(opening, parameters), "", ""
    for i, part in enumerate(text.split(QUOTE)):
        if i and not arguments.done:
            arguments.quote()
        for at in range(0, len(part), size):
            rest += arguments.push(part[at : at + size])
            out += arguments.take()
    if not arguments.done:
        arguments.close()
    return out + arguments.take(), rest


Q = QUOTE
AS_DOCUMENTED = {
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
AS_WRITTEN_BY_MODELS = {
    "file-path:/a/b.c,x.y:1}": {"file-path": "/a/b.c", "x.y": 1},
    f"{Q}a{Q}:1,{Q}b c{Q}:{Q}x{Q}}}": {"a": 1, "b c": "x"},
    '"a":"x\\n\\"q\\" \\u00e9 \\d", "b" : 2 }': {"a": 'x\n"q" é \\d', "b": 2},
    "a:'it\\'s',b:'\\d+'}": {"a": "it's", "b": "\\d+"},
    f"pattern:':\\s*\\w+'{Q},n:1}}": {"pattern": ":\\s*\\w+", "n": 1},  # the other kind of mark at the end
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
    "zip:007,v:1.,w:+5}": {"zip": "007", "v": "1.", "w": "+5"},  # no numbers of JSON
    "a:{b:[1,2}}": {"a": {"b": [1, 2]}},
    "a: b : c }": {"a": "b : c"},
    "a:{x:1} ,b:2}": {"a": {"x": 1}, "b": 2},
}


@pytest.mark.parametrize("text", [*AS_DOCUMENTED, *AS_WRITTEN_BY_MODELS])
def test_arguments_become_json_however_they_are_cut(text):
    expected = (AS_DOCUMENTED | AS_WRITTEN_BY_MODELS)[text]
    for size in (1, 2, 3, 1000):
        out, rest = read(text + "rest", size=size)
        assert (json.loads(out), rest) == (expected, "rest")


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
def test_what_is_open_at_the_end_is_closed(text, expected):
    out, rest = read(text)
    assert (json.loads(out), rest) == (expected, "")


def test_the_form_of_a_python_call_is_read_too():
    out, rest = read(f'path=a.py, n: 3, text={Q}(x, y){Q}, s="b=c") done', "(")
    assert json.loads(out) == {"path": "a.py", "n": 3, "text": "(x, y)", "s": "b=c"}
    assert rest == " done"


def test_the_schema_decides_where_the_notation_leaves_a_choice():
    parameters = {"zip": {"type": "string"}, "note": {}, "n": {"type": "integer"}}
    out, _ = read("zip:10115,note:at ten, room: 4,n:2}", parameters=parameters)
    assert json.loads(out) == {"zip": "10115", "note": "at ten, room: 4", "n": 2}
    assert json.loads(read("zip:10115,note:at ten, room: 4,n:2}")[0]) == {
        "zip": 10115,
        "note": "at ten",
        "room": 4,
        "n": 2,
    }
    assert scalar("12") == "12" and scalar("12", {"type": "string"}) is None


def test_a_string_is_handed_on_while_it_grows():
    arguments = Arguments()
    arguments.push("a:")
    arguments.quote()
    assert arguments.take() == '{"a":"'
    assert arguments.quoted
    arguments.push('x "y')
    assert arguments.take() == 'x \\"y'
    arguments.quote()
    arguments.push(",n:12")
    assert arguments.take() == '","n":'  # 12 may still become 123
    assert arguments.push("}") == "" and arguments.done
    assert arguments.take() == "12}"


def test_a_number_too_long_for_a_reader_stays_text():
    out, _ = read("n:" + "7" * 5000 + "}")
    assert json.loads(out) == {"n": "7" * 5000}


PIECES = [Q, Q, *"{}[](),,::='", '"', "\\", "\\u", "00e9", " ", "\n", "a", "b-c", "12", "true", "é🙂"]


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join), st.sampled_from("{("))
def test_anything_at_all_becomes_one_json_object_however_it_is_cut(text, opening):
    out, rest = read(text, opening)
    assert isinstance(json.loads(out), dict)
    assert read(text, opening, size=1) == (out, rest)
