"""Cut the held-out prompts that ship beside the pair. Knows the corpus and the tokenizer, no model."""

from __future__ import annotations

import argparse
import ast
import random
from pathlib import Path

import corpus
from shapes import write_json
from tokenizers import Tokenizer

CODE, CHAT = 24, 12
PER_FILE = 3
TOKENS = range(30, 61)


def beginnings(text: str) -> list[list[str]]:
    """For each longer function: its source, class line in front, cut after each of its statements."""
    lines, found = text.split("\n"), []
    module = ast.parse(text)
    for owner in [module, *(node for node in module.body if isinstance(node, ast.ClassDef))]:
        head = lines[owner.lineno - 1 : owner.lineno] if isinstance(owner, ast.ClassDef) else []
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2 and not node.decorator_list:
                ends = [node.body[0].lineno - 1, *(statement.end_lineno for statement in node.body[:-1])]
                found.append(["\n".join(head + lines[node.lineno - 1 : end]) for end in ends])
    return found


def code_prompts(tokenizer: Tokenizer) -> list[str]:
    """One beginning of 30 to 60 tokens per function, at most three functions a file, no final newline."""
    chosen, rng = [], random.Random(0)
    for path in corpus.stdlib_files(held_out=True):
        text, mine = corpus.read(path), []
        for cuts in beginnings(text) if text else []:
            fits = [cut.rstrip() for cut in cuts if len(tokenizer.encode(cut.rstrip()).ids) in TOKENS]
            mine.extend(fits[:1])
        chosen.extend(rng.sample(mine, min(PER_FILE, len(mine))))
    rng.shuffle(chosen)
    return chosen[:CODE]


def chat_prompts() -> list[str]:
    """Requests of held-out functions whose summary is one plain sentence."""
    _, pairs = corpus.documents(held_out=True)
    return [ask for ask, _ in pairs if ask.endswith(".") and len(ask) < 90][:CHAT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the tokenizer")
    work = parser.parse_args().work
    tokenizer = Tokenizer.from_file(str(work / "tokens" / "tokenizer.json"))
    prompts = {"code": code_prompts(tokenizer), "chat": chat_prompts()}
    write_json(work / "prompts.json", prompts)
    print({kind: len(texts) for kind, texts in prompts.items()})


if __name__ == "__main__":
    main()
