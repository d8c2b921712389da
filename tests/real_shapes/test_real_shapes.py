"""Pairs of published widths, vocabulary 262,144, few layers, random weights: what tiny models cannot show."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from passes import ROW, best_token, greedy, logits, prefilled, shared_with_drafter
from shelf import CUTS, PUBLISHED, Shelf

from mlx_mtp import load
from mlx_mtp.compare.casting import cast
from mlx_mtp.inside import draft
from mlx_mtp.load import LoadedPair, LoadedTarget, load_pair, load_target
from mlx_mtp.rows import GREEDY
from mlx_mtp.scheduler import Limits

DRAFTS = 4
LONGEST = 7  # drafts a round, in the count of flips
# Where two logits are closer than this, a pass of other width may round to the other one. bfloat16 tells numbers of 16
# to 32 apart by an eighth, float32 by 2e-6.
NEAR_TIE = {mx.bfloat16: 0.25, mx.float32: 1e-3}
TOLERANCE = 1e-3  # of logits up to 30, in float32
RELATIVE = 3e-4  # of the largest, in float32 after 513 tokens

COPIES = [
    ("E2B", PUBLISHED, "bfloat16"),
    ("E2B", "mlx_lm 8", "float32"),
    ("E2B", "mlx_lm 4", "float32"),
    ("E2B", "mlx_vlm 4", "float32"),
    ("12B", "mlx_vlm 4", "float32"),
    ("26B-A4B", "mlx_lm 4", "float32"),
    ("31B", "mlx_lm 4", "float32"),
]
copies = pytest.mark.parametrize(("size", "kind", "dtype"), COPIES)
sizes = pytest.mark.parametrize("size", CUTS)


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, 262_144, count)


def target_of(folder: Path, dtype: str) -> LoadedTarget:
    return load_target(str(folder), dtype=getattr(mx, dtype))


def by_transformers(what: str, folder: Path, given: dict[str, np.ndarray], place: Path) -> dict[str, np.ndarray]:
    """What transformers_side.py computes, in a process of its own."""
    np.savez(place / "in.npz", **given)
    script = str(Path(__file__).parent / "transformers_side.py")
    command = [sys.executable, script, what, str(folder), str(place / "in.npz"), str(place / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(place / "out.npz") as file:
        return dict(file)


def by_mlx_lm(folder: Path, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [L, V] of one pass."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    cast(model, getattr(mx, dtype))
    return np.array(model(mx.array(ids)[None])[0].astype(mx.float32))


@copies
def test_logits_are_those_of_mlx_lm_from_the_same_file(shelf: Shelf, tell, size, kind, dtype):
    folder, ids = shelf.target(size, kind), random_ids(3)
    ours = logits(target_of(folder, dtype), ids)
    theirs = by_mlx_lm(folder, ids, dtype)
    tell(f"{size}, {kind}, {dtype}: largest difference from mlx-lm {np.abs(ours - theirs).max():.1e}")
    rounding = 0.01 if dtype == "bfloat16" else 0  # mlx-lm caps logits in bfloat16, this package in float32
    np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=TOLERANCE)


@pytest.mark.parametrize("size", ["E2B"])
def test_target_computes_what_transformers_computes_past_the_windows_end(shelf: Shelf, tell, tmp_path, size):
    folder, ids = shelf.target(size), random_ids(513)
    theirs = by_transformers("target", folder, {"ids": ids}, tmp_path)
    target = target_of(folder, "float32")
    cache, hidden = prefilled(target, ids)
    ours = shared_with_drafter(target, cache) | {"hidden": np.array(hidden[0, -1])}
    ours["logits"] = np.array(target.model.logits(hidden[:, -1])[0])
    wanted = {n: theirs[n] if v.ndim == 1 else theirs[n][:, -v.shape[1] :] for n, v in ours.items()}
    apart = {n: np.abs(v - wanted[n]).max() / np.abs(wanted[n]).max() for n, v in ours.items()}
    tell(f"{size}: difference from transformers of the largest, {', '.join(f'{n} {a:.1e}' for n, a in apart.items())}")
    assert max(apart.values()) < RELATIVE
    assert ours["logits"].argmax() == theirs["logits"].argmax()


def for_transformers(pair: LoadedPair, ids: np.ndarray, tokens: mx.array) -> dict[str, np.ndarray]:
    """All that a drafter is given after a prompt, with the tokens that ours has drafted, [K]."""
    target = pair.target
    cache, hidden = prefilled(target, ids)
    bonus = mx.argmax(target.model.logits(hidden[:, -1]), axis=-1)
    embedded = target.model.embed(mx.concatenate([bonus, tokens[:-1]])[None])
    given = {"hidden": hidden[0, -1], "embedded": embedded[0], "position": cache.lengths[ROW]}
    return {k: np.array(v) for k, v in given.items()} | shared_with_drafter(target, cache)


@sizes
def test_drafter_computes_what_transformers_computes(shelf: Shelf, tell, tmp_path, size):
    kind = next(kind for one, kind, _ in COPIES[1:] if one == size)
    pair = load_pair(str(shelf.target(size, kind)), str(shelf.drafter(size)), dtype=mx.float32)
    ids = random_ids(6)
    tokens, scores = draft(pair, mx.array(ids)[None], DRAFTS)
    theirs = by_transformers("drafter", shelf.drafter(size), for_transformers(pair, ids, tokens[0]), tmp_path)["logits"]
    ours = np.array(scores[0])
    apart = np.abs(ours - theirs).max(axis=-1)
    tell(f"{size}: drafts' largest differences from transformers, by step: {' '.join(f'{a:.1e}' for a in apart)}")
    assert theirs.argmax(-1).tolist() == tokens[0].tolist()
    assert apart.max() < TOLERANCE


@pytest.mark.parametrize("size", ["E2B"])
def test_four_prompts_of_different_lengths_have_the_texts_they_have_alone(shelf: Shelf, size):
    """Two of them pass the window's end while they decode."""
    pair = load(str(shelf.target(size)), str(shelf.drafter(size)), dtype="float32")
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 64, 510, 519)]
    together = pair.generate(prompts, GREEDY, width=3, max_tokens=6)
    alone = [pair.generate([p], GREEDY, width=0, max_tokens=6)[0] for p in prompts]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


