"""The DFlash drafter: its numbers are other implementations', and its cache of features never shows in its drafts."""

import gc
import json
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FIXTURES
from engines import Models, fixture, prompts, random_dflash, request, smallest

from mlx_mtp.cache import Cache, Snapshot, Trunk
from mlx_mtp.draft_length import MAX_WIDTH, ConstantPolicy
from mlx_mtp.drafters.dflash import DFlashDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.load import load_drafter, load_target
from mlx_mtp.models.dflash import DFlash, read_dflash
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.prefixes import Prefix
from mlx_mtp.rows import CheckpointError, Forward, PairingError, Sampling
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Limits

PLACE = FIXTURES.parent.parent / "dflash"
STEP = 2.0**-10  # the goldens are int16 multiples of it
ONE = slice(0, 1)
CAPPED = Sampler([RowSampler.of(Sampling(seed=0))], keep_logits=True)  # at temperature 1, so that logits stay
# What differs in z-lab/gemma-4-31B-it-DFlash.
PUBLISHED = {
    "hidden_size": 5376,
    "intermediate_size": 10752,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 2048,
    "block_size": 16,
    "num_target_layers": 60,
    "vocab_size": 262144,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 12, 23, 35, 46, 57]},
}
TARGETS = {"mixed": "edge", "full": "dense"}


@dataclass
class Row:
    """A text that a row is told, and how much of it is committed."""

    text: tuple[int, ...]
    known: int = 0


class Told:
    """Drives a drafter as the engine does, over rows whose text is told, and so is what each keeps of a round."""

    def __init__(self, target: Gemma4, network: DFlash, drafter: type[DFlashDrafter] = DFlashDrafter) -> None:
        self.target, self.cache = target, Cache(target.specs, MAX_WIDTH, target.embed_tokens.weight.dtype)
        self.drafter = drafter(target, network, self.cache)
        self.rows: list[Row] = []

    def join(self, row: Row, kept: Snapshot | None = None, state: Any = None) -> None:
        """Add a row; kept, state: as `snapshot` gives them."""
        self.cache.join(len(row.text), kept, row.known)
        self.drafter.begin(len(self.rows), row.known, state)
        self.rows.append(row)

    def snapshot(self, row: int, length: int) -> tuple[Row, Snapshot, Any]:
        told = Row(self.rows[row].text, length)
        return told, self.cache.snapshot(row, length), self.drafter.snapshot(row, length)

    def leave(self, row: int) -> None:
        last = len(self.rows) - 1
        self.drafter.leave(row, last)
        self.cache.leave(row)
        self.rows[row] = self.rows[last]
        self.rows.pop()

    def prompt(self, row: int, count: int) -> None:
        """A prompt chunk of one row."""
        at = self.rows[row].known
        self._pass(slice(row, row + 1), [list(self.rows[row].text[at : at + count])], [count], 0)

    def draft(self, width: int) -> mx.array:
        """Logits [R, K, V] of the next drafts of all rows."""
        bonus = mx.array([row.text[row.known] for row in self.rows], mx.int32)
        sampler = Sampler([RowSampler.of(Sampling(seed=0))] * len(self.rows), keep_logits=True)
        drafted = self.drafter.propose(slice(0, len(self.rows)), bonus, sampler, width)
        assert drafted.source is not None
        return drafted.source.logits

    def verify(self, width: int, kept: list[int]) -> None:
        """The round's pass; drafts that are not kept are wrong. kept: 0 = the row stands still."""
        tokens = [
            [t if c < n else 7 for c, t in enumerate(_padded(row.text[row.known :], width + 1))]
            for row, n in zip(self.rows, [max(1, k) for k in kept], strict=True)
        ]
        self._pass(slice(0, len(self.rows)), tokens, kept, width)

    def _pass(self, rows: slice, tokens: list[list[int]], kept: list[int], drafted: int) -> None:
        ids, columns = mx.array(tokens, mx.int32), len(tokens[0])
        hidden, taps = self.target.forward(ids, self.cache.open(rows, columns), self.drafter.taps)
        counts = mx.array(kept, mx.int32)
        self.cache.commit(rows, counts, columns)
        still = frozenset(i for i, count in enumerate(kept) if not count)
        self.drafter.observe(Forward(rows, ids, hidden, taps, drafted, still=still), counts)
        mx.eval(self.cache.state(), self.drafter.state())
        for row, count in zip(range(rows.start, rows.stop), kept, strict=True):
            self.cache.settle(row, columns - count)
            self.rows[row].known += count


