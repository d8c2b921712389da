"""What is kept from one process to the next: it is what was learnt, and no file, whatever is in it, does any harm."""

import copy
import json
import os
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from engines import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from servers import running, until
from test_depth import COSTS, Cost, linear

from mlx_mtp import GREEDY, Pair, load
from mlx_mtp.auto import Auto
from mlx_mtp.depth import Apart, Depth, depth_of
from mlx_mtp.rows import BOUND, DRAWN, USUAL
from mlx_mtp.tuning import Policies, Tuning

EDGE = FIXTURES / "edge"


@pytest.fixture
def weights(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def text(
    depth: Depth,
    chance: float,
    cost: Cost,
    rows: int,
    seed: int,
    tokens: int = 127,
    outlook: int = USUAL,
    column: float = 0.0,
) -> float:
    """Time over plain decoding's of one text, of which a row keeps a draft with such a chance, on a noisy machine. As
    in the engine a width is chosen while the round before runs. column: of what the drafter has missed and must make
    up for, in plain rounds; 0 is a drafter that misses nothing."""
    rng, written, seconds, slower, owed = random.Random(seed), 0.0, 0.0, 1.0, 0
    owing = column > 0
    width, told = depth.choose([outlook] * rows, 0), 0
    while written < tokens:
        kept = [next((k for k in range(width) if rng.random() >= chance), width) + 1 for _ in range(rows)]
        late, owed = (owed * column, 0) if width else (0.0, owed + rows * owing)
        following = depth.choose([outlook] * rows, owed)
        slower = rng.choice([1.0, 1.0, 1.3, 1.6]) if rng.random() < 0.02 else slower
        took = cost(rows, width) / cost(rows, 0) + late
        seconds, written = seconds + took, written + sum(kept) / rows
        depth.record(width, kept, took * slower * (1 + 0.05 * abs(rng.gauss(0, 1))), [outlook] * rows, told)
        width, told = following, owed
    return seconds / written


def again(auto: Auto) -> Auto:
    """What the next process makes of what this one has kept."""
    return Auto.restored(json.loads(json.dumps(auto.state())))


def by_processes(
    auto: Auto,
    seeds: Iterable[int],
    chance: float,
    cost: Cost,
    rows: int,
    tokens: int = 127,
    outlook: int = USUAL,
    column: float = 0.0,
) -> tuple[list[float], Auto]:
    """`text` in one process after another, each of which goes on with what the one before has kept; and what goes on
    with what the last has."""
    found = []
    for seed in seeds:
        found.append(text(auto, chance, cost, rows, seed, tokens, outlook, column))
        auto = again(auto)
    return found, auto


def texts(chance: float, cost: Cost, rows: int, remember: bool, column: float = 0.0) -> list[float]:
    """`text` in process after process of one user, of several users; the first of each, which nobody can remember
    anything in, left out."""
    found = []
    for user in range(4):
        auto = Auto()
        for process in range(5):
            one = text(auto, chance, cost, rows, 100 * user + process, column=column)
            found += [one] if process else []
            auto = again(auto) if remember else Auto()
    return found


# what is learnt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("per_draft", [0.3, 0.8, 2.0])
def test_short_texts_of_new_processes_are_not_slowed_down_by_useless_drafts(rows, per_draft):
    found = texts(0.0, linear(0.1, per_draft), rows, remember=True)
    assert statistics.mean(found) < 1.012 and max(found) < 1.04


def test_drafts_that_cost_what_they_bring_are_not_tried_in_every_process():
    forgetful, found = (texts(0.6, linear(0.1, 1.0), 1, remember) for remember in (False, True))
    assert statistics.mean(forgetful) > 1.014 and max(forgetful) > 1.05
    assert statistics.mean(found) < 1.01 and max(found) < 1.04


def first_widths(depth: Depth, rows: int, outlook: int = USUAL) -> list[int]:
    """Of the first rounds of a process, which keep no draft."""
    widths = []
    for _ in range(Auto.CHECK_ROUNDS + 1):
        widths.append(depth.choose([outlook] * rows))
        depth.record(widths[-1], [1] * rows, 1.0, [outlook] * rows)
    return widths


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("cost", ["memory-bound", "recorded"])
def test_good_drafts_are_drafted_after_a_look_at_what_none_take(rows, cost):
    forgetful, found = (statistics.mean(texts(0.85, COSTS[cost], rows, remember)) for remember in (False, True))
    assert found < 0.98 * forgetful < 0.98
    auto = Auto()
    text(auto, 0.85, COSTS[cost], rows, 0, tokens=400)
    *check, width = first_widths(again(auto), rows)
    assert not any(check) and width > 2


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("per_draft", [1.0, 3.0])
def test_drafts_that_have_become_dear_are_found_out_by_the_first_ones(rows, per_draft):
    """As when another program takes the memory's bandwidth, or leaves it."""
    found = []
    for user in range(6):
        seed = 100 * user
        _, auto = by_processes(Auto(), range(seed, seed + 3), 0.8, linear(0.05, 0.05), rows, tokens=400)
        assert auto.settled > 0
        of_user, _ = by_processes(auto, range(seed + 50, seed + 54), 0.8, linear(0.1, per_draft), rows)
        found.append(of_user)
    first, *others = (statistics.mean(ones) for ones in zip(*found, strict=True))
    assert first < 1 + 0.15 * per_draft and max(others) < 1.04


@pytest.mark.parametrize("column", [0.0, 0.1], ids=["reads what it missed", "makes up for it"])
def test_a_cost_that_is_no_longer_true_is_found_out(column):
    """As when the chip was hot, or another program ran, in the processes that learnt it."""
    _, auto = by_processes(Auto(), range(3), 0.8, linear(0.1, 3.0), 1, tokens=400, column=3 * column)
    assert auto.settled == 0
    found, _ = by_processes(auto, range(24), 0.8, linear(0.05, 0.05), 1, column=column)
    assert max(found) < 1.02 and max(found[12:]) < 0.7 and statistics.mean(found[16:]) < 0.53


@pytest.mark.parametrize("rows", [4, 8])
def test_a_draft_model_as_large_as_its_target_is_not_tried_in_every_process(rows):
    forgetful, found = (texts(0.96, linear(0.0, 2.0), rows, remember, 1 / rows) for remember in (False, True))
    assert statistics.mean(forgetful) > 1.015
    assert statistics.mean(found) < 1.008 and statistics.median(found) == 1.0


def test_what_did_not_pay_in_one_kind_of_text_is_tried_in_the_next():
    _, auto = by_processes(Auto(), range(10), 0.0, linear(0.1, 0.2), 1)
    found = [text(auto, 0.9, linear(0.1, 0.2), 1, seed, tokens=400) for seed in range(3)]
    assert found[-1] < 0.6 and found[0] < 0.85


def test_what_is_learnt_of_constrained_rows_is_kept_apart():
    depth = depth_of("auto")
    assert isinstance(depth, Apart)
    for seed in range(4):
        text(depth, 0.0, linear(0.1, 0.5), 1, seed)
        text(depth, 0.9, linear(0.1, 0.1), 1, seed, outlook=USUAL + BOUND)
    after = Apart.restored(json.loads(json.dumps(depth.state())))
    assert after.choose([USUAL]) == 0 and first_widths(after, 1, USUAL + BOUND)[-1] > 1


@pytest.mark.parametrize("rows", [1, 8])
def test_what_drawn_rows_keep_says_nothing_of_greedy_ones(rows):
    """Somebody's chats between an editor's requests."""
    auto, cost, found = Auto(), linear(0.0, 0.35), []
    for turn in range(3):
        greedy, auto = by_processes(auto, range(3 * turn, 3 * turn + 3), 0.9, cost, rows)
        found += greedy[:1] if turn else []
        drawn, auto = by_processes(auto, range(6), 0.1, cost, rows, outlook=USUAL + DRAWN)
        assert max(drawn) < 1.04
    assert max(found) < 0.7


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_cost_that_was_too_high_is_put_right_though_a_process_looks_but_once(rows):
    dear, cheap = [], []
    for user in range(4):
        seeds = range(10 * user, 10 * user + 4)
        of_dear, auto = by_processes(Auto(), seeds, 0.65, linear(0.0, 0.8), rows)
        of_cheap, _ = by_processes(auto, seeds, 0.65, linear(0.0, 0.25), rows)
        dear, cheap = dear + of_dear, cheap + of_cheap
    assert statistics.mean(dear) > 0.99 and statistics.mean(cheap) < 0.9


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_drafter_that_pays_in_wider_rounds_only_is_found_out(rows):
    """A block is drafted in as much time however wide it is."""

    def block(rows: int, width: int) -> float:
        return 1 + (0.68 + 0.08 * width if width else 0.0)

    found, _ = by_processes(Auto(), range(8), 0.65, block, rows)
    assert statistics.mean(found) < 0.95


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_drafts_that_seemed_too_dear_to_pay_are_drafted_again_though_processes_are_short(rows):
    """For a few processes another program had the machine, and a round with a draft took as long as 2.2 plain ones."""
    found = []
    for user in range(4):
        _, auto = by_processes(Auto(), range(10 * user, 10 * user + 3), 0.8, linear(0.0, 1.2), rows)
        found += by_processes(auto, range(8), 0.8, linear(0.0, 0.3), rows)[0]
    assert statistics.mean(found) < 0.9


# the file ---------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again_by_the_same_pair_only(tmp_path, weights):
    place = tmp_path / "made" / "when needed"
    tuning = Tuning(place, [weights], "float32", 4)
    assert tuning.recall(lambda state: state) is None
    tuning.keep({"a": [1, 2.5]})
    assert Tuning(place, [weights], "float32", 4).recall(lambda state: state) == {"a": [1, 2.5]}
    assert Tuning(place, [weights], "float32", 8).recall(lambda state: state) is None
    (weights / "model.safetensors").write_bytes(b"other weights")
    assert Tuning(place, [weights], "float32", 4).recall(lambda state: state) is None
    assert len(list(place.iterdir())) == 1


def test_where_nothing_can_be_kept_nothing_happens(tmp_path, weights):
    place = tmp_path / "a file"
    place.write_text("in the way")
    tuning = Tuning(place, [weights])
    tuning.keep({"a": 1})
    assert tuning.recall(lambda state: state) is None and place.read_text() == "in the way"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, weights, monkeypatch):
    tuning = Tuning(tmp_path / "place", [weights])
    tuning.keep({"a": 1})

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    tuning.keep({"a": 2})
    assert tuning.recall(lambda state: state) == {"a": 1}
    assert os.listdir(tmp_path / "place") == [tuning.file.name]


