"""Vim with llama.vim: it sends /infill while a user types and shows ghost text, which Tab accepts.

Vim runs in a pseudo-terminal, because it shows ghost text only in a terminal.
"""

import os
import pty
import re
import shutil
import subprocess
import termios
import threading
from pathlib import Path

import pytest
from programs import CLIENTS, LIMIT_S, Desk, end
from scripted import Scripted, answer

BEFORE = "def add(a, b):\n    \n\n\nprint(add(2, 3))\n"
AFTER = "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))\n"
SETTINGS = """
set nocompatible runtimepath^={plugin} noswapfile viminfo=
let g:llama_config = {{'endpoint_fim': '{url}/infill'}}
"""
# Types at the end of the second line, waits for ghost text, accepts it with Tab, saves.
STEPS = r"""
let g:steps = 0
function! Step(timer)
  let g:steps += 1
  if g:steps == 1
    call cursor(2, 5)
    call feedkeys("Are", 't')
  elseif mode() ==# 'i' && llama#is_fim_hint_shown() && !exists('g:taken')
    let g:taken = 1
    call feedkeys("\<Tab>\<Esc>:wqall!\<CR>", 't')
  endif
endfunction
call timer_start(200, 'Step', {'repeat': -1})
"""


@pytest.fixture
def plugin() -> Path:
    """The folder of llama.vim; `make test-clients` clones it, unless LLAMA_VIM names one."""
    folder = Path(os.environ.get("LLAMA_VIM") or CLIENTS / "llama.vim").resolve()
    assert (folder / "plugin" / "llama.vim").is_file(), f"{folder} does not hold llama.vim"
    return folder


def at_terminal(desk: Desk, *command: str) -> tuple[int, str]:
    """Run a program in a terminal to its end; returns its exit code and its output."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 200))
    variables = desk.environment(TERM="xterm")
    process = subprocess.Popen(
        command, cwd=desk.place, env=variables, stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    os.write(ours, b"\r")  # Vim 9.0 stops at the plugin's advice to take 9.1
    shown = bytearray()
    reading = threading.Thread(target=_read_to_end, args=(ours, shown))
    reading.start()
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pass
    end(process)
    code = process.wait()
    reading.join()
    os.close(ours)
    return code, shown.decode("utf-8", "replace")


def _read_to_end(terminal: int, into: bytearray) -> None:
    """Read a terminal until it closes. Unread output would block the program."""
    try:
        while data := os.read(terminal, 65536):
            into += data
    except OSError:  # Linux raises this when the program has ended
        pass


def says(prompt: str) -> str:
    """The end of the line; nothing if the line is complete, which the plugin requests first."""
    return answer(prompt, "turn a + b\n```" if prompt.endswith("    re") else "\n```")


def test_vim_completes_a_line(server: Scripted, desk: Desk, plugin: Path):
    vim = shutil.which("vim")
    assert vim is not None, "vim is missing"
    (desk.place / "sums.py").write_text(BEFORE)
    (desk.place / "settings.vim").write_text(SETTINGS.format(plugin=plugin, url=server.url))
    (desk.place / "steps.vim").write_text(STEPS)
    server.says(says)
    code, shown = at_terminal(desk, vim, "-u", "settings.vim", "-S", "steps.vim", "sums.py")
    assert code == 0, shown
    server.settle()
    assert (desk.place / "sums.py").read_text() == AFTER, shown
    requests = set(server.record.requests)
    assert ("/infill", 200) in requests and requests <= {("/infill", 200), ("/infill", 499)}  # 499: Vim ended first
    first = server.record.turns[0]
    assert "def add(a, b):\n    re<HOLE>" in first.prompt and "print(add(2, 3))" in first.prompt
    counts = re.search(r"\| p: (\d+) \(\d+\.\d+ ms, (\d+)\.\d+ t/s\) \| g: (\d+) ", shown)
    assert counts is not None and int(counts[1]) == first.prompt_tok and int(counts[2]) > 0 < int(counts[3]), shown
