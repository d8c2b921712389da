"""Kinds of drafters: told by their config, named on the command line."""

import json
from collections.abc import Sequence

import pytest
from checkpoints import FIXTURES
from engines import engine_of, prompts, request, run, smallest
from test_depth import COSTS, Cost

from mlx_mtp.depth import Auto
from mlx_mtp.drafters.kinds import KINDS, kind_of, kinds, split_name
from mlx_mtp.rows import GREEDY, CheckpointError, Sampling
from mlx_mtp.scheduler import Limits


def config(folder: str) -> dict:
    return json.loads((FIXTURES / "edge" / folder / "config.json").read_text())


def test_every_line_of_the_table_is_a_kind_of_that_name():
    assert tuple(kind.name for kind in kinds()) == KINDS


@pytest.mark.parametrize(("folder", "kind"), [("assistant", "mtp"), ("target", "draft_model")])
def test_a_kind_is_known_by_its_config(folder, kind):
    assert kind_of(config(folder), "there")[0].name == kind


def test_a_config_of_no_kind_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=r"there: .* 'llama', no drafter .* one of: mtp, dflash, draft_model"):
        kind_of({"model_type": "llama"}, "there")


@pytest.mark.parametrize(
    ("name", "base"), [("none", None), ("auto", "auto"), ("./a+b", "./a+b"), ("owner/name", "owner/name")]
)
def test_a_name_without_a_kind_in_it_is_a_checkpoint(name, base):
    assert split_name(name) == (base, ())


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lookup", None),
        ("none+lookup", None),
        ("auto+lookup", "auto"),
        ("./a+b+lookup", "./a+b"),
        ("o/n+lookup", "o/n"),
    ],
)
def test_a_kind_without_a_network_is_named_alone_or_over_a_checkpoint(name, base):
    found, over = split_name(name)
    assert found == base and [kind.name for kind in over] == ["lookup"]


class Clocked(Auto):
    """The width policy over an engine's real rounds, told what they would have taken by a table of costs."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.seconds_taken, self.plain_seconds = cost, 0.0, 0.0

    def record(self, width: int, kept: list[int], seconds: float | None, outlook: Sequence[int]) -> None:
        rows = len(kept)
        self.seconds_taken += self.cost(rows, width)
        self.plain_seconds += sum(kept) / rows * self.cost(rows, 0)  # the same tokens, a round for each
        super().record(width, kept, self.cost(rows, width), outlook)


def slowdown(kind: str, cost: str, sampling: Sampling, texts: int) -> float:
    """Time with a drafter over time without, of texts of 250 tokens, two at a time; what is learnt first is in it."""
    models, depth = smallest(), Clocked(COSTS[cost])
    wanted = [request(p, 250, sampling) for p in prompts(models, (9, 4, 20, 3, 12, 6) * 2)[:texts]]
    run(engine_of(models, kind, depth, Limits(max_rows=2)), wanted)
    assert depth.plain_seconds > 0
    return depth.seconds_taken / depth.plain_seconds


def test_a_random_drafter_costs_at_most_three_percent_whether_or_not_copies_help_it():
    assert slowdown("rand+lookup", "dense, M5", GREEDY, texts=6) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "unseeded"])
@pytest.mark.parametrize("kind", ["rand", "lookup", "rand+lookup", "near+lookup"])
def test_no_kind_costs_more_than_three_percent_where_columns_cost_most(kind, sampling):
    assert slowdown(kind, "old chip", sampling, texts=12) < 1.03
