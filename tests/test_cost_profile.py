"""Cost profiles: what is measured is what rounds cost, and no file, whatever is in it, does any harm."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from engines import Models, engine_of, smallest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp import GREEDY, load
from mlx_mtp.cost_profile import CostProfiler, file_of, load_costs, measure
from mlx_mtp.draft_length import PRIOR_PROFILE, CostProfile, GoodputPolicy
from mlx_mtp.engine import Engine
from mlx_mtp.passes import Pass
from mlx_mtp.scheduler import Limits

ROOM = 1000


def on_machine(models: Models, kind: str, batch: int, cost=lambda batch, k: 1 + 0.25 * k) -> Engine:
    """An engine by whose clock a round takes what is said, and nothing else takes any time."""
    engine, read, now = engine_of(models, kind, 0, Limits(max_rows=max(batch, 1))), Engine._read, [0.0]

    def timed(done: Pass):
        now[0] += cost(len(done.decoded), done.width) + 10.0 * len(done.chunks)
        return read(engine, done)

    engine.timer.clock, engine._read = lambda: now[0], timed
    return engine


@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_measured_is_what_rounds_cost(batch):
    costs = measure(on_machine(smallest(), "rand", batch), batch, ROOM)
    assert costs == pytest.approx([1 + 0.25 * k for k in range(9)])


def test_costs_never_fall_with_the_length_nor_below_one():
    uneven = {0: 1.1, 1: 1.0, 2: 1.6, 4: 1.2, 8: 2.0}
    costs = measure(on_machine(smallest(), "rand", 1, lambda batch, k: uneven[k]), 1, ROOM)
    assert costs is not None and costs == pytest.approx([1, 1, 1.2, 1.2, 1.2, 1.4, 1.6, 1.8, 2.0])


def test_a_drafter_that_drafts_no_more_than_a_block_costs_no_more_beyond_it():
    costs = measure(on_machine(smallest(), "dflash", 1), 1, ROOM)  # blocks of five
    assert costs is not None and costs[5:] == pytest.approx([2.25] * 4)


def test_nothing_is_measured_where_too_few_rounds_fit():
    assert measure(on_machine(smallest(), "rand", 1), 1, 20) is None


def test_a_profile_is_measured_once_and_for_new_batch_sizes_only(tmp_path):
    made = []

    def engine() -> Engine:
        made.append(1)
        return on_machine(smallest(), "rand", 4)

    for batches, before in (([1], 1), ([1], 1), ([1, 4], 2)):
        profile, measured = CostProfiler(tmp_path / "costs.json", 0.5).profile(batches, engine, ROOM)
        assert profile is not None and profile.catch_up == 0.5 and sorted(profile.costs) == sorted(batches)
        assert len(made) == before
    assert not measured or before == 2


def test_a_batch_size_that_was_not_measured_costs_something_between_its_neighbours():
    profile = CostProfile({1: [1.0, 1.2], 4: [1.0, 1.5], 8: [1.0, 2.5]})
    assert profile.of(2) == pytest.approx([1.0, 1.3]) and profile.of(6) == pytest.approx([1.0, 2.0])
    assert profile.of(1) == [1.0, 1.2] and profile.of(20) == [1.0, 2.5] and PRIOR_PROFILE.of(5) == PRIOR_PROFILE.of(1)


def test_a_file_is_named_by_the_weights_and_by_what_else_costs_depend_on(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    names = [file_of(tmp_path, [tmp_path], *settings) for settings in (("a",), ("a",), ("b",), ("a", "b"))]
    weights.write_bytes(b"other weights")
    names.append(file_of(tmp_path, [tmp_path], "a"))
    assert names[0] == names[1] and len(set(names)) == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.sampled_from(["1", "x", "costs"]), inner),
    max_leaves=12,
)


@given(JSON | st.builds(lambda costs: {"version": 1, "costs": costs}, JSON))
def test_whatever_a_file_holds_it_is_a_profile_or_none(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(value))
    for batch, row in load_costs(file).items():
        assert batch > 0 and len(row) == 9 and all(1 <= a <= b for a, b in pairwise(row))


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10**5, '{"version": 1, "costs": {"1": [1, NaN, 2, 2, 2, 2, 2, 2, 2]}}']
)
def test_a_damaged_file_is_measured_anew(tmp_path, text):
    file = tmp_path / "costs.json"
    file.write_text(text)
    assert load_costs(file) == {} == load_costs(tmp_path / "none")
    CostProfiler(file, 0.0).profile([1], lambda: on_machine(smallest(), "rand", 1), ROOM)
    assert list(load_costs(file)) == [1]


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    profiler = CostProfiler(tmp_path / "file" / "costs.json", 0.0)
    profile, measured = profiler.profile([1], lambda: on_machine(smallest(), "rand", 1), ROOM)
    assert profile is not None and measured


def test_a_pair_measures_before_its_first_output_and_leaves_no_trace_in_its_statistics(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    pair = load("tiny", limits=Limits(max_rows=2))
    assert pair.generate("def f(", GREEDY, width=0, max_tokens=4) and not list(Path(tmp_path).iterdir())
    (one,) = pair.generate("def f(", GREEDY, max_tokens=4)
    policy = pair._policy("auto")
    assert isinstance(policy, GoodputPolicy) and list(policy.profile.costs) == [1]
    assert pair._engine.total.generated_tokens == 4 + len(one.tokens) and pair._engine.host_reads < 20
    assert pair.measure_costs(8) and not pair.measure_costs(8) and sorted(policy.profile.costs) == [1, 2]
    again = load("tiny", limits=Limits(max_rows=2))
    assert not again.measure_costs(2) and not load("tiny", None).measure_costs()
