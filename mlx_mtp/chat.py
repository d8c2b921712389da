"""A conversation over a pair, turn after turn."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mlx_mtp.rows import Event, RequestError, Sampling

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair


class Chat:
    """A conversation. Each turn continues the very tokens of the one before, so that the engine finds them computed.

    messages: the conversation so far, as the chat template takes it.
    """

    def __init__(self, pair: Pair, system: str | None) -> None:
        self._pair, self._system = pair, system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, except for its system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._said: tuple[int, ...] = ()  # token ids of prompt and reply so far
        self._shown = ""  # and the text they render as

    def send(
        self,
        text: str,
        sampling: Sampling | None = None,
        width: int | str = "auto",
        max_tokens: int | None = None,
    ) -> Generator[Event, None, None]:
        """Say something; the reply comes as events. Closing the iterator ends the reply and keeps what was said."""
        if not text.strip():
            raise RequestError("the message is empty; expected some text")
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._pair.text.render(messages)
        ids = self._continue(rendered)
        events = self._pair.stream(ids, sampling, width, max_tokens)
        return self._reply(events, messages, rendered, ids)

    def _continue(self, rendered: str) -> list[int]:
        """Token ids of the conversation: those it already has and the new text's, or all anew if the template
        renders earlier turns otherwise than they were said."""
        if self._said and rendered.startswith(self._shown):
            return [*self._said, *self._pair.text.encode_rest(rendered[len(self._shown) :])]
        return self._pair.text.encode(rendered)

    def _reply(
        self, events: Generator[Event, None, None], messages: list[dict], rendered: str, ids: list[int]
    ) -> Generator[Event, None, None]:
        tokens: list[int] = []
        reply = ""
        try:
            for event in events:
                tokens += event.tokens
                reply += event.text
                yield event
        finally:
            events.close()
            self.messages = [*messages, {"role": "assistant", "content": reply}]
            spoken = [t for t in tokens if t not in self._pair.eos]
            self._said, self._shown = (*ids, *spoken), rendered + reply
