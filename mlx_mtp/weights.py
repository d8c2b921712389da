"""Which stored tensor becomes which parameter of a network, and reading them. Knows no pairs and no hub.

`plan` holds every name, shape and dtype against the network without reading a weight; `read` then reads the
tensors of the text stack and nothing else. Names are those of the Hugging Face release, of text-only repacks,
or of MLX files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_mtp.models.experts import QuantizedExpertLinear
from mlx_mtp.models.families import Stored, bare
from mlx_mtp.quantized import Packable, group_of, packed_module, quantize_now, recognise
from mlx_mtp.rows import CheckpointError, RequestError, one_line
from mlx_mtp.tensors import BITS, FLOATS, Tensor, read_headers

Report = Callable[[str, int, int], None]  # (stage, done bytes, total bytes)

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
EVAL_BYTES = 512 * 2**20  # read in steps of this many bytes, which bounds what a cast holds twice
OWN_KEYS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")
FUSED = re.compile(r"^(.*\.experts)\.gate_up_proj(?:\.(weight|scales|biases))?$")
# Written with another number of axes of one element by some than by others.
WHOLE = re.compile(r"\.(layer_scalar|global_scale|conv1d\.weight)$")
FLOAT32 = re.compile(r"\.(global_scale|A_log)$")  # in every model


@dataclass(frozen=True)
class Folder:
    """A checkpoint whose config has been read, and nothing else. raw: config.json as it stands.

    headers: of its tensors, where they do not lie in `path`; such a folder can be planned and not read.
    """

    name: str
    path: Path
    raw: dict[str, Any]
    config: Any
    stored: Stored
    headers: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> Tensor of all that is stored. Raises CheckpointError."""
        return read_headers(self.path) if self.headers is None else self.headers


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a stored tensor, which half of its rows if two share it, and what to add."""

    tensor: Tensor
    half: int | None = None
    add: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, of a fused tensor half the rows (axis -2)."""
        shape = self.tensor.shape
        if self.half is None or len(shape) < 2:
            return shape
        return (*shape[:-2], shape[-2] // 2, shape[-1])


@dataclass(frozen=True)
class Plan:
    """A network with the right modules, and where each parameter comes from. No weight has been read.

    dtype: what floating weights become. quantize: bits to pack linear layers and embeddings in while reading.
    """

    folder: Folder
    model: nn.Module
    sources: dict[str, Source]
    dtype: mx.Dtype
    quantize: int | None = None


def plan(folder: Folder, kind: Callable[[Any], nn.Module], dtype: mx.Dtype | None) -> Plan:
    """Check a folder's headers against the network `kind(config)`, with quantised modules where it is packed.

    dtype: None takes the checkpoint's own on a GPU and float32 on the CPU.
    Raises CheckpointError, RequestError.
    """
    sources = _sources(folder)
    chosen = _dtype(dtype, sources)
    try:
        model = kind(folder.config)  # lazy arrays: no memory is taken
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        said = one_line(error, 120)
        raise CheckpointError(
            f"{folder.path / 'config.json'}: no network can have these sizes ({said}); download it again"
        ) from None
    packed = []
    for path, module in model.named_modules():
        if isinstance(module, Packable) and f"{path}.scales" in sources:
            packed.append((path, _packed(folder, path, module, sources, chosen)))
    model.update_modules(tree_unflatten(packed))
    _check_names(folder, model, sources)
    for name, value in parameters(model).items():
        _check_tensor(folder, name, value, sources[name])
    return Plan(folder, model, sources, chosen)


def read(plan: Plan, report: Report | None) -> int:
    """Read the planned tensors into the network, in steps; returns the bytes its weights take in memory.

    report: called after every step with (stage, done bytes, total bytes). Raises CheckpointError.
    """
    plan.model.update(tree_unflatten(list(_lazy(plan).items())))
    if plan.quantize:
        _quantize(plan.model, plan.quantize, plan.dtype)
    left = list(parameters(plan.model).values())
    total, done, step = sum(p.nbytes for p in left), 0, []
    while left:
        step.append(left.pop())
        if not left or sum(p.nbytes for p in step) >= EVAL_BYTES:
            _evaluate(step, plan.folder)
            done += sum(p.nbytes for p in step)
            step = []
            if report:
                report(f"reading {plan.folder.name}", done, total)
    return total


def planned_bytes(plan: Plan, dtype: mx.Dtype) -> int:
    """What the weights will take in memory, in such a dtype, without reading them; `read` returns the same."""
    groups = {f"{path}.weight": group_of(m) for path, m in plan.model.named_modules()} if plan.quantize else {}
    total = 0
    for name in parameters(plan.model):
        source, group = plan.sources[name], groups.get(name)
        count = math.prod(source.shape)
        if plan.quantize and group:
            total += count * plan.quantize // 8 + 2 * count // group * dtype.size
        elif name.endswith(".token_ordering") or FLOAT32.search(name):
            total += 4 * count
        else:
            floating = source.tensor.dtype in FLOATS
            total += count * (dtype.size if floating else BITS[source.tensor.dtype] // 8)
    return total


def bits_of(plan: Plan) -> dict[str, int]:
    """Stored bytes of the network by how they are packed: "4 bit", "8 bit", "BF16"; scales go with what they scale."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedExpertLinear)
    bits = {path: m.bits for path, m in plan.model.named_modules() if isinstance(m, kinds)}
    found: dict[str, int] = {}
    for name in parameters(plan.model):
        source, path = plan.sources[name], name.rpartition(".")[0]
        how = f"{bits[path]} bit" if path in bits else source.tensor.dtype
        found[how] = found.get(how, 0) + math.prod(source.shape) * BITS[source.tensor.dtype] // 8
    return found


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Name -> array of every parameter."""
    return dict(tree_flatten(model.parameters()))  # pyright: ignore[reportArgumentType, reportCallIssue]


def stored_dtype(sources: dict[str, Source]) -> mx.Dtype:
    """The dtype that most floating values are stored in; of a quantised checkpoint, its scales and norms."""
    count = dict.fromkeys(DTYPES, 0)
    for source in sources.values():
        if source.tensor.dtype in count:
            count[source.tensor.dtype] += math.prod(source.shape)
    return DTYPES[max(count, key=lambda dtype: count[dtype])]


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    return mx.default_device().type == mx.DeviceType.cpu


# names ----------------------------------------------------------------------------------------------------


def _sources(folder: Folder) -> dict[str, Source]:
    """Parameter name -> where it is stored, for every tensor that belongs to the network."""
    how, sources, headers = folder.stored, {}, folder.tensors()
    centred = how.centred({name: tensor.shape for name, tensor in headers.items()})
    for stored, tensor in headers.items():
        if not how.holds(stored):
            continue
        name = (bare(stored) if how.nested else stored).removeprefix(how.prefix)
        keys = OWN_KEYS.search(name)
        if keys and _borrows(how.layers, int(keys[1])):
            continue
        for parameter, half in _parameters(name):
            if parameter in sources:
                other = sources[parameter].tensor.name
                raise CheckpointError(f"{folder.path}: {other} and {stored} are both {parameter}; use another copy")
            sources[parameter] = Source(tensor, half, 1.0 if centred and centred.search(parameter) else 0.0)
    return sources


def _borrows(layers: tuple, index: int) -> bool:
    """Whether the layer attends to another one's keys and values, so that its own tensors have no use."""
    return index < len(layers) and layers[index].owner != index


def _parameters(name: str) -> list[tuple[str, int | None]]:
    """(parameter, half) of a stored tensor: two where the experts' gate and up are fused, gate rows first."""
    name = name.replace(".experts.switch_glu.", ".experts.")
    fused = FUSED.match(name)
    if fused:
        part = fused[2] or "weight"
        return [(f"{fused[1]}.gate_proj.{part}", 0), (f"{fused[1]}.up_proj.{part}", 1)]
    return [(f"{name}.weight" if name.endswith(".experts.down_proj") else name, None)]


def _check_names(folder: Folder, model: nn.Module, sources: dict[str, Source]) -> None:
    """Raise unless the tensors are those of the network, no more and no less."""
    wanted = parameters(model)
    missing = [name for name in wanted if name not in sources]
    if missing:
        raise CheckpointError(
            f"{folder.path}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}; "
            "download the checkpoint again"
        )
    unknown = [source.tensor for name, source in sources.items() if name not in wanted]
    if unknown:
        first = unknown[0]
        raise CheckpointError(
            f"{folder.path}: {len(unknown)} tensors have no place in this network, the first is "
            f"{first.name} {first.dtype} {list(first.shape)}; expected plain weights or MLX's quantisation"
        )


# shapes and dtypes ----------------------------------------------------------------------------------------


def _dtype(asked: mx.Dtype | None, sources: dict[str, Source]) -> mx.Dtype:
    """The dtype asked for; else float32 on the CPU, on a GPU the one the weights are stored in."""
    if asked is None:
        return mx.float32 if on_cpu() else stored_dtype(sources)
    if asked not in DTYPES.values():
        raise RequestError(f"dtype is {asked}; expected float32, float16 or bfloat16")
    experts = any(
        name.endswith(".experts.down_proj.weight") and source.tensor.dtype in FLOATS for name, source in sources.items()
    )
    if on_cpu() and experts and asked != mx.float32:
        raise RequestError(f"dtype is {asked}; expected float32, the only one MLX's CPU multiplies experts in")
    return asked


def _packed(folder: Folder, path: str, plain: Packable, sources: dict[str, Source], dtype: mx.Dtype) -> nn.Module:
    """The quantised module that takes a plain one's place."""
    scales, weight = sources[f"{path}.scales"], sources.get(f"{path}.weight")
    if weight is None:
        raise CheckpointError(f"{folder.path}: {path} has scales but no weight; download the checkpoint again")
    inputs, is_float = plain.weight.shape[-1], scales.tensor.dtype in FLOATS
    packing = None
    if weight.tensor.dtype == "U32" and weight.shape and scales.shape and (is_float or scales.tensor.dtype == "U8"):
        packing = recognise(inputs, weight.shape[-1], scales.shape[-1], is_float)
    if packing is None:
        raise CheckpointError(
            f"{folder.path}: {path} is {weight.tensor.dtype} {list(weight.shape)} with scales "
            f"{scales.tensor.dtype} {list(scales.shape)}, no MLX quantisation of {inputs} inputs; use another"
        )
    return packed_module(plain, packing, f"{path}.global_scale" in sources, dtype)


def _check_tensor(folder: Folder, name: str, value: mx.array, source: Source) -> None:
    """Raise unless a stored tensor has a dtype that can become its parameter's, and the parameter's shape."""
    tensor, shape = source.tensor, source.shape
    if mx.issubdtype(value.dtype, mx.floating):
        allowed = FLOATS
    elif name.endswith(".token_ordering"):
        allowed = ("I64", "I32", "U32")
    else:
        allowed = ("U8",) if value.dtype == mx.uint8 else ("U32",)
    if tensor.dtype not in allowed:
        hint = ", or an MLX quantisation (U32 with scales)" if allowed is FLOATS else ""
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}; expected {' or '.join(allowed)}{hint}; "
            "use another copy of the checkpoint"
        )
    expected = list(value.shape)
    if source.half is not None:
        expected[-2] *= 2
    same = list(tensor.shape) == expected or (WHOLE.search(name) and math.prod(shape) == value.size)
    if not same:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}; config.json asks for {expected}; "
            "one of the two is of another model, download both again"
        )


