"""Qwen 3.5's own head as the engine sees it: it drafts token after token over a cache of every position's features.

A feature needs the token behind its position, so that of a row's last position is complete only with the bonus token.
Its keys and values are written with the others', and once more by the first step of a draft, which reads it out.
A row that continues another's beginning has, in that one place, the keys and values of the other's next token: at most
its first drafts can suffer from that.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mtp.buffers import put
from mlx_mtp.cache import Cache
from mlx_mtp.drafters.features import FeatureDrafter
from mlx_mtp.drafters.kinds import Kind, Network
from mlx_mtp.models.families import Target, TargetConfig
from mlx_mtp.models.qwen3_5 import TYPES, QwenConfig, read_qwen
from mlx_mtp.models.qwen3_5_mtp import QwenMtp, stored
from mlx_mtp.rows import Draft, Forward, PairingError
from mlx_mtp.sampling import Drawn, Sampler


class QwenMtpDrafter(FeatureDrafter):
    """Drafts with a target's MTP head. All rows of a step run in one call, whatever their lengths."""

    def __init__(self, target: Target, network: QwenMtp, cache: Cache) -> None:
        """cache: the target's, of which only the lengths of the rows and their bounds are read."""
        size = target.config.hidden_size * cache.dtype.size
        super().__init__(network.specs, size, network.remember, cache)
        self._target, self._network = target, network
        self.taps: tuple[int, ...] = (len(target.layers) - 1,)  # so that every column's hidden state is there
        # [R, 1, H]: the last feature that is stored
        self._newest = mx.zeros((0, 1, target.config.hidden_size), cache.dtype)

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        self._store()
        length = self._rows.lengths[rows]
        hidden = feature = self._newest[rows]
        steps: list[Drawn] = []
        for i in range(width):
            if i:
                feature = self._network.features(self._target.embed(steps[-1].tokens)[:, None], hidden)
            hidden = self._step(rows, feature, length - 1 + i, i)
            drafted = [s.tokens for s in steps]
            scores, _ = sampler.offer(self._target.logits(hidden[:, 0]), None, drafted)
            steps.append(sampler.draw(scores, None, length + 1 + i, drafted))
        return Drawn.draft(steps)

    def _step(self, rows: slice, feature: mx.array, position: mx.array, ahead: int) -> mx.array:
        """One column a row at position [B], which does not count as stored."""
        lengths = self._cache.lengths
        self._cache.lengths = put(lengths, rows, position)
        hidden = self._network.step(feature, self._open(rows, 1, ahead))
        self._cache.lengths = lengths
        return hidden

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        assert fwd.newest is not None
        newest, at = fwd.newest[:, None], mx.arange(fwd.tokens.shape[1])
        following = mx.concatenate([fwd.tokens[:, 1:], newest], axis=1)
        following = mx.where(at == kept[:, None] - 1, newest, following)
        self._see(fwd, self._network.features(self._target.embed(following), fwd.hidden), kept)

    def _take(self, rows: slice, features: mx.array, kept: mx.array) -> None:
        super()._take(rows, features, kept)
        newest = mx.take_along_axis(features, mx.maximum(kept - 1, 0)[:, None, None], axis=1)
        self._newest = put(self._newest, rows, mx.where((kept > 0)[:, None, None], newest, self._newest[rows]))

    def begin(self, row: int, length: int, state: Any) -> None:
        super().begin(row, length, state)
        fresh = mx.zeros((1, *self._newest.shape[1:]), self._newest.dtype)
        self._newest = mx.concatenate([self._newest[:row], fresh])

    def row_bytes(self, positions: int) -> int:
        return super().row_bytes(positions) + self._newest.shape[-1] * self._newest.dtype.size

    def leave(self, row: int, last: int) -> None:
        super().leave(row, last)
        if row < last:
            self._newest = put(self._newest, row, self._newest[last])
        self._newest = self._newest[:last]

    def state(self) -> Any:
        return super().state(), self._newest

    def restore(self, state: Any) -> None:
        stored, self._newest = state
        super().restore(stored)


# pairing ----------------------------------------------------------------------------------------------------


def read(config: dict[str, Any], where: str) -> QwenConfig:
    """The config.json of the target that the head belongs to. Raises CheckpointError, PairingError."""
    read_ = read_qwen(config, where)
    if read_.mtp_layers != 1:
        raise PairingError(
            f"{where}: mtp_num_hidden_layers is {read_.mtp_layers}; expected 1, as in the published Qwen 3.5 models; "
            "name another drafter"
        )
    return read_


def check(target: TargetConfig, config: QwenConfig, advice: str) -> list[str]:
    """Raise PairingError unless the head was made for a target of such sizes."""
    if not isinstance(target, QwenConfig):
        raise PairingError(f"drafter is the MTP head of a Qwen 3.5 model, and the target is none; {advice}")
    facts = (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("a vocabulary of", config.vocab_size, target.vocab_size),
        ("layers numbering", len(config.layers), len(target.layers)),
    )
    for what, got, expected in facts:
        if got != expected:
            raise PairingError(
                f"drafter is the MTP head of a Qwen 3.5 model with {what} {got}, target has {expected}; a head drafts "
                "for its own model only, and a smaller Qwen 3.5 cannot draft as a whole: its recurrent layers could "
                "not take back what was rejected; --drafter auto takes the target's own head"
            )
    return []


def _promises_head(config: dict[str, Any]) -> bool:
    text = config.get("text_config", config)
    return config.get("model_type") in TYPES and bool(text.get("mtp_num_hidden_layers"))


KIND = Kind(
    "qwen_mtp",
    lambda parts: QwenMtpDrafter(parts.target, parts.network, parts.cache),
    Network(
        recognise=lambda config: config.get("model_type") in TYPES,
        read=read,
        build=QwenMtp,
        check=check,
        stored=stored,
        inside=lambda config: config if _promises_head(config) else None,
    ),
)
