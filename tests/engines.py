"""Engines over small real models: loading them once, running requests through them, drafting with a whole model.

outcomes = run(engine_of(fixture("edge"), "fit", 3), [request(prompt, 40)])
"""

import itertools
import math
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from checkpoints import FIXTURES, FULL, SLIDING, Quant, mlx_community, quantised, read, write
from mlx.utils import tree_map
from random_checkpoints import drafter_config, random_checkpoint, target_config

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH, ConstantPolicy, DraftLengthPolicy, DraftRound
from mlx_mtp.drafters import Drafter
from mlx_mtp.drafters.dflash import DFlashDrafter
from mlx_mtp.drafters.draft_model import DraftModel
from mlx_mtp.drafters.kinds import split_name
from mlx_mtp.drafters.lookup import ALONE, OVER_NETWORK
from mlx_mtp.drafters.mtp import Convention, MtpDrafter
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.drafters.qwen_mtp import QwenMtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.load import LoadedTarget, load_drafter, load_pair, load_target
from mlx_mtp.models.dflash import DFlash, DFlashConfig, DFlashLayer
from mlx_mtp.models.families import Target
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.models.qwen3_5_mtp import QwenMtp
from mlx_mtp.rows import (
    GREEDY,
    Event,
    FinishReason,
    Request,
    Sampling,
    Stats,
    TokenLogprob,
)
from mlx_mtp.scheduler import Limits

QWEN = FIXTURES.parent.parent / "qwen"
SHAPES = ("edge", "dense", "moe", "unified")

