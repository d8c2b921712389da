"""Engine faults and what clients see of them; the process, its signals and exit codes."""

import inspect
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import httpx
import pytest
from servers import EDGE, LATE_S, Live, running, until

from mlx_mtp.cli import main
from mlx_mtp.cli.serve import serve
from mlx_mtp.server.nouns import ServerError

ENDLESS = {"ignore_eos": True, "max_tokens": 2000, "temperature": 0}


@pytest.fixture
def live():
    with running(EDGE, max_num_seqs=2) as live:
        yield live


def break_next_pass(live: Live) -> None:
    """Make the engine's next pass raise, once."""
    cache = live.pair._engine.cache
    commit = cache.commit

    def fail(*args):
        cache.commit = commit
        raise RuntimeError("no memory\nfor this")

    cache.commit = fail


def test_a_fault_ends_every_open_request_and_a_new_engine_follows(live, capfd):
    want = live.text("hello", max_tokens=12, temperature=0)
    answers: list = []
    asks = [
        lambda: live.lines("/v1/completions", prompt="hello", **ENDLESS),
        lambda: live.complete("hello", **ENDLESS),
        lambda: live.complete("in the queue", **ENDLESS),
    ]
    threads = []
    for i, ask in enumerate(asks):
        threads.append(threading.Thread(target=lambda ask=ask: answers.append(ask())))
        threads[-1].start()
        until(lambda i=i: live.engine_thread.running + live.engine_thread.waiting == i + 1)
    break_next_pass(live)
    for thread in threads:
        thread.join(LATE_S)
    (stream,) = [a for a in answers if isinstance(a, list)]
    error = json.loads(stream[-1].removeprefix("data: "))["error"]
    assert error["message"] == "the engine has failed: RuntimeError: no memory for this"
    assert error["type"] == "server_error" and len(stream) > 1
    for answer in (a for a in answers if isinstance(a, httpx.Response)):
        assert answer.status_code == 500 and answer.json()["error"] == error
        assert answer.headers["x-should-retry"] == "false"  # the request may have been the cause
    assert live.text("hello", max_tokens=12, temperature=0) == want
    health = live.client.get("/health")
    assert health.status_code == 200 and health.json()["faults"] == 1 and "no memory" in health.json()["last_fault"]
    assert "RuntimeError: no memory" in capfd.readouterr().err  # the traceback
    assert live.settled()


def test_the_third_fault_is_final(live):
    for _ in range(3):
        assert live.client.get("/health").status_code == 200
        break_next_pass(live)
        assert live.complete("hello").status_code == 500
        until(lambda: live.engine_thread.state != "restarting")
    health = live.client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert live.client.get("/health/live").status_code == 503
    for answer in (live.complete("hello"), live.client.get("/v1/models")):
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
    assert live.engine_thread.join(LATE_S)


def test_requests_wait_while_the_engine_restarts(live, monkeypatch):
    building, done, restart = threading.Event(), threading.Event(), live.pair.restart

    def slowly():
        building.set()
        done.wait(LATE_S)
        restart()

    monkeypatch.setattr(live.pair, "restart", slowly)
    break_next_pass(live)
    assert live.complete("hello").status_code == 500
    assert building.wait(LATE_S)
    health = live.client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "restarting"
    assert live.client.get("/health/live").status_code == 200
    answers = []
    thread = threading.Thread(target=lambda: answers.append(live.complete("hello", max_tokens=3)))
    thread.start()
    until(lambda: live.engine_thread.open == 1)
    done.set()
    thread.join(LATE_S)
    assert answers[0].status_code == 200


