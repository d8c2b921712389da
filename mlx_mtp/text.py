"""Tokenizer, chat template, incremental detokenizer and stop strings.

Templates render as in transformers' `apply_chat_template` (`utils/chat_template_utils.py`). The jinja environment
is sandboxed and has the same filters and globals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mlx_mtp.messages import check_messages, check_tools, for_template
from mlx_mtp.rows import CheckpointError, RequestError, one_line

# With these decoders a token's text depends on that token alone. The exception: ByteFallback joins runs of bytes.
LOCAL_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse"})


class Text:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, str], template: str | None) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._template_source = template
        self._context_dependent = _context_dependent_ids(tokenizer)
        self._hidden = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
        self._bos = [] if bos is None else [bos]

    @classmethod
    def from_dir(cls, path: Path) -> Text:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint folder.

        Raises CheckpointError if a file is missing or broken.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; download the complete checkpoint")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises a bare Exception for every broken file
            raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(path / "tokenizer_config.json")
        return cls(tokenizer, _special_tokens(config), _find_template(path, config))

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template. Base models have none."""
        return self._template_source is not None

    @property
    def segmented(self) -> bool:
        """Whether the output uses Gemma 4's markers for reasoning and tool calls.

        The chat template decides. A checkpoint without a template counts as Gemma's.
        """
        return self._template_source is None or "<|turn>" in self._template_source

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def tokenizer_json(self) -> str:
        """The tokenizer, serialised as tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with exactly one BOS token in front.

        Raises RequestError if the text is empty or not valid Unicode.
        """
        if not isinstance(text, str):
            raise RequestError(f"the prompt is a {type(text).__name__}; expected a string")
        if not text:
            raise RequestError("the prompt is empty; expected at least one character")
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # lone surrogates, from undecodable CLI arguments
            raise RequestError(f"the prompt is not valid Unicode: {_one_line(error)}") from error
        return ids if ids[:1] == self._bos else self._bos + ids

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of text that continues other text: without a BOS token."""
        return self.encode(text)[len(self._bos) :] if text else []

    def chat(
        self, messages: list[dict], *, add_generation_prompt: bool = True, options: dict | None = None
    ) -> list[int]:
        """Token ids of a conversation. Arguments and errors as for `render`."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, options=options))

    def render(self, messages: list[dict], *, add_generation_prompt: bool = True, options: dict | None = None) -> str:
        """Render a conversation with the chat template.

        Messages, tools, tool calls and tool results have the form of OpenAI's chat completions.
        options: more template variables, such as `enable_thinking` and `tools`.
        Raises RequestError if the messages are invalid, or if the template does not support tools.
        """
        if self._template_source is None:
            raise RequestError("this checkpoint has no chat template (a base model?); send a plain text prompt")
        check_messages(messages)
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._special, **(options or {})}
        if variables["tools"]:
            check_tools(variables["tools"])
            if "tools" not in self.template_variables:
                raise RequestError(
                    "this checkpoint's chat template does not support tools; remove `tools` from the request"
                )
        joins_results = "tool_responses" in self._template_source and "tool_call_id" not in self._template_source
        plain = _as_plain_json(for_template(messages, joins_results))
        try:
            return self._template.render(
                messages=plain, add_generation_prompt=add_generation_prompt, **_as_plain_json(variables)
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RequestError(f"the chat template rejected the messages: {_one_line(error)}") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def spell(self, token: int) -> bytes:
        """The UTF-8 bytes of a single token. A special token gives its name."""
        name = self._tokenizer.id_to_token(token) or ""
        if name[:3] == "<0x" and self._context_dependent is not None and token in self._context_dependent:
            return bytes([int(name[3:5], 16)])
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name, or None if the vocabulary has no such token."""
        return self._tokenizer.token_to_id(name)

    def shows(self, token: int) -> bool:
        """Whether a token appears in decoded text. Special tokens and unused ids do not."""
        return token not in self._hidden and self._tokenizer.id_to_token(token) is not None

    def depends_on_next(self, token: int) -> bool:
        """Whether this token's text can depend on the token that follows it."""
        return self._context_dependent is None or token in self._context_dependent

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """Names of the variables that the chat template reads, such as `tools` and `enable_thinking`.

        Raises CheckpointError if the template is broken.
        """
        self._template  # noqa: B018  raises the error of a broken template
        tree = _environment().parse(self._template_source or "")
        return frozenset(meta.find_undeclared_variables(tree))

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._template_source or "")
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is broken: {_one_line(error)}") from error


