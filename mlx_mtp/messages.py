"""Checks messages and tools from clients, and converts them for chat templates.

The published Gemma 4 templates differ. The newest one rejects tool arguments given as a JSON string. The first one
reads tool results only from `tool_responses` of the assistant's message. Two print a system message given in parts as
a Python list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_mtp.rows import RequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "model", "tool"})


def check_messages(messages: Sequence[dict]) -> None:
    """Raises RequestError unless this is a non-empty list of text messages with known roles."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("the conversation is empty; expected a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(f"message {i} is a {type(message).__name__}; expected an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(f"message {i} has role {role!r}; expected one of {', '.join(sorted(ROLES))}")
        parts = content if isinstance(content, list) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"message {i} has a part of type {kind!r}; expected 'text' (images and audio are not supported)"
                )
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise RequestError(f"message {i} has content {content!r}; expected text")


def check_tools(tools: Any) -> None:
    """Raises RequestError unless this is a list of objects. The template reads their contents, unchecked."""
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools is a {type(tools).__name__}; expected a list")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RequestError(f"tool {i} is a {type(tool).__name__}; expected an object")


def for_template(messages: Sequence[dict], joins_results: bool = False) -> list[dict]:
    """Copies messages into the form that templates read.

    Tool arguments become objects. Tool results get the name of their tool. System messages in parts become one string.
    joins_results: move results into the assistant message with the call, for templates that read them only there.
    Raises RequestError for arguments that are not a JSON object, and for a result without a preceding call.
    """
    out: list[dict] = []
    for i, message in enumerate(messages):
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_parsed_arguments(i, call) for call in message["tool_calls"]]
        if message["role"] in ("system", "developer") and isinstance(message["content"], list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
        if message["role"] == "tool":
            message["name"] = _tool_name(i, message, out)
        out.append(message)
    return _join_results(out) if joins_results else out


def _with_parsed_arguments(i: int, call: Any) -> dict:
    """A copy of a tool call of message `i`, with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f'message {i} has a tool call without a name; expected {{"function": {{"name": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            arguments = None
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        name = function["name"]
        raise RequestError(f"message {i} calls {name} with invalid arguments; expected a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _tool_name(i: int, result: dict, before: list[dict]) -> str:
    """The name of the tool whose result is message `i`. Templates silently drop a result that has no call."""
    at = len(before) - 1
    while at >= 0 and before[at]["role"] == "tool":
        at -= 1
    calls = (before[at].get("tool_calls") or []) if at >= 0 else []
    if not calls and not (at >= 0 and before[at].get("tool_responses")):
        raise RequestError(f"message {i} is a tool result; expected an assistant message with tool_calls before it")
    names = {call.get("id"): call["function"]["name"] for call in calls}
    place = len(before) - 1 - at
    in_order = calls[place]["function"]["name"] if place < len(calls) else None
    by_id = names.get(result.get("tool_call_id")) if result.get("tool_call_id") is not None else None
    return by_id or result.get("name") or result.get("tool_name") or in_order or "unknown"


def _join_results(messages: list[dict]) -> list[dict]:
    """Moves tool results, and the reply that follows them, into the assistant message with the call."""
    out: list[dict] = []
    for message in messages:
        last = out[-1] if out else {}
        if message["role"] == "tool":
            response = {"name": message["name"], "response": _text_of(message["content"])}
            out[-1] = {**last, "tool_responses": [*last.get("tool_responses", []), response]}
        elif message["role"] in ("assistant", "model") and last.get("tool_responses") and not message.get("tool_calls"):
            texts = [text for text in (_text_of(last.get("content")), _text_of(message["content"])) if text]
            out[-1] = {**last, "content": "\n".join(texts)}
        else:
            out.append(message)
    return out


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