def _padded(tokens: tuple[int, ...], count: int) -> list[int]:
    return [*tokens[:count], *[7] * (count - len(tokens))]


# numbers ----------------------------------------------------------------------------------------------------


@cache
def published(name: str, dtype: mx.Dtype = mx.float32) -> tuple[Gemma4, DFlash]:
    """A target of the oracle in float32, and the random drafter made for it."""
    target = load_target(str(FIXTURES / TARGETS[name] / "target"), dtype=mx.float32)
    return target.model, load_drafter(str(PLACE / name), target, dtype=dtype).model


def goldens(name: str) -> dict[str, np.ndarray]:
    with np.load(PLACE / name / "goldens.npz") as file:
        return dict(file)


def told_by(target: Gemma4, network: DFlash, g: dict[str, np.ndarray], rows: int = 1) -> np.ndarray:
    """Logits [R, rounds, block - 1, V] at the goldens' positions; each row goes through them a round after the last."""
    text, known = tuple(g["text"].tolist()), g["known"].tolist()
    driver, out, width = Told(target, network), [[] for _ in range(rows)], network.config.block - 1
    for row in range(rows):
        driver.join(Row(text))
        driver.prompt(row, known[0])
    for step in range(len(known) + rows - 1):
        logits, kept = np.array(driver.draft(width).astype(mx.float32)), [0] * rows
        for row in range(rows):
            turn = step - row
            if 0 <= turn < len(known):
                out[row].append(logits[row])
            if 0 <= turn < len(known) - 1:
                kept[row] = known[turn + 1] - known[turn]
        driver.verify(MAX_WIDTH, kept)
    return np.array(out)


@pytest.mark.parametrize(
    "name, variant, changes",
    [
        ("mixed", "published", {}),
        ("mixed", "causal", {"is_causal": True}),
        ("full", "published", {}),
    ],
)
def test_drafts_are_those_of_other_implementations_whatever_row_they_are_made_for(name, variant, changes):
    target, network = published(name)
    raw = json.loads((PLACE / name / "config.json").read_text()) | changes
    other = DFlash(read_dflash(raw, "here"))
    other.update(network.parameters())
    g = goldens(name)
    got = told_by(target, other, g, rows=3)
    np.testing.assert_allclose(got, np.stack([g[f"{variant}/logits"]] * 3) * STEP, rtol=0, atol=1.5e-3)


@pytest.mark.parametrize("name", TARGETS)
def test_in_bfloat16_drafts_are_as_near_to_float32_as_the_other_implementations(name):
    """Both are given the float32 target's features, rounded."""
    g, (target, network) = goldens(name), published(name, mx.bfloat16)
    low = load_target(str(FIXTURES / TARGETS[name] / "target"), dtype=mx.bfloat16).model
    ids, known, block = mx.array(g["text"])[None], g["known"].tolist(), network.config.block
    whole, rows = Cache(target.specs, MAX_WIDTH, mx.float32), Cache(low.specs, MAX_WIDTH, mx.bfloat16)
    whole.join(ids.shape[1])
    hidden, taps = target.forward(ids, whole.open(ONE, ids.shape[1]), network.config.taps)
    rows.join(0)
    drafter = DFlashDrafter(low, network, rows)
    drafter.begin(0, 0, None)
    got = []
    for before, after in zip([0, *known], known, strict=False):
        columns, kept = slice(before, after), mx.array([after - before])
        new = {i: x[columns].astype(mx.bfloat16) for i, x in taps.items()}
        rows.commit(ONE, kept, after - before)
        drafter.observe(Forward(ONE, ids[:, columns], hidden[:, columns], new, 0), kept)
        draft = drafter.propose(ONE, ids[0, after : after + 1], CAPPED, block - 1)
        assert draft.source is not None
        got.append(np.array(draft.source.logits[0].astype(mx.float32)))
    exact, theirs = g["published/logits"] * STEP, g["published/bf16_logits"] * STEP
    assert np.abs(np.array(got) - exact).mean() < 1.1 * np.abs(theirs - exact).mean()


def test_a_draft_from_the_slot_before_or_from_other_layers_does_not_pass_for_the_reference():
    target, network = published("full")
    g = goldens("full")
    want = g["published/logits"][None] * STEP

    class Early(DFlash):
        def denoise(self, h, pass_):
            y = super().denoise(h, pass_)
            return mx.concatenate([y[:, :1], y[:, :-1]], axis=1)

    class Shifted(DFlash):
        def features(self, tapped):
            return super().features(mx.roll(tapped, self.config.hidden_size, axis=-1))

    for kind in (Early, Shifted):
        wrong = kind(network.config)
        wrong.update(network.parameters())
        assert np.abs(told_by(target, wrong, g) - want).max() > 1