class Detokenizer:
    """Decodes one sequence's tokens incrementally. The pieces join to `text.decode` of all tokens.

    Each token is decoded once, as soon as later tokens cannot change its text. A run of byte tokens is decoded as
    a whole, because the tokenizer replaces the whole run if it is not valid UTF-8.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._waiting: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens. Returns the text that later tokens cannot change."""
        new = [token for token in tokens if self._text.shows(token)]
        ends = [i for i, token in enumerate(new, start=1) if not self._text.depends_on_next(token)]
        if not ends:
            self._waiting += new
            return ""
        ready, self._waiting = self._waiting + new[: ends[-1]], new[ends[-1] :]
        return self._text.decode(ready)

    def finish(self) -> str:
        """Returns the text of the tokens that are still waiting."""
        ready, self._waiting = self._waiting, []
        return self._text.decode(ready) if ready else ""


class StopStrings:
    """Cuts a text stream at the stop string that is completed first, however the stream is split.

    found: the stop string that ended the text, or None.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Raises RequestError if a stop string is empty or not a string."""
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop is {stop!r}; expected a string of at least one character")
        self._stops = tuple(stops)
        self._buffer = ""  # text that may turn out to begin a stop string
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text. Returns the text that may be shown, and whether a stop string was found."""
        text = self._buffer + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._buffer = ""
            _, at, self.found = min(ends)
            return text[:at], True
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._buffer = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """Returns the text that waited for a stop string to complete."""
        text, self._buffer = self._buffer, ""
        return text


class StoppedText:
    """Decodes one sequence's tokens incrementally, up to a stop string."""

    def __init__(self, text: Text, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = Detokenizer(text), StopStrings(stops)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stops.found

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens. Returns the text that may be shown."""
        return self._stops.push(self._decoder.push(tokens))[0]

    def finish(self) -> str:
        """Returns the text that was still waiting, up to a stop string."""
        shown, stopped = self._stops.push(self._decoder.finish())
        return shown if stopped else shown + self._stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _context_dependent_ids(tokenizer: Tokenizer) -> frozenset[int] | None:
    """Byte tokens: their text depends on the token that follows. None if the decoder can join any tokens."""
    # The pickled state is the decoder's JSON. `tokenizer.to_str()` would serialise the whole vocabulary.
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if not kinds <= LOCAL_DECODERS:
        return None
    names = [f"<0x{value:02{case}}>" for value in range(256) for case in "Xx"]
    return frozenset(i for name in names if (i := tokenizer.token_to_id(name)) is not None)


def _read_json(file: Path) -> dict:
    """The JSON object in a file. Empty if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} contains a {type(value).__name__}; expected a JSON object")
    return value


def _special_tokens(config: dict) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on. Each is a string, or an object with its `content`."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return {"bos_token": "<bos>", "eos_token": "<eos>", **tokens}


def _find_template(path: Path, config: dict) -> str | None:
    """The chat template: chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
    found = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{path}: chat_template is a {type(found).__name__}; expected a string, or a list of named templates"
        )
    return found


def _as_plain_json(value: Any) -> Any:
    """A copy of plain JSON types. Templates come from the hub and must not call methods of our objects."""
    if isinstance(value, dict):
        return {str(key): _as_plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_plain_json(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}`, which marks a reply for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """A jinja environment equal to the one that transformers uses for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's built-in filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    """The error's message on one line, or its type if it has no message."""
    return one_line(error) or type(error).__name__
