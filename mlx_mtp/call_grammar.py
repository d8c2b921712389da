"""Converts JSON schemas of tools to a Lark grammar for Gemma 4's tool-call format.

Object keys are in alphabetical order, as in chat templates, and each occurs at most once. Keys that the schema does not
name are allowed only if `additionalProperties` allows them. All output of the grammar is valid; it does not allow every
valid call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.rows import RequestError

# Keywords without an effect of their own: annotations, and modifiers of keywords that are read elsewhere.
ANNOTATIONS = frozenset(
    "title description default examples $schema $id $comment $defs definitions deprecated readOnly writeOnly nullable "
    "format contentMediaType contentEncoding additionalProperties required".split()
)
SUPPORTED = {
    "string": frozenset({"type", "minLength", "maxLength", "pattern"}),
    "integer": frozenset({"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset({"type"}),
    "null": frozenset({"type"}),
    "array": frozenset({"type", "items", "minItems", "maxItems"}),
    "object": frozenset({"type", "properties"}),
}
"""Keywords that constrain a value, by its type."""

PLAIN_KEY = re.compile(r"[\w$@/-]([\w$@./ -]*[\w$@./-])?")
KEY = r"/[A-Za-z_][A-Za-z0-9_.-]*/"
ANY_CHAR = r"(.|\n)"


@dataclass(frozen=True)
class Marks:
    """Token ids of the tool-call markers."""

    call: int
    call_end: int
    quote: int


@dataclass
class CallGrammar:
    """Lark rules for the calls of a set of tools. Reading a schema adds rules."""

    marks: Marks
    rules: list[str] = field(default_factory=list)
    _named: dict[str, str] = field(default_factory=dict)

    def call(self, name: str, schema: Mapping[str, Any], strict: bool) -> str:
        """Adds the rule for calls of one tool. Returns the rule's name.

        strict: raise RequestError for an unsupported schema keyword, instead of ignoring it.
        """
        reader = _SchemaReader(self, schema, name, strict)
        arguments = reader.object(schema, "{", "}") if schema else '"{}"'
        mark, end = _token(self.marks.call), _token(self.marks.call_end)
        return self.add(f"{mark} {_text(f'call:{name}')} {arguments} {end}")

    def add(self, body: str) -> str:
        """Adds a rule. Returns its name."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def add_once(self, key: str, body: str) -> str:
        """Adds a rule unless one with this key exists. Returns its name."""
        if key not in self._named:
            self._named[key] = self.add(body)
        return self._named[key]

    def reserve(self, key: str) -> tuple[str, bool]:
        """Reserves a rule that may refer to itself. Returns its name, and whether `define` must give its body."""
        new = key not in self._named
        if new:
            self._named[key] = f"r{len(self.rules)}"
            self.rules.append("")
        return self._named[key], new

    def define(self, name: str, body: str) -> None:
        """Sets the body of a reserved rule."""
        self.rules[int(name[1:])] = f"{name}: {body}"


