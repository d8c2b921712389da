"""Gemma 4 on Apple's MLX, several tokens a pass: MTP drafting with exactly the target's own text."""

from mlx_mtp.pair import Chat, Pair, load
from mlx_mtp.rows import (
    GREEDY,
    CheckpointError,
    Completion,
    DownloadError,
    Event,
    MlxMtpError,
    PairingError,
    RequestError,
    Sampling,
    Stats,
    TokenLogprob,
)

__version__ = "0.1.0"

__all__ = [
    "GREEDY",
    "Chat",
    "CheckpointError",
    "Completion",
    "DownloadError",
    "Event",
    "MlxMtpError",
    "Pair",
    "PairingError",
    "RequestError",
    "Sampling",
    "Stats",
    "TokenLogprob",
    "load",
]
