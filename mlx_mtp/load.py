"""From a folder or hub id to a target and drafter ready to run. Knows no rows, requests or samplers.

Order: both configs, whether the two fit, all headers, only then weights, so that a mistake costs no reading.
Vision and audio towers stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp import hub
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.kinds import Kind, Network, kind_of, kinds, split_name
from mlx_mtp.few_rows import Trial, with_head_kernel, with_kernels
from mlx_mtp.loaded import LoadedDrafter, LoadedPair, LoadedTarget, make_drafter
from mlx_mtp.memory_budget import CPU, GPU, PairSize, size_of
from mlx_mtp.models.families import Family, Target, family_of
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.pairs import check_pair, drafter_in, find_drafter, whole_copy
from mlx_mtp.rows import CheckpointError, DownloadError, PairingError, RequestError, Sampling
from mlx_mtp.tensors import Tensor, read_headers, read_json, stale_index
from mlx_mtp.weights import Folder, Plan, Report, on_cpu, plan, planned_bytes, read

__all__ = [
    "LoadedDrafter",
    "LoadedPair",
    "LoadedTarget",
    "PlannedPair",
    "Report",
    "check_pair",
    "find_drafter",
    "load_drafter",
    "load_pair",
    "load_target",
    "own_drafter",
    "plan_pair",
]

# Keys of generation_config.json that would change the text and are not supported: their neutral values.
UNSUPPORTED = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0}


def load_pair(
    target: str,
    drafter: str | None = "auto",
    *,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    admit: Callable[[PairSize], None] | None = None,
    report: Report | None = None,
    trial: Trial | None = None,
) -> LoadedPair:
    """Load a target and its drafter, checking both before a weight of either is read.

    drafter: a folder or hub id of any kind; "auto" looks for the one made for the target and decodes plainly, with
    a note, where none is known or it cannot be fetched; None or "none" decodes plainly; "lookup" needs no checkpoint,
    alone or over another ("auto+lookup"). Others as in load_drafter.
    admit: called before weights are read; it may raise. trial: how kernels are chosen; None: those that win.
    Raises DownloadError, CheckpointError, PairingError, RequestError.
    """
    planned = plan_pair(target, drafter, dtype, quantize, lambda name: _on_disk(name, report))
    size = planned.size(planned.target.dtype, on_cpu())
    if admit:
        admit(size)
    trial = trial or Trial.of()
    loaded = _finish_target(planned.target, planned.family, trial, report)
    opened, draft_plan = planned.opened, planned.drafter
    finished = _finish_drafter(opened, draft_plan, trial, report) if opened and draft_plan else None
    return LoadedPair(loaded, finished, (*planned.notes, *loaded.notes), planned.lookup, size)


def load_target(name: str, *, dtype: mx.Dtype | None = None, report: Report | None = None) -> LoadedTarget:
    """Load a target from a folder or hub id.

    dtype: of activations and unquantised weights; None takes the checkpoint's own on a GPU and float32 on the
    CPU, which multiplies experts in no other and sums quantised products in the input's type.
    report: called with (stage, done bytes, total bytes). Raises DownloadError, CheckpointError, RequestError.
    """
    family, folder, notes = _open_target(name, lambda name: _on_disk(name, report))
    loaded = _finish_target(plan(folder, family.build, dtype), family, Trial.of(), report)
    return replace(loaded, notes=(*notes, *loaded.notes))


def load_drafter(
    name: str,
    target: LoadedTarget,
    *,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    report: Report | None = None,
) -> LoadedDrafter:
    """Load the drafter of a loaded target from a folder or hub id.

    dtype: None takes the target's. quantize: 4 or 8 packs a plain drafter's linear layers and embedding.
    Raises DownloadError, CheckpointError, PairingError, RequestError.
    """
    opened = _open_drafter(name, lambda name: _on_disk(name, report))
    names = (target.name, name)
    notes = check_pair(opened.network, target.model.config, opened.folder.config, names, target.base_model)
    notes += opened.notes
    made = _plan_drafter(opened, dtype or target.dtype, quantize)
    return replace(_finish_drafter(opened, made, Trial.of(), report), notes=tuple(notes))


# before weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """What lies in a folder or a repository. headers: of its tensors, where they are not in `path`. notes: for the
    user."""

    path: Path
    raw: dict[str, Any]
    headers: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()

    @property
    def config_file(self) -> str:
        return str(self.path / "config.json")


Open = Callable[[str], Files]  # a folder or hub id -> what lies there


@dataclass(frozen=True)
class Opened:
    """A drafter's folder, and what its config says it is."""

    kind: Kind
    network: Network
    folder: Folder
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedPair:
    """A target and its drafter of which configs and headers have been checked, and no weight read.

    opened, drafter: None where it has no network. lookup: as in LoadedPair. notes: for the user.
    """

    family: Family
    target: Plan
    opened: Opened | None
    drafter: Plan | None
    lookup: bool
    notes: tuple[str, ...]

    def size(self, dtype: mx.Dtype, on_cpu: bool = False) -> PairSize:
        """What it takes with weights, activations and caches in such a dtype."""
        model, drafter = cast(Target, self.target.model), self.drafter
        cache = Cache(model.specs, MAX_WIDTH, dtype)
        network = (self.opened.kind, drafter.model) if self.opened and drafter else None
        made = make_drafter(model, cache, network)
        size = size_of(
            self.target.folder.config,
            planned_bytes(self.target, dtype),
            planned_bytes(drafter, dtype) if drafter else 0,
            lambda tokens: cache.row_bytes(tokens) + made.row_bytes(tokens),
        )
        saves = 0
        if drafter and not drafter.quantize and "U32" not in {s.tensor.dtype for s in drafter.sources.values()}:
            saves = size.drafter_bytes - planned_bytes(replace(drafter, quantize=4), dtype)
        device = replace(CPU if on_cpu else GPU, number_bytes=dtype.size)
        return replace(size, device=device, num_aux_layers=len(made.taps), drafter_saves=saves)


