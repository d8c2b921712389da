"""bench/peers.py runs against the package as it is now, and its plain functions do what its figures rest on."""

import importlib.util
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.load import load_pair

ROOT = Path(__file__).parent.parent
SCRIPT, TINY = ROOT / "bench" / "peers.py", ROOT / "mlx_mtp" / "data" / "tiny"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peers"]


def test_every_runtime_comes_equally_often_at_every_place(peers):
    places = Counter()
    for repeat in range(10):
        places.update((place, who) for place, who in enumerate(peers.turns(5, repeat, case=0)))
    assert set(places.values()) == {2}


def test_speed_leaves_out_what_came_with_the_first_token(peers):
    run = peers.Run(2, [(1.0, 0, [5]), (1.0, 1, [6]), (2.0, 0, [7, 8]), (3.0, 1, [9])])
    assert (run.decoded, run.seconds, run.tokens(1)) == (3, 2.0, [6, 9])


def test_groups_have_the_lengths_that_they_are_named_for(peers):
    prompts = [(2, *range(10, 13 + i)) for i in range(8)]
    same, mixed = (peers.groups(prompts, 4, lengths, most=8) for lengths in ("same", "mixed"))
    assert len(same) == len(mixed) == 2
    assert all(len({len(p) for p in group}) == 1 for group in same)
    assert all(max(map(len, group)) >= 2 * min(map(len, group)) for group in mixed)
    assert all(p[0] == 2 and 2 not in p[1:] for group in same + mixed for p in group)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_a_table_agrees_with_mlx_lm(peers, rows):
    loaded = load_pair(str(TINY / "target"), str(TINY / "drafter"), dtype=mx.float32)
    runtimes = [peers.Ours(loaded, 2), peers.Ours(loaded, 0), peers.MlxLm(TINY / "target")]
    prompts = [tuple(range(3 + i, 9 + 2 * i)) for i in range(rows)]
    args = Namespace(tokens=8, repeats=2)
    found = peers.decode_table(runtimes, "natural", [prompts], peers.Reference(loaded, None), args)
    assert all(entry["identical"] for entry in found["runtimes"].values())
    assert all(len(entry["tok_s"]) == 2 for entry in found["runtimes"].values())
    assert {r["peer"] for r in found["ratios"]} == {"mlx-lm plain"}
    assert peers.read_counts(runtimes[0], prompts, 8)["reads_per_round"] == 1
