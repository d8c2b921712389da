"""The tokenizer of grammars is built while a server loads, since no other thread runs meanwhile."""

from collections.abc import Iterator

import pytest
from llguidance import LLTokenizer
from servers import TINY, running

from mlx_mtp import GREEDY, grammar, load
from mlx_mtp.rows import RequestError

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The tokenizers that are built, in order."""
    made: list[object] = []

    def make(*given, **named):
        made.append(LLTokenizer(*given, **named))
        return made[-1]

    monkeypatch.setattr(grammar, "LLTokenizer", make)
    yield made


def test_the_first_request_with_a_schema_builds_no_tokenizer(built):
    with running(TINY, num_draft_tokens=2) as live:
        assert len(built) == 1
        answer = live.chat("Where?", response_format=SCHEMA, max_tokens=40)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] in ('{"city": "Bern"}', '{"city": "Rome"}')
        assert len(built) == 1


def test_text_without_a_grammar_needs_no_such_tokenizer(built):
    assert load(TINY[0], TINY[1]).generate("def f(", GREEDY, 2, 4)[0].tokens and not built


def test_a_model_whose_tokenizer_has_no_grammars_is_served_without_them(monkeypatch, capsys):
    def refuse(*given, **named):
        raise ValueError("can't determine decoder type: None")

    monkeypatch.setattr(grammar, "LLTokenizer", refuse)
    with running(TINY, num_draft_tokens=2) as live:
        assert live.chat("Where?", max_tokens=4).status_code == 200
        answer = live.chat("Where?", response_format=SCHEMA, max_tokens=4)
        assert answer.status_code == 400 and "schema" in answer.json()["error"]["message"]
    assert "can't determine decoder type" in capsys.readouterr().err
    with pytest.raises(RequestError, match="^this tokenizer cannot be used for grammars: can't"):
        pair = load(TINY[0], TINY[1])
        grammar.Grammars(pair.text, pair.vocab_size, pair.eos)