def plan_pair(
    target: str, drafter: str | None, dtype: mx.Dtype | None, quantize: int | None, open_: Open
) -> PlannedPair:
    """Check a target and its drafter against their configs, headers and each other; arguments as in load_pair."""
    family, folder, notes = _open_target(target, open_)
    base, looks_up = split_name(drafter or "none")
    if base is None and quantize is not None:
        raise RequestError(f"quantize is {quantize!r}, but there is no drafter to quantise; name one, or leave it out")
    opened, found = _find_drafter(base, folder, open_)
    notes += found
    if opened is not None:
        names = (target, opened.folder.name)
        base_model = folder.headers is None and not _has_chat_template(folder.path)
        notes += check_pair(opened.network, folder.config, opened.folder.config, names, base_model)
        notes += opened.notes
    target_plan = plan(folder, family.build, dtype)
    draft_plan = _plan_drafter(opened, dtype or target_plan.dtype, quantize) if opened else None
    if draft_plan:
        notes += _compare_sizes(draft_plan, target_plan)
    return PlannedPair(family, target_plan, opened, draft_plan, looks_up, tuple(notes))


def _open_target(name: str, open_: Open) -> tuple[Family, Folder, list[str]]:
    files = open_(name)
    family = family_of(files.raw, files.config_file)
    config = family.read(files.raw, files.config_file)
    stored = family.stored(config)
    return family, Folder(name, files.path, files.raw, config, stored, files.headers), list(files.notes)


def _open_drafter(name: str, open_: Open) -> Opened:
    files = open_(name)
    kind, network = kind_of(files.raw, files.config_file)
    config = network.read(files.raw, files.config_file)
    folder = Folder(name, files.path, files.raw, config, network.stored(config), files.headers)
    return Opened(kind, network, folder, files.notes)


