"""Filling a hole in a text: llama.cpp's /infill, and what `suffix` means elsewhere.

Gemma 4 documents no tokens for filling in the middle, so the model is asked in words: it is shown the text around the
hole, and its reply is begun for it with a code fence and the last lines before the hole, so that what it writes next
stands in the hole. The text ends where the fence does, or where the first line after the hole begins. How good this
is has not been measured; a base model, which has no chat template, cannot be asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.rows import Stats
from mlx_mtp.server.asking import Ask
from mlx_mtp.server.forms import Flag, Integer, Lenient, Number, Word
from mlx_mtp.server.nouns import Delta, Finish, Job, ServerError, Usage, invalid
from mlx_mtp.server.openai_form import error_body
from mlx_mtp.server.respond import Json, Text, dumps, read_body, respond
from mlx_mtp.server.service import Prompt, Service

MARK = "<HOLE>"
FENCE = "```"
LEAD_LINES = 2  # whole lines before the hole that the reply is begun with
MOST_CHARS = 12_000  # of the text on each side that the model is shown
STOP_CHARS = 6  # a first line after the hole that is shorter says too little to stop at
DEFAULT_TOK = 128


@dataclass(frozen=True)
class Hole:
    """A place in a text. others: other texts that may help, with their names."""

    before: str
    after: str
    others: tuple[tuple[str, str], ...] = ()

    @property
    def lead(self) -> str:
        """What the reply is begun with."""
        return "".join(self.before[-MOST_CHARS:].splitlines(keepends=True)[-LEAD_LINES - 1 :])

    def question(self) -> str:
        """What the model is asked."""
        shown = f"{self.before[-MOST_CHARS:]}{MARK}{self.after[:MOST_CHARS]}"
        others = "".join(f"{name}:\n{FENCE}\n{text}\n{FENCE}\n\n" for name, text in self.others)
        return (
            f"{others}Write the text that belongs at {MARK}. Reply with a code block that repeats the lines just "
            f"before {MARK} and goes on with what is missing, up to the text that follows. No explanations.\n\n"
            f"{FENCE}\n{shown}\n{FENCE}"
        )


class Extra(Lenient):
    filename: Word | None = None
    text: Word


class InfillForm(Lenient):
    """The body of /infill. prompt: what stands between input_prefix and the hole. t_max_predict_ms: so long
    after its first token the text ends with its line. response_fields: the only fields that are wanted, by their paths.
    """

    input_prefix: Word = ""
    input_suffix: Word = ""
    input_extra: list[Extra] | None = None
    prompt: Word = ""
    n_predict: Integer | None = None
    stream: Flag = False
    stop: list[Word] | None = None
    temperature: Number | None = None
    top_k: Integer | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    seed: Integer | None = None
    t_max_predict_ms: Integer | None = None
    response_fields: list[Word] | None = None

    @property
    def hurry_s(self) -> float | None:
        """llama.cpp takes 0 and less for no limit."""
        return max(0, self.t_max_predict_ms or 0) / 1000 or None

    def ask(self) -> Ask:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        changes = {name: value for name in names if (value := vars(self)[name]) is not None}
        if self.seed is not None and self.seed < 0:
            del changes["seed"]  # llama.cpp's "any"
        if "" in (self.stop or ()):
            raise invalid("stop holds an empty text; expected at least one character", "stop")
        limit = self.n_predict if self.n_predict is not None and self.n_predict > 0 else DEFAULT_TOK
        return Ask([], changes=changes, stops=tuple(self.stop or ()), limit=limit)


def router(service: Service) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter()

    @routes.post("/infill")
    async def fill(request: Request) -> Response:
        form = await read_body(request, InfillForm, service.settings.body_bytes)
        others = tuple((extra.filename or "text", extra.text) for extra in form.input_extra or ())
        hole = Hole(form.input_prefix + form.prompt, form.input_suffix, others)
        if not hole.before and not hole.after and not form.n_predict:  # an editor warms the cache with its other files
            return Json({"content": "", "stop": True})
        job = job_of(service, await prompt_of(service, hole), hole.after, form.ask())
        job = replace(job, hurry_s=form.hurry_s)
        return await respond(request, service, [job], Writer(service, form.response_fields), form.stream)

    return routes


async def prompt_of(service: Service, hole: Hole) -> Prompt:
    """The question and the beginning of its answer. Raises ServerError."""
    text = service.model.text
    question = [{"role": "user", "content": hole.question()}]
    prompt = await service.chat(question, {"enable_thinking": False})
    begun = text.encode_rest(f"{FENCE}\n{hole.lead}")
    return service.ids([*prompt.tokens, *begun])


def stops_of(after: str) -> tuple[str, ...]:
    """Where the text ends: at the fence, or where what follows the hole begins."""
    line = next((line for line in after.splitlines() if line.strip()), "")
    return (f"\n{FENCE}", *((line,) if len(line.strip()) >= STOP_CHARS else ()))


def job_of(service: Service, prompt: Prompt, after: str, ask: Ask) -> Job:
    """Raises ServerError."""
    limit, sampling = service.limit(prompt, ask.limit), service.sampling(ask.changes)
    return Job(prompt.tokens, limit, sampling, (*ask.stops, *stops_of(after)))


class Writer:
    """llama.cpp's form: `content`, and counts and times at the end."""

    media_type = "text/event-stream"
    keepalive = b": keepalive\n\n"

    def __init__(self, service: Service, paths: Sequence[str] | None) -> None:
        """paths: the only fields of the end that are wanted; all where there is none."""
        self._model, self._paths = service.settings.name, paths
        self._finish: Finish | None = None

    def begin(self) -> Iterable[bytes]:
        return ()

    def delta(self, index: int, delta: Delta) -> Iterable[bytes]:
        self._finish = delta.finish or self._finish
        text = "".join(part.text for part in delta.parts)
        if text:
            yield b"data: " + dumps({"content": text, "stop": False}) + b"\n\n"

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield b"data: " + dumps(self._last("", self._finish, usage)) + b"\n\n"

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield b"data: " + dumps(error_body(error)) + b"\n\n"

    def body(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        return self._last(texts[0].answer, texts[0].finish, usage)

    def _last(self, text: str, finish: Finish | None, usage: Usage) -> dict[str, Any]:
        whole = {
            "content": text,
            "stop": True,
            "model": self._model,
            "stop_type": "limit" if finish is None or finish.reason != "stop" else "word" if finish.stop else "eos",
            "stopping_word": finish.stop or "" if finish else "",
            "tokens_cached": usage.cached_tok,
            "tokens_evaluated": usage.prompt_tok,
            "tokens_predicted": usage.completion_tok,
            "truncated": False,
            "timings": timings(finish.stats if finish else Stats()),
        }
        return whole if not self._paths else at_paths(whole, self._paths)


def timings(stats: Stats) -> dict[str, Any]:
    """Counts, milliseconds and rates of the prompt's part that was computed, and of the text."""
    computed, told = stats.prompt_tokens - stats.cached_tokens, stats.generated_tokens
    prompt_ms, predicted_ms = 1000 * stats.prefill_s, 1000 * stats.decode_s
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, computed),
        "prompt_per_second": stats.prefill_tok_s,
        "predicted_n": told,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(1, told),
        "predicted_per_second": stats.decode_tok_s,
    }


def at_paths(whole: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The values at paths such as "timings/prompt_n", by path; one that leads nowhere is left out, as in llama.cpp
    (tools/server, `json_get_nested_values`)."""
    found = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found