class _SchemaReader:
    """Converts one tool's schema to grammar rules."""

    def __init__(self, grammar: CallGrammar, root: Mapping[str, Any], tool: str, strict: bool) -> None:
        self._grammar, self._root, self._tool, self._strict = grammar, root, tool, strict
        self._quote = _token(grammar.marks.quote)

    def value(self, schema: Any) -> str:
        """The Lark expression for a value."""
        if schema is True or schema == {} or not isinstance(schema, Mapping):
            return self._any()
        if "$ref" in schema:
            return self._ref(schema["$ref"])
        if "const" in schema:
            return self._literal(schema["const"])
        if isinstance(schema.get("enum"), Sequence) and schema["enum"]:
            return self._one_of([self._literal(value) for value in schema["enum"]])
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema:
                return self._combined(schema, word)
        types = schema.get("type")
        types = types if isinstance(types, list) else [types or self._type_of(schema)]
        return self._one_of([self._typed(schema, str(kind)) for kind in types])

    def _combined(self, schema: Mapping[str, Any], word: str) -> str:
        inner = {key: value for key, value in schema.items() if key != word and key not in ANNOTATIONS}
        parts = [part for part in schema[word] if isinstance(part, Mapping)]
        if word == "allOf" and len(parts) > 1 or (inner and inner.keys() - {"type"}):
            self._unsupported(word)
        return self._one_of([self.value({**inner, **part} if "$ref" not in part else part) for part in parts])

    def _type_of(self, schema: Mapping[str, Any]) -> str:
        """The type of a schema without `type`, inferred from its keywords."""
        for kind, words in SUPPORTED.items():
            if schema.keys() & (words - {"type"}):
                return kind
        return "any"

    def _typed(self, schema: Mapping[str, Any], kind: str) -> str:
        if kind not in SUPPORTED:
            return self._any()
        known = frozenset().union(*SUPPORTED.values())  # a keyword of another type does not constrain this one
        for word in schema.keys() - known - ANNOTATIONS:
            self._unsupported(word)
        if kind == "string":
            return self._string(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self.object(schema, "{", "}")
        if kind in ("integer", "number"):
            limits = {word: schema[word] for word in SUPPORTED[kind] & schema.keys()} | {"type": kind}
            return self._grammar.add_once(f"number {limits}", f"%json {json.dumps(limits)}")
        return '("true" | "false")' if kind == "boolean" else '"null"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most, pattern = schema.get("minLength", 0), schema.get("maxLength", ""), schema.get("pattern")
        text = f"/{ANY_CHAR}{{{least},{most}}}/" if least or most != "" else f"/{ANY_CHAR}*/"
        if pattern is not None:
            if least or most != "":
                self._unsupported("pattern together with minLength or maxLength")
            else:
                text = self._pattern(str(pattern))
        return f"{self._quote} {self._grammar.add_once(text, text)} {self._quote}"

    def _pattern(self, pattern: str) -> str:
        """A regular expression for the whole string, from one that may match anywhere in it."""
        begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        if (begins or ends) and "|" in re.sub(r"\([^()]*\)|\[[^\]]*\]|\\.", "", pattern):
            self._unsupported("pattern with an anchor in one of several branches")
        inner = pattern[begins : len(pattern) - ends].replace("/", "\\/").replace("\\\\/", "\\/")
        return f"/{'' if begins else ANY_CHAR + '*'}({inner}){'' if ends else ANY_CHAR + '*'}/"

    def _array(self, schema: Mapping[str, Any]) -> str:
        item, least, most = self.value(schema.get("items", True)), schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        item = self._grammar.add_once(f"item {item}", item)
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        filled = f'"[" {item} {more} "]"'
        return f"({filled})" if least else f'({filled} | "[]")'

    def object(self, schema: Mapping[str, Any], opening: str, closing: str) -> str:
        """The Lark expression for an object: its properties in order. Those not required are optional."""
        properties = schema.get("properties") or {}
        additional = schema.get("additionalProperties", not properties)
        if not properties:
            return self._open_object(additional) if additional else f'"{opening}{closing}"'
        required = set(schema.get("required") or ())
        names = sorted((n for n in properties if properties[n] is not False), key=str.lower)
        if required - set(names):
            self._unsupported(f"required {sorted(required - set(names))[0]!r}, which is not a property")
        # before: the remaining properties while the object is empty. after: the same, each with a comma in front.
        before, after = "", ""
        for name in reversed(names):
            pair = self._grammar.add(f"{self._key(name)} {_text(':')} {self.value(properties[name])}")
            first, later = f"{pair} {after}".strip(), f'"," {pair} {after}'.strip()
            if name not in required:
                first = f"({first}) | ({before})" if before else f"({first})?"
                later = f"({later}) | ({after})" if after else f"({later})?"
            before, after = self._grammar.add(first), self._grammar.add(later)
        return f'"{opening}" {before} "{closing}"'

    def _open_object(self, values: Any) -> str:
        """The Lark expression for an object with keys of any name."""
        pair = self._grammar.add_once(f"pair {json.dumps(values, default=str)}", f'{KEY} ":" {self.value(values)}')
        return f'("{{" ({pair} ("," {pair})*)? "}}")'

    def _key(self, name: str) -> str:
        return _text(name) if PLAIN_KEY.fullmatch(name) else f"{self._quote} {_text(name)} {self._quote}"

    def _any(self) -> str:
        name, new = self._grammar.reserve("any")
        if new:
            kinds = ["string", "number", "boolean", "null"]
            pair = f'{KEY} ":" {name}'
            inner = [f'"[" ({name} ("," {name})*)? "]"', f'"{{" ({pair} ("," {pair})*)? "}}"']
            self._grammar.define(name, " | ".join([*(self._typed({}, kind) for kind in kinds), *inner]))
        return name

    def _ref(self, ref: Any) -> str:
        """The rule for a `$ref` into the tool's own schema. References may be recursive."""
        name, new = self._grammar.reserve(f"{self._tool} {ref}")
        if new:
            target: Any = self._root
            for step in str(ref).removeprefix("#").split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                target = target.get(step) if isinstance(target, Mapping) else None
            if not str(ref).startswith("#") or target is None:
                raise RequestError(f"tool {self._tool}: $ref {ref!r} not found; expected a path in the tool's schema")
            self._grammar.define(name, self.value(target))
        return name

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return f"({self._quote} {_text(value)} {self._quote})"
        if isinstance(value, Mapping):
            names = sorted(value, key=str.lower)
            inner = ' "," '.join(f'{self._key(name)} ":" {self._literal(value[name])}' for name in names)
            return f'("{{" {inner} "}}")'
        if isinstance(value, Sequence):
            inner = ' "," '.join(self._literal(one) for one in value)
            return f'("[" {inner} "]")'
        return _text(json.dumps(value))

    def _one_of(self, choices: Sequence[str]) -> str:
        return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"

    def _unsupported(self, word: str) -> None:
        if self._strict:
            raise RequestError(
                f"tool {self._tool}: its schema has {word}, which is not supported in strict mode; "
                "remove it, or remove `strict`"
            )


def _token(token: int) -> str:
    return f"<[{token}]>"


def _text(text: str) -> str:
    """A Lark string literal, or nothing for an empty string."""
    return json.dumps(text, ensure_ascii=False) if text else ""
