"""From a folder or hub id to a target and drafter ready to run. Knows no rows, requests or samplers.

Order: both configs, whether the two fit, all headers, only then weights, so that a mistake costs no reading.
Vision and audio towers stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp import hub
from mlx_mtp.few_rows import use_kernels
from mlx_mtp.models.config import AssistantConfig, read_assistant, read_target
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.pairs import check_pair, find_drafter
from mlx_mtp.rows import CheckpointError, DownloadError, RequestError, Sampling
from mlx_mtp.tensors import read_headers, read_json
from mlx_mtp.weights import Folder, Plan, Report, plan, read

__all__ = [
    "LoadedDrafter",
    "LoadedPair",
    "LoadedTarget",
    "Report",
    "check_pair",
    "find_drafter",
    "load_drafter",
    "load_pair",
    "load_target",
]

# Keys of generation_config.json that would change the text and are not supported: their neutral values.
UNSUPPORTED = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class LoadedTarget:
    """A target ready to run.

    name: as the user wrote it. sampling: defaults from its generation_config.json. eos: its end tokens.
    base_model: it has no chat template, so it was not tuned for instructions. notes: for the user.
    """

    model: Gemma4
    path: Path
    name: str
    sampling: Sampling
    eos: frozenset[int]
    dtype: mx.Dtype
    weight_bytes: int
    base_model: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedDrafter:
    """A drafter ready to run, by default in its target's dtype. notes: for the user."""

    model: Assistant
    path: Path
    name: str
    weight_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedPair:
    """A target and its drafter; None decodes plainly. notes: of both, and why there is no drafter."""

    target: LoadedTarget
    drafter: LoadedDrafter | None
    notes: tuple[str, ...]


def load_pair(
    target: str,
    drafter: str | None = "auto",
    *,
    dtype: mx.Dtype | None = None,
    quantize: int | None = None,
    report: Report | None = None,
) -> LoadedPair:
    """Load a target and its drafter, checking both before a weight of either is read.

    drafter: a folder or hub id; "auto" looks for the one made for the target and decodes plainly, with a
    note, where none is known or it cannot be fetched; None decodes plainly. Others as in load_drafter.
    Raises DownloadError, CheckpointError, PairingError, RequestError.
    """
    folder = _open(target, read_target, report)
    if drafter is None and quantize is not None:
        raise RequestError(f"quantize is {quantize!r}, but there is no drafter to quantise; name one, or leave it out")
    draft_folder, notes = _open_drafter(drafter, target, report)
    if draft_folder is not None:
        names = (target, draft_folder.name)
        notes += check_pair(folder.text, _assistant(draft_folder), names, not _has_chat_template(folder.path))
    target_plan = plan(folder, Gemma4, dtype)
    draft_plan = draft_folder and _plan_drafter(draft_folder, dtype or target_plan.dtype, quantize)
    loaded = _finish_target(target_plan, report)
    notes += loaded.notes
    return LoadedPair(loaded, _finish_drafter(draft_plan, report) if draft_plan else None, tuple(notes))


def load_target(name: str, *, dtype: mx.Dtype | None = None, report: Report | None = None) -> LoadedTarget:
    """Load a target from a folder or hub id.

    dtype: of activations and unquantised weights; None takes the checkpoint's own on a GPU and float32 on the
    CPU, which multiplies experts in no other and sums quantised products in the input's type.
    report: called with (stage, done bytes, total bytes). Raises DownloadError, CheckpointError, RequestError.
    """
    return _finish_target(plan(_open(name, read_target, report), Gemma4, dtype), report)


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
    folder = _open(name, read_assistant, report)
    notes = check_pair(target.model.config, _assistant(folder), (target.name, name), target.base_model)
    drafter = _finish_drafter(_plan_drafter(folder, dtype or target.dtype, quantize), report)
    return replace(drafter, notes=tuple(notes))


# before weights -------------------------------------------------------------------------------------------


def _open(name: str, parse: Callable[[dict, str], Any], report: Report | None) -> Folder:
    """The folder of a checkpoint with its config; refuses what is quantised by others."""
    path = hub.resolve(name, report)
    file = path / "config.json"
    if not file.is_file():
        read_headers(path)  # explains folders of other formats
    raw = read_json(file)
    config = parse(raw, str(file))
    other = raw.get("quantization_config")
    method = other.get("quant_method") if isinstance(other, dict) and "quantization" not in raw else None
    if method is not None:
        raise CheckpointError(
            f"{file}: quantised by {method!r}; expected plain weights or MLX's own quantisation, "
            "as in the google and mlx-community repositories"
        )
    return Folder(name, path, raw, config)


def _open_drafter(drafter: str | None, target: str, report: Report | None) -> tuple[Folder | None, list[str]]:
    """The drafter's folder and notes; "auto" makes a note of it where there is none to be had."""
    if drafter is None:
        return None, []
    if drafter != "auto":
        return _open(drafter, read_assistant, report), []
    found = find_drafter(target)
    if found is None:
        return None, [f"no drafter is known for {target}; decoding plainly (name one with --drafter)"]
    try:
        return _open(found, read_assistant, report), []
    except DownloadError as error:
        return None, [f"decoding plainly, since the drafter could not be fetched: {error}"]


def _assistant(folder: Folder) -> AssistantConfig:
    assert isinstance(folder.config, AssistantConfig)
    return folder.config


def _plan_drafter(folder: Folder, dtype: mx.Dtype, quantize: int | None) -> Plan:
    """The drafter's plan, to be quantised while reading if asked for and not so already."""
    if quantize not in (None, 4, 8):
        raise RequestError(f"quantize is {quantize!r}; expected 4 or 8")
    made = plan(folder, Assistant, dtype)
    packed = [m for m in made.model.modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    bits = {m.bits for m in packed}
    if quantize and bits - {quantize}:
        raise RequestError(
            f"{folder.name} is already quantised, to {min(bits - {quantize})} bits; expected a plain drafter "
            f"to quantise to {quantize}; leave the option out, or name the plain drafter"
        )
    return replace(made, quantize=None if bits else quantize)


# weights --------------------------------------------------------------------------------------------------


def _finish_target(made: Plan, report: Report | None) -> LoadedTarget:
    folder = made.folder
    sampling, eos, notes = _defaults(folder)
    base_model = not _has_chat_template(folder.path)
    weight_bytes = read(made, report)
    assert isinstance(made.model, Gemma4)
    use_kernels(made.model)
    return LoadedTarget(
        made.model, folder.path, folder.name, sampling, eos, made.dtype, weight_bytes, base_model, notes
    )


def _finish_drafter(made: Plan, report: Report | None) -> LoadedDrafter:
    weight_bytes = read(made, report)
    model, folder = made.model, made.folder
    assert isinstance(model, Assistant)
    use_kernels(model)
    if model.config.clusters:
        ordering = model.masked_embedding.token_ordering
        if not mx.array_equal(mx.sort(ordering), mx.arange(ordering.size, dtype=ordering.dtype)).item():
            raise CheckpointError(
                f"{folder.path}: token_ordering is no ordering of {ordering.size} tokens; download it again"
            )
    return LoadedDrafter(model, folder.path, folder.name, weight_bytes)


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
