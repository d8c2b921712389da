"""What every runtime is given: prompts of six kinds as token ids, in groups of so many rows. Runs nothing.

The texts are this project's own. To a checkpoint with a chat template they are put as requests; the embedded pair,
which knows code better than talk, gets all but chat as text to continue.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from mlx_mtp.rows import RequestError
from mlx_mtp.text import Text

KINDS = ("code", "chat", "edit", "json", "enumeration", "long")
LONG_TOK = 2000

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """Prompts that run side by side."""

    kind: str
    prompts: tuple[Prompt, ...]


def prompts_of(kind: str, text: Text, raw: bool) -> list[Prompt]:
    """All prompts of a kind. raw: texts to continue, except for chat. Raises RequestError."""
    data = json.loads((resources.files("mlx_mtp") / "data" / "prompts.json").read_text())
    if kind not in data:
        raise RequestError(f"kind is {kind!r}; expected {', '.join(KINDS)}")
    ask, texts = data[kind]["ask"], data[kind]["texts"]
    if kind == "long":  # as many of the other kinds' texts as fill it, to end with one of them
        texts = [_long(data[other]["texts"], text) for other in texts]
    if text.has_template and (kind == "chat" or not raw):
        messages = [f"{ask}\n\n{one}" if ask else one for one in texts]
        return [tuple(text.chat([{"role": "user", "content": message}])) for message in messages]
    return [tuple(text.encode(one)) for one in texts]


def _long(texts: list[str], text: Text) -> str:
    each = sum(len(text.encode(one)) for one in texts)
    return "\n\n".join(texts * (LONG_TOK // each + 1))


def cases_of(kind: str, prompts: list[Prompt], rows: int, most: int) -> list[Case]:
    """At most `most` groups of so many rows; a group that runs out of prompts begins with the first ones again."""
    count = max(1, min(most, len(prompts) // rows))
    around = [prompts[i % len(prompts)] for i in range(rows * count)]
    return [Case(kind, tuple(around[i * rows : (i + 1) * rows])) for i in range(count)]
