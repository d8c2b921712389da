"""The networks compute what transformers computes: logits, keys, routers, drafts and texts of four small pairs."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import SHAPES, Models, drafter_of, engine_of, fixture, goldens, request, run

from mlx_mtp.cache import Cache, View
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.mtp import Convention, MtpDrafter
from mlx_mtp.models import fused
from mlx_mtp.models.experts import Experts
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.rows import GREEDY, Draft, Forward, Sampling
from mlx_mtp.sampling import RowSampler, Sampler

TOLERANCE = 1e-3  # torch and MLX differ by up to 5e-4 in float32
EDGES = ("wm1", "w", "wp1", "wp2")
MODES = {"n_wp1": Convention(), "n_w": Convention(0, 0), "nm1_w": Convention(-1, 0)}
ONE = slice(0, 1)

shapes = pytest.mark.parametrize("shape", SHAPES)


def close(got: mx.array, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(got, dtype=np.float32), want, rtol=0, atol=TOLERANCE)


def window_of(models: Models) -> int:
    return next(spec.window for spec in models.target.specs if spec.window)


def prefill(models: Models, ids: np.ndarray, rows: Cache, row: int, chunk: int = 0) -> mx.array:
    """Hidden states [1, P, H] after a prompt that entered in chunks (0: all at once); `row` of the cache holds it."""
    chunk, where, parts = chunk or len(ids), slice(row, row + 1), []
    for begin in range(0, len(ids), chunk):
        tokens = mx.array(ids[None, begin : begin + chunk])
        pass_ = rows.open(where, tokens.shape[1])
        parts.append(models.target.forward(tokens, pass_)[0])
        rows.commit(where, mx.array([tokens.shape[1]], mx.int32), tokens.shape[1])
    return mx.concatenate(parts, axis=1)


def prefilled(models: Models, ids: np.ndarray, chunk: int = 0) -> tuple[Cache, mx.array]:
    """The cache of one prompt, and its hidden states [1, P, H]."""
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(len(ids))
    return rows, prefill(models, ids, rows, 0, chunk)


def batch_prompts(shape: str) -> list[np.ndarray]:
    """The four prompts of a fixture's batch, without their padding."""
    g = goldens(shape)
    return [ids[mask.astype(bool)] for ids, mask in zip(g["batch/ids"], g["batch/mask"], strict=True)]


# the target -------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize(
    "prompt, chunk", [("short", 0), ("short", 1), ("short", 7), ("long", 0), ("long", 7), ("long", 18)]
)
def test_logits_and_hidden_states_are_the_references_however_the_prompt_enters(shape, prompt, chunk):
    models, g = fixture(shape), goldens(shape)
    _, hidden = prefilled(models, g[f"{prompt}/ids"], chunk)
    close(hidden[0], g[f"{prompt}/hidden"])
    close(models.target.logits(hidden[0]), g[f"{prompt}/logits"])


@shapes
def test_every_layer_gives_the_references_output(shape):
    models, g = fixture(shape), goldens(shape)
    ids, count = g["short/ids"], len(models.target.config.layers)
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(len(ids))
    layers = tuple(range(count))
    _, tapped = models.target.forward(mx.array(ids[None]), rows.open(ONE, len(ids)), layers)
    close(models.target.embed(mx.array(ids)), g["short/hidden_by_layer"][0])
    for i in range(count - 1):  # the reference's last entry comes after the final norm
        close(tapped[i], g["short/hidden_by_layer"][i + 1])


@shapes
@pytest.mark.parametrize("prompt", EDGES)
def test_logits_are_the_references_at_the_edges_of_the_window(shape, prompt):
    models, g = fixture(shape), goldens(shape)
    _, hidden = prefilled(models, g[f"{prompt}/ids"])
    logits = models.target.logits(hidden[0, -1])
    close(hidden[0, -1], g[f"{prompt}/last_hidden"])
    close(logits, g[f"{prompt}/last_logits"])
    assert mx.argmax(logits).item() == g[f"{prompt}/bonus"]


@shapes
def test_the_last_column_alone_is_the_same_as_the_last_of_all(shape):
    models, g = fixture(shape), goldens(shape)
    ids = g["long/ids"]
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(len(ids))
    hidden, _ = models.target.forward(
        mx.array(ids[None]), rows.open(ONE, len(ids)), last=mx.array([len(ids) - 1], mx.int32)
    )
    assert hidden.shape == (1, 1, models.target.config.hidden_size)
    close(hidden[0, 0], g["long/hidden"][-1])


@shapes
def test_rows_of_different_lengths_in_one_cache_have_the_references_logits(shape):
    models, g = fixture(shape), goldens(shape)
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    for row, ids in enumerate(batch_prompts(shape)):
        rows.join(len(ids))
        prefill(models, ids[:-1], rows, row)
    last = mx.array(g["batch/ids"][:, -1:])
    hidden, _ = models.target.forward(last, rows.open(slice(0, 4), 1))
    close(hidden[:, 0], g["batch/last_hidden"])
    close(models.target.logits(hidden[:, 0]), g["batch/last_logits"])