def own_drafter(target: str) -> str | None:
    """`target`, a folder or hub id, if its own files hold its drafter; None if another is to be looked for.

    Raises PairingError where its files should hold one and do not, and otherwise as load_pair.
    """
    _, folder, _ = _open_target(target, _on_disk)
    opened, lacking = _inside(folder)
    if lacking and not _separate(folder):
        raise PairingError(f"{lacking}; {_elsewhere(target)}")
    return target if opened else None


def _inside(target: Folder) -> tuple[Opened | None, str | None]:
    """The drafter among a target's own tensors, if there is one; what to say where there should be one and is none."""
    for kind in kinds():
        network, raw = kind.network, kind.network.inside(target.raw)
        if raw is None:
            continue
        config = network.read(raw, str(target.path / "config.json"))
        stored = network.stored(config)
        if network.prefix:
            stored = replace(stored, nested=True, prefix=network.prefix)
        if any(map(stored.holds, target.tensors())):
            return Opened(kind, network, replace(target, config=config, stored=stored)), None
        return None, (
            f"{target.name} should bring a drafter along, but its files hold none (conversions to MLX leave it out)"
        )
    return None, None


def _separate(target: Folder) -> str | None:
    """A drafter that lies in a folder of its own in the target's, or is known by the target's name."""
    return drafter_in(target.path) or find_drafter(target.name)


def _elsewhere(target: str) -> str:
    """Where to find the drafter that a target's files lack."""
    whole = whole_copy(target)
    return "name a copy that has it with --drafter" + (f", such as {whole}" if whole else "")


def _on_disk(name: str, report: Report | None = None) -> Files:
    """A folder or hub id, brought to this disk; refuses what is quantised by others."""
    path = hub.resolve(name, report)
    file = path / "config.json"
    if not file.is_file():
        read_headers(path)  # explains folders of other formats
    raw = read_json(file)
    _check_quantised(raw, file)
    stale = stale_index(path)
    return Files(path, raw, notes=(stale,) if stale else ())


def described(name: str) -> Files:
    """The same without a download: of a repository that is not here, the config and the headers alone."""
    here = hub.here(name)
    if here is not None:
        return _on_disk(str(here))
    path, raw, headers = hub.describe(name)
    _check_quantised(raw, path / "config.json")
    return Files(path, raw, headers)


def _check_quantised(raw: dict[str, Any], file: Path) -> None:
    other = raw.get("quantization_config")
    method = other.get("quant_method") if isinstance(other, dict) and "quantization" not in raw else None
    if method is not None:
        raise CheckpointError(
            f"{file}: quantised by {method!r}; expected plain weights or MLX's own quantisation, "
            "as in the google and mlx-community repositories"
        )


def _find_drafter(drafter: str | None, target: Folder, open_: Open) -> tuple[Opened | None, list[str]]:
    """The drafter and notes; "auto" makes a note of it where there is none to be had."""
    if drafter is None:
        return None, []
    if drafter != "auto":
        return _open_drafter(drafter, open_), []
    opened, lacking = _inside(target)
    if opened:
        return opened, []
    found = _separate(target)
    if found is None and lacking:
        return None, [f"{lacking}; decoding plainly ({_elsewhere(target.name)})"]
    if found is None:
        return None, [f"no drafter is known for {target.name}; decoding plainly (name one with --drafter)"]
    try:
        return _open_drafter(found, open_), []
    except DownloadError as error:
        return None, [f"decoding plainly, since the drafter could not be fetched: {error}"]


