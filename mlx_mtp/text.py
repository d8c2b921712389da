"""Text to token ids and back: chat template, tokenizer, incremental decoding, stop strings. Knows no model.

A template runs as in transformers' `apply_chat_template` (`utils/chat_template_utils.py`): in a sandboxed
jinja environment with the same filters and globals, so that it renders the same text.
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

# Decoders that see one token at a time, except that ByteFallback joins a run of byte tokens.
LOCAL_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse"})


class Text:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, str], template: str | None) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._template_source = template
        self._joining = _joining_ids(tokenizer)
        self._hidden = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
        self._bos = [] if bos is None else [bos]

    @classmethod
    def from_dir(cls, path: Path) -> Text:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint folder."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; expected a complete checkpoint folder")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception for every kind of broken file
            raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(path / "tokenizer_config.json")
        return cls(tokenizer, _special_tokens(config), _find_template(path, config))

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template; base models bring none."""
        return self._template_source is not None

    @property
    def segmented(self) -> bool:
        """Whether thoughts and calls of tools are marked as Gemma 4 marks them, by the checkpoint's template; one
        without any is taken for Gemma's."""
        return self._template_source is None or "<|turn>" in self._template_source

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with one bos token in front whether or not the text brings its own."""
        if not isinstance(text, str):
            raise RequestError(f"the prompt is a {type(text).__name__}; expected text")
        if not text:
            raise RequestError("the prompt is empty; expected at least one character")
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # lone surrogates, as from undecodable arguments
            raise RequestError(f"the prompt is not valid Unicode: {_one_line(error)}") from error
        return ids if ids[:1] == self._bos else self._bos + ids

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of text that goes on where other text ended: no bos token in front."""
        return self.encode(text)[len(self._bos) :] if text else []

    def chat(
        self, messages: list[dict], *, add_generation_prompt: bool = True, options: dict | None = None
    ) -> list[int]:
        """Token ids of a conversation, rendered by the chat template."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, options=options))

    def render(self, messages: list[dict], *, add_generation_prompt: bool = True, options: dict | None = None) -> str:
        """The text of a conversation; `options` are more template variables (`enable_thinking`, `tools`).

        Tools are written as in OpenAI's chat completions, and so are their calls and results in the messages. Raises
        RequestError for tools if the template has no place for them.
        """
        if self._template_source is None:
            raise RequestError("this checkpoint has no chat template (a base model?); give the prompt as plain text")
        check_messages(messages)
        variables: dict[str, Any] = {"tools": None, "documents": None, **self._special, **(options or {})}
        if variables["tools"]:
            check_tools(variables["tools"])
            if "tools" not in self.template_variables:
                raise RequestError("this checkpoint's chat template has no place for tools; send the request without")
        joins_results = "tool_responses" in self._template_source and "tool_call_id" not in self._template_source
        plain = _plain(for_template(messages, joins_results))
        try:
            return self._template.render(
                messages=plain, add_generation_prompt=add_generation_prompt, **_plain(variables)
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RequestError(f"the chat template refused the messages: {_one_line(error)}") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def spell(self, token: int) -> bytes:
        """The bytes of one token by itself, special tokens by their name."""
        name = self._tokenizer.id_to_token(token) or ""
        if name[:3] == "<0x" and self._joining is not None and token in self._joining:
            return bytes([int(name[3:5], 16)])
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name, None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(name)

    def shows(self, token: int) -> bool:
        """Whether a token is part of the text: special tokens and ids without a token are not."""
        return token not in self._hidden and self._tokenizer.id_to_token(token) is not None

    def joins_next(self, token: int) -> bool:
        """Whether what this token shows can depend on the token after it."""
        return self._joining is None or token in self._joining

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """What the chat template can be told (`tools`, `enable_thinking`, ...); anything else would be ignored."""
        self._template  # noqa: B018  it says what is wrong with a broken one
        tree = _environment().parse(self._template_source or "")
        return frozenset(meta.find_undeclared_variables(tree))

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._template_source or "")
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is broken: {_one_line(error)}") from error


class Detokenizer:
    """Decodes one request's tokens as they come; what it returned joins to `text.decode` of all of them.

    A token is decoded once, when nothing after it can change its text. Byte tokens wait for the end of their
    run: the tokenizer replaces every byte of a run that is not valid UTF-8 as a whole.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._waiting: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        new = [token for token in tokens if self._text.shows(token)]
        ends = [i for i, token in enumerate(new, start=1) if not self._text.joins_next(token)]
        if not ends:
            self._waiting += new
            return ""
        ready, self._waiting = self._waiting + new[: ends[-1]], new[ends[-1] :]
        return self._text.decode(ready)

    def finish(self) -> str:
        """Return the text of the tokens that still waited."""
        ready, self._waiting = self._waiting, []
        return self._text.decode(ready) if ready else ""


class StopStrings:
    """Cuts a stream of text at the stop string that is completed first, wherever the stream is split."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop is {stop!r}; expected a text of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None  # the stop string that was completed

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return what can be shown for certain, and whether a stop string was found."""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            _, at, self.found = min(ends)
            return text[:at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held


class StoppedText:
    """One request's tokens to text, up to a stop string."""

    def __init__(self, text: Text, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = Detokenizer(text), StopStrings(stops)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that has become certain."""
        return self._stops.push(self._decoder.push(tokens))[0]

    def finish(self) -> str:
        """Return the text that had been held back; it may turn out to end at a stop string."""
        shown, stopped = self._stops.push(self._decoder.finish())
        return shown if stopped else shown + self._stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _joining_ids(tokenizer: Tokenizer) -> frozenset[int] | None:
    """Ids whose text depends on the token after them: byte tokens. None: any token's may."""
    # The pickled state is the decoder's JSON; `tokenizer.to_str()` would write out the whole vocabulary.
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if not kinds <= LOCAL_DECODERS:
        return None
    spelled = [f"<0x{value:02{case}}>" for value in range(256) for case in "Xx"]
    return frozenset(i for name in spelled if (i := tokenizer.token_to_id(name)) is not None)


def _read_json(file: Path) -> dict:
    """A JSON object from a file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


def _special_tokens(config: dict) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, each written as text or as an object with its content."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return {"bos_token": "<bos>", "eos_token": "<eos>", **tokens}


def _find_template(path: Path, config: dict) -> str | None:
    """The chat template: its own file first, then tokenizer_config.json (one, or a list of named ones)."""
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
            f"{path}: chat_template is a {type(found).__name__}; expected text, or a list of named templates"
        )
    return found


def _plain(value: Any) -> Any:
    """A copy out of plain JSON types: templates come from the hub and must not reach our objects' methods."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)


class _Generation(Extension):
    """`{% generation %}` marks a reply for training; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The jinja environment that transformers renders chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
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
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return one_line(error) or type(error).__name__