@shapes
@pytest.mark.parametrize("prompt", ["short", "long"])
@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "by_7"])
def test_the_keys_and_values_that_a_drafter_reads_are_the_references(shape, prompt, chunk):
    models, g = fixture(shape), goldens(shape)
    ids, window = g[f"{prompt}/ids"], window_of(models)
    rows, _ = prefilled(models, ids, chunk)
    sliding, full = models.target.config.drafter_slots
    (part,) = rows.committed(sliding, ONE, window + 1).parts
    places = np.arange(max(0, len(ids) - window - 1), len(ids))
    slots = places % rows.ring_size(window)
    assert np.flatnonzero(np.array(part.mask)[0, 0, 0]).tolist() == sorted(slots)
    close(part.keys[0][:, mx.array(slots)], g[f"{prompt}/kv_sliding_k"][:, places])
    close(part.values[0][:, mx.array(slots)], g[f"{prompt}/kv_sliding_v"][:, places])
    (part,) = rows.committed(full, ONE, None).parts
    assert np.flatnonzero(np.array(part.mask)[0, 0, 0]).tolist() == list(range(len(ids)))
    close(part.keys[0, :, : len(ids)], g[f"{prompt}/kv_full_k"])
    close(part.values[0, :, : len(ids)], g[f"{prompt}/kv_full_v"])


def test_per_layer_inputs_are_the_references():
    target, g = fixture("edge").target, goldens("edge")
    tokens = mx.array(g["short/ids"][None])
    close(target._per_layer_inputs(tokens, target.embed(tokens))[0], g["short/per_layer_inputs"])


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_every_token_goes_to_the_references_experts_with_their_weights(prompt, monkeypatch):
    models, g, seen = fixture("moe"), goldens("moe"), []
    compute = Experts.__call__

    def watched(self, x, chosen, weights):
        seen.append((chosen, weights))
        return compute(self, x, chosen, weights)

    monkeypatch.setattr(Experts, "__call__", watched)
    monkeypatch.setattr(fused, "FUSED_COLUMNS", 0)  # a compiled layer would show its trace, not its numbers
    prefilled(models, g[f"{prompt}/ids"])
    assert len(seen) == len(models.target.layers)
    for layer, (chosen, weights) in enumerate(seen):
        index, weight = g[f"{prompt}/router_index"][layer], g[f"{prompt}/router_weight"][layer]
        ours, theirs = np.argsort(np.array(chosen)), np.argsort(index)
        assert (np.sort(np.array(chosen)) == np.sort(index)).all()
        close(np.take_along_axis(np.array(weights), ours, -1), np.take_along_axis(weight, theirs, -1))


@shapes
def test_filtered_probabilities_are_the_references(shape):
    g = goldens(shape)
    sampler = Sampler([RowSampler.of(Sampling(0.7, top_k=20, top_p=0.9, seed=1))])
    kept = sampler.filter(mx.array(g["short/logits"][-1])[None, None])
    close(mx.softmax(kept[0, 0]), g["short/probs_t0.7_k20_p0.9"])
    assert (np.isfinite(np.array(kept[0, 0])) == (g["short/probs_t0.7_k20_p0.9"] > 0)).all()


# the drafter ------------------------------------------------------------------------------------------------


def observe_prompts(models: Models, prompts: list[np.ndarray], kind: str, mode: str) -> MtpDrafter:
    """A drafter that has seen these prompts, a row each."""
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    drafter = drafter_of(models, kind, rows, MODES[mode])
    for row, ids in enumerate(prompts):
        rows.join(len(ids))
        drafter.begin(row, 0, None)
        hidden, where = prefill(models, ids, rows, row), slice(row, row + 1)
        count = mx.array([len(ids)], mx.int32)
        drafter.observe(Forward(where, mx.array(ids[None]), hidden, {}, 0), count)
    return drafter


def propose(drafter: MtpDrafter, bonus: np.ndarray) -> Draft:
    """Four greedy drafts a row, with their logits."""
    sampler = Sampler([RowSampler.of(GREEDY)] * len(bonus), keep_logits=True)
    return drafter.propose(slice(0, len(bonus)), mx.array(bonus), sampler, 4)


def close_logits(draft: Draft, row: int, want: np.ndarray) -> None:
    """Four steps of a row against [4, V]; where a head scores few tokens, the reference fills the rest."""
    got, ids = draft.source.logits[row], draft.source.ids
    if ids is None:
        close(got, want)
        return
    ids = np.array(ids[row])
    scored = np.take_along_axis(want, ids, -1)
    close(got, scored)
    rest = np.ones_like(want, bool)
    np.put_along_axis(rest, ids, False, -1)
    for step in range(len(want)):
        assert np.ptp(want[step][rest[step]]) == 0, "the reference scored a token that we left out"
        assert want[step][rest[step]][0] < scored[step].min()


