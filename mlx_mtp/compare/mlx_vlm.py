"""mlx-vlm as one of the runtimes compared: with the same drafter, and plain. Its private names are touched here."""

# pyright: reportMissingImports=false
# It is no dependency, not even for development.

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models.gemma4 import gemma4
from mlx_vlm.models.gemma4.config import ModelConfig, TextConfig, VisionConfig
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.utils import load_model

from mlx_mtp.compare.cases import Prompt
from mlx_mtp.compare.casting import cast
from mlx_mtp.compare.runs import Drafts
from mlx_mtp.rows import CheckpointError


@dataclass(frozen=True)
class VlmPair:
    """mlx-vlm's target and drafter."""

    model: Any
    drafter: Any
    kind: str


class MlxVlm:
    """mlx-vlm: `generate_step` for one request, its server's `BatchGenerator` for several.

    block: its draft_block_size, one more than the tokens drafted; None decodes plainly.
    """

    batches = True

    def __init__(self, pair: VlmPair, block: int | None) -> None:
        self._pair, self._block, self._drafts = pair, block, Drafts()

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        pair, options = self._pair, {}
        if self._block:
            self._set_block()
            options = {
                "draft_model": pair.drafter,
                "draft_kind": pair.kind,
                "draft_block_size": self._block,
            }
        steps = generate_step(mx.array([prompt]), pair.model, None, None, max_tokens=tokens, temperature=0.0, **options)
        for token, _ in steps:
            yield [int(token)]
        self._count()

    def open(self) -> MlxVlmSession:
        if self._block:
            self._set_block()
        return MlxVlmSession(self._pair, self._block, self._count)

    def drafts(self) -> Drafts:
        taken, self._drafts = self._drafts, Drafts()
        return taken

    def _set_block(self) -> None:
        """Its loop goes back to the configured size, 4, where a larger one is only asked for."""
        self._pair.drafter.config.block_size = self._block

    def _count(self) -> None:
        """Add the rounds that it has just recorded; for a batch each is one round of all rows, which it keeps level."""
        if not self._block:
            return
        kept, drafted = self._pair.drafter.accept_lens, self._pair.drafter.draft_lens
        most = range(max(drafted, default=0))
        at = [sum(d > i for d in drafted) for i in most], [sum(k > i for k in kept) for i in most]
        self._drafts.add(len(kept), *at)


class MlxVlmSession:
    """What mlx-vlm's server runs on its GPU thread."""

    def __init__(self, pair: VlmPair, block: int | None, count: Callable[[], None]) -> None:
        options = {}
        if block:
            options = {"draft_model": pair.drafter, "draft_kind": pair.kind, "draft_block_size": block}
        self._model, self._count = pair.model, count
        self._generator = BatchGenerator(
            pair.model.language_model,
            _NoTokenizer(),
            compute_logprobs=False,
            greedy_sampling=True,
            **options,
        )

    def submit(self, prompt: Prompt, tokens: int) -> int:
        embedded = self._model.get_input_embeddings(mx.array([prompt]), None, mask=None).to_dict()
        kwargs = {name: value for name, value in embedded.items() if value is not None}
        return self._generator.insert([list(prompt)], tokens, prompt_kwargs=[kwargs])[0]

    def step(self) -> list[tuple[int, list[int]]]:
        new: dict[int, list[int]] = {}
        for response in self._generator.next()[1]:
            if response.token is not None:
                new.setdefault(response.uid, []).append(int(response.token))
        return list(new.items())

    def close(self) -> None:
        self._count()
        self._generator.close()


class _NoTokenizer:
    """Stands where mlx-vlm asks its processor whether a token ends the text: none does."""

    @property
    def stopping_criteria(self) -> _NoTokenizer:
        return self

    def add_eos_token_ids(self, tokens: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


def load(target: Path, drafter: Path, dtype: mx.Dtype | None) -> VlmPair:
    """The pair from two folders. dtype: what both are cast to; None keeps the checkpoint's.

    It drafts only for its multimodal class, so a checkpoint of the text alone gets a vision tower that is never used.
    """
    config = json.loads((target / "config.json").read_text())
    model = load_model(target) if "vision_config" in config else _text_only(target, config)
    draft, kind = load_drafter(str(drafter))
    if dtype is not None:
        cast(model, dtype)
        cast(draft, dtype)
    mx.eval(model.parameters(), draft.parameters())
    return VlmPair(model, draft, kind)


def _text_only(target: Path, config: dict) -> Any:
    """Raises CheckpointError where a weight is missing, and for quantised checkpoints."""
    if "quantization" in config:
        raise CheckpointError(f"{target}: mlx-vlm drafts for no quantised checkpoint without its vision tower")
    small = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    one = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    text, vision = TextConfig.from_dict(config), VisionConfig(**small, **one)
    model = gemma4.Model(ModelConfig(text_config=text, vision_config=vision, audio_config=None))
    weights: dict[str, mx.array] = {}
    for file in sorted(target.glob("*.safetensors")):
        arrays: Any = mx.load(str(file))
        for name, value in arrays.items():
            weights |= _names("language_model." + name, value)
    model.load_weights(list(weights.items()), strict=False)
    parameters: Any = tree_flatten(model.language_model.parameters())
    missing = sorted({"language_model." + name for name, _ in parameters} - set(weights))
    if missing:
        raise CheckpointError(f"{target}: mlx-vlm's model has weights that the checkpoint lacks, such as {missing[0]}")
    return model


def _names(name: str, value: mx.array) -> dict[str, mx.array]:
    """A weight under mlx-vlm's name; fused expert matrices are split."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = (mx.contiguous(part) for part in mx.split(value, 2, axis=-2))
        stem = name.removesuffix("gate_up_proj") + "switch_glu."
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {name.replace("down_proj", "switch_glu.down_proj.weight"): value}
    return {name: value}
