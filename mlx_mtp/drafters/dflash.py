"""DFlash as the engine sees it: a block of drafts in one pass, over a cache of projected target features of its own."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.cache import Cache
from mlx_mtp.drafters.features import FeatureDrafter
from mlx_mtp.drafters.kinds import Kind, Network
from mlx_mtp.models.dflash import DFlash, DFlashConfig, is_dflash, read_dflash
from mlx_mtp.models.families import Stored, Target, TargetConfig
from mlx_mtp.rows import Draft, Forward, PairingError
from mlx_mtp.sampling import Sampler


class DFlashDrafter(FeatureDrafter):
    """Drafts at most a block less the known token, whatever is asked for.

    A narrower draft is made from a narrower block, as in vLLM, mlx-vlm and z-lab's own code: the masks beyond it are
    not computed, so the layers that look ahead see fewer of them than in the full block.
    """

    def __init__(self, target: Target, network: DFlash, cache: Cache) -> None:
        """cache: the target's, of which only the bounds of the rows' lengths are read."""
        self.taps: tuple[int, ...] = network.config.taps
        size = len(self.taps) * network.config.hidden_size * cache.dtype.size
        super().__init__(network.specs, size, network.remember, cache)
        self._target, self._network = target, network

    def propose(self, rows: slice, bonus: mx.array, sampler: Sampler, width: int) -> Draft:
        self._store()
        config = self._network.config
        width = min(width, config.block - 1)
        masks = mx.full((bonus.shape[0], width), config.mask, mx.int32)
        pass_ = self._open(rows, width + 1)
        block = self._target.embed(mx.concatenate([bonus[:, None], masks], axis=1))
        hidden = self._network.denoise(block, pass_)[:, 1:]
        logits = self._target.logits(hidden, capped=config.softcap is not None and not sampler.greedy)
        position = self._rows.lengths[rows][:, None] + 1 + mx.arange(width)
        return sampler.draw_all(logits, position)

    def observe(self, fwd: Forward, kept: mx.array) -> None:
        tapped = mx.concatenate([fwd.taps[i] for i in self.taps], axis=-1)
        self._see(fwd, tapped.reshape(*fwd.tokens.shape, -1), kept)


# pairing ----------------------------------------------------------------------------------------------------


def check(target: TargetConfig, config: DFlashConfig, advice: str) -> list[str]:
    """Raise PairingError unless the drafter's sizes are the target's, and the layers it taps are there."""
    facts = (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("a vocabulary of", config.vocab_size, target.vocab_size),
        ("layers numbering", config.target_layers, len(target.layers)),
        ("logits capped at", config.softcap or target.softcap, target.softcap),
    )
    for what, got, expected in facts:
        if got != expected:
            raise PairingError(f"drafter expects {what} {got}, target has {expected}; {advice}")
    if max(config.taps) >= len(target.layers):
        raise PairingError(
            f"drafter taps layer {max(config.taps)}, expected at most {len(target.layers) - 1}, the target's last; "
            f"{advice}"
        )
    if config.mask >= target.vocab_size:
        raise PairingError(f"drafter's mask token is {config.mask}, target has {target.vocab_size} tokens; {advice}")
    return []


KIND = Kind(
    "dflash",
    lambda parts: DFlashDrafter(parts.target, parts.network, parts.cache),
    Network(recognise=is_dflash, read=read_dflash, build=DFlash, check=check, stored=lambda config: Stored()),
)