# drafts do not depend on how the text came ---------------------------------------------------------------------


@cache
def from_nothing(models: Models, text: tuple[int, ...], known: int, width: int) -> np.ndarray:
    """Logits [K, V] of the drafts after the known tokens of a text, if all of them came as one prompt."""
    driver = Told(models.target, random_dflash(models))
    driver.join(Row(text))
    driver.prompt(0, known)
    return np.array(driver.draft(width)[0])


class Schedule:
    """Random joins, chunks, rounds, snapshots and leaves; every draft is held against `from_nothing`."""

    def __init__(self, seed: int, drafter: type[DFlashDrafter]) -> None:
        self.models, self.rng = smallest(), random.Random(seed)
        self.texts = prompts(self.models, (64, 64, 64), seed=2)
        self.driver = Told(self.models.target, random_dflash(self.models), drafter)
        self.prompted: list[int] = []  # how long each row's prompt is
        self.kept: list[tuple[Row, Snapshot, Any]] = []

    def run(self, steps: int) -> int:
        """Returns how many rows' drafts were compared."""
        return sum(self.step() for _ in range(steps))

    def step(self) -> int:
        rows, rng = self.driver.rows, self.rng
        if len(rows) < 4 and rng.random() < 0.3:
            self.join()
        compared = self.round() if rows else 0
        for i, row in enumerate(rows):  # chunks come beside rounds
            left = self.prompted[i] - row.known
            if left > 0:
                self.driver.prompt(i, min(left, rng.choice((1, 2, 9, 30))))
                break
        for i in reversed(range(len(rows))):
            if rows[i].known > (50 if rng.random() < 0.7 else 40):
                if rng.random() < 0.7:
                    length = rows[i].known - rng.choice((0, 1, 3, 12))
                    self.kept.append(self.driver.snapshot(i, length))
                self.driver.leave(i)
                self.prompted[i] = self.prompted[-1]
                self.prompted.pop()
        return compared

    def join(self) -> None:
        if self.kept and self.rng.random() < 0.6:
            row, *state = self.rng.choice(self.kept)
            length = row.known - self.rng.randint(0, 3)
            self.driver.join(Row(row.text, length), *state)
            self.prompted.append(length + self.rng.randint(1, 4))
        else:
            self.driver.join(Row(self.rng.choice(self.texts)))
            self.prompted.append(self.rng.choice((1, 5, 17, 30)))

    def round(self) -> int:
        rows, compared = self.driver.rows, 0
        decoding = [row.known >= n for row, n in zip(rows, self.prompted, strict=True)]
        if not any(decoding):
            return 0
        width = self.rng.choice((0, 1, 2, 3, 5, 5, 9))
        if width and self.rng.random() < 0.85:  # else another drafter proposed
            logits = np.array(self.driver.draft(width))
            for i, row in enumerate(rows):
                if decoding[i]:
                    want = from_nothing(self.models, row.text, row.known, width)
                    np.testing.assert_allclose(logits[i], want, rtol=0, atol=2e-3)
                    compared += 1
        kept = [self.rng.randint(1, width + 1) if d else 0 for d in decoding]
        self.driver.verify(width, kept)
        return compared


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_schedule_every_draft_is_the_one_made_from_the_text_alone(seed):
    assert Schedule(seed, DFlashDrafter).run(100) > 40


class OneLess(DFlashDrafter):
    def observe(self, fwd, kept):
        super().observe(fwd, mx.maximum(kept - 1, 0) if fwd.drafted else kept)


class OneMore(DFlashDrafter):
    def observe(self, fwd, kept):
        super().observe(fwd, kept + (kept > 0) if fwd.drafted else kept)


class Late(DFlashDrafter):
    def _open(self, rows, columns):
        pass_ = super()._open(rows, columns)
        pass_.start = pass_.start + (columns == 6)  # blocks of five drafts
        return pass_


class Unmoved(DFlashDrafter):
    def leave(self, row, last):
        super().leave(last, last)


class Forgetful(DFlashDrafter):
    def snapshot(self, row, length):
        pending, self._pending = self._pending, None
        state, self._pending = super().snapshot(row, length), pending
        return state


@pytest.mark.parametrize("wrong", [OneLess, OneMore, Late, Unmoved, Forgetful])
def test_a_drafter_that_is_off_by_one_is_caught(wrong):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        for seed in range(3):
            Schedule(seed, wrong).run(100)


