"""Admission: clients' requests to the engine's. Prompts to token ids, limits, sampling defaults, the queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_mtp.grammar import Thought
from mlx_mtp.pair import Pair
from mlx_mtp.rows import Constraint, Request, RequestError, Sampling
from mlx_mtp.server.asking import GenerationRequest, ResponseFormat
from mlx_mtp.server.decoding import OutputDecoder
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import ServerError, Settings, invalid, shutting_down
from mlx_mtp.server.worker import EngineThread, GenerationStream

MAX_RETRY_S = 30


class Admission:
    """What every dialect needs between its JSON and the engine thread. One a server."""

    def __init__(self, settings: Settings, engine_thread: EngineThread, metrics: Metrics) -> None:
        self.settings, self.engine_thread, self.metrics = settings, engine_thread, metrics
        self.created = int(time.time())
        self.draining = False
        self._compiling = threading.Lock()

    @property
    def pair(self) -> Pair:
        """The loaded pair, for its plain values: only the engine thread may run it. Raises ServerError (503)."""
        pair = self.engine_thread.pair
        if pair is None or self.engine_thread.state == "failed":
            raise self.engine_thread.refusal()
        return pair

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model (404). No request loads a model."""
        known = (self.settings.name, *self.settings.aliases)
        if name is not None and name not in known and "*" not in known:
            message = f"model {name[:200]!r} is not served here; use {self.settings.name!r}, or start with --alias"
            raise ServerError(404, "model_not_found", message, "model")

    async def submit(self, requests: Sequence[GenerationRequest]) -> GenerationStream:
        """Start requests, or queue them. Raises ServerError: 400, 429 if the queue is full, 503 if nothing runs."""
        at_once, count = self.pair.budget.num_seqs, sum(request.n for request in requests)
        most = at_once + self.settings.max_queued
        if count > most:
            raise invalid(f"{count} outputs requested (n times the prompts); expected at most {most}", "n")
        choices = [choice for request in requests for choice in await self.prepare(request)]
        if self.draining:
            raise shutting_down()
        waiting = self.engine_thread.open + count - at_once
        if waiting > self.settings.max_queued:
            wait_s = min(MAX_RETRY_S, max(1, round(self.metrics.request_s * waiting / at_once)))
            message = f"the queue is full: {self.engine_thread.open} of {most} sequences run or wait; try again later"
            raise ServerError(429, "queue_full", message, retry_s=wait_s)
        return self.engine_thread.submit(choices)

    async def prepare(self, request: GenerationRequest) -> list[tuple[Request, OutputDecoder]]:
        """The engine's requests for a client's, one for each of its n choices. Raises ServerError.

        With a seed, choice i has seed + i, so the first is what n=1 gives.
        """
        pair, prompt = self.pair, await self.tokenize(request)
        outputs = [OutputDecoder(pair.text, request, prompt, self.settings.loop_guard) for _ in range(request.n)]
        constraint = await self._constraint(request, outputs[0].thinking)
        eos = pair.eos if request.stop_at_eos else frozenset()
        limit, sampling, choices = self.limit(len(prompt), request.max_tokens), dict(request.sampling), []
        for output in outputs:
            chosen = self._sampling(sampling)
            try:
                engine_request = Request(prompt, limit, chosen, eos, logprobs=request.logprobs, constraint=constraint)
            except RequestError as error:
                raise invalid(str(error)) from None
            choices.append((engine_request, output))
            if "seed" in sampling:
                sampling["seed"] = (sampling["seed"] + 1) % 2**64
        return choices

    # prompts ----------------------------------------------------------------------------------------------------

    async def tokenize(self, request: GenerationRequest) -> tuple[int, ...]:
        """A request's prompt as token ids. Raises ServerError."""
        text, messages, prompt = self.pair.text, request.messages, request.prompt
        if request.response_format.tools and not text.segmented:
            raise invalid("tool calls are supported for Gemma 4 only; remove `tools` from the request", "tools")

        def encode() -> Sequence[int]:
            if messages is not None:
                chat = text.chat(list(messages), options=request.template_options())
                return [*chat, *text.encode_rest(request.reply_prefix)]
            return text.encode(prompt) if isinstance(prompt, str) else self._checked(prompt)

        param = "prompt" if messages is None else "messages"
        try:
            tokens = tuple(await asyncio.to_thread(encode))  # a long prompt would stop the event loop
        except RequestError as error:
            raise invalid(str(error), param) from None
        except RecursionError:
            raise invalid(f"{param} is nested too deeply", param) from None
        for most, what in ((self.pair.context_tok, "the model's context is"), (self.pair.room_tok, "memory holds")):
            if len(tokens) >= most:
                message = f"the prompt has {len(tokens)} tokens; {what} {most}, output included"
                raise invalid(message, param, "context_length_exceeded")
        return tokens

    def _checked(self, tokens: Sequence[int]) -> Sequence[int]:
        size = self.pair.vocab_size
        if not tokens:
            raise RequestError("the prompt is empty; expected at least one token")
        bad = next((token for token in tokens if not 0 <= token < size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is out of range; expected 0 to {size - 1}")
        return tokens

    # grammars ---------------------------------------------------------------------------------------------------

    async def _constraint(self, request: GenerationRequest, in_thought: bool) -> Constraint | None:
        """The grammar of a request's outputs, None if any text will do. Raises ServerError."""
        wanted = request.response_format
        if wanted.any_text:
            return None
        wanted.check()
        if request.thinking and not self.pair.text.segmented:
            raise invalid(
                "a JSON schema cannot be combined with thinking: this model's reasoning format is unknown; "
                "turn off thinking or remove the schema"
            )
        thought: Thought = "open" if in_thought else "may" if request.thinking else "none"
        try:
            return await asyncio.to_thread(self._compile, wanted, thought)
        except RequestError as error:
            raise invalid(str(error), "tools" if "tool" in str(error) else "response_format") from None

    def _compile(self, wanted: ResponseFormat, thought: Thought) -> Constraint:
        grammars = self.engine_thread.grammars
        if grammars is None:
            raise RequestError("this checkpoint's tokenizer cannot be used with schemas or strict tools")
        with self._compiling:
            return wanted.compile(grammars, thought)

    # limits and sampling ----------------------------------------------------------------------------------------

    def limit(self, prompt_tok: int, asked: int | None) -> int:
        """The most tokens an output may have, never more than context and memory have room for.

        Memory is reserved for the limit. A request without one gets a fair share, so that other requests need not wait.
        """
        default = self.settings.max_tokens or self.pair.budget.default_max_tokens(prompt_tok)
        return max(1, min(self.pair.room_tok - prompt_tok, asked or default))

    def _sampling(self, changes: Mapping[str, Any]) -> Sampling:
        """The checkpoint's defaults, then the server's, then the request's. Raises ServerError."""
        size = self.pair.vocab_size
        for token, _ in changes.get("logit_bias", ()):
            if token >= size:
                raise invalid(f"logit_bias has token {token}; expected 0 to {size - 1}", "logit_bias")
        try:
            return replace(self.pair.default_sampling, **{**self.settings.sampling, **changes})
        except RequestError as error:
            param = next((name for name in changes if name in str(error)), None)
            raise invalid(str(error), param) from None
