"""A disconnect frees its sequence within one engine pass: in every dialect, streaming or not.

The sequence may be in the queue, in its prompt or in its output. The test counts engine passes in the server, from the
disconnect to the cancellation.
"""

import asyncio
import contextlib
import json
import socket
from dataclasses import replace

import anthropic
import ollama
import openai
import pytest
from servers import EDGE, Live, running, until

CHAT = [{"role": "user", "content": "hello"}]
NEVER = tuple((token, -100.0) for token in (0, 1, 2, 106))  # no output ends by itself
MAX_TOKENS = 1500
# Each dialect's path, and a body with WORD in place of the prompt.
DIALECTS = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "WORD"}]}),
    "completions": ("/v1/completions", {"prompt": "WORD"}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "WORD"}], "max_tokens": MAX_TOKENS}),
    "responses": ("/v1/responses", {"input": "WORD"}),
    "ollama chat": ("/api/chat", {"messages": [{"role": "user", "content": "WORD"}]}),
    "ollama generate": ("/api/generate", {"prompt": "WORD"}),
    "infill": ("/infill", {"input_prefix": "WORD", "input_suffix": "\n~", "n_predict": MAX_TOKENS}),
}


class DisconnectLog:
    """A server that runs one sequence, and a log of its disconnects.

    seen: for each, where the sequence was, and the passes until it was cancelled.
    """

    def __init__(self, live: Live) -> None:
        self.live, self.engine = live, live.pair._engine
        self.seen: list[tuple[str, int]] = []
        self._noticed: tuple = (None, 0)  # a stream, and the passes when its client disconnected
        engine_thread, pair = live.engine_thread, live.pair
        notice, cancel = engine_thread.cancel, pair.cancel

        def noticed(stream):
            if stream is not self._noticed[0]:
                self._noticed = stream, self.engine.host_reads
            notice(stream)

        def cancelled(request):
            row = self.engine.scheduler.find(request)
            assert row is not None
            where = "queue" if row.index < 0 else "output" if row.tokens else "prompt"
            stats = cancel(request)
            assert row.index < 0 and row not in self.engine.scheduler.waiting
            self.seen.append((where, self.engine.host_reads - self._noticed[1]))
            return stats

        engine_thread.cancel, pair.cancel = noticed, cancelled

    def dial(self, path: str, body: dict, word: str) -> socket.socket:
        """Send a request on a connection of its own."""
        raw = json.dumps({"model": "tiny", **body}).replace("WORD", word).encode()
        line = socket.create_connection(("127.0.0.1", self.live.client.base_url.port))
        line.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\n" % path.encode())
        line.sendall(b"content-length: %d\r\n\r\n" % len(raw) + raw)
        return line

    def writes(self) -> bool:
        """Whether an output has begun."""
        return any(len(row.tokens) > 3 for row in list(self.engine.scheduler.rows))

    def hang_up(self, line: socket.socket, left: int) -> None:
        """Close a connection; `left` choices stay open."""
        line.close()
        until(lambda: self.live.engine_thread.open == left)

    def disconnect_everywhere(self, path: str, body: dict) -> list[tuple[str, int]]:
        """Disconnect in the queue, in an output, and in a prompt of hundreds of passes."""
        self.seen.clear()
        output = self.dial(path, body, "hello")
        until(self.writes)
        waits = self.dial(path, body, "bye")
        until(lambda: self.live.engine_thread.waiting == 1)
        self.hang_up(waits, 1)
        self.hang_up(output, 0)
        before = self.engine.host_reads
        prompt = self.dial(path, body, "long " * 300)
        until(lambda: self.live.engine_thread.running == 1 and self.engine.host_reads > before)
        self.hang_up(prompt, 0)
        return self.seen


@pytest.fixture(scope="module")
def log():
    options = {"sampling": {"temperature": 0.0, "logit_bias": NEVER}, "loop_guard": None, "max_tokens": MAX_TOKENS}
    with running(EDGE, max_num_seqs=1, max_queued=2, **options) as live:
        scheduler = live.pair._engine.scheduler
        scheduler.limits = replace(scheduler.limits, alone_tok=4, prefix_bytes=0)
        yield DisconnectLog(live)


@pytest.fixture(autouse=True)
def the_engine_is_empty_afterwards(log: DisconnectLog):
    log.seen.clear()
    yield
    assert log.live.settled() and log.live.engine_thread.faults == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_disconnect_frees_its_sequence_within_one_pass(log, dialect, stream):
    path, body = DIALECTS[dialect]
    seen = log.disconnect_everywhere(path, {**body, "stream": stream})
    assert [where for where, _ in seen] == ["queue", "output", "prompt"]
    assert all(passes <= 1 for _, passes in seen), seen


def test_a_disconnect_cancels_all_choices_of_its_request(log):
    line = log.dial("/v1/completions", {"prompt": "hello", "n": 3, "stream": True}, "")
    until(lambda: log.live.engine_thread.waiting == 2 and log.writes())
    log.hang_up(line, 0)
    assert sorted(where for where, _ in log.seen) == ["output", "queue", "queue"]
    assert all(passes <= 1 for _, passes in log.seen)


# closed by client packages --------------------------------------------------------------------


def read_some(stream, count: int = 3) -> None:
    for _, _ in zip(range(count), stream, strict=False):
        pass


def openai_chat(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.create(model="tiny", messages=CHAT, stream=True) as stream:
            read_some(stream)


def openai_responses(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.create(model="tiny", input="hello", stream=True) as stream:
            read_some(stream, 8)


def anthropic_messages(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        with client.messages.stream(model="tiny", max_tokens=MAX_TOKENS, messages=CHAT) as stream:
            read_some(stream, 6)


def ollama_chat(url: str) -> None:
    with ollama.Client(host=url) as client:
        stream = client.chat("tiny", CHAT, stream=True)
        read_some(stream)
        stream.close()


@pytest.mark.parametrize("leave", [openai_chat, openai_responses, anthropic_messages, ollama_chat])
def test_a_stream_closed_by_a_package_frees_its_sequence(log, leave):
    leave(log.live.url)
    until(lambda: log.live.engine_thread.open == 0)
    assert [where for where, _ in log.seen] == ["output"] and log.seen[0][1] <= 1


async def anthropic_waits(url: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        await client.messages.create(model="tiny", max_tokens=MAX_TOKENS, messages=CHAT)


async def responses_wait(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await client.responses.create(model="tiny", input="hello")


async def ollama_waits(url: str) -> None:
    async with ollama.AsyncClient(host=url) as client:
        await client.generate("tiny", "hello")


@pytest.mark.parametrize("ask", [anthropic_waits, responses_wait, ollama_waits])
def test_cancelling_a_task_that_waits_for_a_body_frees_its_sequence(log, ask):
    async def cancel() -> None:
        task = asyncio.create_task(ask(log.live.url))
        while log.live.engine_thread.running != 1:
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until(lambda: log.live.engine_thread.open == 0)
    assert len(log.seen) == 1 and log.seen[0][1] <= 1
