"""What the tensor files of a checkpoint folder hold, by their headers. Reads no weights and knows no model.

The format is that of huggingface/safetensors: 8 bytes with the header's length, a JSON header with every
tensor's dtype, shape and place, then the data. A folder holds one file, or several with or without an index.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.rows import CheckpointError, one_line

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
}
FLOATS = ("F32", "F16", "BF16")
LONGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: the file it is in, its name there, its dtype as the format spells it, its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({one_line(error, 120)}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Name -> Tensor of everything the folder's safetensors files hold; with an index, of what it lists.

    A stale index counts for nothing. Raises CheckpointError for other formats, missing or truncated files, and an index
    that does not match.
    """
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index and not stale_index(folder):
        return _indexed(index[0])
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: {_other_formats(folder)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                first = tensors[name].file.name
                raise CheckpointError(f"{folder}: {name} is in {first} and in {file.name}; remove one of the files")
            tensors[name] = tensor
    return tensors


def stale_index(folder: Path) -> str | None:
    """A warning if a folder's index is of other files than those there: none that it names, and others that hold
    weights. Copying a release's JSON files over a conversion leaves such an index. Raises CheckpointError."""
    for path in sorted(folder.glob("*.safetensors.index.json"))[:1]:
        named = set(_weight_map(path).values())
        if not any((folder / name).is_file() for name in named) and any(folder.glob("*.safetensors")):
            return f"{path.name} in {folder} names none of the files there and is ignored; delete it"
    return None


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> Tensor of one safetensors file. Raises CheckpointError where file and header disagree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if start == b"version ":
                raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` there")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: no safetensors file, or not all of it ({size} bytes); download it again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; download the checkpoint again") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON ({one_line(error, 120)}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not an object; download it again")
    header.pop("__metadata__", None)
    tensors, ends = {}, [0]
    for name, entry in header.items():
        tensors[name], end = _entry(path, name, entry)
        ends.append(end)
    data_bytes = size - 8 - length
    if max(ends) != data_bytes:
        state = "truncated" if max(ends) > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: {data_bytes} bytes of data, the header promises {max(ends)}; download it again"
        )
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[Tensor, int]:
    """(tensor, end of its data) of one header entry."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole, dtype, shape, begin, end = False, "", [], 0, 0
    if not whole or not isinstance(dtype, str):
        raise CheckpointError(f"{path}: the header entry of {name} is broken; download it again")
    bits = BITS.get(dtype)
    if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
        raise CheckpointError(
            f"{path}: {name}, {dtype} {list(shape)}, cannot take {end - begin} bytes; download it again"
        )
    return Tensor(path, name, dtype, tuple(shape)), end


def _indexed(path: Path) -> dict[str, Tensor]:
    """What an index lists, checked against the files it names."""
    table = _weight_map(path)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(table.values())):
        if Path(file).name != file or not (path.parent / file).is_file():
            count = sum(1 for v in table.values() if v == file)
            raise CheckpointError(
                f"{path}: it places {count} tensors in {file}, which is missing; download that file again"
            )
        held = read_header(path.parent / file)
        for name in (k for k, v in table.items() if v == file):
            if name not in held:
                raise CheckpointError(f"{path}: places {name} in {file}, which does not hold it; download both again")
            tensors[name] = held[name]
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to files; download it again")
    return table


def _other_formats(folder: Path) -> str:
    """Why there is nothing to read in a folder without safetensors files."""
    found = {p.suffix for p in folder.iterdir()}
    if ".gguf" in found:
        return "holds GGUF files only; expected safetensors, as in the google or mlx-community repositories"
    others = sorted(found & {".bin", ".pt", ".pth", ".ckpt", ".npz"})
    if others:
        return f"its weights are {' and '.join(others)} files; expected safetensors"
    return "no *.safetensors file; download the checkpoint again"
