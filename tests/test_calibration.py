"""What a pair measures before its first text: what rounds cost is found, nothing else is learnt, and the first text of
all is never slow."""

import json
import random
import statistics
from pathlib import Path

import mlx.core as mx
import pytest
from engines import drafter_of, smallest
from servers import running, until
from test_depth import COSTS, STEPS, Cost, linear
from test_depth_engine import KINDS, MACHINES, OnMachine, Work, slowdown
from test_tuning import EDGE, pair, text

from mlx_mtp import GREEDY, load
from mlx_mtp.auto import Auto
from mlx_mtp.cache import Cache
from mlx_mtp.calibration import WIDTHS, Script, calibrate
from mlx_mtp.depth import MAX_WIDTH, Constant
from mlx_mtp.engine import Engine
from mlx_mtp.rows import DRAWN, USUAL, RequestError
from mlx_mtp.scheduler import Limits

USERS = 20
DEAR = {f"{per_draft} a draft": linear(0.1, per_draft) for per_draft in (0.3, 0.55, 0.8, 1.1, 2.0)}
BLOCK = {"a block": lambda rows, width: 1.45 + 0.16 * width if width else 1.0}
ALL: dict[str, Cost] = {**COSTS, "steps": STEPS, **DEAR, **BLOCK}


def calibrated(cost: Cost, rows: int, seed: int = 0, noise: float = 0.05) -> tuple[Auto, list[int]]:
    """A new policy that has been told what rounds cost, and the widths that this took. As in the engine a width is
    chosen while the round before runs."""
    auto, rng, widths = Auto(), random.Random(1000 + seed), []
    script = Script(rows, [auto])
    width = script.choose([USUAL] * rows)
    while not script.done:
        widths.append(width)
        following = script.choose([USUAL] * rows)
        script.record(width, [1] * rows, cost(rows, width) * (1 + noise * abs(rng.gauss(0, 1))), [USUAL] * rows)
        width = following
    return auto, widths


def first_texts(cost: Cost, rows: int, chance: float, calibrates: bool) -> list[float]:
    """Time over plain decoding's of the first text of all that each of several users has."""
    autos = [calibrated(cost, rows, user)[0] if calibrates else Auto() for user in range(USERS)]
    return [text(auto, chance, cost, rows, user) for user, auto in enumerate(autos)]


# what it finds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("machine", ALL)
def test_costs_are_found_without_a_text(machine, rows):
    auto, widths = calibrated(ALL[machine], rows, noise=0.0)
    assert auto.knows(rows) and not auto.knows(rows + 1)
    found = auto._times.costs(rows)
    truth = [ALL[machine](rows, width) / ALL[machine](rows, 0) for width in range(len(found))]
    if machine != "recorded":  # where some wider rounds took less than narrow ones
        for width in {*widths} - {0}:
            assert found[width] == pytest.approx(truth[width], rel=0.01)
    assert json.loads(json.dumps(auto.state()))["kept"] == {}


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_no_wide_rounds_are_run_where_no_draft_could_pay(rows):
    dear, cheap = (calibrated(linear(0.0, per_draft), rows)[1] for per_draft in (1.1, 0.2))
    assert {*dear} == {0, WIDTHS[0]} and {*cheap} == {0, *WIDTHS}
    assert 25 <= len(cheap) <= 26 and len(dear) < 13


def test_rounds_while_others_are_on_their_way_are_plain_and_say_nothing():
    auto = Auto()
    script = Script(4, [auto])
    for rows in (1, 2, 3):
        assert script.choose([USUAL] * rows) == 0
        script.record(0, [1] * rows, 9.0, [USUAL] * rows)
    assert not any(auto.knows(rows) for rows in (1, 2, 3, 4))
    together = [script.choose([USUAL] * 4) for _ in range(50)]
    assert [w for w in together if w] == [w for w in calibrated(linear(0.0, 0.2), 4)[1] if w]


# what the first text makes of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("machine", ALL)
def test_useless_drafts_do_not_slow_down_the_first_text_of_all(machine, rows):
    found = first_texts(ALL[machine], rows, 0.0, True)
    assert statistics.mean(found) < 1.022 and max(found) < 1.03


def test_without_it_they_do():
    assert statistics.mean(first_texts(linear(0.1, 2.0), 1, 0.0, False)) > 1.04


@pytest.mark.parametrize("machine", ["memory-bound", "4 bit, M4 Pro", "recorded", "a block"])
def test_good_drafts_are_at_work_sooner(machine):
    ratios = [
        statistics.mean(first_texts(ALL[machine], rows, 0.9, True))
        / statistics.mean(first_texts(ALL[machine], rows, 0.9, False))
        for rows in (1, 4, 8)
    ]
    assert statistics.geometric_mean(ratios) < 0.97