@shapes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind, prompt", [("rand", "short"), ("rand", "long"), *(("fit", p) for p in ("short", "long", *EDGES))]
)
def test_four_draft_steps_are_the_references(shape, kind, mode, prompt, monkeypatch):
    models, g, hidden = fixture(shape), goldens(shape), []
    step = Assistant.step

    def watched(self, *args):
        result = step(self, *args)
        hidden.append(result[1])
        return result

    monkeypatch.setattr(Assistant, "step", watched)
    drafter = observe_prompts(models, [g[f"{prompt}/ids"]], kind, mode)
    draft = propose(drafter, g[f"{prompt}/bonus"][None])
    assert draft.tokens[0].tolist() == g[f"{prompt}/{kind}/{mode}/draft_tokens"].tolist()
    close_logits(draft, 0, g[f"{prompt}/{kind}/{mode}/draft_logits"])
    close(mx.concatenate(hidden, axis=1)[0], g[f"{prompt}/{kind}/{mode}/draft_hidden"])


def _a_column_before(drafter: MtpDrafter, fwd: Forward, kept: mx.array) -> mx.array:
    return OBSERVE(drafter, fwd, kept - 1)


def _a_position_on(assistant: Assistant, embedded: mx.array, hidden: mx.array, position: mx.array, views: Any) -> Any:
    return STEP(assistant, embedded, hidden, position + 1, views)


def _one_committed_position_less(cache: Cache, layer: int, rows: slice, window: int | None) -> View:
    lengths, cache.lengths = cache.lengths, cache.lengths - 1
    view, cache.lengths = COMMITTED(cache, layer, rows, window), lengths
    return view


OBSERVE, STEP, COMMITTED = MtpDrafter.observe, Assistant.step, Cache.committed
OFF_BY_ONE = [
    (MtpDrafter, "observe", _a_column_before),
    (Assistant, "step", _a_position_on),
    (Cache, "committed", _one_committed_position_less),
]


@pytest.mark.parametrize(("owner", "name", "wrong"), OFF_BY_ONE)
def test_a_drafter_that_is_off_by_one_is_caught(owner, name, wrong, monkeypatch):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        test_four_draft_steps_are_the_references("edge", "fit", "n_wp1", "short", monkeypatch)


@shapes
@pytest.mark.parametrize("kind", ["rand", "fit"])
@pytest.mark.parametrize("mode", MODES)
def test_four_rows_are_drafted_for_in_one_call_as_each_alone(shape, kind, mode):
    models, g = fixture(shape), goldens(shape)
    drafter = observe_prompts(models, batch_prompts(shape), kind, mode)
    draft = propose(drafter, g["batch/bonus"])
    assert draft.tokens.tolist() == g[f"batch/{kind}/{mode}/draft_tokens"].tolist()
    for row in range(4):
        close_logits(draft, row, g[f"batch/{kind}/{mode}/draft_logits"][row])


# texts ------------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize(
    "kind, width, prompt",
    [
        ("plain", 0, "long"),
        ("fit", 3, "short"),
        ("fit", 4, "long"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("rand", 3, "short"), ("fit", 1, "long"))),
    ],
)
def test_greedy_text_is_the_references_with_and_without_a_drafter(shape, prompt, kind, width):
    g = goldens(shape)
    (outcome,) = run(engine_of(fixture(shape), kind, width), [request(g[f"{prompt}/ids"], 48)])
    assert outcome.tokens == g[f"{prompt}/greedy"].tolist()
    assert outcome.reason == "length"
    if kind == "fit":
        kept = [len(event.tokens) - 1 for event in outcome.events[1:]]
        assert kept == g[f"{prompt}/{kind}/n_wp1_k{width}_rounds"][:, 2].tolist()


@shapes
@pytest.mark.parametrize("kind, width", [pytest.param("plain", 0, marks=pytest.mark.slow), ("fit", 3)])
def test_texts_of_a_batch_are_the_references(shape, kind, width):
    outcomes = run(engine_of(fixture(shape), kind, width), [request(ids, 24) for ids in batch_prompts(shape)])
    assert [o.tokens for o in outcomes] == goldens(shape)["batch/greedy_single"].tolist()


@shapes
@pytest.mark.parametrize("kind, width", [pytest.param("plain", 0, marks=pytest.mark.slow), ("fit", 3)])
def test_text_ends_with_the_end_token(shape, kind, width):
    g = goldens(shape)
    wanted = request(g["short/ids"], 48, eos=[int(g["eos/id"])])
    (outcome,) = run(engine_of(fixture(shape), kind, width), [wanted])
    assert outcome.tokens == g["eos/greedy"].tolist()
    assert outcome.reason == "stop"
