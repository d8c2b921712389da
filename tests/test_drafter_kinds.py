"""Kinds of drafters: told by their config, named on the command line."""

import json

import mlx.core as mx
import pytest
from checkpoints import FIXTURES
from engines import Job, Listed, engine_of, prompts, qwen, request, run, smallest
from graph import primitives
from mlx.utils import tree_flatten

from mlx_mtp.drafters.kinds import KINDS, kind_of, kinds, split_name
from mlx_mtp.engine import Pass
from mlx_mtp.rows import CheckpointError
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
def test_a_name_without_lookup_in_it_is_a_checkpoint(name, base):
    assert split_name(name) == (base, False)


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
def test_lookup_is_named_alone_or_over_a_checkpoint(name, base):
    assert split_name(name) == (base, True)


LONG = Limits(alone_tok=200, kv_bytes=2**40)
LAZY_AND_WIDE = (*[0] * 20, 15, 15, 3)


@pytest.mark.parametrize("kind", ["plain", "rand", "dflash", "near"])
def test_a_row_takes_as_much_at_its_drafter_as_admission_counts_and_no_more(kind):
    models, taken = smallest(), 0
    engine = engine_of(models, kind, Listed(LAZY_AND_WIDE), LONG)
    engine.submit(request(prompts(models, (1180,))[0], 60))
    while not engine.idle:
        engine.step()
        arrays = [leaf for _, leaf in tree_flatten([engine.drafter.state()]) if isinstance(leaf, mx.array)]
        taken = max(taken, sum(a.nbytes for a in arrays))
    counted = engine.drafter.row_bytes(1180 + 60)
    assert taken <= counted <= max(3 * taken, 1)


def test_a_draft_models_cache_leaves_room_for_fewer_rows():
    """Three rows fit by what the target's cache takes; a drafter as large as the target leaves room for one."""
    models = smallest()
    three = 3 * engine_of(models, "plain", 0).cache.row_bytes(20)
    for kind, rows in (("plain", 3), ("rand", 2), ("near", 1)):
        engine = engine_of(models, kind, 0, Limits(kv_bytes=three))
        for prompt in prompts(models, (10, 10, 10)):
            engine.submit(request(prompt, 10))
        engine.step()
        assert len(engine.scheduler.rows) == rows, kind


@pytest.mark.parametrize("kind", ["rand", "near", "dflash", "head"])
def test_a_dispatch_leaves_nothing_of_a_drafter_to_be_evaluated(kind):
    models, left = qwen() if kind == "head" else smallest(), []
    engine = engine_of(models, kind, Listed([*[0] * 20, 2, 0, 3, 0, 0]))
    engine.hands_over_first = False  # as on a GPU
    dispatch = engine._dispatch

    def look(built: Pass) -> None:
        dispatch(built)
        left.append(primitives(engine.drafter.state()).total())

    engine._dispatch = look
    run(engine, [Job(request(p, 40 + 9 * i), 5 * i) for i, p in enumerate(prompts(models, (5, 9, 3)))])
    assert len(left) > 40 and not any(left)
