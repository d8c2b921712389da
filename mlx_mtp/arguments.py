"""Gemma 4's notation for the arguments of a call, rewritten as JSON while it arrives. Knows no tokens and no tools.

    {city:<|"|>Paris<|"|>,days:3,opt:{metric:true}}   ->   {"city":"Paris","days":3,"opt":{"metric":true}}

What models write instead is read too: quoted keys, JSON strings, single quotes, strings without quotes, a quotation
mark missing on one side, `name(key=value)`, commas too many and brackets too few. Whatever comes in, what goes out is
one JSON object, and its text does not depend on how the input was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, auto

QUOTE = '<|"|>'

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
CLOSING = {"{": "}", "[": "]", "(": ")"}
OPENING = {end: begin for begin, end in CLOSING.items()}
KEY = re.compile(r"""\s*(["']?)([\w.$@/-]{1,80})\1\s*""")  # between a comma and a colon, in text without quotes
MOST_DIGITS = 400  # longer is text: some JSON readers refuse to make a number of it
JSON_ESCAPES = frozenset('"\\/bfnrt')
HEX = frozenset("0123456789abcdefABCDEF")


class At(Enum):
    """Where the reader stands."""

    KEY = auto()  # before or inside a key without quotes; held: the key so far
    QUOTED_KEY = auto()  # inside a key between Gemma's marks
    MARKED_KEY = auto()  # inside a key between " or '
    COLON = auto()  # after a quoted key; held: the key
    VALUE = auto()  # before a value
    QUOTED = auto()  # inside a string between Gemma's marks
    MARKED = auto()  # inside a string between " or '; held: an escape begun
    STRING_END = auto()  # after a mark that ends a string if a separator follows; held: space in between
    BARE = auto()  # inside a value without quotes; held: all of it
    VALUE_END = auto()  # after an inner object or array
    DONE = auto()


class Arguments:
    """One call's arguments, from the character after the opening bracket to the one that closes it."""

    def __init__(self, opening: str = "{", parameters: Mapping[str, object] | None = None) -> None:
        """opening: `{`, or `(` for the form `name(key=value)`.

        parameters: JSON schema of each parameter, as far as known. Used only where a value has no quotes: a string is
        one although it looks like a number, and only what can be a key ends a text with commas in it.
        """
        self._parameters = parameters or {}
        self._out = ["{"]
        self._open = [opening]  # brackets not closed yet
        self._first = [True]  # nothing written yet in each of them
        self._at, self._held = At.KEY, ""
        self._key = ""  # the newest key of the outermost object
        self._inner = ""  # brackets opened in a text without quotes
        self._mark = ""  # the mark that the string or key under way began with
        self._read = {
            At.KEY: self._in_key,
            At.QUOTED_KEY: self._in_quoted_key,
            At.MARKED_KEY: self._in_marked_key,
            At.COLON: self._before_colon,
            At.VALUE: self._before_value,
            At.MARKED: self._in_marked,
            At.STRING_END: self._after_string,
            At.BARE: self._in_bare,
            At.VALUE_END: self._after_value,
        }

    @property
    def done(self) -> bool:
        """Whether the closing bracket has come."""
        return self._at is At.DONE

    @property
    def quoted(self) -> bool:
        """Whether one of Gemma's marks is open, so that everything up to the next one is text."""
        return self._at in (At.QUOTED, At.QUOTED_KEY)

    def push(self, text: str) -> str:
        """Read text; returns what follows the end of the arguments, if that has come."""
        for i, char in enumerate(text):
            if self._at is At.DONE:
                return text[i:]
            if self._at is At.QUOTED:  # only a mark ends it, and marks do not come as text
                self._out.append(_escape(text[i:]))
                return ""
            self._read[self._at](char)
        return ""

    def quote(self) -> None:
        """Read one of Gemma's own quotation marks."""
        at = self._at
        if at is At.KEY and not self._held.strip():
            self._held, self._at = "", At.QUOTED_KEY
        elif at is At.QUOTED_KEY:
            self._at = At.COLON
        elif at is At.VALUE:
            self._begin('"')
            self._mark, self._at = QUOTE, At.QUOTED
        elif at is At.QUOTED:
            self._at = At.STRING_END
        elif at is At.MARKED:  # closed by another mark than opened
            self._out.append(_escape(self._held))
            self._held, self._mark, self._at = "", QUOTE, At.STRING_END
        elif at is At.BARE and self._held.rstrip().endswith(",") and self._open[-1] != "[":
            self._write_bare(self._held.rstrip()[:-1])
            self._held, self._at = "", At.QUOTED_KEY
        elif at is At.BARE:  # only the first mark was forgotten
            self._begin('"' + _escape(self._held))
            self._held, self._mark, self._at = "", QUOTE, At.STRING_END

    def take(self) -> str:
        """The JSON that has become certain since the last call."""
        out, self._out = "".join(self._out), []
        return out

    def close(self) -> None:
        """End the arguments here, whatever is open."""
        if self._at is At.MARKED:
            self._out.append(_escape(self._held))
        if self._at in (At.QUOTED, At.MARKED, At.STRING_END):
            self._end_string()
        elif self._at is At.BARE:
            self._write_bare(self._held)
        elif self._at is At.VALUE and self._open[-1] != "[":
            self._begin("null")
        elif self._at is At.COLON or (self._at is not At.VALUE and self._held.strip()):
            self._write_key(self._held)
            self._begin("null")
        while self._open:
            self._pop()

    # keys -------------------------------------------------------------------------------------------------------

    def _in_key(self, char: str) -> None:
        if char == ":" or (char == "=" and self._open[-1] == "("):
            self._write_key(self._held.strip())
        elif char in ",}])":
            if self._held.strip():  # a key without a value
                self._write_key(self._held.strip())
                self._begin("null")
            self._held = ""
            self._after_value(char)
        elif char in "\"'" and not self._held.strip():
            self._mark, self._held, self._at = char, "", At.MARKED_KEY
        else:
            self._held += char

    def _in_quoted_key(self, char: str) -> None:
        self._held += char

    def _in_marked_key(self, char: str) -> None:
        if char == self._mark:
            self._at = At.COLON
        else:
            self._held += char

    def _before_colon(self, char: str) -> None:
        if char in ":=":
            self._write_key(self._held)
        elif char in ",}])":
            self._write_key(self._held)
            self._begin("null")
            self._after_value(char)
        elif not char.isspace():  # text between mark and colon has no place but the key
            self._held += char

    def _write_key(self, key: str) -> None:
        if len(self._open) == 1:
            self._key = key
        self._begin(json.dumps(key, ensure_ascii=False) + ":")
        self._first[-1] = True  # no comma before the value
        self._held, self._at = "", At.VALUE

    # values -----------------------------------------------------------------------------------------------------

    def _before_value(self, char: str) -> None:
        if char.isspace():
            return
        if char in "{[":
            self._begin(char)
            self._open.append(char)
            self._first.append(True)
            self._at = At.KEY if char == "{" else At.VALUE
        elif char in "\"'":
            self._begin('"')
            self._mark, self._at = char, At.MARKED
        elif char in ",}])":
            if self._open[-1] != "[":
                self._begin("null")
            self._after_value(char)
        else:
            self._inner, self._at = "", At.BARE
            self._in_bare(char)

    def _in_marked(self, char: str) -> None:
        if self._held:
            self._in_escape(char)
        elif char == "\\":
            self._held = char
        elif char == self._mark:
            self._at = At.STRING_END
        else:
            self._out.append(_escape(char))

    def _in_escape(self, char: str) -> None:
        """A character after a backslash: JSON's escapes between ", only those of the mark and itself between '."""
        text, self._held = self._held + char, ""
        if self._mark == "'":
            self._out.append(_escape(char if char in "'\\" else text))
        elif len(text) == 2 and char == "u":
            self._held = text
        elif len(text) == 2:
            self._out.append(text if char in JSON_ESCAPES else _escape(text))
        elif char not in HEX:
            self._out.append(_escape(text[:-1]))
            self._in_marked(char)
        elif len(text) == 6:
            self._out.append(text)
        else:
            self._held = text

    def _after_string(self, char: str) -> None:
        if char.isspace():
            self._held += char
        elif char in ",}])":
            self._end_string()
            self._after_value(char)
        elif self._mark == QUOTE:  # text between mark and separator has no place but the string
            self._out.append(_escape(self._held + char))
            self._held = ""
        else:  # a mark inside the string
            self._out.append(_escape(self._mark + self._held))
            self._held, self._at = "", At.MARKED
            self._in_marked(char)

    def _in_bare(self, char: str) -> None:
        if char in CLOSING:
            self._inner += char
        elif char in OPENING and OPENING[char] in self._inner:
            self._inner = self._inner[: self._inner.rindex(OPENING[char])]
        elif char in OPENING and OPENING[char] in self._open:
            self._write_bare(self._held)
            return self._after_value(char)
        elif not self._inner:
            if char == "," and (self._open[-1] == "[" or self._scalar(self._held.strip())):
                self._write_bare(self._held)
                return self._after_value(char)
            if char == ":" or (char == "=" and self._open[-1] == "("):
                text, comma, key = self._held.rpartition(",")
                match = KEY.fullmatch(key) if comma else None
                if match and self._may_be_key(match[2]):
                    self._write_bare(text)
                    self._write_key(match[2])
                    return None
        self._held += char
        return None

    def _may_be_key(self, key: str) -> bool:
        return len(self._open) > 1 or not self._parameters or key in self._parameters

    def _scalar(self, text: str) -> str | None:
        return scalar(text, self._parameters.get(self._key) if len(self._open) == 1 else None)

    def _write_bare(self, text: str) -> None:
        text = text.strip()
        if self._open[-1] != "[":
            text = text.removesuffix(",").rstrip()  # a comma before the closing bracket
        self._begin(self._scalar(text) or json.dumps(text, ensure_ascii=False))
        self._held = ""

    def _end_string(self) -> None:
        self._out.append('"')
        self._held = ""

    def _after_value(self, char: str) -> None:
        """A comma or a closing bracket; anything else after an inner object or array has no place and is left out."""
        if char == ",":
            self._at = At.VALUE if self._open[-1] == "[" else At.KEY
        elif OPENING.get(char) in self._open:
            while self._open and self._open[-1] != OPENING[char]:  # brackets that were forgotten
                self._pop()
            self._pop()
        else:
            self._at = At.VALUE_END

    # out --------------------------------------------------------------------------------------------------------

    def _begin(self, text: str) -> None:
        """Write the beginning of a value or key, with a comma in front where it is not the first."""
        self._out.append(text if self._first[-1] else "," + text)
        self._first[-1] = False

    def _pop(self) -> None:
        self._out.append("]" if self._open.pop() == "[" else "}")
        self._first.pop()
        self._at = At.VALUE_END if self._open else At.DONE


def scalar(text: str, schema: object = None) -> str | None:
    """JSON of a number or word; None for other text, and for all text where the schema asks for a string."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return None
    return text if len(text) < MOST_DIGITS and NUMBER.fullmatch(text) else WORDS.get(text)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
