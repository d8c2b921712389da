"""`bench`: counts agree with what really runs, made-up pairs have real shapes, chance keeps what it should."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_mtp.bench.graph import Count, as_on_metal, count, primitives
from mlx_mtp.bench.made_up import MadeUp, bytes_of, hollow, hollow_fill, make, random_fill, truncated
from mlx_mtp.bench.settings import Size, Sweep
from mlx_mtp.bench.steps import count_mlx_lm, count_round, count_steps
from mlx_mtp.bench.sweep import Result, Run, Setting, lines, measure
from mlx_mtp.bench.synthetic import Synthetic
from mlx_mtp.cache import Cache
from mlx_mtp.cli import main
from mlx_mtp.depth import MAX_WIDTH, depth_of
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.drafters.plain import PlainDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.load import load_pair
from mlx_mtp.rows import GREEDY, Draft, Request, RequestError
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import SIZES, shape

TINY = Path(__file__).parent.parent / "mlx_mtp" / "data" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    loaded = load_pair(str(TINY / "target"), str(TINY / "drafter"), dtype=mx.float32)
    layers = len(loaded.target.model.layers)
    return MadeUp(loaded.target.model, loaded.drafter.model, mx.float32, layers, layers)


class Watched(Engine):
    """An engine that runs, and counts what it dispatches."""

    counted = ()

    def _dispatch(self, built):
        self.counted = (*self.counted, count(built.out, self._state()))
        super()._dispatch(built)


@pytest.mark.parametrize(("width", "batch"), [(0, 1), (2, 1), (1, 2)])
def test_a_counted_round_has_as_many_operations_as_one_that_runs(tiny, width, batch):
    cache = Cache(tiny.target.specs, MAX_WIDTH, tiny.dtype)
    drafter = MtpDrafter(tiny.target, tiny.drafter, cache) if width else PlainDrafter()
    engine = Watched(tiny.target, cache, drafter, depth_of(width), Limits(max_rows=batch))
    for _ in range(batch):
        engine.submit(Request(tuple(range(3, 43)), 40, GREEDY))
    for _ in range(batch + 5):
        engine.step()
    assert engine.counted[-1] == count_round(tiny, width, batch, context=45)


def test_a_counted_step_of_mlx_lm_has_as_many_operations_as_one_that_runs(monkeypatch):
    generate = pytest.importorskip("mlx_lm.generate")
    from mlx_lm.utils import load_model

    model, _ = load_model(TINY / "target")
    mx.eval(model.parameters())
    counted, run = [], mx.async_eval

    def watched(*arrays):
        counted.append(count(*arrays))
        run(*arrays)

    monkeypatch.setattr(mx, "async_eval", watched)
    for _ in generate.generate_step(mx.array(list(range(3, 43))), model, max_tokens=4):
        pass
    assert counted[-1] == count_mlx_lm(model, 1, 45)


@pytest.mark.parametrize("size", SIZES)
def test_a_plain_step_has_fewer_operations_than_mlx_lms(size):
    pytest.importorskip("mlx_lm")
    mx.reset_peak_memory()
    steps = count_steps(Size(size, 4, 4))
    assert mx.get_peak_memory() < 64e6, "no weights may be made to count operations"
    assert steps.mlx_lm is not None
    assert steps.plain.kernels < steps.mlx_lm.kernels and steps.plain.primitives < steps.mlx_lm.primitives
    assert steps.plain.primitives < steps.rounds[1].primitives < steps.rounds[3].primitives


def test_a_graph_is_counted_down_to_what_is_evaluated():
    x = mx.ones((4, 4))
    mx.eval(x)
    assert count(x) == Count(0, 0)
    assert primitives(mx.exp(x).T, [mx.exp(x)]) == {"Exp": 2, "Transpose": 1}
    assert count(mx.exp(x).T) == Count(2, 1)


def test_metals_fused_operations_count_once_and_only_inside():
    x, q, k = mx.ones((1, 8)), mx.ones((1, 8, 1, 64)), mx.ones((1, 2, 16, 64))
    wide = mx.ones((1, 8, 1, 512)), mx.ones((1, 2, 16, 512))
    mx.eval(x, q, k, *wide)
    apart = count(mx.fast.rms_norm(x, None, 1e-6))
    with as_on_metal():
        assert count(mx.fast.rms_norm(x, None, 1e-6)).primitives == 1
        assert count(mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0)).primitives == 1
        assert count(mx.fast.scaled_dot_product_attention(wide[0], wide[1], wide[1], scale=1.0)).primitives > 3
    assert count(mx.fast.rms_norm(x, None, 1e-6)) == apart and apart.primitives > 1


def test_a_hollow_array_takes_no_memory():
    before = mx.get_active_memory()
    made = hollow(mx.zeros((20000, 20000)))
    assert made.shape == (20000, 20000) and mx.get_active_memory() - before < 1000
    assert count(made) == Count(0, 0)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_weights_keep_the_size_of_what_they_multiply(bits):
    found = shape("E2B")
    text = _small(found.drafter.text)
    small = replace(found, target=_small(found.target), drafter=replace(found.drafter, text=text, clusters=None))
    made = make(small, Size("E2B", bits, bits, 5), random_fill)
    x = mx.random.normal((64, 1536), made.dtype)
    y = made.target.layers[0].self_attn.q_proj(x)
    assert y.shape == (64, 8 * 256)
    assert float(y.astype(mx.float32).std()) == pytest.approx(1, rel=0.1)
    assert abs(float(y.astype(mx.float32).mean())) < 0.05
    packed = isinstance(made.target.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert packed == (bits != 16)


def _small(config):
    """The same attention over a small vocabulary, with small products between."""
    layers = tuple(replace(layer, mlp_size=256) for layer in config.layers)
    return replace(config, vocab_size=1024, ple_vocab_size=1024, layers=layers)


def test_a_stack_is_cut_to_layers_that_a_drafter_can_read():
    config = shape("31B").target
    assert len(truncated(config, 6).layers) == 6 and truncated(config, None) is config
    assert truncated(config, 6).drafter_reads == (4, 5)
    with pytest.raises(RequestError, match="layers is 5; expected 6 to 60"):
        truncated(config, 5)
    whole, cut = bytes_of(Size("31B", 4, 4), 1, 1024), bytes_of(Size("31B", 4, 4, 6), 1, 1024)
    assert cut < whole / 4


def test_chance_keeps_drafts_at_its_rate_and_the_text_is_draft_then_target():
    sampler = Sampler([RowSampler.of(GREEDY)] * 256)
    draft = Draft(mx.full((256, 3), 5, mx.int32))
    logits = mx.broadcast_to(mx.arange(8).astype(mx.float32), (256, 4, 8))  # the target always says 7
    judge = Synthetic(0.8, seed=3)
    kept = []
    for _ in range(8):
        found = judge(draft, logits, mx.zeros((256,), mx.int32), sampler)
        for tokens, n in zip(found.tokens.tolist(), found.kept.tolist(), strict=True):
            assert tokens[:n] == [5] * (n - 1) + [7]
            kept.append(n)
    assert sum(kept) / len(kept) == pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=0.03)
    certain = Synthetic(1.0)(draft, logits, mx.zeros((256,), mx.int32), sampler)
    assert set(certain.kept.tolist()) == {4}
    never = Synthetic(0.0)(draft, logits, mx.zeros((256,), mx.int32), sampler)
    assert set(never.kept.tolist()) == {1}


def test_an_engine_keeps_what_its_judge_says(tiny):
    asked = Sweep((2,), (40,), (3,), (1.0,), rounds=4, repeats=1)
    plain, wide = measure(tiny, asked, [Setting(2, 40, 0, 1.0), Setting(2, 40, 3, 1.0)])
    assert (plain.tokens_per_round, wide.tokens_per_round) == (1, 4)
    (none,) = measure(tiny, asked, [Setting(1, 40, 3, 0.0)])
    assert none.tokens_per_round == 1
    assert plain.verify_s > 0 and wide.draft_s > 0 and plain.draft_s == 0


def test_a_line_sets_a_width_beside_width_0_of_the_same_repeat():
    plain = Result(Setting(1, 8, 0, 0.8), [Run(10, 10, 1.0, 0.1), Run(10, 10, 2.0, 0.1)], 0.1, 0.0)
    wide = Result(Setting(1, 8, 2, 0.8), [Run(24, 10, 2.0, 0.2), Run(24, 10, 3.0, 0.2)], 0.12, 0.04)
    first, second = lines([plain, wide])
    assert (first.speedup, first.verify_ratio, first.draft_share) == (1, 1, 0)
    assert (second.least_speedup, second.most_speedup) == (1.2, 1.6)
    assert second.verify_ratio == pytest.approx(1.2) and second.draft_share == pytest.approx(0.25)
    assert second.free_speedup == pytest.approx(2.4) and second.host_ms == pytest.approx(20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "70B"], "size is '70B'"),
        (["--size", "Qwen3.5-4B"], "weights are made up of Gemma 4 only"),
        (["--bits", "3"], "bits is 3; expected 16, 8, 4"),
        (["--synthetic-acceptance", "1.5"], "synthetic acceptance is 1.5; expected 0 to 1"),
        (["--width", "16"], "width is 16; expected 1 to 15"),
        (["--size", "31B", "--bits", "16", "--layers", "3"], "layers is 3; expected 6 to 60"),
        (["--primitives", "--layers", "6"], "--primitives counts all layers"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err


def test_the_command_refuses_a_size_that_memory_cannot_hold(capsys, monkeypatch):
    monkeypatch.setattr("mlx_mtp.doctor.memory_bytes", lambda: 8 * 10**9)
    assert main(["bench", "--size", "31B"]) == 2
    assert "31B at 4 bits takes" in (err := capsys.readouterr().err) and "--layers" in err


def test_the_command_counts_operations_as_a_table_and_as_json(capsys):
    assert main(["bench", "--primitives", "--size", "26B-A4B", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (steps,) = found["steps"]
    assert found["machine"]["commit"] and found["machine"]["command"].startswith("mlx-mtp")
    assert main(["bench", "--primitives", "--size", "26B-A4B"]) == 0
    assert f"{steps['plain']['primitives']} ({steps['plain']['kernels']})" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_times_a_truncated_size_and_says_so(capsys, tmp_path):
    file = tmp_path / "lines.csv"
    options = ["--size", "E2B", "--bits", "16", "--layers", "5", "--batch", "1", "--width", "2", "--context", "64"]
    assert main(["bench", *options, "--rounds", "2", "--repeats", "1", "--csv", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "5 of 35 layers" in err and re.search(r"^2 ", out, re.MULTILINE)
    header, *rows = file.read_text().splitlines()
    assert len(rows) == 2 and {"chip", "commit", "command", "mlx", "layers"} <= set(header.split(","))


def test_what_is_drawn_is_text():
    out = io.StringIO()
    mx.export_to_dot(out, mx.exp(mx.ones(3)))
    assert '[label ="Exp"' in out.getvalue(), "the counts are read from this form"


def test_hollow_weights_stand_for_every_parameter():
    made = make(shape("E4B"), Size("E4B", 4, 4), hollow_fill)
    assert made.layers == made.all_layers == 42
    assert count(made.target.parameters(), made.drafter.parameters()) == Count(0, 0)