@pytest.mark.parametrize("size", ["E2B"])
@pytest.mark.parametrize(("kind", "dtype", "count"), [(PUBLISHED, "bfloat16", 17), ("mlx_lm 4", "float32", 9)])
def test_a_choice_depends_on_the_draft_length_only_at_near_ties(shelf: Shelf, tell, size, kind, dtype, count):
    """Each of a text's tokens was chosen in a pass of one column; a flip is another choice in a pass of 2 to 8."""
    target, prompt, near = target_of(shelf.target(size, kind), dtype), random_ids(4), NEAR_TIE[getattr(mx, dtype)]
    text, margin = greedy(target, prompt, count)
    flips = {k: best_token(target, prompt, text[:-1], k + 1) != text[1:] for k in range(1, LONGEST + 1)}
    counts = " ".join(f"{k}:{flipped.sum()}" for k, flipped in flips.items())
    widest = max((margin[1:][flipped].max() for flipped in flips.values() if flipped.any()), default=0.0)
    tell(
        f"{size}, {kind}, {dtype}: flips of {count - 1} by draft length 0:0 {counts}; widest {widest:.1e}, "
        f"{(margin < near).sum()} margins under {near:g}, median margin {np.median(margin):.2f}"
    )
    assert widest <= near


@pytest.mark.parametrize(
    ("size", "kind", "dtype", "prompt_tok"), [(*COPIES[0], 128), *((*copy, 8) for copy in COPIES[4:])]
)
def test_peak_memory_is_what_the_budget_says(shelf: Shelf, tell, size, kind, dtype, prompt_tok):
    """Of a prompt chunk and a round, at their own length; without what MLX does not count itself."""
    limits = Limits(max_rows=1, alone_tok=prompt_tok, chunk_tok=prompt_tok)
    pair = load(str(shelf.target(size, kind)), str(shelf.drafter(size)), dtype=dtype, limits=limits, prefix_bytes=0)
    mx.reset_peak_memory()
    with closing(pair.stream(random_ids(prompt_tok).tolist(), GREEDY, width=3, max_tokens=8)) as events:
        next(events), next(events)
        peak = mx.get_peak_memory()
    counted, tokens = pair._loaded.size, prompt_tok + 8
    planned = counted.target_bytes + counted.drafter_bytes + counted.seq_bytes(tokens)
    planned += counted.working_bytes(prompt_tok, 1, tokens) - counted.device.runtime_bytes
    tell(f"{size}, {kind}, {dtype}: planned {planned / 1e9:.3f} GB, measured {peak / 1e9:.3f}")
    assert 0.99 < planned / peak < 1.05
