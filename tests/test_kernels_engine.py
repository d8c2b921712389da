"""The whole engine with its kernels, emulated: the same text as without, and rows that do not see each other."""

import contextlib
import functools
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import metal_emu as emu
import mlx.core as mx
import pytest
from checkpoints import FULL, SLIDING, Quant, mlx_community, quantised, read, write
from metal_emu import checks
from random_checkpoints import drafter_config, random_checkpoint, target_config

from mlx_mtp.accept import verdict, verdict_by_kernel
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import ConstantPolicy
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.kernels.self_test import uses
from mlx_mtp.load import LoadedDrafter, LoadedTarget, load_drafter, load_target
from mlx_mtp.rows import GREEDY, Request, Sampling
from mlx_mtp.scheduler import Limits

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
}
KINDS = {
    "edge": {"num_kv_shared_layers": 2},
    "moe": {"num_key_value_heads": 2, "num_global_key_value_heads": 1},
}
SEEDED = Sampling(temperature=0.9, seed=3)
FILTERED = Sampling(temperature=0.8, top_k=12, top_p=0.95, seed=5)
STEERED = Sampling(temperature=0.9, seed=3, repetition_penalty=1.4, frequency_penalty=0.5, logit_bias=((7, 3.0),))
# before, at and past the window of 16
PROMPTS = (
    (5, 9, 2, 77),
    tuple(range(3, 40)),
    (100, 4),
    tuple(range(60, 82)),
    (8,),
    *(tuple(range(40, 40 + n)) for n in (15, 16, 17)),
)


@functools.cache
def folders(kind: str, bits: int | None) -> tuple[Path, Path]:
    """A random target of two layers of each sort and a drafter, with clusters if edge; quantised if bits are given."""
    place = Path(tempfile.mkdtemp(prefix="mlx-mtp-test-"))
    config = target_config(kind, **(SMALL | KINDS[kind]))
    target = random_checkpoint(place / "target", config, seed=11)
    drafter = random_checkpoint(
        place / "drafter", drafter_config(config, clusters=16 if kind == "edge" else 0, **SMALL_DRAFTER), seed=12
    )
    if bits is None:
        return target, drafter
    packed = write(quantised(mlx_community(read(target)), Quant(bits, 32)), place / "packed")
    return packed, drafter


SMALL_DRAFTER = {"hidden_size": 64, "intermediate_size": 64}