def learnt() -> Any:
    """Plain values as a file holds them."""
    depth = depth_of("auto")
    assert isinstance(depth, Apart)
    for seed in range(2):
        for rows in (1, 4):
            text(depth, 0.6, COSTS["recorded"], rows, seed)
    return json.loads(json.dumps(depth.state()))


LEARNT = learnt()


def test_what_is_restored_is_what_was_kept():
    assert json.loads(json.dumps(Apart.restored(LEARNT).state())) == LEARNT
    assert LEARNT["free"]["kept"] and LEARNT["free"]["times"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every way into plain values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inside for found in places(one, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just(10**400),
)


@given(st.sampled_from(places(LEARNT)[1:]), JUNK, st.booleans())
def test_no_file_does_any_harm(tmp_path_factory, path, junk, removed):
    state = copy.deepcopy(LEARNT)
    *outer, last = path
    inside = state
    for key in outer:
        inside = inside[key]
    if removed:
        del inside[last]
    else:
        inside[last] = junk
    folder = tmp_path_factory.mktemp("tuning")
    tuning = Tuning(folder, [])
    tuning.file.write_text(json.dumps(state))
    depth = Policies(tuning).of("auto")
    for rows in (1, 4):
        assert 0 < text(depth, 0.5, COSTS["recorded"], rows, 0, tokens=60) < 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 10**5, '{"free": NaN}', '{"free": {"times": 1e999}}'])