# models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """A target with the drafters that tests run it with: "rand" and "fit" assistants, "near" a disturbed copy, or its
    own MTP head.

    Compared by identity, so that results may be kept for each.
    """

    name: str
    loaded: LoadedTarget
    assistants: dict[str, Assistant]
    near: Gemma4 | None = None
    head: QwenMtp | None = None

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def target(self) -> Target:
        return self.loaded.model

    @property
    def vocab(self) -> int:
        return self.target.config.vocab_size


def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="mlx-mtp-test-"))


def disturbed(folder: Path, by: float) -> Gemma4:
    """The target of a folder with every floating weight changed by noise of `by` times its spread."""
    model = load_target(str(folder), dtype=mx.float32).model
    keys = iter(mx.random.split(mx.random.key(5), 4096))

    def shake(w: mx.array) -> mx.array:
        if not mx.issubdtype(w.dtype, mx.floating) or w.ndim < 2:
            return w
        return w + by * mx.std(w) * mx.random.normal(w.shape, key=next(keys))

    model.update(tree_map(shake, model.parameters()))
    mx.eval(model.parameters())
    return model


@cache
def goldens(shape: str) -> dict[str, np.ndarray]:
    """Reference arrays of a fixture."""
    with np.load(FIXTURES / shape / "goldens.npz") as file:
        return dict(file)


@cache
def fixture(shape: str) -> Models:
    """A fixture in float32: target, both assistants."""
    folder = FIXTURES / shape
    loaded = load_target(str(folder / "target"), dtype=mx.float32)
    names = {"rand": "assistant", "fit": "assistant_fit"}
    assistants = {k: load_drafter(str(folder / v), loaded).model for k, v in names.items()}
    return Models(shape, loaded, assistants, disturbed(folder / "target", 0.03))


@cache
def qwen(name: str = "qwen", folder: Path | None = None) -> Models:
    """The Qwen 3.5 fixture with its head, in float32, or another copy of it."""
    pair = load_pair(str(folder or QWEN), dtype=mx.float32)
    return Models(name, pair.target, {}, head=pair.drafter.model)


@cache
def packed(shape: str, bits: int) -> Models:
    """A fixture whose target is quantised; activations stay float32, drafters as they are."""
    whole = read(FIXTURES / shape / "target")
    folder = write(quantised(mlx_community(whole), Quant(bits, 32)), _scratch() / "target")
    loaded = load_target(str(folder), dtype=mx.float32)
    return replace(fixture(shape), name=f"{shape}-{bits}bit", loaded=loaded)


@cache
def smallest(vocab: int = 48) -> Models:
    """The least model that has everything: two sliding layers with a window of 8, two full ones, hidden size 32."""
    config = target_config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        sliding_window=8,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        max_position_embeddings=512,
    )
    place = _scratch()
    folder = random_checkpoint(place / "target", config, seed=11)
    loaded = load_target(str(folder), dtype=mx.float32)
    small = drafter_config(config, clusters=8, hidden_size=32, intermediate_size=32)
    drafter = random_checkpoint(place / "drafter", small, seed=12)
    assistants = {"rand": load_drafter(str(drafter), loaded).model}
    return Models("smallest", loaded, assistants, disturbed(folder, 0.05))


# drafters and depths ----------------------------------------------------------------------------------------


class Listed:
    """The draft lengths of a list, again and again."""

    drafts = True

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = itertools.cycle(widths)

    def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
        return next(self._widths)

    def record(self, done: DraftRound) -> None:
        pass


class Noting(Listed):
    """Draft lengths from a list; keeps the rounds it was told of."""

    def __init__(self, *widths: int) -> None:
        super().__init__(widths)
        self.rounds: list[DraftRound] = []

    def record(self, done: DraftRound) -> None:
        assert len(done.matched) == len(done.num_accepted)
        self.rounds.append(done)


def random_widths(seed: int = 0, most: int = 7) -> Listed:
    """Another width for every round, 0 .. most."""
    rng = random.Random(seed)
    return Listed([rng.randint(0, most) for _ in range(997)])


DRAFTERS = ("plain", "rand", "fit", "dflash", "near", "self", "lookup", "fit+lookup", "near+lookup")


@cache
def random_dflash(models: Models) -> DFlash:
    """A DFlash network of random weights for a target: one layer with a window of 7, one that looks ahead."""
    c = models.target.config
    layers, taps = (DFlashLayer(7, True), DFlashLayer(None, False)), (0, len(c.layers) // 2, len(c.layers) - 2)
    sizes = (c.hidden_size, c.vocab_size, 48, 4, 2, 8, c.eps, 1e4)
    network = DFlash(DFlashConfig(*sizes, layers, taps, len(c.layers), 6, 4, c.softcap))
    keys = iter(mx.random.split(mx.random.key(3), 256))

    def fill(w: mx.array) -> mx.array:
        noise = mx.random.normal(w.shape, key=next(keys))
        return 1.0 + 0.2 * noise if w.ndim == 1 else noise * w.shape[-1] ** -0.5

    network.update(tree_map(fill, network.parameters()))
    mx.eval(network.parameters())
    return network


def drafter_of(models: Models, kind: str, rows: Cache, convention: Convention | None = None) -> Drafter:
    """A drafter by name, one of DRAFTERS without lookup; "rand" and "fit" are MTP drafters, "near" and "self" whole
    models, "dflash" has random weights, and "head" is the target's own."""
    if kind == "plain":
        return PlainDrafter()
    if kind == "head":
        return QwenMtpDrafter(models.target, models.head, rows)
    if kind == "dflash":
        return DFlashDrafter(models.target, random_dflash(models), rows)
    if kind in ("near", "self"):
        return DraftModel(models.near if kind == "near" else models.target, rows)
    return MtpDrafter(models.target, models.assistants[kind], rows, convention)


def engine_of(models: Models, kind: str, depth: int | DraftLengthPolicy, limits: Limits | None = None) -> Engine:
    """An engine with nothing in it. depth: an integer is a constant width."""
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    depth = ConstantPolicy(depth) if isinstance(depth, int) else depth
    base, looks_up = split_name(kind)
    least = 0 if not looks_up else OVER_NETWORK if base else ALONE
    engine = Engine(models.target, rows, drafter_of(models, base or "plain", rows), depth, limits or Limits(), least)
    engine.hands_over_first = False  # as on a GPU
    return engine


# running ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A request, the step of the engine before which it comes, and the step before which it is cancelled."""

    request: Request
    at: int = 0
    cancel: int | None = None


@dataclass
class Outcome:
    """All that came of a request."""

    tokens: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    reason: FinishReason | None = None
    stats: Stats | None = None


