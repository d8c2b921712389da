"""The JSON that OpenAI's endpoints take, as pydantic models, and which fields are accepted without effect.

A field that is `null` is absent (respond.parse drops it). A field that is neither here nor in NO_EFFECT is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from mlx_mtp.rows import MAX_LOGPROBS
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat, stable
from mlx_mtp.server.forms import Form, stop_strings
from mlx_mtp.server.nouns import ServerError, invalid

# Bookkeeping, hints for caches that this server does not need, and limits on what it never does.
NO_EFFECT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options "
    "keep_alive id_slot session_id request_id "
    "cache_prompt "  # llama.cpp's: always on here
    "prediction".split()  # a hint for speed; the output is the same without
)
# Fields that have no meaning at these values, and cannot be honoured at others.
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
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
SAMPLING += ("presence_penalty", "frequency_penalty", "repetition_penalty")


class OpenForm(Form):
    """A JSON object that keeps its unknown fields, for checks and for the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(OpenForm):
    include_usage: StrictBool | None = None
    continuous_usage_stats: Literal[False] | None = None


class CommonForm(OpenForm):
    """The fields of both endpoints."""

    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    seed: StrictInt | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    logit_bias: dict[str, StrictFloat] | None = None
    stop: Any = None  # checked by `stop_strings`: pydantic would report each type that it is not
    n: Annotated[StrictInt, Field(ge=1, le=128)] = 1
    ignore_eos: StrictBool = False

    def request(self) -> GenerationRequest:
        """The request without its prompt. Raises ServerError."""
        self._check_extras()
        return GenerationRequest(
            sampling=self._sampling(),
            stop=stop_strings(self.stop, "stop"),
            max_tokens=self.max_tokens,
            n=self.n,
            stop_at_eos=not self.ignore_eos,
        )

    def _sampling(self) -> dict[str, Any]:
        out = self.given(*SAMPLING)
        if self.top_k == -1:  # vLLM's "all"
            out["top_k"] = 0
        if self.seed is not None and -(2**63) <= self.seed < 0:
            out["seed"] = self.seed % 2**64
        if self.logit_bias:
            out["logit_bias"] = tuple((_token(key), bias) for key, bias in self.logit_bias.items())
        return out

    def _check_extras(self) -> None:
        """Refuse fields that would change the answer and cannot be honoured."""
        extras = {name: value for name, value in (self.model_extra or {}).items() if name not in NO_EFFECT}
        bad = [n for n, v in extras.items() if not any(_same(v, ok) for ok in ONLY_AT.get(n, ()))]
        if bad:
            names = ", ".join(name[:60] for name in sorted(bad)[:20])
            raise invalid(f"not supported: {names}; remove the field", sorted(bad)[0][:60])


class ToolCallForm(OpenForm):
    """A tool call of an earlier turn. arguments: an object or its JSON text; an empty string is an empty object."""

    class Function(OpenForm):
        name: StrictStr
        arguments: StrictStr | dict[str, Any] | None = None

    id: StrictStr | None = None
    function: Function


class ChatMessage(OpenForm):
    """A turn of a conversation. Chat templates ignore fields that they do not know, such as a user's name."""

    role: StrictStr
    content: StrictStr | list[dict[str, Any]] | None = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: list[ToolCallForm] | None = None
    tool_call_id: StrictStr | None = None


class FunctionForm(OpenForm):
    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolForm(OpenForm):
    type: Literal["function"]
    function: FunctionForm


class NamedToolForm(OpenForm):
    """The choice of one tool."""

    class Named(OpenForm):
        name: StrictStr

    type: Literal["function"] = "function"
    function: Named


class ResponseFormatForm(OpenForm):
    class Schema(OpenForm):
        model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
        definition: dict[str, Any] | None = Field(None, alias="schema")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema_of_answer(self) -> Any:
        """True is any object, None any text. Raises ServerError."""
        if self.type != "json_schema":
            return True if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.definition is None:
            raise invalid("response_format has no json_schema.schema", "response_format")
        return self.json_schema.definition


class ChatForm(CommonForm):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage]
    tools: list[ToolForm] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolForm | None = None
    response_format: ResponseFormatForm | None = None
    parallel_tool_calls: StrictBool | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    enable_thinking: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
        base, variables = super().request(), dict(self.chat_template_kwargs or {})
        return replace(
            base,
            messages=plain_messages(self.messages),
            response_format=self._response_format(),
            thinking=self._thinking(variables.pop("enable_thinking", None)),
            template_variables=variables,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _thinking(self, variable: Any) -> bool:
        """Whether the model may think; three fields can ask for it."""
        for name in ("messages", "add_generation_prompt", "tools", "documents"):
            if name in (self.chat_template_kwargs or {}):
                raise invalid(f"chat_template_kwargs must not set {name}", "chat_template_kwargs")
        effort = None if self.reasoning_effort is None else self.reasoning_effort != "none"
        flags = [flag for flag in (variable, self.enable_thinking, effort) if flag is not None]
        if not all(isinstance(flag, bool) for flag in flags):
            raise invalid("enable_thinking must be true or false", "chat_template_kwargs")
        if len(set(flags)) > 1:
            raise invalid("enable_thinking and reasoning_effort contradict each other; give one", "enable_thinking")
        return bool(flags and flags[0])

    def _response_format(self) -> ResponseFormat:
        choice = self.tool_choice
        tools = [] if choice == "none" else self.tools or []
        return ResponseFormat(
            tools=tuple(tool.model_dump(exclude_none=True) for tool in tools),
            tool_choice="required" if choice == "required" else "auto",
            tool_name=choice.function.name if isinstance(choice, NamedToolForm) else None,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            schema=self.response_format.schema_of_answer() if self.response_format else None,
        )


class CompletionForm(CommonForm):
    """The body of /v1/completions."""

    prompt: Any  # checked by hand: pydantic would report every element of a long list
    suffix: StrictStr | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None

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
        raise invalid("prompt must be a string, a list of strings, token ids, or a list of lists of ids", "prompt")


def _token(key: str) -> int:
    """A key of logit_bias."""
    if not key.isascii() or not key.isdecimal() or len(key) > 9:
        raise invalid(f"logit_bias has the key {key[:40]!r}; expected a token id", "logit_bias")
    return int(key)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them. A turn that has only tool calls or reasoning gets empty content.

    System prompts lose their volatile line: proxies pass on Claude Code's to this endpoint.
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
        return stable(content)
    parts = [{**part, "text": stable(part["text"])} if isinstance(part.get("text"), str) else part for part in content]
    return [part for part in parts if part.get("text") != ""]


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = types.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