def test_what_is_no_tuning_is_left_alone_until_something_is_learnt(tmp_path, content):
    tuning = Tuning(tmp_path, [])
    tuning.file.write_text(content)
    policies = Policies(tuning)
    text(policies.of("auto"), 0.5, COSTS["recorded"], 1, 0)
    assert tuning.file.read_text() == content
    policies.keep()
    assert tuning.recall(Apart.restored) is not None


# a pair -----------------------------------------------------------------------------------------------------


def pair(folder: Path, drafter: str | None = str(EDGE / "assistant_fit")) -> Pair:
    made = load(str(EDGE / "target"), drafter, dtype="float32")
    made.remember(folder)
    return made


def test_a_pair_goes_on_where_another_process_ended_and_writes_the_same_text(tmp_path):
    prompt, first = list(range(5, 25)), pair(tmp_path)
    told = first.generate([prompt], GREEDY, max_tokens=40)[0].tokens
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["free"]["times"] and kept["free"]["kept"]
    second = pair(tmp_path)
    assert second.generate([prompt], GREEDY, max_tokens=40)[0].tokens == told
    assert [tuple(key[:2]) for key in kept["free"]["times"]] == [
        tuple(key[:2]) for key in json.loads(file.read_text())["free"]["times"][: len(kept["free"]["times"])]
    ]


def test_what_is_learnt_is_kept_when_a_text_is_broken_off_and_not_before(tmp_path):
    first = pair(tmp_path)
    events = first.stream(list(range(5, 25)), GREEDY, max_tokens=40)
    for _ in range(6):
        next(events)
    assert not list(tmp_path.iterdir())
    events.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_width_that_is_given_keeps_nothing(tmp_path):
    pair(tmp_path).generate([[5, 6, 7]], GREEDY, width=3, max_tokens=8)
    assert not list(tmp_path.iterdir())


def test_a_server_keeps_what_its_requests_have_shown_and_of_its_warm_up_what_rounds_cost(tmp_path):
    def half(name: str) -> dict[str, Any]:
        (file,) = tmp_path.glob("*.json")
        return json.loads(file.read_text())[name]

    with running(width="auto", prepare=lambda pair: pair.remember(tmp_path)) as live:
        until(lambda: list(tmp_path.glob("*.json")))
        assert half("free")["times"] and not half("free")["kept"]
        live.client.post("/v1/completions", json={"prompt": "hello there", "max_tokens": 40})
        until(lambda: half("free")["kept"])
        assert not half("bound")["kept"]
