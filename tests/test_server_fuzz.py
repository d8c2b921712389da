"""Random requests, most of them broken; and many clients that connect and disconnect."""

import gc
import json
import math
import random
import socket
import string
import threading
import time
from typing import Any

import httpx
import mlx.core as mx
import pytest
from servers import EDGE, TINY, Live, running

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.pair import Pair

ROUTES = ("/v1/models", "/health", "/metrics", "/", "/v1/%00", "/v1/models/%ff")
WORDS = (
    "",
    "a",
    "hello there",
    "\x00",
    "\ud800",
    "é" * 7,
    "<|channel>",
    "<|turn>model\n",
    "x" * 300,
    "\u200d👩\u0644",
)
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-9, 1e23, 1e308, 2**31, 2**63, 2**64, -(2**64), 10**40, math.nan, math.inf)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "done"},
]
FIELDS = {
    "model": "tiny",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 4,
    "n": 2,
    "stop": ["\n"],
    "logit_bias": {"5": 1},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "user": "me",
    "ignore_eos": True,
}
OF_CHAT = {
    "messages": TURNS[:1],
    "max_completion_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "enable_thinking": True,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"a": 1},
}
OF_TEXT = {"prompt": "hello", "max_tokens": 3, "logprobs": 2, "suffix": "", "echo": False, "best_of": 1}


class Fuzz:
    """Random requests from one seed. Some are legal, most are not."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        kind = self.chance.randrange(8 if depth < 4 else 5)
        if kind == 0:
            return self.chance.choice(NUMBERS)
        if kind == 1:
            return self.chance.choice(WORDS)
        if kind == 2:
            return self.chance.choice((None, True, False))
        if kind == 3:
            return self.chance.randrange(-5, 2000)
        if kind == 4:
            return "".join(self.chance.choices(string.printable, k=self.chance.randrange(40)))
        if kind == 5:
            return {str(self.value(9)): self.value(depth + 1) for _ in range(self.chance.randrange(4))}
        return [self.value(depth + 1) for _ in range(self.chance.randrange(5))]

    def mutated(self, value: Any) -> Any:
        """A value with one change inside."""
        if isinstance(value, dict) and value and self.chance.random() < 0.8:
            name = self.chance.choice(list(value))
            return {**value, name: self.mutated(value[name])}
        if isinstance(value, list) and value and self.chance.random() < 0.8:
            at = self.chance.randrange(len(value))
            return [*value[:at], self.mutated(value[at]), *value[at + 1 :]]
        return self.value()

    def body(self, chat: bool) -> bytes:
        """A legal body, or one with up to five changes, perhaps with broken bytes."""
        chance, own = self.chance, OF_CHAT if chat else OF_TEXT
        names = chance.sample([*FIELDS, *own], chance.randrange(6))
        body: Any = {name: (FIELDS | own)[name] for name in (*names, "messages" if chat else "prompt")}
        if chat and chance.random() < 0.3:
            body["messages"] = TURNS
        for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
            body = self.mutated(body) if isinstance(body, dict) and body else body
        if isinstance(body, dict):
            if chance.random() < 0.1:
                body[str(self.value(9))] = self.value()
            for name, most in (("max_tokens", 6), ("max_completion_tokens", 6), ("n", 3)):
                if isinstance(body.get(name), (int, float)) and body[name] > most:
                    body[name] = most  # more is legal, but would take minutes
        raw = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if chance.random() < 0.1:
            at = chance.randrange(len(raw))
            raw = raw[:at] + chance.randbytes(chance.randrange(4)) + raw[at + chance.randrange(3) :]
        return raw

    def headers(self) -> dict[str, bytes]:
        chance, out = self.chance, {"content-type": b"application/json"}
        if chance.random() < 0.1:
            out["content-type"] = chance.choice((b"text/plain", b"application/json; charset=latin-1", b";", b"\xff"))
        if chance.random() < 0.05:
            name = chance.choice(("host", "origin", "authorization", "x-api-key", "accept", "content-encoding"))
            out[name] = bytes(chance.choices(range(33, 256), k=chance.randrange(1, 30)))
        return out

    def send(self, client: httpx.Client) -> httpx.Response:
        chance, chat = self.chance, self.chance.random() < 0.5
        path, method = "/v1/chat/completions" if chat else "/v1/completions", "POST"
        if chance.random() < 0.06:
            path = chance.choice(ROUTES)
        if chance.random() < 0.06:
            method = chance.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "NONSENSE"))
        return client.request(method, path, content=self.body(chat), headers=self.headers())


def check(answer: httpx.Response) -> None:
    """The request was done or refused with a reason; the server never failed."""
    assert answer.status_code in (200, 400, 403, 404, 405, 413, 429), (answer.status_code, answer.text[:300])
    request = answer.request
    if request.method == "HEAD" or answer.headers["content-type"].startswith("text/plain"):
        return
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-300:]
    elif answer.status_code == 200:
        assert answer.json()
    else:
        assert answer.json()["error"]["message"], request.content


def broken_line(live: Live, chance: random.Random) -> None:
    """Send bytes that are not HTTP, or half a request."""
    with socket.create_connection(("127.0.0.1", live.client.base_url.port)) as line:
        heads = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01",
            b"",
        )
        line.sendall(chance.choice(heads))
        line.sendall(
            chance.choice((b"content-length: 99\r\n\r\n{", b"content-length: -1\r\n\r\n", chance.randbytes(60)))
        )


def bombard(live: Live, count: int, seed: int, threads: int) -> None:
    """Send requests from several threads. One output is requested again and again, and must not change."""
    ask = {"prompt": "hello", "max_tokens": 12, "temperature": 1.0, "seed": 1}
    want, wrong, done, over = live.text(**ask), [], [], threading.Event()

    def attack(number: int) -> None:
        fuzz = Fuzz(seed + number)
        try:
            with httpx.Client(base_url=live.url, timeout=60) as client:
                for _ in range(count // threads):
                    answer = fuzz.send(client)
                    check(answer)
                    done.append(answer.status_code == 200)
                    if fuzz.chance.random() < 0.02:
                        broken_line(live, fuzz.chance)
        except Exception as error:  # to the main thread
            wrong.append(error)

    def watch() -> None:
        while not over.is_set():
            answer = live.complete(**ask)
            if answer.status_code != 429 and answer.json()["choices"][0]["text"] != want:
                wrong.append(answer.text)

    watcher = threading.Thread(target=watch)
    attackers = [threading.Thread(target=attack, args=(i,)) for i in range(threads)]
    for thread in (watcher, *attackers):
        thread.start()
    for thread in attackers:
        thread.join()
    over.set()
    watcher.join()
    if wrong and isinstance(wrong[0], Exception):
        raise wrong[0]
    assert not wrong and len(done) == count // threads * threads
    assert 0.15 < sum(done) / len(done) < 0.8  # neither mostly legal nor mostly broken
    assert live.settled() and live.engine_thread.faults == 0 and live.text(**ask) == want


def test_broken_requests_do_not_break_the_server_or_another_output():
    with running(EDGE, max_num_seqs=4, max_queued=16, max_tokens=4) as live:
        bombard(live, 80, seed=1, threads=4)


@pytest.mark.slow
def test_ten_thousand_broken_requests_do_not_break_the_server():
    with running(EDGE, max_num_seqs=8, max_queued=16, max_tokens=4) as live:
        for turn in range(10):
            bombard(live, 1000, seed=1000 * turn + 7, threads=8)


# memory -------------------------------------------------------------------------------------------

SOAK_S, ROWS, WIDEST = 600.0, 8, 7  # of the slow test; more draft tokens are rare


def trace_every_round(pair: Pair) -> None:
    """Run a round of every shape once.

    MLX keeps every compiled graph: on a CPU, 2.4 MB a shape with this pair. A late shape would resemble a leak.
    """
    model = pair._model
    for rows in range(1, ROWS + 1):
        cache = Cache(model.specs, MAX_WIDTH, mx.float32)
        for _ in range(rows):
            cache.join(64)
        for columns in range(1, WIDEST + 2):
            pass_ = cache.open(slice(0, rows), columns)
            mx.eval(model.forward(mx.ones((rows, columns), mx.int32), pass_)[0])


def resident_bytes() -> int:
    """Resident memory of this process by /proc; skips the test if there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except FileNotFoundError:
        pytest.skip("no /proc here")