def load(kind: str, bits: int | None, dtype: mx.Dtype) -> tuple[LoadedTarget, LoadedDrafter]:
    target, drafter = folders(kind, bits)
    loaded = load_target(str(target), dtype=dtype)
    return loaded, load_drafter(str(drafter), loaded, quantize=bits)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """The emulator needs values, so nothing may be traced; elsewhere it saves the compiler's time."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@contextlib.contextmanager
def kernels_on(**options: object) -> Iterator[list]:
    """Models loaded inside use kernels. Yields the launches."""
    with untraced(), emu.patched(check=False, **options) as launches:
        yield launches


def outcomes(models: tuple[LoadedTarget, LoadedDrafter], width: int, requests: list[Request]) -> list[tuple]:
    """What an engine makes of requests that all come at once: (text, drafts kept by position) of each."""
    target, drafter = models
    cache = Cache(target.model.specs, 7, target.dtype)
    engine = Engine(
        target.model, cache, MtpDrafter(target.model, drafter.model, cache), ConstantPolicy(width), Limits()
    )
    engine.runner.judge = verdict_by_kernel if uses(target.kernels, "verdict") else verdict
    text: dict[int, list[int]] = {engine.submit(r): [] for r in requests}
    kept = {}
    while not engine.idle:
        for event in engine.step():
            text[event.request] += event.tokens
            if event.stats:
                kept[event.request] = event.stats.kept_at
    return [(text[i], kept[i]) for i in text]


def requests(sampling: Sampling, count: int, tokens: int = 6) -> list[Request]:
    return [Request(PROMPTS[i], tokens, sampling) for i in range(count)]


# the same text ----------------------------------------------------------------------------------------------


TEXTS = [
    ("edge", 4, GREEDY, 1),
    ("edge", 4, FILTERED, 4),
    ("moe", 4, SEEDED, 4),
    ("edge", 4, STEERED, 2),
    pytest.param("edge", 4, GREEDY, 4, marks=pytest.mark.slow),
    pytest.param("edge", 4, SEEDED, 1, marks=pytest.mark.slow),
    pytest.param("edge", None, FILTERED, 4, marks=pytest.mark.slow),
    pytest.param("moe", 4, GREEDY, 1, marks=pytest.mark.slow),
]


@emulated
@pytest.mark.parametrize("kind, bits, sampling, rows", TEXTS)
def test_texts_and_kept_drafts_are_those_of_the_plain_path(kind, bits, sampling, rows):
    wanted = requests(sampling, rows)
    with untraced():
        plain = outcomes(load(kind, bits, mx.float32), 3, wanted)
    with kernels_on() as launches:
        models = load(kind, bits, mx.float32)
        checked = len(launches)
        assert outcomes(models, 3, wanted) == plain
    used = {launch.definition.name.split("_")[0] for launch in launches[checked:]}
    expected = {"rows", "attend", "verdict"} | ({"experts"} if kind == "moe" else set())
    expected |= {"head"} if kind == "edge" else set()
    assert used >= expected, used


@emulated
def test_without_a_seed_drafts_come_from_the_clustered_head_s_kernel():
    wanted = requests(Sampling(top_k=64, top_p=0.95), 1)
    with kernels_on() as launches:
        ((text, kept),) = outcomes(load("edge", 4, mx.float32), 3, wanted)
    assert len(text) == 6 and kept
    assert "head_logits" in {launch.definition.name for launch in launches}


# rows that are computed alone -------------------------------------------------------------------------------


def logits_by_width(
    target: LoadedTarget, rows: list[int], tokens: list[list[int]], widths: list[int], plain: LoadedTarget | None = None
) -> mx.array:
    """Logits [B, L, V] after each of L tokens a row, in rounds of these widths; rows hold their prompts.

    plain: who computes the prompts; the emulator needs no time for them if that is a model without kernels.
    """
    cache, out, at = Cache(target.model.specs, 7, target.dtype), [], 0
    for index, row in enumerate(rows):
        cache.join(64)
        one, prompt = slice(index, index + 1), PROMPTS[row]
        (plain or target).model.forward(mx.array([prompt], mx.int32), cache.open(one, len(prompt)))
        cache.commit(one, mx.array([len(prompt)], mx.int32), len(prompt))
    everyone = slice(0, len(rows))
    for width in widths:
        columns = width + 1
        ids = mx.array([tokens[row][at : at + columns] for row in rows], mx.int32)
        hidden, _ = target.model.forward(ids, cache.open(everyone, columns, frozenset()))
        out.append(target.model.logits(hidden))
        cache.commit(everyone, mx.full((len(rows),), columns, mx.int32), columns)
        at += columns
    return mx.concatenate(out, axis=1)


TOKENS = [[(7 * i + 31 * row) % 120 for i in range(8)] for row in range(8)]
CASES = [
    ("moe", 4, mx.float32),
    ("edge", None, mx.bfloat16),
    pytest.param("edge", 4, mx.float32, marks=pytest.mark.slow),
    pytest.param("moe", None, mx.bfloat16, marks=pytest.mark.slow),
    pytest.param("moe", 4, mx.bfloat16, marks=pytest.mark.slow),
]
# Row 1 alone, at every width; the last three in several rounds.
ALONE = [[0] * 8, [1], [2], [3], [4], [5], [6], [7], [1, 0, 3], [3, 3], [4, 2]]
# Row 1 among 2 to 8 rows of all lengths, at its place in the list; the last pass is the widest a kernel takes.
AMONG = [
    ([3, 1], [3]),
    ([1, 7, 4], [1]),
    ([2, 1, 0, 3], [1]),
    ([4, 5, 6, 1, 0], [0]),
    ([1, 5, 2, 7, 3, 6], [0]),
    ([6, 5, 4, 3, 2, 1, 0], [0]),
    ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0]),
    ([7, 6, 5, 4, 3, 2, 1, 0], [7]),
]


def assert_rows_do_not_see_each_other(target: LoadedTarget, plain: LoadedTarget | None = None) -> None:
    """The logits of row 1 are the same bits at widths 0 to 7, and beside one to seven rows of any length."""
    alone = logits_by_width(target, [1], TOKENS, ALONE[0], plain)[0]
    for rows, widths in [*(([1], widths) for widths in ALONE[1:]), *AMONG]:
        got = logits_by_width(target, rows, TOKENS, widths, plain)[rows.index(1)]
        assert mx.array_equal(got, alone[: len(got)]), (rows, widths)
    assert not mx.array_equal(alone[0], alone[1])


@emulated
@pytest.mark.parametrize("kind, bits, dtype", CASES)
def test_a_row_s_logits_are_the_same_bits_at_every_width_and_beside_any_rows(kind, bits, dtype):
    with untraced():
        plain, _ = load(kind, bits, dtype)
    with kernels_on():
        target, _ = load(kind, bits, dtype)
        assert_rows_do_not_see_each_other(target, plain)


# on Metal ---------------------------------------------------------------------------------------------------

on_metal = pytest.mark.skipif(not mx.metal.is_available(), reason="this build of MLX has no Metal backend: not run")


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize("kind, bits", [("edge", 4), ("edge", None), ("moe", 4), ("moe", None)])
def test_every_kernel_that_a_model_needs_builds_and_agrees_with_its_reference_on_metal(kind, bits):
    target, drafter = load(kind, bits, mx.bfloat16)
    found = [o for o in (*target.kernels, *drafter.kernels) if o.reason and "as long as" not in o.reason]
    assert target.kernels and not found


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize("kind, bits", [("edge", 4), ("edge", None), ("moe", 4), ("moe", None)])
def test_rows_do_not_see_each_other_on_metal(kind, bits):
    assert_rows_do_not_see_each_other(load(kind, bits, mx.bfloat16)[0])


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, FILTERED], ids=["greedy", "seeded", "filtered"])
@pytest.mark.parametrize("kind", ["edge", "moe"])
def test_the_text_is_that_of_width_0_on_metal(kind, sampling):
    models, wanted = load(kind, 4, mx.bfloat16), requests(sampling, 4, tokens=32)
    plainly = [outcomes(models, 0, [request])[0][0] for request in wanted]
    assert [text for text, _ in outcomes(models, 3, wanted)] == plainly


# what is used -----------------------------------------------------------------------------------------------


@emulated
def test_a_round_is_made_of_kernels_a_prompt_is_not_and_one_that_is_refused_is_in_neither():
    def names(edit) -> Counter:
        with kernels_on(edit=edit) as launches:
            target, _ = load("moe", 4, mx.float32)
            checked = len(launches)
            logits_by_width(target, [0], TOKENS, [3])
            return Counter(launch.definition.name for launch in launches[checked:])

    layers = 4
    every = names(None)
    per_layer = 5 + 1  # q, k, v, o, down and the router; v is k in full layers
    assert every["rows_qmv"] == layers * per_layer - 2 + 1
    assert every["gate_up"] == layers
    assert every["experts_gate_up"] == every["experts_combine"] == every["attend_parts"] == layers
    broken = checks.planted("experts_combine", "source", "j < TOP", "j < 1")
    assert not any(name.startswith("experts") for name in names(broken))


@emulated
@pytest.mark.parametrize(
    "kind, count", [("edge", 25), ("moe", 25), *(pytest.param(k, 200, marks=pytest.mark.slow) for k in ("edge", "moe"))]
)
def test_nothing_is_left_to_build_in_the_rounds_of_random_requests(kind, count):
    """As many rows, columns and settings as may come; the libraries of loading are those of all rounds."""
    rng = random.Random(7)
    with kernels_on() as launches:
        models = load(kind, 4, mx.bfloat16 if kind == "edge" else mx.float32)
        built, loading = {emu.library(launch) for launch in launches}, len(launches)
        while count > 0:
            rows, width = min(count, rng.choice((1, 1, 2, 3, 5, 8))), rng.choice((0, 1, 2, 3, 4, 7))
            settings = (GREEDY, SEEDED, FILTERED, Sampling(), Sampling(top_k=9, top_p=0.9))
            outcomes(models, width, [Request(rng.choice(PROMPTS), 3, rng.choice(settings)) for _ in range(rows)])
            count -= rows
    assert len(launches) > 10 * loading
    assert not {emu.library(launch) for launch in launches[loading:]} - built
