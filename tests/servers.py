"""A server under test: the real application and engine on threads of this process, with a real socket.

with running(TINY) as live:
    live.client.post("/v1/completions", json={"prompt": "import os"})
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import httpx
from checkpoints import FIXTURES

from mlx_mtp.pair import Pair, load
from mlx_mtp.scheduler import Limits
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import Settings
from mlx_mtp.server.run import Server, listen
from mlx_mtp.server.service import Admission
from mlx_mtp.server.worker import EngineThread

TINY = (str(resources.files("mlx_mtp") / "data" / "tiny" / "target"), "auto")
EDGE = (str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant_fit"))
LATE_S = 60.0  # no answer is waited for longer, however busy the machine
MakeAdmission = Callable[[Settings, EngineThread], Admission]


@dataclass
class Live:
    """A running server. pair: the engine's own; read it only while it is idle, or to inject a fault."""

    url: str
    admission: Admission
    client: httpx.Client
    pair: Pair
    server: Server

    @property
    def engine_thread(self) -> EngineThread:
        return self.admission.engine_thread

    def chat(self, text: str, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def text(self, prompt: Any, **fields: Any) -> str:
        """The output of one completion."""
        answer = self.complete(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def lines(self, path: str, **fields: Any) -> list[str]:
        """A stream's lines, blank ones left out."""
        with self.client.stream("POST", path, json={"stream": True, **fields}) as answer:
            assert answer.status_code == 200, answer.read()
            return [line for line in answer.iter_lines() if line]

    def settled(self) -> bool:
        """Wait until nothing runs; returns whether the engine is empty."""
        until(lambda: not self.engine_thread.open and not self.engine_thread.running and not self.engine_thread.waiting)
        engine = self.pair._engine
        return engine.idle and not engine.cache.bounds and not self.pair._inbox


def until(holds: Any, seconds: float = LATE_S) -> None:
    """Wait for a condition; fails if it does not come true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.005)


def chunks(lines: list[str]) -> list[dict]:
    """The JSON of a stream's data lines, which [DONE] must end; comments are left out."""
    assert lines[-1] == "data: [DONE]", lines[-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


def _admission(settings: Settings, engine_thread: EngineThread) -> Admission:
    return Admission(settings, engine_thread, Metrics())


@contextlib.contextmanager
def running(
    model: tuple[str, str | None] = EDGE,
    kv_bytes: int | None = None,
    prepare: Callable[[Pair], None] = lambda pair: None,
    make_admission: MakeAdmission = _admission,
    **settings: Any,
) -> Iterator[Live]:
    """A server on an unused port. prepare: called with the pair, on the engine thread."""
    chosen = Settings(**{"name": "tiny", "num_draft_tokens": 3, "grace_s": 1.0, "warm_up": ((1, 8),), **settings})
    pairs: list[Pair] = []

    def make() -> Pair:
        limits = Limits(max_rows=chosen.max_num_seqs, kv_bytes=kv_bytes)
        pairs.append(load(*model, dtype="float32", limits=limits))
        prepare(pairs[0])
        return pairs[0]

    engine_thread = EngineThread(make, chosen)
    admission = make_admission(chosen, engine_thread)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(admission)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    thread.start()
    try:
        until(lambda: engine_thread.state != "loading")
        assert engine_thread.state == "ready", engine_thread.error
        limits = httpx.Limits(max_connections=64)
        headers = {} if chosen.api_key is None else {"authorization": b"Bearer " + chosen.api_key.encode()}
        with httpx.Client(base_url=url, timeout=LATE_S, limits=limits, headers=headers) as client:
            yield Live(url, admission, client, pairs[0], server)
    finally:
        pairs.clear()
        server.should_exit = True
        thread.join(LATE_S)
        assert not thread.is_alive() and engine_thread.join(LATE_S)
