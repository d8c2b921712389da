"""Layers that are alike share the traces of what is compiled, and compute what they do uncompiled."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FIXTURES, Quant, mlx_community, quantised, read, write
from engines import SHAPES, qwen
from passes import logits

from mlx_mtp.load import LoadedTarget, load_target
from mlx_mtp.models import fused, gemma4
from mlx_mtp.models.fused import Fused, Traces

IDS = np.arange(5, 12)


def loaded(shape: str) -> LoadedTarget:
    """A target that nothing has traced yet."""
    return load_target(str(FIXTURES / shape / "target"), dtype=mx.float32)


def mixed(folder: Path) -> LoadedTarget:
    """Every second layer packed to 8 bits, the others to 4, of which one product in larger groups."""
    overrides = {"*.layers.0.self_attn.q_proj": Quant(4, 64), "*.layers.[135].*": Quant(8, 32)}
    packed = quantised(mlx_community(read(FIXTURES / "dense" / "target")), Quant(4, 32), overrides)
    return load_target(str(write(packed, folder)), dtype=mx.float32)


def plain(target: LoadedTarget, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(fused, "FUSED_COLUMNS", 0)
        return logits(target, IDS)


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_shape_costs_a_trace_a_kind_of_layer_instead_of_one_a_layer(shape, monkeypatch):
    traced, project = [], gemma4.Block._project

    def watched(self, h, start):
        traced.append(h.shape)
        return project(self, h, start)

    monkeypatch.setattr(gemma4.Block, "_project", watched)
    target = loaded(shape)
    layers, owners = target.model.config.layers, set(target.model.config.owners)
    kinds = {(c.window, c.mlp_size, i in owners) for i, c in enumerate(layers)}
    assert len(kinds) < len(layers)
    for columns in (1, 3, 1, 3):
        logits(target, IDS[:columns])
    assert sorted(shape[0] for shape in traced) == [1] * len(kinds) + [3] * len(kinds)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_that_share_a_trace_compute_with_their_own_weights(shape, monkeypatch):
    target = loaded(shape)
    want = plain(target, monkeypatch)
    close(logits(target, IDS), want)
    close(logits(target, IDS), want)
    close(plain(target, monkeypatch), want)  # tracing has put back what it borrowed


def test_qwens_layers_compute_what_they_do_uncompiled(monkeypatch):
    target = qwen().loaded
    close(logits(target, IDS), plain(target, monkeypatch))


def test_layers_packed_otherwise_share_nothing(tmp_path, monkeypatch):
    target = mixed(tmp_path / "target")
    packed = {(m.bits, m.group_size) for m in target.model.modules() if isinstance(m, nn.QuantizedLinear)}
    assert packed == {(4, 32), (4, 64), (8, 32)}
    close(logits(target, IDS), plain(target, monkeypatch))


def test_a_weight_that_is_exchanged_counts_from_the_next_pass_on(monkeypatch):
    target = loaded("dense")
    before = logits(target, IDS)
    for layer in target.model.layers:
        layer.layer_scalar = layer.layer_scalar * 0.5
    after = logits(target, IDS)
    assert np.abs(after - before).max() > 0.01
    close(after, plain(target, monkeypatch))


def test_a_trace_that_fails_leaves_the_weights_in_place():
    class Layer(gemma4.Norm):
        def _run(self, x: mx.array) -> mx.array:
            raise ValueError("no")

    layer = Layer(4, 1e-6)
    weight = layer.weight
    with pytest.raises(ValueError, match="no"):
        Fused(layer, layer._run, Traces())(1, mx.ones((1, 4)))
    assert layer.weight is weight
