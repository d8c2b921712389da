"""Requests that go on in a new engine after theirs has failed."""

from collections.abc import Iterable

import pytest
from engines import Listed, engine_of, fixture, prompts, request, solo

from mlx_mtp.engine import Engine
from mlx_mtp.rows import GREEDY, Event, Request, Sampling

SEEDED = Sampling(temperature=0.9, top_k=20, seed=7)
PENALISED = Sampling(temperature=0.0, presence_penalty=1.5, repetition_penalty=1.3)


def finished(engine: Engine, events: list[Event]) -> list[Event]:
    while not engine.idle:
        events += engine.step()
    return events


def tokens_of(events: Iterable[Event], ids: list[int]) -> list[list[int]]:
    return [[token for event in events if event.request == one for token in event.tokens] for one in ids]


def requests_of(kind: str = "edge") -> list[Request]:
    lengths = (5, 40, 9)
    settings = (GREEDY, SEEDED, PENALISED)
    return [request(p, 14, s) for p, s in zip(prompts(fixture(kind), lengths), settings, strict=True)]


@pytest.mark.parametrize("kind", ["plain", "fit", "dflash", "near", "fit+lookup"])
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 7])
def test_output_is_the_same_after_an_engine_has_failed(kind: str, steps: int):
    models, wanted = fixture("edge"), requests_of()
    failed, engine = (engine_of(models, kind, Listed([3, 0, 5])) for _ in range(2))
    ids = [failed.submit(one) for one in wanted]
    events = [event for _ in range(steps) for event in failed.step()]
    engine.take_over(failed)
    events = finished(engine, events)
    assert tokens_of(events, ids) == [solo(models, one) for one in wanted]
    ends = [event for event in events if event.finish_reason]
    assert sorted(event.request for event in ends) == ids
    assert all(event.stats and event.stats.generated_tokens == 14 for event in ends)


@pytest.mark.parametrize("at", range(1, 9))
def test_no_event_is_lost_when_a_dispatch_fails(at: int, monkeypatch: pytest.MonkeyPatch):
    models, wanted = fixture("edge"), requests_of()
    failed, engine = (engine_of(models, "fit", 3) for _ in range(2))
    failed.hands_over_first = False  # as on a GPU: the next pass is sent before the caller has the events
    real, calls = failed._dispatch, []

    def failing(built: object) -> None:
        calls.append(built)
        if len(calls) == at:
            raise RuntimeError("[metal::Device] Unable to build metal library")
        real(built)

    monkeypatch.setattr(failed, "_dispatch", failing)
    ids, events = [failed.submit(one) for one in wanted], []
    with pytest.raises(RuntimeError, match="metal"):
        finished(failed, events)
    engine.take_over(failed)
    assert tokens_of(finished(engine, events), ids) == [solo(models, one) for one in wanted]


def test_sampling_without_a_seed_goes_on_with_as_many_tokens():
    models = fixture("edge")
    failed, engine = (engine_of(models, "fit", 3) for _ in range(2))
    ids = [failed.submit(request((5, 6, 7), 20, Sampling(temperature=1.0, top_k=64, top_p=0.95))) for _ in range(2)]
    events = [event for _ in range(3) for event in failed.step()]
    engine.take_over(failed)
    assert [len(one) for one in tokens_of(finished(engine, events), ids)] == [20, 20]
