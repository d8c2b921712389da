"""Prompt chunks: as wide as the device likes, as narrow as memory asks, and causal where the cut is exact."""

import math
from dataclasses import replace
from importlib import resources

import mlx.core as mx
import pytest
from engines import Job, engine_of, prompts, request, run, smallest, texts

from mlx_mtp.cache import Cache, LayerSpec
from mlx_mtp.load import LoadedPair, load_pair
from mlx_mtp.prompt_chunks import fitted
from mlx_mtp.scheduler import CHUNK_STEP, Limits
from mlx_mtp.views import Part, View

ONE = slice(0, 1)


def chunks_of(engine) -> list[tuple[int, int]]:
    """(start, tokens) of every chunk that an engine computes from now on."""
    found, scheduled = [], engine.scheduler.chunks

    def noted():
        out = scheduled()
        found.extend((c.start, c.count) for c in out)
        return out

    engine.scheduler.chunks = noted
    return found


def by_scores(start: int) -> int:
    """How long a chunk may be where it may have so many pairs of a query and a key."""
    return (math.isqrt(start * start + 4 * 20_000) - start) // 2


# how wide ---------------------------------------------------------------------------------------------------


def test_chunks_shrink_as_the_context_grows_and_the_text_is_the_same():
    models = smallest()
    wanted = request(prompts(models, (900,))[0], 6)
    plain = texts(run(engine_of(models, "near", 2, Limits(alone_tok=256)), [wanted]))
    engine = engine_of(models, "near", 2, Limits(alone_tok=256, score_chunk=by_scores))
    chunks = chunks_of(engine)
    assert texts(run(engine, [wanted])) == plain
    assert all(count <= max(CHUNK_STEP, by_scores(start)) for start, count in chunks)
    sizes = [count for _, count in chunks[:-1]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1] and sum(c for _, c in chunks) == 900


def test_a_short_request_gets_its_first_token_after_the_chunk_that_is_under_way():
    models = smallest()
    long, short = (request(p, 4) for p in prompts(models, (900, 20)))
    for limits in (Limits(alone_tok=256), Limits(alone_tok=256, score_chunk=by_scores)):
        outcomes = run(engine_of(models, "near", 2, limits), [long, Job(short, at=1)])
        assert outcomes[1].stats.first_passes == 1


# on which device --------------------------------------------------------------------------------------------


def tiny() -> LoadedPair:
    return load_pair(str(resources.files("mlx_mtp") / "data" / "tiny" / "target"), None)


def test_a_cpu_keeps_the_chunks_that_were_good_on_it():
    assert fitted(Limits(), 2048, tiny()) == Limits()


def test_a_gpu_gets_large_chunks_and_fewer_tokens_where_mlx_keeps_the_scores(monkeypatch: pytest.MonkeyPatch):
    """The scores that a CPU keeps stand for those of a GPU without fused attention for a head size."""
    loaded = tiny()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    limits = fitted(Limits(chunk_tok=100), 1024, loaded)
    assert (limits.alone_tok, limits.chunk_tok, limits.first_chunk_tok) == (1024, 100, 256)
    assert limits.score_chunk == loaded.size.score_chunk
    monkeypatch.setattr(mx, "get_peak_memory", lambda: mx.get_active_memory())  # as if it kept none
    assert fitted(Limits(), 2048, loaded).score_chunk is None


# causal -----------------------------------------------------------------------------------------------------

SPECS = (LayerSpec(32, 1, 8), LayerSpec(None, 1, 8))


def keys(seed: int, columns: int) -> tuple[mx.array, mx.array]:
    shape = (1, 1, columns, 8)
    return mx.random.normal(shape, key=mx.random.key(seed)), mx.random.normal(shape, key=mx.random.key(seed + 1))


def step(cache: Cache, layer: int, columns: int, still=None, settles: bool = True) -> View:
    return cache.open(ONE, columns, still, settles).store(layer, *keys(columns, columns))


def attended(view: View, columns: int, causal: bool) -> mx.array:
    q = mx.random.normal((1, 2, columns, 8), key=mx.random.key(99))
    return View(tuple(replace(part, causal=causal) for part in view.parts)).attend(q)


@pytest.mark.parametrize(
    "layer, before, columns, causal",
    [(1, 0, 40, True), (1, 40, 33, True), (0, 0, 20, True)] + [(0, 0, 40, False), (0, 40, 33, False)],
)
def test_a_prompt_s_keys_are_cut_where_it_ends_and_mlx_s_causal_mask_says_the_same(layer, before, columns, causal):
    cache = Cache(SPECS, 3, mx.float32)
    cache.join(100)
    if before:
        step(cache, layer, before)
        cache.commit(ONE, mx.array([before], mx.int32), before)
        cache.settle(0, 0)
    view = step(cache, layer, columns)
    (part,) = view.parts
    assert part.causal is causal
    if causal:
        assert part.keys.shape[2] == before + columns
        assert mx.allclose(attended(view, columns, True), attended(view, columns, False), atol=1e-6)


def test_a_bound_that_is_not_settled_is_no_place_to_cut():
    cache = Cache(SPECS, 3, mx.float32)
    cache.join(100)

    def causal(**how: object) -> bool:
        undo, bounds = cache.state(), list(cache.bounds)
        part: Part = step(cache, 1, 20, **how).parts[0]
        cache.restore(undo)
        cache.bounds = bounds
        return part.causal

    assert causal() and not causal(settles=False) and not causal(still=frozenset())
    step(cache, 1, 4, frozenset())
    cache.commit(ONE, mx.array([2], mx.int32), 4)
    assert not causal(), "two of four were kept, which the host has not read"
    cache.settle(0, 2)
    assert causal()