def test_an_abort_ends_all_requests(live):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(live.complete("hello", **ENDLESS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: live.engine_thread.running == 2 and live.engine_thread.waiting == 1)
    live.engine_thread.abort(ServerError(503, "shutting_down", "enough"))
    for thread in threads:
        thread.join(LATE_S)
    assert [a.status_code for a in answers] == [503] * 3 and live.settled()


# the process ------------------------------------------------------------------------------------------------

CLI = "import sys; from mlx_mtp.cli import main; "
BROKEN = """
from mlx_mtp.models.gemma4 import Gemma4
forward = Gemma4.forward
def fail(self, tokens, *rest):
    if 700 in tokens.reshape(-1).tolist():
        raise RuntimeError("poisoned")
    return forward(self, tokens, *rest)
Gemma4.forward = fail
"""


class Process:
    """`mlx-mtp serve` as a process."""

    def __init__(self, *options: str, before: str = "") -> None:
        arguments = ["serve", "-m", EDGE[0], "--drafter", EDGE[1], "--port", "0", "--width", "3", *options]
        command = [sys.executable, "-c", f"{before}\n{CLI}sys.exit(main({arguments!r}))"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
        self.process.stderr.close()

    def ready(self) -> str:
        until(lambda: any("ready: " in line for line in self.lines) or self.process.poll() is not None)
        assert self.process.poll() is None, self.lines
        return next(line for line in self.lines if "ready: " in line).split("ready: ")[1].strip()

    def ended(self) -> int:
        code = self.process.wait(LATE_S)
        self.reader.join(LATE_S)
        return code


def post(url: str, **body) -> tuple[int, bytes]:
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=LATE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_running_requests_finish_after_sigterm_and_the_exit_code_is_0():
    server = Process("--rows", "2")
    url, answers = server.ready(), []
    assert all(any(stage in line for line in server.lines) for stage in ("grammar tokenizer", "warm-up 1/"))
    body = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(post(url, **body)))
    thread.start()
    until(lambda: b'running"} 1.0' in urllib.request.urlopen(url.removesuffix("/v1") + "/metrics").read())
    server.process.send_signal(signal.SIGTERM)
    thread.join(LATE_S)
    assert answers[0][0] == 200 and json.loads(answers[0][1])["usage"]["completion_tokens"] == 120
    assert server.ended() == 0


@pytest.mark.parametrize(
    ("signals", "grace_s"),
    [([signal.SIGTERM], "0.2"), pytest.param([signal.SIGINT] * 2, "600", marks=pytest.mark.slow)],
    ids=["after the grace", "at the second interrupt"],
)
def test_a_shutdown_ends_running_requests(signals, grace_s):
    server = Process("--grace-s", grace_s)
    url, answers = server.ready(), []
    body = {"prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    thread = threading.Thread(target=lambda: answers.append(post_anyhow(url, **body)))
    thread.start()
    until(lambda: running_of(url) == 1)
    for number in signals:
        server.process.send_signal(number)
        time.sleep(0.3)
    assert server.ended() == 0
    thread.join(LATE_S)
    assert len(signals) > 1 or b"shutting down" in answers[0]


def running_of(url: str) -> float:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as page:
        return float(page.read().decode().split('mlx_mtp_outputs{state="running"} ')[1].split()[0])


def post_anyhow(url: str, **body) -> bytes:
    """The bytes of a stream, however it ended."""
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=LATE_S) as answer:
        out = b""
        try:
            for piece in answer.iter_bytes():
                out += piece
        except httpx.HTTPError:
            pass
        return out


def test_three_faults_end_the_process_with_code_1():
    server = Process(before=BROKEN)
    url = server.ready()
    for _ in range(3):
        assert post(url, prompt=[5, 700, 6])[0] == 500
    assert server.ended() == 1
    assert any("the engine has failed: RuntimeError: poisoned" in line for line in server.lines)


def test_the_help_names_every_route(live):
    page = inspect.getdoc(serve)
    assert page is not None
    for path in live.client.get("/openapi.json").json()["paths"]:
        assert path.replace("{name}", "ID") in page


def test_wrong_options_end_with_code_2_and_one_line(capfd):
    for options, word in (
        (["-m", "./no/such/folder"], "no/such/folder"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--temperature", "-1"], "temperature"),
        (["--width", "99"], "width"),
        (["--api-key", ""], "API key"),
    ):
        assert main(["serve", "--port", "0", *options]) == 2
        shown = capfd.readouterr()
        assert word in shown.err and shown.err.count("\n") == 1 and not shown.out
