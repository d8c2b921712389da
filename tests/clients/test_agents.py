"""Coding agents against the server: the model calls a tool, the agent runs it, its result comes back, the model ends.

A script decides what the model writes; everything else is real. The note's word is in no prompt until the agent has
run the tool. So an answer that has the word went all the way round.
"""

import json
import re
import socket
import sys
import uuid
from collections import Counter

import pytest
from programs import Desk, Ran, node, python
from scripted import Scripted, Turn, answer, call

QUESTION = "What is in note.txt?"
COMMAND = "cat note.txt && echo made > made.txt"
WORD = re.compile(r"the word is (\w+)")


@pytest.fixture
def word(desk: Desk) -> str:
    """A word that only the note contains."""
    word = "w" + uuid.uuid4().hex[:8]
    (desk.place / "note.txt").write_text(f"the word is {word}\n")
    return word


def calls(server: Scripted, tool: str, **arguments: str | list[str]) -> None:
    """The model calls a tool and then repeats the word in its result. A request without tools gets a title."""

    def says(prompt: str) -> str:
        if "<|tool>" not in prompt:
            return answer(prompt, "A title")
        results = Turn(prompt, 0, "").results
        if not results:
            return call(tool, **arguments)
        found = WORD.search(results[-1])
        return answer(prompt, f"It says {found[1]}." if found else f"The tool says {results[-1][:500]}")

    server.says(says)


def check_loop(server: Scripted, desk: Desk, ran: Ran, word: str, requests: dict[str, int]) -> None:
    """Check both sides of a loop. requests: how many the server got by route; all were answered with 200.

    Claude Code may also send HEAD / to test the connection.
    """
    server.settle()
    record = server.record
    assert ran.code == 0 and f"It says {word}." in ran.out, ran
    assert (desk.place / "made.txt").read_text() == "made\n"
    asked = Counter(request for request in record.requests if request != ("/", 200))
    assert asked == Counter({(route, 200): count for route, count in requests.items()})
    first, second = [turn for turn in record.turns if "<|tool>" in turn.prompt]
    assert not first.results and word not in first.prompt
    assert "<|tool_call>call:" in second.prompt and [word in result for result in second.results] == [True]
    assert record.cached[second.prompt_tok] >= first.prompt_tok - 1, "the first prompt was computed again"


def test_claude_code_runs_a_command_and_reports_its_result(server, desk, word):
    calls(server, "Bash", command=COMMAND, description="Read the note")
    ran = desk.run(
        node("claude"),
        "-p",
        QUESTION,
        "--allowedTools",
        "Bash",
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_AUTH_TOKEN="x",
        ANTHROPIC_MODEL="gemma",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    check_loop(server, desk, ran, word, {"/v1/messages": 2})


def test_codex_runs_a_command_and_reports_its_result(server, desk, word):
    calls(server, "exec_command", cmd=COMMAND)
    folder = desk.home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(
        'model = "gemma"\nmodel_provider = "mlx"\ncheck_for_update_on_startup = false\n'
        "[analytics]\nenabled = false\n"
        f'[model_providers.mlx]\nname = "mlx-mtp"\nbase_url = "{server.url}/v1"\nwire_api = "responses"\n'
    )
    unsandboxed = "--dangerously-bypass-approvals-and-sandbox"  # the command is ours, and containers have no sandbox
    ran = desk.run(node("codex"), "exec", "--skip-git-repo-check", unsandboxed, QUESTION, CODEX_HOME=str(folder))
    check_loop(server, desk, ran, word, {"/v1/responses": 2})


def test_opencode_runs_a_command_and_reports_its_result(server, desk, word):
    calls(server, "bash", command=COMMAND, description="Read the note")
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{server.url}/v1"}, "models": {"gemma": {}}}
    config = {"provider": {"mlx": provider}, "model": "mlx/gemma"}
    config |= {"autoupdate": False, "share": "disabled", "snapshot": False}
    (desk.place / "opencode.json").write_text(json.dumps(config))
    ran = desk.run(
        node("opencode"),
        "run",
        QUESTION,
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
    )
    check_loop(server, desk, ran, word, {"/v1/chat/completions": 3})  # one of them for the title


def test_continue_runs_a_command_and_reports_its_result(server, desk, word):
    calls(server, "Bash", command=COMMAND)
    config = desk.home / "config.yaml"
    config.write_text(
        "name: local\nversion: 0.0.1\nschema: v1\n"
        f"models: [{{name: gemma, provider: openai, model: gemma, apiBase: {server.url}/v1, apiKey: x}}]\n"
    )
    ran = desk.run(
        node("cn"),
        "-p",
        QUESTION,
        "--auto",
        "--config",
        str(config),
        CONTINUE_CLI_ENABLE_TELEMETRY="0",
        CONTINUE_METRICS_ENABLED="0",
        CONTINUE_API_BASE="http://127.0.0.1:9/",  # otherwise it calls continue.dev
    )
    check_loop(server, desk, ran, word, {"/v1/chat/completions": 2})


def test_cline_runs_a_command_and_reports_its_result(server, desk, word):
    calls(server, "run_commands", commands=[COMMAND])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])  # for its daemon, so that it does not find the user's
    kind, url = "openai-compatible", f"{server.url}/v1"
    auth = desk.run(node("cline"), "auth", "-p", kind, "-b", url, "-k", "x", "-m", "gemma", CLINE_HUB_PORT=port)
    assert auth.code == 0, auth
    try:
        ran = desk.run(node("cline"), "-P", kind, "--json", QUESTION, CLINE_HUB_PORT=port)
    finally:
        stopped = desk.run(node("cline"), "hub", "stop", CLINE_HUB_PORT=port)
    assert '"stopped":true' in stopped.out, stopped
    check_loop(server, desk, ran, word, {"/v1/chat/completions": 2})


def test_aider_applies_an_edit_reports_a_test_and_fixes_it(server, desk, word):
    """Aider has no tools: its model writes whole files and reads the output of a test command."""
    (desk.place / "sums.py").write_text("def add(a, b):\n    return a - b\n")
    (desk.place / "check.py").write_text(f"import sums\nassert sums.add(2, 3) == 5, 'the word is {word}'\n")
    listing = "sums.py\n```\ndef add(a, b):\n    return a {} b\n```"
    server.says(lambda prompt: answer(prompt, listing.format("+" if WORD.search(prompt) else "*")))
    prices = desk.home / ".aider" / "caches" / "model_prices_and_context_window.json"
    prices.parent.mkdir(parents=True)
    prices.write_text('{"none": {}}')  # it would fetch them
    quiet = ("analytics", "check-update", "show-model-warnings", "show-release-notes", "pretty", "git")
    ran = desk.run(
        python("aider"),
        "--model=openai/gemma",
        "--yes-always",
        "--auto-test",
        f"--test-cmd={sys.executable} check.py",
        "--message=Mend add.",
        *(f"--no-{name}" for name in quiet),
        "sums.py",
        OPENAI_API_BASE=f"{server.url}/v1",
        OPENAI_API_KEY="x",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    server.settle()
    record = server.record
    assert ran.code == 0 and word in ran.out, ran
    assert (desk.place / "sums.py").read_text() == "def add(a, b):\n    return a + b\n", ran
    assert record.requests == [("/v1/chat/completions", 200)] * 2
    first, second = record.turns
    assert "return a - b" in first.prompt and word not in first.prompt
    assert "return a * b" in second.prompt and word in second.prompt
