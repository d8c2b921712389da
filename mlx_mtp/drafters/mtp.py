"""Gemma 4's own drafter as the engine sees it: one hidden state a row, keys and values read in place from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import put
from mlx_mtp.cache import Cache
from mlx_mtp.drafters.kinds import Kind, Network
from mlx_mtp.kernels import head
from mlx_mtp.models.config import DRAFTER_TYPES, TARGET_TYPES, AssistantConfig, LayerConfig, TextConfig, read_assistant
from mlx_mtp.models.families import Stored, Target, TargetConfig
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.rows import Draft, Forward, PairingError
from mlx_mtp.sampling import Drawn, Sampler


@dataclass(frozen=True)
class Convention:
    """Where the drafter's query stands and how far it sees; nothing in the checkpoints decides it.

    position_offset: 0 puts the query at the bonus token's own index n (transformers, LiteRT-LM), -1 at that of the
    hidden state (vLLM, mlx-vlm). extra_keys: sliding layers show the last window + extra_keys committed positions.
    """

    position_offset: int = 0
    extra_keys: int = 1


class MtpDrafter:
    """Drafts with an assistant. All rows of a step run in one call, whatever their lengths."""

    taps: tuple[int, ...] = ()

    def __init__(
        self, target: Target, assistant: Assistant, cache: Cache, convention: Convention | None = None
    ) -> None:
        """cache: the target's, which the drafter reads and never writes."""
        self._target, self._assistant, self._cache = target, assistant, cache
        self._convention = convention or Convention()
        self._clusters = assistant.clusters if assistant.head_by_kernel else None
        # [R, 1, T]: what produced each row's newest token
        self._hidden = mx.zeros((0, 1, target.config.hidden_size), cache.dtype)

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        length = self._cache.lengths[rows]
        position, views = length + self._convention.position_offset, self._views(rows)
        token, hidden = bonus, self._hidden[rows]
        steps: list[Drawn] = []
        for i in range(width):
            y, hidden = self._assistant.step(self._target.embed(token[:, None]), hidden, position, views)
            steps.append(self._drawn(y, sampler, length + 1 + i, steps))
            token = steps[-1].tokens
        return Drawn.draft(steps)

    def _drawn(self, y: mx.array, sampler: Sampler, position: mx.array, before: list[Drawn]) -> Drawn:
        """A step's token from its hidden state y [B, h]."""
        drafted = [step.tokens for step in before]
        found = self._assistant.logits(y) if self._clusters is None else head.logits(y, self._clusters)
        scores, which = sampler.offer(*found, drafted)
        return sampler.draw(scores, which, position, drafted)

    def _views(self, rows: slice):
        """(sliding, full) committed keys and values; the same in all steps of a round."""
        sliding, full = self._target.config.drafter_slots
        window = self._cache.specs[sliding].window
        assert window is not None
        reach = window + self._convention.extra_keys
        return self._cache.committed(sliding, rows, reach), self._cache.committed(full, rows, None)

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        skipped = fwd.tokens.shape[1] - fwd.hidden.shape[1]
        if fwd.hidden.shape[1] == 1:
            picked = fwd.hidden
        elif fwd.picked is None:
            column = mx.maximum(kept - 1 - skipped, 0)[:, None, None]
            picked = mx.take_along_axis(fwd.hidden, column, axis=1)
        else:
            picked = fwd.picked[:, None]
        if fwd.still:
            picked = mx.where((kept > 0)[:, None, None], picked, self._hidden[fwd.rows])
        if picked.shape[0] == self._hidden.shape[0]:
            self._hidden = picked
        else:
            self._hidden = put(self._hidden, fwd.rows, picked)

    def begin(self, row: int, length: int, state: None) -> None:
        self._hidden = mx.concatenate([self._hidden, mx.zeros((1, *self._hidden.shape[1:]), self._hidden.dtype)])

    def snapshot(self, row: int, length: int) -> None:
        # Keys and values are the target's, and the next column, which always comes, brings its hidden state.
        return None

    def row_bytes(self, positions: int) -> int:
        return self._target.config.hidden_size * self._cache.dtype.size

    def leave(self, row: int, last: int) -> None:
        if row < last:
            self._hidden = put(self._hidden, row, self._hidden[last])
        self._hidden = self._hidden[:last]

    def state(self) -> mx.array:
        return self._hidden

    def restore(self, state: mx.array) -> None:
        self._hidden = state


# pairing ----------------------------------------------------------------------------------------------------


def check(target: TargetConfig, config: AssistantConfig, advice: str) -> list[str]:
    """Raise PairingError unless every size that the drafter shares with its target is the target's."""
    if not isinstance(target, TextConfig):
        raise PairingError(f"drafter reads the keys and values of a Gemma 4 target, and this is none; {advice}")
    if config.backbone_size != target.hidden_size:
        raise PairingError(
            f"drafter expects hidden size {config.backbone_size}, target has {target.hidden_size}; {advice}"
        )
    if config.text.vocab_size != target.vocab_size:
        raise PairingError(f"drafter has vocabulary {config.text.vocab_size}, target has {target.vocab_size}; {advice}")
    sliding, full = target.drafter_reads
    for index, layer in enumerate(config.text.layers):
        kind, owner = ("full", full) if layer.window is None else ("sliding", sliding)
        if owner < 0:
            raise PairingError(
                f"drafter layer {index} reads a {kind} layer, target has none with keys of its own; {advice}"
            )
        _check_layer(index, layer, target.layers[owner], advice)
    return []


def _check_layer(index: int, layer: LayerConfig, owner: LayerConfig, advice: str) -> None:
    facts = (
        ("heads of size", layer.head_dim, owner.head_dim),
        ("key heads numbering", layer.kv_heads, owner.kv_heads),
        ("a sliding window of", layer.window, owner.window),
        ("a RoPE base of", layer.rope_theta, owner.rope_theta),
        ("a RoPE factor of", layer.rope_factor, owner.rope_factor),
        ("rotated frequencies numbering", layer.rotated, owner.rotated),
    )
    for what, got, expected in facts:
        if got != expected:
            raise PairingError(f"drafter layer {index} expects {what} {got}, target has {expected}; {advice}")
    if layer.heads % owner.kv_heads:
        raise PairingError(
            f"drafter layer {index} has {layer.heads} heads, expected a multiple of the target's "
            f"{owner.kv_heads} key heads; {advice}"
        )


def _merged(config: dict[str, Any]) -> dict[str, Any] | None:
    """The drafter's config.json that oMLX writes into its target's when it merges the two."""
    text = config.get("text_config", config)
    found = text.get("mtp_assistant_config") if config.get("model_type") in TARGET_TYPES else None
    return found if isinstance(found, dict) else None


KIND = Kind(
    "mtp",
    lambda parts: MtpDrafter(parts.target, parts.network, parts.cache),
    Network(
        recognise=lambda config: config.get("model_type") in DRAFTER_TYPES,
        read=read_assistant,
        build=Assistant,
        check=check,
        stored=lambda config: Stored(nested=False, layers=config.text.layers),
        inside=_merged,
        prefix="mtp.",
    ),
)
