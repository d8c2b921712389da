"""A whole model as a drafter: it drafts what it would say, whatever it has seen late, or twice, or not at all."""

from collections.abc import Sequence

import mlx.core as mx
import pytest
from engines import Job, Listed, Models, engine_of, prompts, request, run, smallest
from test_exact import SELF_SAMPLING, SMALL_CHUNKS

from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.draft_model import CHUNK_TOK, DraftModel, check
from mlx_mtp.drafters.mtp import KIND as MTP
from mlx_mtp.engine import Engine
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.rows import PairingError
from mlx_mtp.scheduler import Limits

# Rounds without a draft, few and many (more than a round is wide), between drafts of every width.
WIDTHS = [3, 0, 0, 1, 7, 0, 15, *[0] * 20, 5, *[0] * 3, 2, 4, *[0] * 16]


def kept_of_drafted(models: Models, jobs: list, limits: Limits) -> tuple[int, int]:
    outcomes = run(engine_of(models, "self", Listed(WIDTHS), limits), jobs)
    return sum(o.stats.kept for o in outcomes), sum(o.stats.drafted for o in outcomes)


@pytest.mark.parametrize(
    ("rows", "hows"), [(1, ["greedy"]), (1, ["unseeded"]), (4, ["greedy"]), (4, ["seeded"]), (8, [*SELF_SAMPLING])]
)
def test_it_is_accepted_completely_by_itself_whatever_the_widths_and_whoever_joins(rows, hows):
    models = smallest()
    lengths = (1, 2, 30, 9, 5, 17, 3, 40)[-rows:]
    samplings = [SELF_SAMPLING[hows[i % len(hows)]] for i in range(rows)]
    wanted = zip(prompts(models, lengths), samplings, strict=True)
    jobs = [Job(request(prompt, 70, sampling), 2 * i) for i, (prompt, sampling) in enumerate(wanted)]
    kept, drafted = kept_of_drafted(models, jobs, SMALL_CHUNKS)
    assert drafted > 25 * rows and kept == drafted


def test_it_is_accepted_completely_after_rows_have_left_before_it():
    models = smallest()
    lengths = (9, 4, 20, 3, 12, 6)
    wanted = [Job(request(p, 10 + 14 * (i % 3)), i) for i, p in enumerate(prompts(models, lengths))]
    kept, drafted = kept_of_drafted(models, wanted, Limits(max_rows=3, chunk_tok=7, first_chunk_tok=4))
    assert drafted and kept == drafted


class OneMore(DraftModel):
    """Believes that it has read a token more."""

    def _has(self, rows: slice, positions: mx.array) -> None:
        super()._has(rows, positions + 1)


class Late(DraftModel):
    """Every step but a draft's first runs a position too far."""

    def _run(self, rows: slice, tokens: mx.array, start: mx.array, ahead: int) -> mx.array:
        return super()._run(rows, tokens, start + (ahead > 0), ahead)


class Previous(DraftModel):
    """Reads what stands a position before."""

    def __init__(self, model: Gemma4, target_cache: Cache) -> None:
        super().__init__(model, target_cache)
        read = self._texts.at
        self._texts.at = lambda rows, positions: read(rows, mx.maximum(positions - 1, 0))


@pytest.mark.parametrize("wrong", [OneMore, Late, Previous])
def test_one_that_is_off_by_one_is_not_accepted_completely(wrong):
    models = smallest()
    cache = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    engine = Engine(models.target, cache, wrong(models.target, cache), Listed(WIDTHS), SMALL_CHUNKS)
    outcomes = run(engine, [request(p, 70) for p in prompts(models, (9, 5, 17, 30))])
    kept, drafted = sum(o.stats.kept for o in outcomes), sum(o.stats.drafted for o in outcomes)
    assert drafted > 100 and kept < 0.9 * drafted


class Counted(DraftModel):
    """Counts passes by (rows, columns)."""

    def __init__(self, models: Models, cache: Cache) -> None:
        super().__init__(models.target, cache)
        self.passes: list[tuple[int, int]] = []

    def _run(self, rows: slice, tokens: mx.array, start: mx.array, ahead: int) -> mx.array:
        self.passes.append(tokens.shape)
        return super()._run(rows, tokens, start, ahead)


def counted(widths: list[int], rows: int, tokens: int) -> list[tuple[int, int]]:
    """Passes through the drafter behind the prompts."""
    models = smallest()
    cache = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    drafter = Counted(models, cache)
    engine = Engine(models.target, cache, drafter, Listed(widths), Limits())
    run(engine, [request(p, tokens) for p in prompts(models, (8,) * rows)])
    return [p for p in drafter.passes if p[0] == rows]


def test_a_draft_of_k_tokens_takes_k_passes_for_all_rows_the_first_of_two_columns():
    assert counted([4], rows=3, tokens=16)[:8] == [(3, 2), (3, 1), (3, 1), (3, 1)] * 2


def test_rounds_without_a_draft_cost_nothing_until_the_next_draft():
    assert counted([0] * 5 + [2], rows=3, tokens=9)[:2] == [(3, 7), (3, 1)]
    assert counted([0], rows=3, tokens=30) == []


def test_it_catches_up_in_chunks():
    models = smallest()
    cache = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    drafter = Counted(models, cache)
    engine = Engine(models.target, cache, drafter, Listed([3]), Limits(chunk_tok=2 * CHUNK_TOK))
    run(engine, [request(prompts(models, (CHUNK_TOK + 40,))[0][: models.target.config.max_positions - 10], 8)])
    assert max(columns for _, columns in drafter.passes) <= CHUNK_TOK


def test_another_vocabulary_is_refused_with_both_sizes():
    small, large = smallest(48).target.config, smallest(64).target.config
    with pytest.raises(PairingError, match="vocabulary 48, target has 64; .*the same tokenizer.*: use another"):
        check(large, small, "use another")
    assert check(small, small, "") == [] and MTP.name == "mtp"


def test_the_policy_learns_how_many_rounds_of_all_rows_a_draft_model_has_not_seen():
    models, lags = smallest(), []

    class Watching(Listed):
        def choose(self, matched: Sequence[bool], lag: int = 0) -> int:
            lags.append(lag)
            return super().choose(matched, lag)

    run(engine_of(models, "near", Watching([0, 0, 0, 2])), [request(prompt, 12) for prompt in prompts(models, (5, 5))])
    assert lags[:7] == [0, 0, 2, 4, 6, 0, 2]  # a round is chosen while the one before it runs
