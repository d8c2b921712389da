"""Converts tool arguments from Gemma 4's format to JSON, incrementally.

    {city:<|"|>Paris<|"|>,days:3,opt:{metric:true}}   ->   {"city":"Paris","days":3,"opt":{"metric":true}}

The parser also accepts what models write by mistake: quoted keys, JSON strings, single quotes, unquoted strings,
a missing quote, `name(key=value)`, extra commas and missing closing brackets. The result is one JSON object for any
input. It does not depend on how the input was split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, auto

QUOTE = '<|"|>'

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
JSON_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
CLOSING = {"{": "}", "[": "]", "(": ")"}
OPENING = {end: begin for begin, end in CLOSING.items()}
KEY = re.compile(r"""\s*(["']?)([\w.$@/-]{1,80})\1\s*""")  # what may stand between a comma and a colon
MAX_DIGITS = 400  # longer numbers become strings: some JSON parsers reject them
JSON_ESCAPES = frozenset('"\\/bfnrt')
HEX = frozenset("0123456789abcdefABCDEF")


class State(Enum):
    """Position of the parser. The comments say what is in its buffer."""

    KEY = auto()  # before or inside an unquoted key; buffer: the key so far
    TOKEN_KEY = auto()  # inside a key in quote tokens; buffer: the key so far
    QUOTED_KEY = auto()  # inside a key in " or '; buffer: the key so far
    COLON = auto()  # after a quoted key; buffer: the key
    VALUE = auto()  # before a value
    TOKEN_STRING = auto()  # inside a string in quote tokens
    QUOTED_STRING = auto()  # inside a string in " or '; buffer: an incomplete escape
    STRING_END = auto()  # after a quote, which ends the string if a separator follows; buffer: spaces after it
    BARE = auto()  # inside an unquoted value; buffer: the whole value
    VALUE_END = auto()  # after an inner object or array
    DONE = auto()


class ArgumentsParser:
    """Parses the arguments of one call, from after the opening bracket to the closing bracket."""

    def __init__(self, opening: str = "{", parameters: Mapping[str, object] | None = None) -> None:
        """opening: `{`, or `(` for the form `name(key=value)`.

        parameters: the JSON schema of each known parameter. Schemas decide about unquoted values only: whether digits
        are a string, and whether `, name:` inside a value begins the next key.
        """
        self._parameters = parameters or {}
        self._out = ["{"]
        self._brackets = [opening]  # open brackets, outermost first
        self._is_empty = [True]  # for each open bracket: whether nothing is written in it yet
        self._state, self._buffer = State.KEY, ""
        self._key = ""  # the latest key of the outermost object
        self._bare_brackets = ""  # open brackets inside an unquoted value
        self._quote = ""  # the quote that opened the current string or key
        self._handlers = {
            State.KEY: self._in_key,
            State.TOKEN_KEY: self._in_token_key,
            State.QUOTED_KEY: self._in_quoted_key,
            State.COLON: self._before_colon,
            State.VALUE: self._before_value,
            State.QUOTED_STRING: self._in_quoted_string,
            State.STRING_END: self._after_string,
            State.BARE: self._in_bare,
            State.VALUE_END: self._after_value,
        }

    @property
    def done(self) -> bool:
        """Whether the closing bracket was read."""
        return self._state is State.DONE

    @property
    def in_token_string(self) -> bool:
        """Whether a quote token is open. Everything up to the next quote token is then text."""
        return self._state in (State.TOKEN_STRING, State.TOKEN_KEY)

    def push(self, text: str) -> str:
        """Reads text. Returns the text after the closing bracket."""
        for i, char in enumerate(text):
            if self._state is State.DONE:
                return text[i:]
            if self._state is State.TOKEN_STRING:  # only a quote token ends it
                self._out.append(_escape(text[i:]))
                return ""
            self._handlers[self._state](char)
        return ""

    def quote_token(self) -> None:
        """Reads a quote token."""
        state = self._state
        if state is State.KEY and not self._buffer.strip():
            self._buffer, self._state = "", State.TOKEN_KEY
        elif state is State.TOKEN_KEY:
            self._state = State.COLON
        elif state is State.VALUE:
            self._write('"')
            self._quote, self._state = QUOTE, State.TOKEN_STRING
        elif state is State.TOKEN_STRING:
            self._state = State.STRING_END
        elif state is State.QUOTED_STRING:  # the string began with another quote
            self._out.append(_escape(self._buffer))
            self._buffer, self._quote, self._state = "", QUOTE, State.STRING_END
        elif state is State.BARE and self._buffer.rstrip().endswith(",") and self._brackets[-1] != "[":
            self._write_bare(self._buffer.rstrip()[:-1])
            self._buffer, self._state = "", State.TOKEN_KEY
        elif state is State.BARE:  # the opening quote is missing
            self._write('"' + _escape(self._buffer))
            self._buffer, self._quote, self._state = "", QUOTE, State.STRING_END

    def take(self) -> str:
        """Returns the JSON written since the last call."""
        out, self._out = "".join(self._out), []
        return out

    def close(self) -> None:
        """Ends the arguments, and closes every open string and bracket."""
        if self._state is State.QUOTED_STRING:
            self._out.append(_escape(self._buffer))
        if self._state in (State.TOKEN_STRING, State.QUOTED_STRING, State.STRING_END):
            self._end_string()
        elif self._state is State.BARE:
            self._write_bare(self._buffer)
        elif self._state is State.VALUE and self._brackets[-1] != "[":
            self._write("null")
        elif self._state is State.COLON or (self._state is not State.VALUE and self._buffer.strip()):
            self._write_key(self._buffer)
            self._write("null")
        while self._brackets:
            self._close_bracket()

    # keys -------------------------------------------------------------------------------------------------------

    def _in_key(self, char: str) -> None:
        if char == ":" or (char == "=" and self._brackets[-1] == "("):
            self._write_key(self._buffer.strip())
        elif char in ",}])":
            if self._buffer.strip():  # a key without value
                self._write_key(self._buffer.strip())
                self._write("null")
            self._buffer = ""
            self._after_value(char)
        elif char in "\"'" and not self._buffer.strip():
            self._quote, self._buffer, self._state = char, "", State.QUOTED_KEY
        else:
            self._buffer += char

    def _in_token_key(self, char: str) -> None:
        self._buffer += char

    def _in_quoted_key(self, char: str) -> None:
        if char == self._quote:
            self._state = State.COLON
        else:
            self._buffer += char

    def _before_colon(self, char: str) -> None:
        if char in ":=":
            self._write_key(self._buffer)
        elif char in ",}])":
            self._write_key(self._buffer)
            self._write("null")
            self._after_value(char)
        elif not char.isspace():  # text between quote and colon belongs to the key
            self._buffer += char

    def _write_key(self, key: str) -> None:
        if len(self._brackets) == 1:
            self._key = key
        self._write(json.dumps(key, ensure_ascii=False) + ":")
        self._is_empty[-1] = True  # no comma before the value
        self._buffer, self._state = "", State.VALUE

    # values -----------------------------------------------------------------------------------------------------

    def _before_value(self, char: str) -> None:
        if char.isspace():
            return
        if char in "{[":
            self._write(char)
            self._brackets.append(char)
            self._is_empty.append(True)
            self._state = State.KEY if char == "{" else State.VALUE
        elif char in "\"'":
            self._write('"')
            self._quote, self._state = char, State.QUOTED_STRING
        elif char in ",}])":
            if self._brackets[-1] != "[":
                self._write("null")
            self._after_value(char)
        else:
            self._bare_brackets, self._state = "", State.BARE
            self._in_bare(char)

    def _in_quoted_string(self, char: str) -> None:
        if self._buffer:
            self._in_escape(char)
        elif char == "\\":
            self._buffer = char
        elif char == self._quote:
            self._state = State.STRING_END
        else:
            self._out.append(_escape(char))

    def _in_escape(self, char: str) -> None:
        """Read a character after a backslash. Strings in " have JSON's escapes, strings in ' only \\' and \\\\."""
        text, self._buffer = self._buffer + char, ""
        if self._quote == "'":
            self._out.append(_escape(char if char in "'\\" else text))
        elif len(text) == 2 and char == "u":
            self._buffer = text
        elif len(text) == 2:
            self._out.append(text if char in JSON_ESCAPES else _escape(text))
        elif char not in HEX:
            self._out.append(_escape(text[:-1]))
            self._in_quoted_string(char)
        elif len(text) == 6:
            self._out.append(text)
        else:
            self._buffer = text

    def _after_string(self, char: str) -> None:
        if char.isspace():
            self._buffer += char
        elif char in ",}])":
            self._end_string()
            self._after_value(char)
        elif self._quote == QUOTE:  # text between quote and separator belongs to the string
            self._out.append(_escape(self._buffer + char))
            self._buffer = ""
        else:  # the quote was part of the string
            self._out.append(_escape(self._quote + self._buffer))
            self._buffer, self._state = "", State.QUOTED_STRING
            self._in_quoted_string(char)

    def _in_bare(self, char: str) -> None:
        if char in CLOSING:
            self._bare_brackets += char
        elif char in OPENING and OPENING[char] in self._bare_brackets:
            self._bare_brackets = self._bare_brackets[: self._bare_brackets.rindex(OPENING[char])]
        elif char in OPENING and OPENING[char] in self._brackets:
            self._write_bare(self._buffer)
            return self._after_value(char)
        elif not self._bare_brackets:
            if char == "," and (self._brackets[-1] == "[" or self._json_scalar(self._buffer.strip())):
                self._write_bare(self._buffer)
                return self._after_value(char)
            if char == ":" or (char == "=" and self._brackets[-1] == "("):
                text, comma, key = self._buffer.rpartition(",")
                match = KEY.fullmatch(key) if comma else None
                if match and self._may_be_key(match[2]):
                    self._write_bare(text)
                    self._write_key(match[2])
                    return None
        self._buffer += char
        return None

    def _may_be_key(self, key: str) -> bool:
        return len(self._brackets) > 1 or not self._parameters or key in self._parameters

    def _json_scalar(self, text: str) -> str | None:
        return json_scalar(text, self._parameters.get(self._key) if len(self._brackets) == 1 else None)

    def _write_bare(self, text: str) -> None:
        text = text.strip()
        if self._brackets[-1] != "[":
            text = text.removesuffix(",").rstrip()  # an extra comma before the closing bracket
        self._write(self._json_scalar(text) or json.dumps(text, ensure_ascii=False))
        self._buffer = ""

    def _end_string(self) -> None:
        self._out.append('"')
        self._buffer = ""

    def _after_value(self, char: str) -> None:
        """Reads a comma or closing bracket. Other characters after an object or array are ignored."""
        if char == ",":
            self._state = State.VALUE if self._brackets[-1] == "[" else State.KEY
        elif OPENING.get(char) in self._brackets:
            while self._brackets and self._brackets[-1] != OPENING[char]:  # missing closing brackets
                self._close_bracket()
            self._close_bracket()
        else:
            self._state = State.VALUE_END

    # output -----------------------------------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        """Writes the beginning of a key or value, after a comma unless it is the first."""
        self._out.append(text if self._is_empty[-1] else "," + text)
        self._is_empty[-1] = False

    def _close_bracket(self) -> None:
        """Closes the innermost bracket."""
        self._out.append("]" if self._brackets.pop() == "[" else "}")
        self._is_empty.pop()
        self._state = State.VALUE_END if self._brackets else State.DONE


def json_scalar(text: str, schema: object = None) -> str | None:
    """The JSON of a number or of `true`, `false`, `null`. None for other text, or if the schema's type is string."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return None
    return text if len(text) < MAX_DIGITS and NUMBER.fullmatch(text) else JSON_WORDS.get(text)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
