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


def test_an_assistant_is_known_by_its_config():
    assert kind_of(config("assistant"), "there")[0].name == "mtp"


def test_a_config_of_no_kind_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=r"there: model_type is 'llama', no drafter .* one of: mtp"):
        kind_of({"model_type": "llama"}, "there")


@pytest.mark.parametrize(
    ("name", "base"), [("none", None), ("auto", "auto"), ("./a+b", "./a+b"), ("owner/name", "owner/name")]
)
def test_a_name_without_a_kind_in_it_is_a_checkpoint(name, base):
    assert split_name(name) == (base, ())
