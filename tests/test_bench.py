"""The scripts' parts: operations are counted from graphs, sizes get random weights, the loop keeps drafts by chance."""

import io
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from graph import Count, as_on_metal, count, primitives
from loop import Run, Setting, Synthetic, line, main, measure, run
from made_up import MadeUp, Size, bytes_of, hollow, hollow_fill, make, random_fill, truncated
from memory import Load, page
from memory import measure as measure_memory

from mlx_mtp.load import load_pair
from mlx_mtp.rows import GREEDY, Draft, RequestError
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.shapes import shape

TINY = Path(__file__).parent.parent / "mlx_mtp" / "data" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    loaded = load_pair(str(TINY / "target"), str(TINY / "drafter"), dtype=mx.float32)
    layers = len(loaded.target.model.layers)
    return MadeUp(loaded.target.model, loaded.drafter.model, mx.float32, layers, layers)


def test_a_graph_is_counted_down_to_what_is_evaluated():
    x = mx.ones((4, 4))
    mx.eval(x)
    assert count(x) == Count(0, 0)
    assert primitives(mx.exp(x).T, [mx.exp(x)]) == {"Exp": 2, "Transpose": 1}
    assert count(mx.exp(x).T) == Count(2, 1)


def test_the_counts_are_read_from_mlx_s_own_drawing():
    out = io.StringIO()
    mx.export_to_dot(out, mx.exp(mx.ones(3)))
    assert '[label ="Exp"' in out.getvalue()


def test_metals_fused_operations_count_once_and_only_inside():
    x, q, k = mx.ones((1, 8)), mx.ones((1, 8, 1, 64)), mx.ones((1, 2, 16, 64))
    wide, odd = ((mx.ones((1, 8, 1, d)), mx.ones((1, 2, 16, d))) for d in (512, 80))
    mx.eval(x, q, k, *wide, *odd)
    apart = count(mx.fast.rms_norm(x, None, 1e-6))
    with as_on_metal():
        assert count(mx.fast.rms_norm(x, None, 1e-6)).primitives == 1
        assert count(mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0)).primitives == 1
        assert count(mx.fast.scaled_dot_product_attention(wide[0], wide[1], wide[1], scale=1.0)).primitives == 1
        assert count(mx.fast.scaled_dot_product_attention(odd[0], odd[1], odd[1], scale=1.0)).primitives > 3
    assert count(mx.fast.rms_norm(x, None, 1e-6)) == apart and apart.primitives > 1


def test_hollow_weights_stand_for_every_parameter_and_take_no_memory():
    before = mx.get_active_memory()
    assert hollow(mx.zeros((20000, 20000))).shape == (20000, 20000)
    made = make(shape("E4B"), Size("E4B", 4), hollow_fill)
    assert made.layers == made.all_layers == 42 and mx.get_active_memory() - before < 64e6
    assert count(made.target.parameters(), made.drafter.parameters()) == Count(0, 0)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_random_weights_keep_the_size_of_what_they_multiply(bits):
    found = shape("E2B")
    drafter = replace(found.drafter, text=_small(found.drafter.text), clusters=None)
    made = make(replace(found, target=_small(found.target), drafter=drafter), Size("E2B", bits, 5), random_fill)
    x = mx.random.normal((64, 1536), made.dtype)
    y = made.target.layers[0].self_attn.q_proj(x).astype(mx.float32)
    assert y.shape == (64, 8 * 256)
    assert float(y.std()) == pytest.approx(1, rel=0.1) and abs(float(y.mean())) < 0.05
    assert isinstance(made.target.layers[0].self_attn.q_proj, nn.QuantizedLinear) == (bits != 16)


def _small(config):
    """The same attention over a small vocabulary, with small products between."""
    layers = tuple(replace(layer, mlp_size=256) for layer in config.layers)
    return replace(config, vocab_size=1024, ple_vocab_size=1024, layers=layers)


