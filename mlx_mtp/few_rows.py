"""A model whose rounds run on kernels and whose prompts run on MLX's own operations, over one set of weights.

Kernels are for few rows. A prompt, however short, would read the weights once for every eight of its tokens. So the
pass says which of two networks runs: the one that was loaded, or its twin, whose modules hand few rows to kernels.
Where no kernel is used there is no twin. Knows nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_mtp.cache import LayerSpec, Pass
from mlx_mtp.kept import own_cache
from mlx_mtp.kernels import experts
from mlx_mtp.kernels import self_test_cases as cases
from mlx_mtp.kernels.delta import Given, Span, delta
from mlx_mtp.kernels.gate_up import gate_up
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.kernels.rows_qmv import rows_qmv
from mlx_mtp.kernels.self_test import Case, KernelChoice, Outcome, Record, self_test, uses
from mlx_mtp.mlx_setup import machine
from mlx_mtp.models.experts import Experts
from mlx_mtp.models.families import Target
from mlx_mtp.models.gemma4 import Mlp
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.models.qwen3_5 import DeltaNet
from mlx_mtp.quantized import Table
from mlx_mtp.states import StateSpec

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


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
        matrices = _experts_of(self)
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


class KernelTarget:
    """A target in two networks with the same weights: `prompts` and `rounds`."""

    def __init__(self, prompts: Target, rounds: Target, specs: tuple[LayerSpec | StateSpec, ...]) -> None:
        """specs: the cache's layers, with which of them the attention kernel reads."""
        self.prompts, self.rounds, self.specs = prompts, rounds, specs
        self.config, self.layers, self.heads = prompts.config, prompts.layers, prompts.heads

    def embed(self, tokens: mx.array) -> mx.array:
        """As Target.embed."""
        return self.prompts.embed(tokens)

    def forward(
        self, tokens: mx.array, pass_: Pass, taps: tuple[int, ...] = (), last: mx.array | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """As Target.forward."""
        return (self.rounds if pass_.is_round else self.prompts).forward(tokens, pass_, taps, last)

    def logits(self, hidden: mx.array, capped: bool = True) -> mx.array:
        """As Target.logits. Few rows ask for them, of prompts too."""
        return self.rounds.logits(hidden, capped)


@dataclass(frozen=True)
class Trial:
    """How kernels are chosen while a model is loaded."""

    choice: KernelChoice
    record: Record

    @staticmethod
    def of(kernels: str = "auto") -> Trial:
        """With the user's own record. kernels: as --kernels takes it. Raises RequestError."""
        return Trial(KernelChoice.parse(kernels), Record(own_cache(), machine))


def with_kernels(model: Target, dtype: mx.Dtype, trial: Trial) -> tuple[Target, tuple[Outcome, ...]]:
    """A target with the kernels that pass their trial here, and what came of it. dtype: of its activations."""
    found = self_test(_cases(model, dtype), trial.choice, trial.record)
    specs = tuple(_by_kernel(model, spec, found) for spec in model.specs)
    if specs == model.specs and not any(uses(found, k) for k in ("rows_qmv", "gate_up", "experts", "delta")):
        return model, found
    rounds = _twin(model)
    _exchange(rounds, dtype, found)
    return KernelTarget(model, cast(Target, rounds), specs), found


def with_head_kernel(drafter: Assistant, trial: Trial) -> tuple[Outcome, ...]:
    """Let a drafter choose tokens by its vocabulary's clusters in the kernel, if it has any and that passes."""
    if drafter.clusters is None:
        return ()
    table, dtype = drafter.clusters.embedding, drafter.model.norm.weight.dtype
    shape = f"{cases.layout_name(table)}, {drafter.clusters.top} of {drafter.clusters.centroids.rows} clusters"
    found = self_test([cases.clustered(shape, drafter.clusters, dtype)], trial.choice, trial.record)
    drafter.head_by_kernel = uses(found, "head")
    return found


# what a model needs -----------------------------------------------------------------------------------------


def _cases(model: Target, dtype: mx.Dtype) -> Iterator[Case]:
    """Every kernel for every shape of a model, once."""
    network, config = cast(nn.Module, model), model.config
    products = ((_shape(Matrix.of(m), dtype), Matrix.of(m)) for m in _products(network))
    for shape, matrices in _grouped(products):
        yield cases.products(shape, matrices, dtype)
    pairs = ((_shape(pair[0], dtype), pair) for pair in map(_gate_and_up, _modules(network, Mlp)) if pair)
    for shape, both in _grouped(pairs):
        yield cases.gates(shape, both, dtype)
    layers = [_experts_of(m) for m in _modules(network, Experts) if not _scaled(m)]
    for shape, routed in _grouped((_shape(layer.gate, dtype), layer) for layer in layers):
        yield cases.routed(shape, routed, config.moe.top_k, dtype)
    for spec in dict.fromkeys(spec for spec in model.specs if isinstance(spec, LayerSpec)):
        heads = (model.heads, spec.kv_heads)
        yield cases.attention(_attention(model, spec), heads, spec.head_dim, spec.window, dtype)
    for net in _modules(network, DeltaNet)[:1]:
        c = net.config
        sizes = (c.key_dim, c.value_dim)
        yield cases.recurrence(f"{c.value_heads} heads of {sizes}", (c.key_heads, c.value_heads), sizes)
    yield cases.verdicts(f"{config.vocab_size} tokens", config.vocab_size, config.hidden_size, dtype)


def _products(network: nn.Module) -> list[nn.Module]:
    """Modules that are one product with a matrix whose layout kernels read; not those that gate_up takes in pairs."""
    paired = {id(m) for mlp in _modules(network, Mlp) if _gate_and_up(mlp) for m in (mlp.gate_proj, mlp.up_proj)}
    return [
        module
        for path, module in network.named_modules()
        if type(module) in PRODUCTS
        and "bias" not in module
        and (path == "embed_tokens" or not isinstance(module, nn.Embedding | Table))  # the others are only looked up
        and id(module) not in paired
        and Matrix.of(module).why_not() is None
    ]


def _gate_and_up(mlp: Mlp) -> tuple[Matrix, Matrix] | None:
    """The matrices of an MLP, if gate_up takes them."""
    gate, up = (Matrix.of(m) for m in (mlp.gate_proj, mlp.up_proj))
    alike = gate.template() == up.template() and gate.weight.shape == up.weight.shape
    return (gate, up) if alike and gate.weight.dtype == up.weight.dtype and gate.why_not() is None else None


def _experts_of(module: Experts) -> experts.Experts:
    return experts.Experts(*(Matrix.of(m) for m in (module.gate_proj, module.up_proj, module.down_proj)))


def _scaled(module: Experts) -> bool:
    """Whether its matrices have one more factor an expert, which no kernel knows."""
    return any("global_scale" in m for m in module.children().values())


def _modules(network: nn.Module, kind: type[M]) -> list[M]:
    """The modules of exactly this type, in the order of the layers."""
    return [m for _, m in sorted(network.named_modules(), key=_layer_of) if type(m) is kind]


def _layer_of(named: tuple[str, nn.Module]) -> list[int]:
    return [int(part) for part in named[0].split(".") if part.isdigit()]


def _grouped(named: Iterable[tuple[str, T]]) -> list[tuple[str, list[T]]]:
    groups: dict[str, list[T]] = {}
    for name, value in named:
        groups.setdefault(name, []).append(value)
    return list(groups.items())


def _shape(matrix: Matrix, dtype: mx.Dtype) -> str:
    """What a kernel is built for that multiplies activations of a dtype by a matrix."""
    return f"{cases.layout_name(matrix)}, {str(dtype).removeprefix('mlx.core.')}"


def _attention(model: Target, spec: LayerSpec) -> str:
    keys = "all keys" if spec.window is None else f"{spec.window} keys"
    return f"{model.heads} heads of {spec.head_dim} on {spec.kv_heads}, {keys}"


# twins ------------------------------------------------------------------------------------------------------


def _twin(model: Target) -> nn.Module:
    """The same network once more, whose arrays are the model's."""
    network = cast(nn.Module, model)
    twin = cast(Any, type(network))(model.config)  # lazy arrays, which are never evaluated
    leaves = [(path, copy.copy(m)) for path, m in network.named_modules() if not m.children()]
    twin.update_modules(tree_unflatten(leaves))
    twin.update(network.parameters())
    return twin


def _exchange(network: nn.Module, dtype: mx.Dtype, found: Iterable[Outcome]) -> None:
    """Let modules hand their work to the kernels that are used for their shape."""
    exchanged: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in _products(network):
        if uses(found, "rows_qmv", _shape(Matrix.of(module), dtype)):
            exchanged.append((module, PRODUCTS[type(module)]))
    for mlp in _modules(network, Mlp):
        pair = _gate_and_up(mlp)
        if pair and uses(found, "gate_up", _shape(pair[0], dtype)):
            exchanged.append((mlp, FewRowsMlp))
    for module in _modules(network, Experts):
        if not _scaled(module) and uses(found, "experts", _shape(Matrix.of(module.gate_proj), dtype)):
            exchanged.append((module, FewRowsExperts))
    if uses(found, "delta"):
        exchanged += [(module, OneLaunchDeltaNet) for module in _modules(network, DeltaNet)]
    for module, kind in exchanged:
        object.__setattr__(module, "__class__", kind)  # same weights, another way to multiply


def _by_kernel(model: Target, spec: LayerSpec | StateSpec, found: Iterable[Outcome]) -> LayerSpec | StateSpec:
    if isinstance(spec, LayerSpec) and uses(found, "attend", _attention(model, spec)):
        return replace(spec, by_kernel=True)
    return spec