def stream_on(live: Live, seed: int, longest: tuple[int, int], over: threading.Event, failed: list) -> None:
    """One client; it disconnects from half of its streams. longest: of prompts and of outputs, in tokens."""
    chance = random.Random(seed)
    try:
        with httpx.Client(base_url=live.url, timeout=120) as client:
            while not over.is_set():
                tokens = chance.randrange(5, longest[1])
                body = {"prompt": [chance.randrange(3, 700) for _ in range(chance.randrange(1, longest[0]))]}
                body |= {"max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 1.0}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    leave = chance.randrange(tokens) if chance.random() < 0.5 else 10**9
                    lines = [line for _, line in zip(range(leave), answer.iter_lines(), strict=False)]
                    assert leave < 10**9 or lines[-2] == "data: [DONE]"
    except Exception as error:
        failed.append(error)


def soak(live: Live, seconds: float, longest: tuple[int, int] = (600, 120)) -> tuple[float, float]:
    """Mean resident bytes in the middle third and in the last third of the time."""
    over, failed, seen = threading.Event(), [], []
    clients = [threading.Thread(target=stream_on, args=(live, seed, longest, over, failed)) for seed in range(8)]
    for client in clients:
        client.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not failed:
        time.sleep(min(0.5, seconds / 30))
        seen.append(resident_bytes())
    over.set()
    for client in clients:
        client.join()
    if failed:
        raise failed[0]
    assert live.settled() and live.engine_thread.faults == 0
    third = len(seen) // 3
    return sum(seen[third : 2 * third]) / third, sum(seen[2 * third : 3 * third]) / third


@pytest.mark.slow
def test_memory_stays_flat_over_ten_minutes_of_eight_clients():
    with running(TINY, max_num_seqs=ROWS, num_draft_tokens="auto", kv_bytes=2**26, prepare=trace_every_round) as live:
        store = live.pair._engine.scheduler.prefixes
        for _ in range(20):
            soak(live, 20.0)
            if store.nbytes > 0.9 * store.budget_bytes:  # the cache has reached its budget
                break
        gc.collect()
        before = memory_by_kind(live)
        middle, last = soak(live, SOAK_S)
        print(f"\nresident: middle third {middle / 2**20:.1f} MiB, last third {last / 2**20:.1f} MiB")
        print(f"of it, before and after: {before}, {memory_by_kind(live)}")
        assert last < 1.03 * middle


def memory_by_kind(live: Live) -> str:
    """The memory in use by kind, in MiB."""
    known = {
        "prefix cache": live.pair._engine.scheduler.prefixes.nbytes,
        "arrays": mx.get_active_memory(),
        "spare buffers": mx.get_cache_memory(),
    }
    return ", ".join(f"{name} {size / 2**20:.1f}" for name, size in known.items())


def test_disconnects_leave_no_sequence_in_the_engine():
    with running(EDGE, max_num_seqs=4, max_queued=8) as live:
        soak(live, 0.8, longest=(100, 20))  # clients finish the streams that they have begun