def test_a_stack_is_cut_to_layers_that_a_drafter_can_read():
    config = shape("31B").target
    assert truncated(config, 6).drafter_reads == (4, 5) and truncated(config, None) is config
    with pytest.raises(RequestError, match="layers is 5; expected 6 to 60"):
        truncated(config, 5)
    assert bytes_of(Size("31B", 4, 6), 1, 1024) < bytes_of(Size("31B", 4), 1, 1024) / 4


def test_chance_keeps_drafts_at_its_rate_and_the_text_is_draft_then_target():
    sampler = Sampler([RowSampler.of(GREEDY)] * 256)
    draft = Draft(mx.full((256, 3), 5, mx.int32))
    logits = mx.broadcast_to(mx.arange(8).astype(mx.float32), (256, 4, 8))  # the target always says 7
    judge, kept = Synthetic(0.8, seed=3), []
    for _ in range(8):
        found = judge(draft, logits, mx.zeros((256,), mx.int32), sampler)
        for tokens, n in zip(found.tokens.tolist(), found.kept.tolist(), strict=True):
            assert tokens[:n] == [5] * (n - 1) + [7]
            kept.append(n)
    assert sum(kept) / len(kept) == pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=0.03)
    for chance, expected in ((1.0, 4), (0.0, 1)):
        assert set(Synthetic(chance)(draft, logits, mx.zeros((256,), mx.int32), sampler).kept.tolist()) == {expected}


def test_an_engine_keeps_what_chance_says(tiny):
    plain, wide = measure(tiny, [Setting(2, 40, 0, 1.0), Setting(2, 40, 3, 1.0)], rounds=4, repeats=1)
    assert (plain.tokens_per_round, wide.tokens_per_round) == (1, 4)
    assert plain.draft_share == 0 < wide.draft_share < 1 and plain.pass_ratio == plain.speedup == 1
    assert run(tiny, Setting(1, 40, 3, 0.0), 4).tokens == 4


def test_a_line_sets_a_width_beside_width_0_of_the_same_repeat():
    plain = [Run(10, 10, seconds, 0, 0, 0.1) for seconds in (1.0, 2.0)]
    wide = [Run(24, 10, seconds, 0, 0, 0.2) for seconds in (2.0, 3.0)]
    found = line(1, wide, Run(24, 10, 2.0, 1.2, 0.4, 0.2), plain, Run(10, 10, 1.0, 1.0, 0.0, 0.1))
    assert (found.least_speedup, found.most_speedup, found.tokens_per_round) == (1.2, 1.6, 2.4)
    assert found.pass_ratio == pytest.approx(1.2) and found.draft_share == pytest.approx(0.25)
    assert found.host_ms == pytest.approx(20)


@pytest.mark.slow
def test_the_script_times_a_truncated_size_and_says_so(capsys, tmp_path):
    file = tmp_path / "lines.csv"
    options = ["--size", "E2B", "--bits", "16", "--layers", "5", "--batch", "1", "--width", "2", "--context", "64"]
    assert main([*options, "--rounds", "2", "--repeats", "1", "--csv", str(file)]) == 0
    assert "5 of 35 layers" in capsys.readouterr().out
    header, *rows = file.read_text().splitlines()
    assert len(rows) == 2 and {"chip", "commit", "command", "mlx", "layers"} <= set(header.split(","))


def test_a_size_that_memory_cannot_hold_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("loop.memory_bytes", lambda: 8 * 10**9)
    with pytest.raises(SystemExit):
        main(["--size", "31B"])
    assert "31B takes" in (err := capsys.readouterr().err) and "--layers" in err


def test_page_on_memory_is_what_the_budget_says():
    assert (TINY.parent.parent.parent / "docs" / "memory.md").read_text() == page()


def test_peak_is_measured_while_several_sequences_run(tiny):
    peak = measure_memory(tiny, Load(batch=2, prompt_tok=40, new_tok=8, chunk=16, width=3))
    assert peak.weights < peak.measured and 0 < peak.measured_working <= peak.counted_working
    assert peak.counted > peak.weights
