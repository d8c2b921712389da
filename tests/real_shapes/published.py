"""Writes checkpoints of published widths with few layers and random weights, as Hugging Face lays them out.

    folder = write_target(tmp / "E2B", "E2B", "ssfssf", shared=3)
    folder = write_drafter(tmp / "E2B-assistant", "E2B")

Tensors are drawn and written piece by piece, so that gigabytes take little memory and little time.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from checkpoints import FIXTURES, FULL, HF_PREFIX, SLIDING, Config, is_drafter, text_of
from random_checkpoints import Shapes, spread_of, tensor_shapes

from mlx_mtp.shapes import read_configs

BLOCK = 16_777_213  # numbers that are drawn; a prime
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
AUDIO: Shapes = {"model.audio_tower.conv.weight": (4, 3, 3), "model.embed_audio.embedding_projection.weight": (64, 16)}


def write_target(folder: Path, size: str, layers: str, shared: int = 0, shards: int = 3) -> Path:
    """A published target cut to `layers`, a letter a layer (`s` sliding, `f` full), of which the last `shared` own no
    keys and values. It has a tiny vision tower and names of an audio tower, and a tokenizer of 768 tokens."""
    config = read_configs(size)["target"]
    kinds = {"s": SLIDING, "f": FULL}
    text = config["text_config"] | {
        "layer_types": [kinds[letter] for letter in layers],
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": shared,
        "dtype": "bfloat16",
    }
    source = FIXTURES / ("unified" if "unified" in config["model_type"] else "edge") / "target"
    whole = json.loads((source / "config.json").read_text())  # what the published configs in the package leave out
    config = whole | config | {"text_config": whole["text_config"] | text}
    shapes = tensor_shapes(config) | _tower(source, text["hidden_size"])
    for name in SIDE_FILES:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    generation = {"bos_token_id": 2, "eos_token_id": config["eos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return _write(folder, config, shapes, shards)


def write_drafter(folder: Path, size: str) -> Path:
    """The published drafter of a size, whole: it is small."""
    config = read_configs(size)["drafter"]
    text = config["text_config"] | {"dtype": "bfloat16", "vocab_size_per_layer_input": 0}
    kind = "Gemma4UnifiedAssistant" if "unified" in config["model_type"] else "Gemma4Assistant"
    config |= {"architectures": [f"{kind}ForCausalLM"], "dtype": "bfloat16", "text_config": text}
    return _write(folder, config, tensor_shapes(config), 1)


def _tower(source: Path, hidden: int) -> Shapes:
    """Everything of a fixture's file that is no text, its projections at another hidden size; and an audio tower."""
    with (source / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if not name.startswith(HF_PREFIX)}
    audio = {} if any("embed_audio" in name for name in shapes) else AUDIO
    return {n: (hidden, s[1]) if "embedding_projection" in n else s for n, s in (audio | shapes).items()}


def _write(folder: Path, config: Config, shapes: Shapes, shards: int) -> Path:
    """config.json, the tensors in so many files, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names, where = sorted(shapes), {}
    for i in range(shards):
        part = names[i::shards]
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        _write_file(folder / file, config, {name: shapes[name] for name in part}, seed=i + is_drafter(config))
        where |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_file(path: Path, config: Config, shapes: Shapes, seed: int) -> None:
    """A safetensors file of bfloat16 tensors, `token_ordering` int64."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        dtype, width = ("I64", 8) if name.endswith("token_ordering") else ("BF16", 2)
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in _draw(rng, config, name, shape):
                file.write(piece)


def _draw(rng: np.random.Generator, config: Config, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor's numbers in pieces: uint16 that hold bfloat16, or an ordering of tokens.

    A large tensor is one block again and again: drawing gigabytes would take minutes. The block's length is a prime,
    so no two rows of a matrix are alike.
    """
    if name.endswith("token_ordering"):
        yield rng.permutation(shape[0])
        return
    mean, std = spread_of(name, shape, text_of(config))
    block = rng.standard_normal(min(BLOCK, math.prod(shape)), np.float32) * np.float32(std) + np.float32(mean)
    if name.endswith("model.norm.weight"):
        block *= 7.0 * rng.choice([-1.0, 1.0], len(block))  # as in random_checkpoints
    packed = (block.astype(np.float32).view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    for first in range(0, math.prod(shape), BLOCK):
        yield packed[: math.prod(shape) - first]
