"""Modules that hand passes of few rows to kernels, and their exchange for a loaded model's plain ones.

Where no kernel can be used nothing is exchanged, and the model runs as it was built. Knows nothing of files.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp import kernels
from mlx_mtp.kernels import experts
from mlx_mtp.kernels.delta import Given, Span, delta
from mlx_mtp.kernels.gate_up import gate_up
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.kernels.rows_qmv import rows_qmv
from mlx_mtp.models.experts import Experts
from mlx_mtp.models.gemma4 import Mlp
from mlx_mtp.models.qwen3_5 import DeltaNet
from mlx_mtp.quantized import Table


class FewRowsLinear(nn.Linear):
    """A linear layer without bias whose row results do not depend on how many rows there are."""

    def __call__(self, x: mx.array) -> mx.array:
        return rows_qmv(x, Matrix.of(self))


class FewRowsQuantizedLinear(nn.QuantizedLinear):
    """The same, quantised."""

    def __call__(self, x: mx.array) -> mx.array:
        return rows_qmv(x, Matrix.of(self))


class FewRowsEmbedding(nn.Embedding):
    """An embedding whose use as an output head is FewRowsLinear."""

    def as_linear(self, x: mx.array) -> mx.array:
        return rows_qmv(x, Matrix.of(self))


class FewRowsTable(Table):
    """The same, quantised."""

    def as_linear(self, x: mx.array) -> mx.array:
        return rows_qmv(x, Matrix.of(self))


class FewRowsMlp(Mlp):
    """A gated MLP whose two products and activation are one operation."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gate_up(x, Matrix.of(self.gate_proj), Matrix.of(self.up_proj)))


class FewRowsExperts(Experts):
    """Routed experts each of which is read once for all tokens of a pass; wider passes sort, as Experts does."""

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        routing = experts.Routing(chosen.reshape(flat.shape[0], -1), weights.reshape(flat.shape[0], -1))
        matrices = experts.Experts(*(Matrix.of(m) for m in (self.gate_proj, self.up_proj, self.down_proj)))
        if experts.why_not(flat, routing, matrices):
            return super().__call__(x, chosen, weights)
        return experts.experts(flat, routing, matrices).reshape(x.shape)


class OneLaunchDeltaNet(DeltaNet):
    """A gated delta net whose recurrence over all columns of a pass is one operation."""

    def run(self, state: mx.array, given: Given, span: Span) -> tuple[mx.array, mx.array]:
        return delta(state, given, span)


PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FewRowsLinear,
    nn.QuantizedLinear: FewRowsQuantizedLinear,
    nn.Embedding: FewRowsEmbedding,
    Table: FewRowsTable,
}


def use_kernels(model: nn.Module) -> None:
    """Exchange the modules of a model whose kernels are usable on this device; weights stay where they are."""
    exchange = dict(PRODUCTS) if kernels.usable("rows_qmv") else {}
    if exchange and kernels.usable("gate_up"):
        exchange[Mlp] = FewRowsMlp
    if kernels.usable("experts"):
        exchange[Experts] = FewRowsExperts
    if kernels.usable("delta"):
        exchange[DeltaNet] = OneLaunchDeltaNet
    if not exchange:
        return
    for module in model.modules():
        scaled = isinstance(module, Experts) and any("global_scale" in m for m in module.children().values())
        if type(module) in exchange and "bias" not in module and not scaled:
            object.__setattr__(module, "__class__", exchange[type(module)])  # same weights, another way to multiply
