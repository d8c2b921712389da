"""Prompt tokens that are really computed in an agent's conversation: this package's server beside mlx_lm.server.

    python bench/agent_turns.py                       # a few seconds a server on the embedded pair
    python bench/agent_turns.py --words 12000 --json out.json

One conversation, three requests: a question (behind a system prompt and tools), then the same with a call and its
result, then with a second call and result; the last one has about 8,000 tokens. Calls and results are written
here and not by the model, so that every server sees the same text. Forms:

- chat: OpenAI's, word for word the same beginning every time.
- chat, tools turned: the list of tools begins with another one every time, as with clients that list what they find.
- chat, a line: the line that Claude Code puts in front of its system prompt, another one every time, as proxies hand it
  on.
- messages: Anthropic's, with that line and turned tools. mlx_lm.server has no such route.

Counts are the servers' own, from `usage`: prompt tokens, those of them taken from the cache, and the rest. No times:
what a token costs is not in question here. The embedded checkpoint says that its context is 4096 tokens; its copy here
says 32768, which changes no count. Its chat template is Gemma 4's own, from the tests' fixtures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from serve_load import REQUEST_S, TINY, Server, free_port, note, started, text, write_float32

TEMPLATE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "templates" / "gemma4_v5.jinja"
TOOLS = ("read_file", "write_file", "list_files", "search", "run_command", "fetch_page", "ask_user", "plan")
CALLS = (("read_file", {"path": "src/main.py"}), ("run_command", {"command": "make test"}))
CONTEXT_TOK = 32768
Turn = dict[str, Any]

# the conversation ---------------------------------------------------------------------------------------------


def tools(turn: int) -> list[dict[str, Any]]:
    """OpenAI's form; turn: by how many places the list is turned."""
    order = [*TOOLS[turn:], *TOOLS[:turn]]
    return [{"type": "function", "function": function(name)} for name in order]


def function(name: str) -> dict[str, Any]:
    number = TOOLS.index(name)
    properties = {
        "path": {"type": "string", "description": text(100 + number, 12)},
        "command": {"type": "string", "description": text(200 + number, 12)},
    }
    schema = {"type": "object", "properties": properties, "required": ["path"]}
    return {"name": name, "description": text(300 + number, 30), "parameters": schema}


def chats(words: int, turned: bool = False, line: bool = False) -> Iterator[Turn]:
    """The three bodies for chat completions. words: of all texts together, tools left out."""
    system = "You are a coding agent. " + text(1, words // 3)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": "Make the tests pass. " + text(2, 40)},
    ]
    for i in range(3):
        if i:
            name, arguments = CALLS[i - 1]
            call = {"name": name, "arguments": json.dumps(arguments)}
            call = {"id": f"call_{i}", "type": "function", "function": call}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"call_{i}", "content": text(10 + i, words // 3)})
        if line:
            messages[0] = {"role": "system", "content": f"{header(i)}\n{system}"}
        yield {"messages": list(messages), "tools": tools(i if turned else 0), "max_tokens": 8, "temperature": 0}


def header(number: int) -> str:
    return f"x-anthropic-billing-header: cc_version=2.1.{number}; cc_entrypoint=cli; cch={number * 7919:05x};"


def as_anthropic(chat: Turn, number: int) -> Turn:
    """The same for /v1/messages, as Claude Code sends it."""
    system, user, *rest = chat["messages"]
    messages: list[dict[str, Any]] = [user]
    for message in rest:
        if message["role"] == "assistant":
            call = message["tool_calls"][0]
            arguments = json.loads(call["function"]["arguments"])
            block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}
            messages.append({"role": "assistant", "content": [block]})
        else:
            block = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
            messages.append({"role": "user", "content": [block]})
    named = [tool["function"] for tool in chat["tools"]]
    return {
        "system": [{"type": "text", "text": header(number)}, {"type": "text", "text": system["content"]}],
        "messages": messages,
        "tools": [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in named],
        "max_tokens": 8,
        "temperature": 0,
    }


def forms(words: int) -> dict[str, tuple[str, list[Turn]]]:
    """Path and bodies by the form's name. Each form's texts are its own, or one would find another's in the cache."""
    chat = "/v1/chat/completions"
    claude = [as_anthropic(body, i) for i, body in enumerate(chats(words + 90, turned=True))]
    return {
        "chat": (chat, list(chats(words))),
        "chat, tools turned": (chat, list(chats(words + 30, turned=True))),
        "chat, a line": (chat, list(chats(words + 60, line=True))),
        "messages": ("/v1/messages", claude),
    }


# the servers --------------------------------------------------------------------------------------------------


def servers(args: argparse.Namespace, folder: Path) -> list[Server]:
    """Those that were asked for, with the copied checkpoint."""
    target, out = str(folder / "target"), []
    if "ours" in args.servers:
        port = free_port()
        command = [sys.executable, "-m", "mlx_mtp", "serve", "-m", target, "--drafter", str(TINY / "drafter")]
        command += ["--dtype", "float32", "--port", str(port), "--name", "served"]
        out.append(Server("mlx-mtp", command, port, "served", folder / "ours.log"))
    if "mlx-lm" in args.servers:
        port = free_port()
        command = [args.lm_python, "-m", "mlx_lm", "server", "--model", target, "--port", str(port)]
        command += ["--chat-template-args", '{"enable_thinking": false}']
        out.append(Server("mlx-lm", command, port, "default_model", folder / "lm.log"))
    return out


def write_checkpoint(folder: Path) -> None:
    target = write_float32(TINY / "target", folder / "target")
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOK
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(TEMPLATE, target / "chat_template.jinja")


def play(server: Server, path: str, bodies: list[Turn]) -> Iterator[tuple[int, int]]:
    """(prompt tokens, tokens from the cache) of every request."""
    for body in bodies:
        answer = httpx.post(server.url + path, json={"model": server.model, **body}, timeout=REQUEST_S)
        if answer.status_code != 200:
            raise SystemExit(f"{server.name}: {answer.status_code} {answer.text[:300]}")
        yield counted(answer.json()["usage"])


def counted(usage: dict[str, Any]) -> tuple[int, int]:
    if "input_tokens" in usage:  # Anthropic's leaves out what was cached
        return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["cache_read_input_tokens"]
    return usage["prompt_tokens"], (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


# reports ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-turns-")))
        write_checkpoint(folder)
        wanted = forms(args.words)
        for server in servers(args, folder):
            with started(server):
                for form, (path, bodies) in wanted.items():
                    if path == "/v1/messages" and server.name != "mlx-mtp":
                        continue
                    for i, (prompt, cached) in enumerate(play(server, path, bodies)):
                        row = {"server": server.name, "form": form, "turn": i + 1}
                        rows.append(row | {"prompt": prompt, "cached": cached, "computed": prompt - cached})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """A table on stderr."""
    note(f"{'form':20} {'server':8} {'turn':>4} {'prompt':>7} {'cached':>7} {'computed':>8}")
    for row in sorted(rows, key=lambda r: (r["form"], r["server"] != "mlx-mtp", r["turn"])):
        numbers = f"{row['turn']:4} {row['prompt']:7} {row['cached']:7} {row['computed']:8}"
        note(f"{row['form']:20} {row['server']:8} {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", default=["ours", "mlx-lm"])
    parser.add_argument("--lm-python", default=sys.executable, help="a Python that has mlx-lm")
    parser.add_argument("--words", type=int, default=6000, help="of the conversation, tools left out")
    parser.add_argument("--json", type=Path, help="write the counts there")
    args = parser.parse_args()
    rows = run(args)
    report(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    elif not sys.stdout.isatty():
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
