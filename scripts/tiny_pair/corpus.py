"""The training text: the running interpreter's own standard library. Knows nothing of tokens or models.

Two kinds of documents: whole source files, and chat pairs (name + docstring -> body) cut from the same files
with `ast`, so that the turn markers are learned from something real. A file is trained on or held out by a
hash of its path, so no held-out prompt shares a file with the training text.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from pathlib import Path

SKIP_DIRS = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo encodings __pycache__ ensurepip "
    "_bundled pydoc_data".split()
)
SKIP_FILES = ("_sysconfigdata", "keyword.py", "token.py", "opcode.py", "entities.py")  # generated tables
HELD_OUT_SHARE = 0.04
ROOT = Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(held_out: bool) -> list[Path]:
    """Source files of one side of the split, in path order."""
    files = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if SKIP_DIRS.isdisjoint(inside.parts[:-1]) and not inside.name.startswith(SKIP_FILES):
            if is_held_out(inside) == held_out:
                files.append(path)
    return files


def is_held_out(inside: Path) -> bool:
    """The split: a hash of the path inside the library, so it is the same on every machine."""
    digest = hashlib.sha256(inside.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def read(path: Path) -> str | None:
    """One file with tabs expanded, or None when it is not UTF-8 or too short to teach anything."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").expandtabs(8)
    return text if len(text) > 200 else None


def chat_pairs(text: str) -> list[tuple[str, str]]:
    """(request, answer) for every documented, undecorated, short function or method of one file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines, pairs = text.split("\n"), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        if not doc or node.decorator_list:
            continue
        summary = doc.split("\n\n")[0].replace("\n", " ").strip()
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        body = lines[node.body[1].lineno - 1 : node.end_lineno]
        code = textwrap.dedent("\n".join(head + body))
        if head and 10 < len(summary) < 200 and 40 < len(code) < 700:
            pairs.append((f"Write `{node.name}`: {summary}", code))
    return pairs


def documents(held_out: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """All files and all chat pairs of one side of the split, each in a fixed shuffled order."""
    plain = [text for path in stdlib_files(held_out) if (text := read(path)) is not None]
    chat = [pair for text in plain for pair in chat_pairs(text)]
    random.Random(0).shuffle(plain)
    random.Random(0).shuffle(chat)
    return plain, chat
