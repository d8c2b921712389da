"""Filling a hole in a text: llama.cpp's /infill, and what `suffix` means in other dialects.

Gemma 4 documents no tokens for this, so the prompt is a question with the text around the hole. The reply is begun
with a code fence and the last lines before the hole: what the model writes next belongs in the hole. The output ends at
the closing fence, or where the first line after the hole begins. The quality has not been measured. A base model cannot
do this, since it has no chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.rows import Stats
from mlx_mtp.segments import Segment
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat
from mlx_mtp.server.forms import Form, stop_strings
from mlx_mtp.server.nouns import FinishInfo, ServerError, Usage
from mlx_mtp.server.openai_form import error_body
from mlx_mtp.server.respond import CompletionText, DialectWriter, Json, read_body, respond, sse
from mlx_mtp.server.service import Admission

MARK = "<HOLE>"
FENCE = "```"
LEAD_LINES = 2  # whole lines before the hole that the reply repeats
MOST_CHARS = 12_000  # of the text on each side that the model sees
STOP_CHARS = 6  # a shorter first line after the hole is no stop string
DEFAULT_TOK = 128


@dataclass(frozen=True)
class Hole:
    """A hole in a text. others: (name, text) of other files that may help."""

    before: str
    after: str
    others: tuple[tuple[str, str], ...] = ()

    @property
    def lead(self) -> str:
        """The last lines before the hole."""
        return "".join(self.before[-MOST_CHARS:].splitlines(keepends=True)[-LEAD_LINES - 1 :])

    @property
    def stops(self) -> tuple[str, ...]:
        """The output ends at the fence, or where the text after the hole begins."""
        line = next((line for line in self.after.splitlines() if line.strip()), "")
        return (f"\n{FENCE}", *((line,) if len(line.strip()) >= STOP_CHARS else ()))

    def question(self) -> str:
        shown = f"{self.before[-MOST_CHARS:]}{MARK}{self.after[:MOST_CHARS]}"
        others = "".join(f"{name}:\n{FENCE}\n{text}\n{FENCE}\n\n" for name, text in self.others)
        return (
            f"{others}Write the text that belongs at {MARK}. Reply with a code block that repeats the lines just "
            f"before {MARK} and goes on with what is missing, up to the text that follows. No explanations.\n\n"
            f"{FENCE}\n{shown}\n{FENCE}"
        )


def fill(base: GenerationRequest, hole: Hole) -> GenerationRequest:
    """A request that fills a hole, with the limits and sampling of another."""
    return replace(
        base,
        messages=[{"role": "user", "content": hole.question()}],
        reply_prefix=f"{FENCE}\n{hole.lead}",
        response_format=ResponseFormat(),
        thinking=False,
        stop=(*base.stop, *hole.stops),
    )


class Extra(Form):
    filename: StrictStr | None = None
    text: StrictStr


class InfillForm(Form):
    """The body of /infill."""

    input_prefix: StrictStr = ""
    input_suffix: StrictStr = ""
    input_extra: list[Extra] | None = None
    prompt: StrictStr = ""  # stands between input_prefix and the hole
    n_predict: StrictInt | None = None
    stream: StrictBool = False
    stop: list[StrictStr] | None = None
    temperature: StrictFloat | None = None
    top_k: StrictInt | None = None
    top_p: StrictFloat | None = None
    min_p: StrictFloat | None = None
    seed: StrictInt | None = None
    t_max_predict_ms: StrictInt | None = None  # this long after its first token, the output ends with its line
    response_fields: list[StrictStr] | None = None  # the paths of the only fields that are wanted

    def hole(self) -> Hole:
        others = tuple((extra.filename or "text", extra.text) for extra in self.input_extra or ())
        return Hole(self.input_prefix + self.prompt, self.input_suffix, others)

    def request(self) -> GenerationRequest:
        """Raises ServerError."""
        sampling = self.given("temperature", "top_k", "top_p", "min_p", "seed")
        if self.seed is not None and self.seed < 0:
            del sampling["seed"]  # llama.cpp's "any"
        base = GenerationRequest(
            sampling=sampling,
            stop=stop_strings(self.stop, "stop"),
            max_tokens=self.n_predict if self.n_predict is not None and self.n_predict > 0 else DEFAULT_TOK,
            time_limit_s=max(0, self.t_max_predict_ms or 0) / 1000 or None,  # 0 and less are no limit
        )
        return fill(base, self.hole())


def router(admission: Admission) -> APIRouter:
    """The dialect's routes."""
    routes = APIRouter()

    @routes.post("/infill")
    async def infill(request: Request) -> Response:
        form = await read_body(request, InfillForm, admission)
        hole = form.hole()
        if not hole.before and not hole.after and not form.n_predict:  # an editor warms the cache with its other files
            return Json({"content": "", "stop": True})
        writer = InfillWriter(admission, form.response_fields)
        return await respond(request, admission, [form.request()], writer, form.stream)

    return routes


class InfillWriter(DialectWriter):
    """llama.cpp's form: `content`, with counts and times at the end."""

    def __init__(self, admission: Admission, paths: Sequence[str] | None) -> None:
        """paths: of the only fields that the end should have; None or empty is all."""
        self._model, self._paths = admission.settings.name, paths

    def segment(self, segment: Segment) -> Iterable[bytes]:
        yield sse({"content": segment.text, "stop": False})

    def end(self, usage: Usage) -> Iterable[bytes]:
        yield sse(self._last("", self.finish, usage))

    def error(self, error: ServerError) -> Iterable[bytes]:
        yield sse(error_body(error))

    def body(self, outputs: Sequence[CompletionText], usage: Usage) -> dict[str, Any]:
        return self._last(outputs[0].answer, outputs[0].finish, usage)

    def _last(self, text: str, finish: FinishInfo | None, usage: Usage) -> dict[str, Any]:
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
        return at_paths(whole, self._paths) if self._paths else whole


def timings(stats: Stats) -> dict[str, Any]:
    """Counts, milliseconds and rates: of the prompt tokens that were not cached, and of the output."""
    computed, predicted = stats.prompt_tokens - stats.cached_tokens, stats.generated_tokens
    prompt_ms, predicted_ms = 1000 * stats.prefill_s, 1000 * stats.decode_s
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, computed),
        "prompt_per_second": stats.prefill_tok_s,
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(1, predicted),
        "predicted_per_second": stats.decode_tok_s,
    }


def at_paths(whole: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The values at paths such as "timings/prompt_n", by path. Unknown paths are left out, as in llama.cpp
    (tools/server, `json_get_nested_values`)."""
    found = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found