def request(prompt: Iterable[int], max_tokens: int, sampling: Sampling = GREEDY, eos: Iterable[int] = ()) -> Request:
    """A request; without end tokens it ends at its limit."""
    return Request(tuple(int(t) for t in prompt), max_tokens, sampling, frozenset(eos))


def prompts(models: Models, lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, models.vocab) for _ in range(n)) for n in lengths]


def run(engine: Engine, jobs: Sequence[Job | Request]) -> list[Outcome]:
    """Submit and cancel as the jobs say, step until nothing is left; one outcome a job."""
    jobs = [job if isinstance(job, Job) else Job(job) for job in jobs]
    outcomes = [Outcome() for _ in jobs]
    ids: dict[int, int] = {}
    for step in itertools.count():
        for i, job in enumerate(jobs):
            if job.at == step:
                ids[engine.submit(job.request)] = i
            if job.cancel is not None and max(job.cancel, job.at) == step:
                engine.cancel(next(id_ for id_, n in ids.items() if n == i))
        for event in engine.step():
            outcome = outcomes[ids[event.request]]
            assert outcome.reason is None, "an event after the last"
            outcome.events.append(event)
            outcome.tokens += event.tokens
            outcome.reason, outcome.stats = event.finish_reason, event.stats
        if engine.idle and len(ids) == len(jobs):
            return outcomes
        assert step < 5000, "the engine does not come to an end"


_SOLO: dict[tuple[Models, Request], list[int]] = {}


def solo(models: Models, wanted: Request) -> list[int]:
    """The text that a request has on its own, drafting nothing."""
    key = (models, wanted)
    if key not in _SOLO:
        _SOLO[key] = run(engine_of(models, "plain", 0), [wanted])[0].tokens
    return _SOLO[key]


def texts(outcomes: Sequence[Outcome]) -> list[list[int]]:
    return [outcome.tokens for outcome in outcomes]


def full_pass(models: Models, tokens: Sequence[int]) -> mx.array:
    """Logits [L, V] after every token of a text, by one pass over all of it."""
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(len(tokens))
    ids = mx.array([list(tokens)], mx.int32)
    hidden, _ = models.target.forward(ids, rows.open(slice(0, 1), len(tokens)))
    return models.target.logits(hidden)[0]


def processed(logits: np.ndarray, prompt: Sequence[int], text: Sequence[int], s: Sampling) -> np.ndarray:
    """Logits [V] after a prompt and a text, token by token as the penalties are defined, in double precision."""
    out = logits.astype(np.float64)
    for token in {*prompt, *text}:
        out[token] *= 1 / s.repetition_penalty if out[token] > 0 else s.repetition_penalty
    for token in text:
        out[token] -= s.frequency_penalty
    for token in set(text):
        out[token] -= s.presence_penalty
    for token, bias in s.logit_bias:
        out[token] += bias
    return out


def logprobs_of(outcome: Outcome) -> list[TokenLogprob]:
    return [told for event in outcome.events for told in event.logprobs]


def assert_true_logprobs(models: Models, wanted: Request, outcome: Outcome) -> None:
    """Every token of a text has its log-probability, and the best ones beside it, as one pass over the text says."""
    assert all(len(event.logprobs) == len(event.tokens) for event in outcome.events)
    told = logprobs_of(outcome)
    assert [one.token for one in told] == outcome.tokens
    if not told:
        return
    logits = np.array(full_pass(models, (*wanted.prompt, *outcome.tokens))[len(wanted.prompt) - 1 : -1], np.float64)
    true = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for one, row in zip(told, true, strict=True):
        assert abs(one.logprob - row[one.token]) < 1e-4
        ids, values = [i for i, _ in one.top], [v for _, v in one.top]
        assert len(set(ids)) == wanted.logprobs and values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][: len(ids)], atol=1e-4)
        np.testing.assert_allclose(values, row[ids], atol=1e-4)


def rounds_needed(generated: int, width: int) -> int:
    """Rounds when every draft is kept; the first token comes from the prompt pass."""
    return math.ceil((generated - 1) / (width + 1))
