"""What every dialect needs between its JSON and the worker: prompts, limits, sampling, admission. Knows no JSON."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_mtp.grammar import Grammars
from mlx_mtp.rows import Constraint, RequestError, Sampling
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import Job, ServerError, Settings, invalid
from mlx_mtp.server.worker import Generation, Model, Worker

MAX_WAIT_S = 30


@dataclass(frozen=True)
class Prompt:
    """Token ids ready to run."""

    tokens: tuple[int, ...]


class Service:
    """One server's state, for all its dialects."""

    def __init__(self, settings: Settings, worker: Worker, metrics: Metrics) -> None:
        self.settings, self.worker, self.metrics = settings, worker, metrics
        self.created = int(time.time())
        self.draining = False
        self._grammars: Grammars | None = None  # made when the first request needs it
        self._compiling = threading.Lock()

    @property
    def model(self) -> Model:
        """The loaded model. Raises ServerError (503) while there is none."""
        model = self.worker.model
        if model is None or self.worker.state == "failed":
            raise self.worker.refusal()
        return model

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model (404), whatever it is: none is ever loaded for a request."""
        known = (self.settings.name, *self.settings.aliases)
        if name is not None and name not in known and "*" not in known:
            raise ServerError(
                404,
                "model_not_found",
                f"the model {name[:200]!r} is not served here; use {self.settings.name!r} (or start the server with "
                "--alias)",
                "model",
            )

    # prompts ----------------------------------------------------------------------------------------------------

    async def chat(self, messages: list[dict], options: dict[str, Any]) -> Prompt:
        """A conversation by the checkpoint's template; options are template variables. Raises ServerError.

        Tools come in the order of their names: clients list them in changing order, and each order would be a prompt
        of its own, of which no cached part could be used.
        """
        text = self.model.text
        if options.get("tools") and not text.segmented:
            raise invalid(
                "this checkpoint writes calls of tools in a notation that is not read here (Gemma 4's is); send the "
                "request without tools",
                "tools",
            )
        if "tools" in options:
            options = {**options, "tools": sorted(options["tools"], key=lambda tool: tool["function"]["name"])}
        return await self._prepare(lambda: text.chat(messages, options=options), "messages")

    async def text(self, prompt: str) -> Prompt:
        """Text to continue. Raises ServerError."""
        text = self.model.text
        return await self._prepare(lambda: text.encode(prompt), "prompt")

    def ids(self, tokens: Sequence[int]) -> Prompt:
        """Token ids to continue. Raises ServerError."""
        size = self.model.vocab_size
        if not tokens:
            raise invalid("the prompt is empty; expected at least one token", "prompt")
        if not all(0 <= token < size for token in tokens):
            bad = next(token for token in tokens if not 0 <= token < size)
            raise invalid(
                f"token id {bad} is out of range; the vocabulary has {size} tokens, 0 to {size - 1}", "prompt"
            )
        return self._fitting(tuple(tokens), "prompt")

    async def _prepare(self, encode: Callable[[], list[int]], param: str) -> Prompt:
        """Long prompts take their time, which the event loop has not."""
        try:
            tokens = await asyncio.to_thread(encode)
        except RequestError as error:
            raise invalid(str(error), param) from None
        except RecursionError:
            raise invalid(f"{param} is nested too deeply", param) from None
        return self._fitting(tuple(tokens), param)

    def _fitting(self, tokens: tuple[int, ...], param: str) -> Prompt:
        context, room = self.model.context_tok, self.model.room_tok
        if len(tokens) >= context:
            raise invalid(
                f"the prompt has {len(tokens)} tokens; the model's context is {context}, text included",
                param,
                "context_length_exceeded",
            )
        if len(tokens) >= room:
            raise invalid(
                f"the prompt has {len(tokens)} tokens; this machine's memory for keys and values holds {room}",
                param,
                "context_length_exceeded",
            )
        return Prompt(tokens)

    # constraints ------------------------------------------------------------------------------------------------

    async def constraint(self, compile: Callable[[Grammars], Constraint]) -> Constraint:
        """What a text must be, compiled beside the event loop. Raises ServerError where it cannot be honoured."""

        def compiled() -> Constraint:
            with self._compiling:
                if self._grammars is None:
                    model = self.model
                    self._grammars = Grammars(model.text, model.vocab_size, model.eos)
                return compile(self._grammars)

        try:
            return await asyncio.to_thread(compiled)
        except RequestError as error:
            raise invalid(str(error), "tools" if "tool" in str(error) else "response_format") from None

    # limits and sampling ----------------------------------------------------------------------------------------

    def limit(self, prompt: Prompt, asked: int | None) -> int:
        """The most tokens a text may have: what was asked for, as far as context and memory go.

        Memory is set aside for the limit, not for what is used of it. Where a request names none, and neither does
        the server, it gets its share of the memory, lest it keep all other requests waiting for the end of its text.
        """
        model = self.model
        left = model.room_tok - len(prompt.tokens)
        share = max(model.share_tok - len(prompt.tokens), model.share_tok // 2)
        return max(1, min(left, asked or self.settings.max_tokens or share))

    def sampling(self, changes: dict[str, Any]) -> Sampling:
        """The checkpoint's defaults, the server's over them, a request's over both. Raises ServerError."""
        size = self.model.vocab_size
        for token, _ in changes.get("logit_bias", ()):
            if token >= size:
                raise invalid(f"logit_bias names token {token}; the vocabulary has {size} tokens", "logit_bias")
        try:
            return replace(self.model.sampling, **{**self.settings.sampling, **changes})
        except RequestError as error:
            param = next((name for name in changes if name in str(error)), None)
            raise invalid(str(error), param) from None

    # admission --------------------------------------------------------------------------------------------------

    def open(self, jobs: Sequence[Job]) -> Generation:
        """Start jobs, or queue them. Raises ServerError: 429 where the queue is full, 503 where nothing runs."""
        rows, most, open_ = self.settings.rows, self.settings.rows + self.settings.queue, self.worker.open
        if self.draining:
            raise ServerError(503, "shutting_down", "the server is shutting down")
        if len(jobs) > most:
            raise invalid(f"{len(jobs)} texts asked for at once; this server takes {most} (n times the prompts)", "n")
        if open_ + len(jobs) > most:
            wait_s = min(MAX_WAIT_S, max(1, round(self.metrics.job_s * (open_ + len(jobs) - rows) / rows)))
            raise ServerError(
                429, "queue_full", f"{open_} texts run or wait already, and {most} is the most", retry_s=wait_s
            )
        return self.worker.submit(jobs)