def _plan_drafter(opened: Opened, dtype: mx.Dtype, quantize: int | None) -> Plan:
    """The drafter's plan, to be quantised while reading if asked for and not so already."""
    if quantize not in (None, 4, 8):
        raise RequestError(f"quantize is {quantize!r}; expected 4 or 8")
    made = plan(opened.folder, opened.network.build, dtype)
    packed = [m for m in made.model.modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    bits = {m.bits for m in packed}
    if quantize and bits - {quantize}:
        raise RequestError(
            f"{opened.folder.name} is already quantised, to {min(bits - {quantize})} bits; expected a plain drafter "
            f"to quantise to {quantize}; leave the option out, or name the plain drafter"
        )
    return replace(made, quantize=None if bits else quantize)


def _compare_sizes(drafter: Plan, target: Plan) -> list[str]:
    """A warning if the drafter is as large as its target; without having read either."""
    sizes = [sum(s.tensor.bytes for s in p.sources.values() if not s.half) for p in (drafter, target)]
    if sizes[0] < sizes[1]:
        return []
    return [
        f"the drafter's weights take {sizes[0] / 1e9:.2f} GB and the target's {sizes[1] / 1e9:.2f}, so that drafting "
        "costs as much as it saves; name a smaller drafter"
    ]


# weights --------------------------------------------------------------------------------------------------


def _finish_target(made: Plan, family: Family, trial: Trial, report: Report | None) -> LoadedTarget:
    folder = made.folder
    sampling, eos, notes = _defaults(folder)
    base_model = not _has_chat_template(folder.path)
    weight_bytes = read(made, report)
    model, kernels = with_kernels(cast(Target, made.model), made.dtype, trial)
    return LoadedTarget(
        model=model,
        path=folder.path,
        name=folder.name,
        sampling=sampling,
        eos=eos,
        dtype=made.dtype,
        weight_bytes=weight_bytes,
        base_model=base_model,
        family=family.name,
        notes=notes,
        kernels=kernels,
    )


def _finish_drafter(opened: Opened, made: Plan, trial: Trial, report: Report | None) -> LoadedDrafter:
    weight_bytes, model, folder = read(made, report), made.model, made.folder
    if isinstance(model, Assistant) and model.config.clusters:
        ordering = model.masked_embedding.token_ordering
        if not mx.array_equal(mx.sort(ordering), mx.arange(ordering.size, dtype=ordering.dtype)).item():
            raise CheckpointError(
                f"{folder.path}: token_ordering is no ordering of {ordering.size} tokens; download it again"
            )
    kernels = with_head_kernel(model, trial) if isinstance(model, Assistant) else ()
    return LoadedDrafter(opened.kind, model, folder.path, folder.name, weight_bytes, kernels=kernels)


# what comes with a target ---------------------------------------------------------------------------------


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    file = path / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def _defaults(folder: Folder) -> tuple[Sampling, frozenset[int], tuple[str, ...]]:
    """(sampling, end tokens, notes) from a target's generation_config.json; greedy where there is none."""
    file, config = folder.path / "generation_config.json", str(folder.path / "config.json")
    values = read_json(file) if file.is_file() else {}
    eos = _token_ids(values.get("eos_token_id"), str(file))
    for source in (folder.raw, folder.raw.get("text_config", {})):
        eos |= _token_ids(source.get("eos_token_id"), config)
    odd = {k: values[k] for k, neutral in UNSUPPORTED.items() if values.get(k) not in (None, neutral)}
    notes = tuple(f"{file}: {k} {v!r} is not supported and has no effect" for k, v in odd.items())
    return _sampling(values, str(file)), frozenset(eos), notes


def _token_ids(value: Any, where: str) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: eos_token_id is {value!r}; expected token ids")
    return set(ids)


def _sampling(values: dict[str, Any], where: str) -> Sampling:
    """transformers' rule: greedy unless do_sample is true; keys left out or null take its defaults. A repetition
    penalty holds for both."""
    sample = values.get("do_sample")
    if sample not in (None, True, False):
        raise CheckpointError(f"{where}: do_sample is {sample!r}; expected true or false")
    chosen: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    chosen |= {k: values[k] for k in chosen if values.get(k) is not None}
    try:
        return Sampling(**chosen) if sample else Sampling(0.0, repetition_penalty=chosen["repetition_penalty"])
    except RequestError as error:
        raise CheckpointError(f"{where}: {error}") from None