def test_the_first_drafts_of_a_text_are_narrow_until_something_is_known_of_them():
    auto = calibrated(linear(0.02, 0.02), 1)[0]
    outlook = [USUAL]
    widths = []
    for _ in range(4):
        widths.append(auto.choose(outlook))
        if len(widths) > 1:
            auto.record(widths[-2], [widths[-2] + 1], 1 + 0.04 * widths[-2], outlook)
    assert widths[:2] == [1, 1] and widths[3] > 2
    assert auto.choose([USUAL + DRAWN]) == 1


# in the engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["rand", "dflash", "near", "lookup", "rand+lookup"])
def test_an_engine_finds_what_its_machine_takes(kind, rows):
    auto, machine = Auto(), MACHINES["dense, M5"]
    engine = OnMachine(smallest(), kind, Constant(0), machine, rows)
    calibrate(engine, rows, [auto], 1000)
    found = auto._times.costs(rows)
    assert [found[w] for w in WIDTHS] == pytest.approx([machine(rows, w) / machine(rows, 0) for w in WIDTHS], rel=0.01)


def test_a_round_counts_only_between_others_of_its_width():
    """The first one of a width takes ten times as long here, and the last next to nothing."""
    script = Script(1, [auto := Auto()])
    widths = [script.choose([USUAL])]
    while not script.done:
        widths.append(script.choose([USUAL]))
        before, width, following = ([0, *widths])[-3:]
        seconds = 10.0 if before != width else 0.01 if following != width else 1.0 + 0.1 * width
        script.record(width, [1], seconds, [USUAL])
    assert [auto._times.costs(1)[w] for w in (0, *WIDTHS)] == pytest.approx([1.0, 1.1, 1.2, 1.4])


@pytest.mark.parametrize("most_tok", [1, 9, 14, 20])
def test_a_row_without_room_finds_what_it_can(most_tok):
    models, auto = smallest(), Auto()
    cache = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    engine = Engine(models.target, cache, drafter_of(models, "rand", cache), Constant(0), Limits(max_rows=1))
    calibrate(engine, 1, [auto], most_tok)
    assert auto.choose([USUAL]) in (0, 1)


FIRST = {"tokens": 128, "turns": 1}


def test_a_random_drafter_does_not_slow_down_the_first_text_of_all_in_the_engine():
    assert slowdown("rand", "old chip", Work(1, **FIRST), calibrates=True) < 1.03
    assert slowdown("rand", "experts, M2 Pro", Work(4, **FIRST), calibrates=True) < 1.03


def test_no_width_is_tried_between_others_that_are_as_dear_as_it_would_have_to_be():
    """Copies that keep nearly what they cost, where width 3 would cost what lies between 2 and 4."""
    assert slowdown("lookup", "experts, M5", Work(4, **FIRST), calibrates=True) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_no_kind_slows_down_the_first_text_of_all_on_any_machine(kind, machine, rows):
    """Drafts that are perfect and then useless, in one text of 128 tokens, may cost a percent more."""
    assert slowdown(kind, machine, Work(rows, **FIRST), calibrates=True) < (1.04 if kind == "fickle" else 1.03)


# a pair -----------------------------------------------------------------------------------------------------


def kept(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_a_pair_measures_once_on_a_machine(tmp_path):
    first = pair(tmp_path)
    assert first.calibrate() and not first.calibrate()
    first.keep()
    for half in ("free", "bound"):
        assert {tuple(one[:2]) for one in kept(tmp_path)[half]["times"]} >= {(1, 0), (1, 1)}
    second = pair(tmp_path)
    assert not second.calibrate() and second.calibrate(4)


def test_nothing_but_times_is_left_of_it_and_the_text_is_the_same(tmp_path):
    made, plain = pair(tmp_path), load(str(EDGE / "target"), None, dtype="float32")
    made.calibrate()
    made.calibrate(4)
    engine = made._engine
    assert engine.total.rounds == engine.first_drafts == engine.host_reads == 0 and made.doubt is None
    prompts = [list(range(5, 5 + n)) for n in (20, 9, 12, 30)]
    told = [one.tokens for one in made.generate(prompts, GREEDY, max_tokens=40)]
    assert told == [one.tokens for one in plain.generate(prompts, GREEDY, width=0, max_tokens=40)]


def test_without_a_drafter_there_is_nothing_to_measure(tmp_path):
    made = pair(tmp_path, None)
    assert not made.calibrate()
    made.keep()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [0, 9])
def test_more_rows_than_may_run_are_refused(tmp_path, rows):
    with pytest.raises(RequestError, match=f"rows is {rows}; expected 1 to 8"):
        pair(tmp_path).calibrate(rows)


def test_a_server_measures_before_its_first_request_unless_its_width_is_given(tmp_path):
    with running(width="auto", rows=2, prepare=lambda made: made.remember(tmp_path)):
        until(lambda: list(tmp_path.glob("*.json")))
        assert {one[0] for one in kept(tmp_path)["free"]["times"]} == {1, 2}
    (tmp_path / "given").mkdir()
    with running(width=3, prepare=lambda made: made.remember(tmp_path / "given")):
        assert not list((tmp_path / "given").iterdir())
