"""An output over HTTP does not depend on other requests, each with its own sampling."""

import random
import threading

import pytest
from servers import EDGE, TINY, Live, running

BASE = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}
ASKS = [
    {"prompt": "def read(path):", **BASE},
    {"prompt": "import os", **BASE, "temperature": 0.9, "seed": 1},
    {"prompt": "class A:", **BASE, "temperature": 1.3, "top_k": 12, "seed": 2, "logprobs": 2},
    {"prompt": "for i in range(10):\n" * 9, **BASE, "repetition_penalty": 1.3},
    {"prompt": "x = 1", **BASE, "temperature": 0.7, "top_p": 0.8, "seed": 3, "n": 2},
    {"prompt": "return", **BASE, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"prompt": "try:\n    pass", **BASE, "temperature": 1.0, "min_p": 0.1, "seed": 4, "logit_bias": {"40": 3}},
    {"prompt": "\n", **BASE, "max_tokens": 24, "stop": ["zz", "\n\n\n"]},
]


def outputs_of(live: Live, ask: dict) -> list[str]:
    answer = live.complete(**ask)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def noise(live: Live, seed: int, over: threading.Event) -> None:
    """Send unseeded requests; some disconnect early."""
    chance = random.Random(seed)
    while not over.is_set():
        body = {"prompt": [chance.randrange(3, 700) for _ in range(chance.randrange(1, 90))], "temperature": 1.0}
        with live.client.stream("POST", "/v1/completions", json={**body, "max_tokens": 60, "stream": True}) as answer:
            for _, _line in zip(range(chance.randrange(1, 60)), answer.iter_lines(), strict=False):
                if over.is_set():
                    return


def check(live: Live, turns: int) -> None:
    want = [outputs_of(live, ask) for ask in ASKS]
    wrong: list = []

    def client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(turns):
            i = chance.randrange(len(ASKS))
            over.wait(chance.random() * 0.05)
            got = outputs_of(live, ASKS[i])
            if got != want[i]:
                wrong.append((ASKS[i], want[i], got))

    over = threading.Event()
    others = [threading.Thread(target=noise, args=(live, seed, over)) for seed in range(3)]
    clients = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in (*others, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    over.set()
    for thread in others:
        thread.join()
    assert not wrong
    assert live.settled() and live.engine_thread.faults == 0


def test_outputs_do_not_depend_on_other_requests():
    with running(EDGE, max_num_seqs=8) as live:
        check(live, 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_draft_tokens", [0, 3, "auto"])
def test_outputs_of_the_embedded_pair_do_not_depend_on_other_requests(num_draft_tokens):
    with running(TINY, max_num_seqs=8, num_draft_tokens=num_draft_tokens) as live:
        check(live, 12)


@pytest.mark.slow
def test_drafting_does_not_change_outputs():
    with (
        running(EDGE, max_num_seqs=8, num_draft_tokens=0) as plain,
        running(EDGE, max_num_seqs=8, num_draft_tokens=4) as drafting,
    ):
        for ask in ASKS:
            assert outputs_of(plain, ask) == outputs_of(drafting, ask)
