"""The JSON that OpenAI's endpoints take, as pydantic models, and which fields are accepted without effect.

A field that is `null` is absent (respond.parse drops it). A field that is neither here nor in NO_EFFECT is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_mtp.rows import MAX_LOGPROBS
from mlx_mtp.server import asking
from mlx_mtp.server.asking import Must
from mlx_mtp.server.forms import Flag, Integer, Number, Word
from mlx_mtp.server.nouns import ServerError, invalid

# Bookkeeping, hints for caches that nothing need be told here, and limits on what this server never does.
NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "cache_prompt",  # llama.cpp's: always on here
        "prediction",  # a hint for speed; the text is the same without
        "keep_alive",
        "id_slot",
        "session_id",
        "request_id",
    }
)
# Fields that mean nothing at these values, and cannot be honoured at others.
ONLY_AT: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "verbosity": ("medium",),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "typical_p": (1, 1.0),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "return_token_ids": (False,),
    "logit_bias": ({}, []),
}


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(_Form):
    include_usage: Flag | None = None
    include_obfuscation: Flag | None = None  # padding against eavesdroppers; nothing leaves this machine
    continuous_usage_stats: Literal[False] | None = None


class Common(_Form):
    """What both endpoints take."""

    model: Word | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    seed: Integer | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop: Any = None  # a text or a list of texts, checked by hand: pydantic would report each kind it is not
    n: Annotated[Integer, Field(ge=1, le=128)] = 1
    ignore_eos: Flag = False

    def changes(self) -> dict[str, Any]:
        """The fields of `Sampling` that the request names. Raises ServerError."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        names += ("presence_penalty", "frequency_penalty", "repetition_penalty")
        out = {name: value for name in names if (value := vars(self)[name]) is not None}
        if self.top_k == -1:  # vLLM's "all"
            out["top_k"] = 0
        if self.seed is not None and -(2**63) <= self.seed < 0:
            out["seed"] = self.seed % 2**64
        if self.logit_bias:
            out["logit_bias"] = tuple((_token(key), bias) for key, bias in self.logit_bias.items())
        return out

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises ServerError."""
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise invalid("stop must be a text or a list of texts", "stop")
        if "" in stops:
            raise invalid("stop holds an empty text; expected at least one character", "stop")
        if len(stops) > 64:
            raise invalid(f"stop holds {len(stops)} texts; 64 is the most", "stop")
        return tuple(stops)

    def check_extras(self) -> None:
        """Refuse fields that would change the answer and cannot be honoured. Raises ServerError."""
        extras = {name: value for name, value in (self.model_extra or {}).items() if name not in NO_EFFECT}
        bad = [n for n, v in extras.items() if not any(_same(v, ok) for ok in ONLY_AT.get(n, ()))]
        if bad:
            names = ", ".join(name[:60] for name in sorted(bad)[:20])
            raise invalid(f"not supported by this server: {names}; leave the field out", sorted(bad)[0][:60])


class CallForm(_Form):
    """A tool call that was made earlier. arguments: an object, or its JSON text; empty text is an empty object."""

    class Function(_Form):
        name: Word
        arguments: Word | dict[str, Any] | None = None

    id: Word | None = None
    function: Function


class Message(_Form):
    """A turn of a conversation. What templates do not know, such as a user's name, they leave out."""

    role: Word
    content: Word | list[dict[str, Any]] | None = None
    name: Word | None = None
    reasoning_content: Word | None = None
    tool_calls: list[CallForm] | None = None
    tool_call_id: Word | None = None


class Function(_Form):
    """What a tool is called with."""

    name: Annotated[Word, Field(min_length=1, max_length=256)]
    description: Word | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(_Form):
    """A tool on offer."""

    type: Literal["function"]
    function: Function


class NamedTool(_Form):
    """The choice of one tool."""

    class Named(_Form):
        name: Word

    type: Literal["function"] = "function"
    function: Named


class ResponseFormat(_Form):
    """What an answer must be."""

    class Schema(_Form):
        model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
        definition: dict[str, Any] | None = Field(None, alias="schema")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def required(self) -> Any:
        """The answer's schema; True for any object, None for any text. Raises ServerError."""
        if self.type != "json_schema":
            return True if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.definition is None:
            raise invalid("response_format has no json_schema.schema", "response_format")
        return self.json_schema.definition


class ChatForm(Common):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Flag | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    enable_thinking: Flag | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        """How many log-probabilities a token, None for none. Raises ServerError."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def options(self) -> dict[str, Any]:
        """The template's variables, `enable_thinking` among them. Raises ServerError."""
        options = dict(self.chat_template_kwargs or {})
        for name in ("messages", "add_generation_prompt", "tools", "documents"):
            if name in options:
                raise invalid(f"chat_template_kwargs must not hold {name}", "chat_template_kwargs")
        said = [options.pop("enable_thinking", None), self.enable_thinking]
        said.append(None if self.reasoning_effort is None else self.reasoning_effort != "none")
        said = [flag for flag in said if flag is not None]
        if not all(isinstance(flag, bool) for flag in said):
            raise invalid("enable_thinking must be true or false", "chat_template_kwargs")
        if len(set(said)) > 1:
            raise invalid("enable_thinking and reasoning_effort contradict each other; give one", "enable_thinking")
        if self.offered():
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in self.offered()]
        return {**options, "enable_thinking": bool(said and said[0])}

    def must(self) -> Must:
        """What the text has to be. Raises ServerError."""
        named = isinstance(self.tool_choice, NamedTool)
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        functions = [tool.function for tool in self.offered()]
        return Must(
            tools=tuple(asking.Tool(f.name, f.parameters or {}, bool(f.strict)) for f in functions),
            choice="auto" if choice in (None, "none") else choice,
            named=named,
            several=self.parallel_tool_calls is not False,
            schema=self.response_format.required() if self.response_format else None,
        )

    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())


class CompletionForm(Common):
    """The body of /v1/completions. prompt is checked by hand: pydantic would report every element of a long list."""

    prompt: Any
    suffix: Word | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt or several. Raises ServerError."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            if all(type(item) is int for item in given):
                return [given]
            if all(isinstance(item, str) for item in given):
                return given
            if all(isinstance(item, list) and all(type(i) is int for i in item) for item in given):
                return given
        raise invalid("prompt must be a text, a list of texts, token ids, or a list of lists of ids", "prompt")


def _token(key: str) -> int:
    """A key of logit_bias."""
    if not key.isascii() or not key.isdecimal() or len(key) > 9:
        raise invalid(f"logit_bias has the key {key[:40]!r}; expected a token id", "logit_bias")
    return int(key)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as plain objects, nulls left out; beside calls there may be no content, and then it is empty.

    System prompts without volatile lines: proxies hand Claude Code's on to this API as they are.
    """
    out = [message.model_dump(exclude_none=True) for message in messages]
    for message in out:
        if message["role"] == "system":
            message.update(content=_stable(message.get("content", "")))
        if message.get("tool_calls") or message.get("reasoning_content"):
            message.setdefault("content", "")
    return out


def _stable(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return asking.stable(content)
    texts = [
        {**part, "text": asking.stable(part["text"])} if isinstance(part.get("text"), str) else part for part in content
    ]
    return [part for part in texts if part.get("text") != ""]


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "invalid_request_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