# data -----------------------------------------------------------------------------------------------------


def _lazy(plan: Plan) -> dict[str, mx.array]:
    """Parameter name -> array as the network wants it; nothing but headers has been read yet."""
    files: dict[Path, dict[str, mx.array]] = {}
    weights = {}
    for name, value in parameters(plan.model).items():
        source = plan.sources[name]
        if source.tensor.file not in files:
            files[source.tensor.file] = _arrays(source.tensor.file)
        array = files[source.tensor.file][source.tensor.name]
        if source.half is not None:
            rows = value.shape[-2]
            array = mx.contiguous(array[..., source.half * rows : (source.half + 1) * rows, :])
        array = array.reshape(value.shape)
        if source.add:  # before it is rounded
            array = array.astype(mx.float32) + source.add
        weights[name] = _cast(name, array, plan.dtype)
    return weights


def _arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a file, each of which is read when it is evaluated."""
    try:
        return mx.load(str(file), format="safetensors")  # pyright: ignore[reportReturnType]
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{file}: MLX cannot read it ({one_line(error, 120)}); use another copy") from None


def _cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    if name.endswith(".token_ordering"):
        return array.astype(mx.int32)
    if FLOAT32.search(name):
        return array.astype(mx.float32)
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize(model: nn.Module, bits: int, dtype: mx.Dtype) -> None:
    """Swap linear layers and embeddings for quantised ones, still unread; others stay as they are."""
    made = [(path, quantize_now(module, bits, dtype)) for path, module in model.named_modules()]
    model.update_modules(tree_unflatten([(path, module) for path, module in made if module is not None]))


def _evaluate(arrays: list[mx.array], folder: Folder) -> None:
    try:
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.path}: the weights could not be read ({one_line(error, 120)}); check disk and free memory"
        ) from None