def test_no_more_than_a_block_is_drafted():
    models = smallest()
    driver = Told(models.target, random_dflash(models))
    driver.join(Row(prompts(models, (20,))[0]))
    driver.prompt(0, 9)
    assert driver.draft(15).shape[1] == random_dflash(models).config.block - 1


def beyond_its_buffers(length: int) -> tuple[int, int]:
    """(bytes that an engine takes at its largest moment beyond both caches, bytes of the drafter's full layer)."""
    models = smallest()
    network = DFlash(replace(random_dflash(models).config, head_dim=64, kv_heads=4))
    gc.collect()
    mx.eval(network.parameters())
    base, rows = mx.get_active_memory(), Cache(models.target.specs, MAX_WIDTH, mx.float32)
    drafter = DFlashDrafter(models.target, network, rows)
    engine = Engine(models.target, rows, drafter, ConstantPolicy(3), Limits(prefix_bytes=2**40))

    def filled(of: Cache) -> Snapshot:
        trunk, ring = Trunk(), {}
        for i, s in enumerate(of.specs):
            size = of.ring_size(s.window) if s.window else length + 512
            pair = tuple(mx.random.normal((1, s.kv_heads, size, s.head_dim), key=mx.random.key(i)) for _ in range(2))
            (ring if s.window else trunk.buffers)[i] = pair
        mx.eval(ring, trunk.buffers)
        return Snapshot(length, ring, trunk)

    tokens = np.full(length, 5, np.int32)
    engine.scheduler.prefixes.add(Prefix(tokens, filled(rows), filled(drafter._cache)))
    engine.submit(request((*tokens, 9), 60))
    for _ in range(4):
        engine.step()
    mx.reset_peak_memory()
    for _ in range(6):
        engine.step()
    peak, held, full = mx.get_peak_memory(), 0, 0
    for each in (rows, drafter._cache):
        _, ring, buffers, _ = each.state()
        full = sum(a.nbytes for pair in buffers[1] for a in pair)
        held += sum(a.nbytes for pair in ring.values() for a in pair)
        held += sum(a.nbytes for per_row in buffers.values() for pair in per_row for a in pair)
    return peak - base - held, full


def test_no_round_copies_the_drafters_buffers():
    beyond, full = beyond_its_buffers(16384)
    assert full > 30e6
    assert beyond < 0.3 * full


# pairing --------------------------------------------------------------------------------------------------------


def raw(name: str) -> dict:
    return json.loads((PLACE / name / "config.json").read_text())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 96}, "drafter expects hidden size 96, target has 64; .*drafter"),
        ({"vocab_size": 999}, "drafter expects a vocabulary of 999, target has 768"),
        ({"num_target_layers": 60}, "drafter expects layers numbering 60, target has 10"),
        ({"dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 10]}}, "taps layer 10, expected at most 9"),
        (
            {"dflash_config": {"mask_token_id": 768, "target_layer_ids": [1]}},
            "mask token is 768, target has 768 tokens",
        ),
        ({"final_logit_softcapping": 50.0}, "drafter expects logits capped at 50.0, target has 30"),
    ],
)
def test_a_drafter_of_another_target_is_refused_before_a_weight_is_read(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw("mixed") | changes))  # and no weights beside it
    with pytest.raises(PairingError, match=message):
        load_drafter(str(tmp_path), fixture("edge").loaded)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dflash_config": None}, "dflash_config is None; expected an object"),
        (
            {"dflash_config": {"mask_token_id": 4, "target_layer_ids": []}},
            "target_layer_ids is \\[\\]; expected a list",
        ),
        ({"dflash_config": {"mask_token_id": 4, "target_layer_ids": [1], "use_swa": True}}, "use_swa is True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is .*yarn.*; expected None"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*; expected 5 entries"),
        ({"sliding_window": None}, "sliding_window is None; expected an integer"),
        ({"block_size": 1}, "block_size is 1; expected an integer of at least 2"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; expected a multiple"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_with_file_and_key(changes, message):
    with pytest.raises(CheckpointError, match=f"here.*: {message}"):
        read_dflash(raw("mixed") | changes, "here")


def test_the_published_config_is_read_as_its_authors_serve_it():
    config = read_dflash(raw("mixed") | PUBLISHED, "here")
    assert [(layer.window, layer.causal) for layer in config.layers] == [(2048, True)] * 4 + [(None, False)]
    assert (config.taps, config.block, config.mask) == ((1, 12, 23, 35, 46, 57), 16, 4)
    assert (config.heads, config.kv_heads, config.head_dim, config.rope_theta) == (64, 8, 128, 1e6)
