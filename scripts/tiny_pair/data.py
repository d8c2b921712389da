"""What the trainings read: the shipped configs and tokenizer, the corpus, batches of it.

The corpus is the standard library of the Python that runs this. It has two kinds of documents: whole files, and chat
pairs (name and docstring -> body) cut from the same files. Files with a low hash of their path are held out: the
shipped prompts come from those.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = {  # of each model: its config.json, and its weights as shipped
    "edge_target": REPOSITORY / "mlx_mtp" / "data" / "tiny" / "target",
    "edge_drafter": REPOSITORY / "mlx_mtp" / "data" / "tiny" / "drafter",
    "edge_dflash": REPOSITORY / "tests" / "fixtures" / "tiny_dflash",
    "moe_target": REPOSITORY / "tests" / "fixtures" / "tiny_moe" / "target",
    "moe_drafter": REPOSITORY / "tests" / "fixtures" / "tiny_moe" / "drafter",
}
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIP_DIRS = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 turtledemo encodings __pycache__ ensurepip "
    "_bundled pydoc_data".split()
)
SKIP_FILES = ("_sysconfigdata", "keyword.py", "token.py", "opcode.py", "entities.py")  # generated tables
HELD_OUT_SHARE = 0.04
LONGEST_GAP = 768


def config(name: str) -> dict:
    """config.json of one of FOLDERS."""
    return json.loads((FOLDERS[name] / "config.json").read_text())


def stdlib_texts() -> list[str]:
    """The files to train on, in path order, tabs expanded."""
    texts = []
    for path in sorted(STDLIB.rglob("*.py")):
        inside = path.relative_to(STDLIB)
        if SKIP_DIRS.isdisjoint(inside.parts[:-1]) and not inside.name.startswith(SKIP_FILES):
            if not held_out(inside) and (text := read(path)) is not None:
                texts.append(text)
    return texts


def read(path: Path) -> str | None:
    """One file, or None if it is not UTF-8 or too short to teach anything."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").expandtabs(8)
    return text if len(text) > 200 else None


def held_out(inside: Path) -> bool:
    """Whether a path inside the library is held out; the same on every machine."""
    digest = hashlib.sha256(inside.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


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


def documents() -> tuple[list[str], list[tuple[str, str]]]:
    """All files and all chat pairs to train on, each in a fixed shuffled order."""
    files = stdlib_texts()
    chat = [pair for text in files for pair in chat_pairs(text)]
    random.Random(0).shuffle(files)
    random.Random(0).shuffle(chat)
    return files, chat


@cache
def training_ids() -> Tensor:
    """The corpus as one row of tokens, int64: <bos> file <eos> ..., then every chat pair, twice."""
    tokenizer = Tokenizer.from_file(str(FOLDERS["edge_target"] / "tokenizer.json"))
    files, chat = documents()
    turns = [f"<bos><|turn>user\n{ask}<turn|>\n<|turn>model\n{answer}<turn|>\n" for ask, answer in chat]
    texts = [f"<bos>{text}<eos>" for text in files] + turns + turns
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return torch.from_numpy(np.concatenate(ids).astype(np.int64))


class Batches:
    """Random crops of the corpus that all start with <bos>, as every prompt will."""

    def __init__(self, seed: int):
        self.ids = training_ids()
        self.rng = np.random.default_rng(seed)
        self.starts: list[int] = []

    def next(self, rows: int, length: int) -> Tensor:
        """[rows, length]. An epoch is a shuffled tiling with a new phase, so every token is seen equally often."""
        out = []
        for _ in range(rows):
            if not self.starts:
                starts = np.arange(self.rng.integers(0, length - 1), len(self.ids) - length, length - 1)
                self.rng.shuffle(starts)
                self.starts = starts.tolist()
            out.append(crop(self.ids, self.starts.pop(), length))
        return torch.stack(out)


def crop(ids: Tensor, start: int, length: int) -> Tensor:
    """[length] tokens from `start`, the first one replaced by <bos>."""
    out = ids[start : start + length].clone()
    out[0] = 2
    return out


def positions_with_gap(rng: np.random.Generator, length: int) -> Tensor:
    """[length]. Half of the time a suffix is shifted, so that full attention sees distances of up to a thousand."""
    positions = torch.arange(length)
    if rng.random() < 0.5:
        positions[int(rng.integers(32, length - 32)) :] += int(rng.integers(1, LONGEST_GAP))
    return positions
