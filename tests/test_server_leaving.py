"""A client that goes away frees its row within one pass of the engine: every dialect, streaming or not, in the queue,
in its prompt, in its text. Counted in the server: passes between seeing the client go and letting its row go."""

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
NEVER = tuple((token, -100.0) for token in (0, 1, 2, 106))  # no text ends by itself
MOST = 1500  # tokens a text may have
# Of each dialect: the path, and a body with a word in the place of the prompt.
DIALECTS = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "WORD"}]}),
    "completions": ("/v1/completions", {"prompt": "WORD"}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "WORD"}], "max_tokens": MOST}),
    "responses": ("/v1/responses", {"input": "WORD"}),
    "ollama chat": ("/api/chat", {"messages": [{"role": "user", "content": "WORD"}]}),
    "ollama generate": ("/api/generate", {"prompt": "WORD"}),
    "infill": ("/infill", {"input_prefix": "WORD", "input_suffix": "\n~", "n_predict": MOST}),
}


class Leaving:
    """A server with one row, and what it did about clients that went away.

    seen: for each, where its request was then, and the passes until it was let go.
    """

    def __init__(self, live: Live) -> None:
        self.live, self.engine = live, live.pair._engine
        self.seen: list[tuple[str, int]] = []
        self._noticed: tuple = (None, 0)  # who has gone, and the passes read when the server saw it
        worker, pair = live.worker, live.pair
        notice, let_go = worker.cancel, pair.cancel

        def noticed(generation):
            if generation is not self._noticed[0]:
                self._noticed = generation, self.engine.host_reads
            notice(generation)

        def gone(request):
            row = self.engine.scheduler.find(request)
            assert row is not None
            where = "queue" if row.index < 0 else "text" if row.tokens else "prompt"
            stats = let_go(request)
            assert row.index < 0 and row not in self.engine.scheduler.waiting
            self.seen.append((where, self.engine.host_reads - self._noticed[1]))
            return stats

        worker.cancel, pair.cancel = noticed, gone

    def dial(self, path: str, body: dict, word: str) -> socket.socket:
        """A request on a line of its own."""
        raw = json.dumps({"model": "tiny", **body}).replace("WORD", word).encode()
        line = socket.create_connection(("127.0.0.1", self.live.client.base_url.port))
        line.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\n" % path.encode())
        line.sendall(b"content-length: %d\r\n\r\n" % len(raw) + raw)
        return line

    def writes(self) -> bool:
        """Whether a text has begun."""
        return any(len(row.tokens) > 3 for row in list(self.engine.scheduler.rows))

    def hang_up(self, line: socket.socket, left: int) -> None:
        """Close a line; `left` texts are open afterwards."""
        line.close()
        until(lambda: self.live.worker.open == left)

    def leave_everywhere(self, path: str, body: dict) -> list[tuple[str, int]]:
        """Go away from the queue, from a text, and from a prompt of hundreds of passes."""
        self.seen.clear()
        text = self.dial(path, body, "hello")
        until(self.writes)
        waits = self.dial(path, body, "bye")
        until(lambda: self.live.worker.waiting == 1)
        self.hang_up(waits, 1)
        self.hang_up(text, 0)
        before = self.engine.host_reads
        prompt = self.dial(path, body, "long " * 300)
        until(lambda: self.live.worker.running == 1 and self.engine.host_reads > before)
        self.hang_up(prompt, 0)
        return self.seen


@pytest.fixture(scope="module")
def leaving():
    options = {"sampling": {"temperature": 0.0, "logit_bias": NEVER}, "loop_guard": None, "max_tokens": MOST}
    with running(EDGE, rows=1, queue=2, **options) as live:
        scheduler = live.pair._engine.scheduler
        scheduler.limits = replace(scheduler.limits, alone_tok=4, prefix_bytes=0)
        yield Leaving(live)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(leaving: Leaving):
    leaving.seen.clear()
    yield
    assert leaving.live.settled() and leaving.live.worker.faults == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_client_that_goes_away_frees_its_row_within_one_pass(leaving, dialect, stream):
    path, body = DIALECTS[dialect]
    seen = leaving.leave_everywhere(path, {**body, "stream": stream})
    assert [where for where, _ in seen] == ["queue", "text", "prompt"]
    assert all(passes <= 1 for _, passes in seen), seen


def test_all_choices_of_a_request_go_with_its_client(leaving):
    line = leaving.dial("/v1/completions", {"prompt": "hello", "n": 3, "stream": True}, "")
    until(lambda: leaving.live.worker.waiting == 2 and leaving.writes())
    leaving.hang_up(line, 0)
    assert sorted(where for where, _ in leaving.seen) == ["queue", "queue", "text"]
    assert all(passes <= 1 for _, passes in leaving.seen)


# closed by the packages that people use --------------------------------------------------------------------


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
        with client.messages.stream(model="tiny", max_tokens=MOST, messages=CHAT) as stream:
            read_some(stream, 6)


def ollama_chat(url: str) -> None:
    with ollama.Client(host=url) as client:
        stream = client.chat("tiny", CHAT, stream=True)
        read_some(stream)
        stream.close()


@pytest.mark.parametrize("leave", [openai_chat, openai_responses, anthropic_messages, ollama_chat])
def test_a_stream_that_a_package_closes_frees_its_row(leaving, leave):
    leave(leaving.live.url)
    until(lambda: leaving.live.worker.open == 0)
    assert [where for where, _ in leaving.seen] == ["text"] and leaving.seen[0][1] <= 1


async def anthropic_waits(url: str) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        await client.messages.create(model="tiny", max_tokens=MOST, messages=CHAT)


async def responses_wait(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await client.responses.create(model="tiny", input="hello")


async def ollama_waits(url: str) -> None:
    async with ollama.AsyncClient(host=url) as client:
        await client.generate("tiny", "hello")


@pytest.mark.parametrize("ask", [anthropic_waits, responses_wait, ollama_waits])
def test_a_task_that_waits_for_a_whole_answer_frees_its_row_when_it_is_cancelled(leaving, ask):
    async def cancel() -> None:
        task = asyncio.create_task(ask(leaving.live.url))
        while leaving.live.worker.running != 1:
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until(lambda: leaving.live.worker.open == 0)
    assert len(leaving.seen) == 1 and leaving.seen[0][1] <= 1
