"""Messages and tools as clients send them, brought into the form that chat templates can render. Knows no tokenizer.

Published templates of Gemma 4 differ in what they take: the newest refuses arguments written as JSON text, the first
knows tool results only as a part of the assistant's message, two print a system message given in parts as Python would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_mtp.rows import RequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "model", "tool"})


def check_messages(messages: Sequence[dict]) -> None:
    """Raise RequestError unless these are messages that a text model can read."""
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
                    f"message {i} has a part of type {kind!r}; expected text (no image or audio support)"
                )
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise RequestError(f"message {i} has content {content!r}; expected text")


def check_tools(tools: Any) -> None:
    """Raise RequestError unless this is a list of objects; what each holds is between the client and the template."""
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools is a {type(tools).__name__}; expected a list")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RequestError(f"tool {i} is a {type(tool).__name__}; expected an object")


def for_template(messages: Sequence[dict], joins_results: bool = False) -> list[dict]:
    """Messages as a template takes them; the ones given are not changed.

    Arguments of calls become objects, results get the name of their tool, and a system message in parts becomes one
    text. joins_results: move results into the message of the call, for templates that know no others.
    Raises RequestError for arguments that are no JSON object, and for a result that no call stands before.
    """
    out: list[dict] = []
    for i, message in enumerate(messages):
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(i, call) for call in message["tool_calls"]]
        if message["role"] in ("system", "developer") and isinstance(message["content"], list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
        if message["role"] == "tool":
            _name_result(i, message, out)
        out.append(message)
    return _joined(out) if joins_results else out


def _call(i: int, call: Any) -> dict:
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
        raise RequestError(f"message {i} calls {name} with arguments that are no JSON object; expected one")
    return {**call, "function": {**function, "arguments": arguments}}


def _name_result(i: int, message: dict, before: list[dict]) -> None:
    """Give a tool's result the name of its tool, from the call it answers. Templates leave out what answers none."""
    at = len(before) - 1
    while at >= 0 and before[at]["role"] == "tool":
        at -= 1
    calls = (before[at].get("tool_calls") or []) if at >= 0 else []
    if not calls and not (at >= 0 and before[at].get("tool_responses")):
        raise RequestError(f"message {i} is a tool's result; expected an assistant message with tool_calls before it")
    names = {call.get("id"): call["function"]["name"] for call in calls}
    place = len(before) - 1 - at
    in_order = calls[place]["function"]["name"] if place < len(calls) else None
    name = names.get(message.get("tool_call_id")) if message.get("tool_call_id") is not None else None
    message["name"] = name or message.get("name") or message.get("tool_name") or in_order or "unknown"


def _joined(messages: list[dict]) -> list[dict]:
    """Results as `tool_responses` of the message that called, and what was said next as that message's content."""
    out: list[dict] = []
    for message in messages:
        last = out[-1] if out else {}
        if message["role"] == "tool":
            response = {"name": message["name"], "response": _text_of(message["content"])}
            out[-1] = {**last, "tool_responses": [*last.get("tool_responses", []), response]}
        elif message["role"] in ("assistant", "model") and last.get("tool_responses") and not message.get("tool_calls"):
            said = [text for text in (_text_of(last.get("content")), _text_of(message["content"])) if text]
            out[-1] = {**last, "content": "\n".join(said)}
        else:
            out.append(message)
    return out


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
