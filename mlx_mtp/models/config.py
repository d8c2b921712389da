"""What a config.json says about a Gemma 4 target or drafter, as frozen dataclasses. Reads no weights.

Every layer's sizes are worked out here, so that networks hold no defaults and no conditions on names.
Keys and defaults follow transformers 5.22 and 5.23 (`configuration_gemma4*.py`): `global_head_dim` and
`num_global_key_value_heads`, or the `per_layer_config` table that 5.23 writes instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlx_mtp.rows import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"
TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True)
class PassSize:
    """What a pass of a target holds in memory at once, besides its cache.

    token_numbers: activations per position, of the widest layer and those still alive around it. heads, window: of the
    attention scores of sliding layers; window 0 where there are none.
    """

    token_numbers: int
    heads: int
    window: int = 0


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of one layer. window: None sees everything. owner: the layer whose keys and values it reads."""

    window: int | None
    owner: int
    heads: int
    kv_heads: int
    head_dim: int
    k_eq_v: bool
    mlp_size: int
    rope_theta: float
    rope_factor: float
    rotated: int  # leading frequencies that turn; the others of head_dim / 2 stand still


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts beside the dense branch of every layer."""

    experts: int
    top_k: int
    width: int


@dataclass(frozen=True)
class TextConfig:
    """A Gemma 4 text stack. ple_size: width of the per-layer inputs, 0 = none. softcap: None = no cap."""

    vocab_size: int
    hidden_size: int
    eps: float
    layers: tuple[LayerConfig, ...]
    max_positions: int
    softcap: float | None
    ple_size: int
    ple_vocab_size: int
    moe: MoeConfig | None
    eos: tuple[int, ...]

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that store keys and values, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.owner == i)

    @property
    def pass_size(self) -> PassSize:
        """The factors are the peaks of prompt chunks measured at published widths (`bench/memory.py`)."""
        numbers = 14 * self.hidden_size + 6 * max(layer.mlp_size for layer in self.layers)
        numbers += 3 * self.ple_size * len(self.layers)
        if self.moe:
            numbers += self.moe.top_k * (4 * self.hidden_size + 3 * self.moe.width)
        heads = max(layer.heads for layer in self.layers)
        return PassSize(numbers, heads, max(layer.window or 0 for layer in self.layers))

    @property
    def drafter_reads(self) -> tuple[int, int]:
        """(sliding, full): the last layers of each kind that own keys and values; the drafter reads them."""
        sliding = [i for i in self.owners if self.layers[i].window is not None]
        full = [i for i in self.owners if self.layers[i].window is None]
        return sliding[-1] if sliding else -1, full[-1] if full else -1

    @property
    def drafter_slots(self) -> tuple[int, int]:
        """The same as places in the cache, which has a layer for each of `owners`; -1 where there is none."""
        sliding, full = (self.owners.index(i) if i >= 0 else -1 for i in self.drafter_reads)
        return sliding, full


@dataclass(frozen=True)
class AssistantConfig:
    """A drafter. clusters: (centroids, how many of them are scored) of the clustered head; None if tied."""

    text: TextConfig
    backbone_size: int
    clusters: tuple[int, int] | None


def read_target(config: dict, where: str) -> TextConfig:
    """config.json of a target -> TextConfig. Raises CheckpointError naming `where` and the key."""
    kind = config.get("model_type")
    if kind in DRAFTER_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, a drafter; pass it as that, and a Gemma 4 model as the target"
        )
    if kind not in TARGET_TYPES:
        raise CheckpointError(f"{where}: model_type is {kind!r}; supported targets: {', '.join(TARGET_TYPES)}")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config is {type(text).__name__}; expected an object")
    eos = config.get("eos_token_id", text.get("eos_token_id"))
    return _text(Reader(text, where), eos, unified="unified" in kind)


def read_assistant(config: dict, where: str) -> AssistantConfig:
    """config.json of a drafter -> AssistantConfig. Raises CheckpointError naming `where` and the key."""
    kind = config.get("model_type")
    if kind in TARGET_TYPES:
        raise CheckpointError(f"{where}: model_type is {kind!r}, a target; its drafter has '-assistant' in its name")
    if kind not in DRAFTER_TYPES:
        raise CheckpointError(f"{where}: model_type is {kind!r}; supported drafters: {', '.join(DRAFTER_TYPES)}")
    if not isinstance(config.get("text_config"), dict):
        raise CheckpointError(f"{where}: no text_config; a {kind} config nests its layers there")
    top = Reader(config, where)
    text = _text(Reader(config["text_config"], where), None, unified="unified" in kind, drafter=True)
    clusters = None
    if config.get("use_ordered_embeddings", False):
        clusters = (top.integer("num_centroids", 2048), top.integer("centroid_intermediate_top_k", 32))
        if text.vocab_size % clusters[0] or clusters[1] > clusters[0]:
            raise CheckpointError(
                f"{where}: {clusters[0]} centroids (top {clusters[1]}) do not divide {text.vocab_size} tokens"
            )
    return AssistantConfig(text, top.integer("backbone_hidden_size"), clusters)


class Reader:
    """Typed access to a JSON object; every complaint names the file, the key, and what was found."""

    def __init__(self, values: dict, where: str) -> None:
        self.values, self.where = values, where

    def fail(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {self.values.get(key)!r}; expected {expected}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def table(self, key: str, default: dict | None = None) -> dict:
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(key, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "a positive number")
        return float(value)


def _text(r: Reader, eos: Any, unified: bool, drafter: bool = False) -> TextConfig:
    if r.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise r.fail("hidden_activation", "'gelu_pytorch_tanh'")
    if r.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise r.fail("use_bidirectional_attention", "null or 'vision' (text is causal)")
    if r.get("tie_word_embeddings", True) is not True:
        raise r.fail("tie_word_embeddings", "true (Gemma 4 has no separate output head)")
    vocab, ple = (
        r.integer("vocab_size"),
        0 if unified or drafter else r.integer("hidden_size_per_layer_input", 0, 0),
    )
    moe = None
    if r.get("enable_moe_block", False):
        moe = MoeConfig(r.integer("num_experts"), r.integer("top_k_experts"), r.integer("moe_intermediate_size"))
        if moe.top_k > moe.experts:
            raise r.fail("top_k_experts", f"at most num_experts ({moe.experts})")
    return TextConfig(
        vocab_size=vocab,
        hidden_size=r.integer("hidden_size"),
        eps=r.number("rms_norm_eps", 1e-6),
        layers=_layers(r, unified, drafter),
        max_positions=r.integer("max_position_embeddings", 131072),
        softcap=None if r.get("final_logit_softcapping") is None else r.number("final_logit_softcapping"),
        ple_size=ple,
        ple_vocab_size=r.integer("vocab_size_per_layer_input", vocab) if ple else 0,
        moe=moe,
        eos=_token_ids(r, eos),
    )


def _token_ids(r: Reader, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise CheckpointError(f"{r.where}: eos_token_id is {value!r}; expected token ids")
    return tuple(ids)


def _layers(r: Reader, unified: bool, drafter: bool) -> tuple[LayerConfig, ...]:
    count = r.integer("num_hidden_layers")
    if count > 1000:
        raise r.fail("num_hidden_layers", "at most 1000")
    kinds = _layer_types(r, count)
    shared = count if drafter else r.integer("num_kv_shared_layers", 0, 0)
    first = count - shared  # layers from here on own no keys and values
    if not drafter and (first < 1 or not set(kinds[first:]) <= set(kinds[:first])):
        raise r.fail("num_kv_shared_layers", f"fewer, so that the first of {count} layers own keys and values")
    owners, last = [], {}
    for i, kind in enumerate(kinds):
        if i < first:
            last[kind] = i
        owners.append(last.get(kind, -1))
    rope = {kind: _rope(r, kind) for kind in set(kinds)}
    return tuple(_layer(r, i, kinds[i], owners[i], rope[kinds[i]], unified) for i in range(count))


def _layer_types(r: Reader, count: int) -> list[str]:
    kinds = r.get("layer_types")
    if kinds is None:
        kinds = [FULL if i % 6 == 5 else SLIDING for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise r.fail("layer_types", f"{count} entries of {SLIDING!r} or {FULL!r}")
    return [*kinds[:-1], FULL]  # transformers forces the last layer to full attention


def _rope(r: Reader, kind: str) -> tuple[float, float, float]:
    """(theta, share of the frequencies that turn, factor) of one kind of layer."""
    table = r.get("rope_parameters", {})
    given = table.get(kind) if isinstance(table, dict) else None
    default = {"rope_type": "default", "rope_theta": 1e4}
    if kind == FULL:
        default = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    p = Reader(given if isinstance(given, dict) else default, f"{r.where}: rope_parameters.{kind}")
    rope_type = p.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise p.fail("rope_type", "'default' or 'proportional'")
    share = p.number("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
    if share > 1:
        raise p.fail("partial_rotary_factor", "at most 1")
    return p.number("rope_theta", default["rope_theta"]), share, p.number("factor", 1.0)


def _layer(r: Reader, i: int, kind: str, owner: int, rope: tuple, unified: bool) -> LayerConfig:
    # The unified text config has no such switch in transformers, where global heads then always count.
    k_eq_v = bool(r.get("attention_k_eq_v", unified))
    overrides = _overrides(r, i, kind, k_eq_v)
    head_dim = overrides.integer("head_dim")
    heads, kv_heads = overrides.integer("num_attention_heads"), overrides.integer("num_key_value_heads")
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{r.where}: layer {i} has {heads} heads, {kv_heads} key heads of size {head_dim}; "
            "expected a multiple and an even size"
        )
    theta, share, factor = rope
    double = bool(r.get("use_double_wide_mlp", False)) and 0 <= owner < i  # consumers of shared keys only
    return LayerConfig(
        window=r.integer("sliding_window", 1024 if unified else 512) if kind == SLIDING else None,
        owner=owner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        k_eq_v=k_eq_v and kind == FULL,
        mlp_size=overrides.integer("intermediate_size") * (2 if double else 1),
        rope_theta=theta,
        rope_factor=factor,
        rotated=int(share * head_dim / 2),
    )


def _overrides(r: Reader, i: int, kind: str, k_eq_v: bool) -> Reader:
    """The layer's own values: `per_layer_config` where the file has one, the flat global keys otherwise."""
    table = r.get("per_layer_config")
    if table is not None:
        # Keys are layer numbers, padded with zeros to the width of the largest.
        named = {k.lstrip("0") or "0": v for k, v in table.items()} if isinstance(table, dict) else {}
        own = named.get(str(i), {}) if isinstance(table, dict) else None
        if not isinstance(own, dict):
            raise r.fail("per_layer_config", "an object of objects keyed by layer index")
    elif kind == FULL:
        own = {"head_dim": r.integer("global_head_dim", 512)}
        if k_eq_v and r.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = r.integer("num_global_key_value_heads")
    else:
        own = {}
    base = {"head_dim": r.integer("head_dim", 256), "num_attention_heads": r.integer("num_attention_heads")}
    base["num_key_value_heads"] = r.integer("num_key_value_heads", base["num_attention_heads"])
    base["intermediate_size"] = r.integer("intermediate_size")
    return Reader(base | own, f"{r.where}: layer {i}")
