"""Kinds of drafters: told by their config, named on the command line."""

import json

import pytest
from checkpoints import FIXTURES

from mlx_mtp.drafters.kinds import KINDS, kind_of, kinds, split_name
from mlx_mtp.rows import CheckpointError


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
