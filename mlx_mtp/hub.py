"""Where a checkpoint lies: a folder as it is, or a Hugging Face repository brought into the hub's cache.

Knows nothing of what the files mean. Cache, token and endpoint are huggingface_hub's own configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_mtp.rows import CheckpointError, DownloadError, one_line
from mlx_mtp.tensors import Tensor, read_json

# Weights, configuration and tokenizer; neither GGUF nor PyTorch copies of the same weights.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
UNWANTED = ["*.gguf", "*.bin", "*.pt", "*.pth"]
DRAFTER_FOLDERS = ("assistant", "drafter", "mtp")  # in a target's folder or repository; no other folder is fetched
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name: str, report: Callable[[str, int, int], None] | None = None) -> Path:
    """A folder of checkpoint files: `name` itself if it is one, else the downloaded or cached hub repository.

    report: told (stage, 0, 0) when a download begins, whose size is not known then.
    Raises CheckpointError for a file, DownloadError for what is no folder and cannot be fetched.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name}: {_why_not(path)}")
    if not HUB_ID.fullmatch(name):
        raise DownloadError(f"{name!r}: no such folder; expected one with config.json, or a hub id owner/name")
    if report:
        report(f"fetching {name}", 0, 0)
    return _download(name)


def here(name: str) -> Path | None:
    """A folder of checkpoint files as `resolve` would return it, if nothing has to be fetched for that."""
    path = Path(name).expanduser()
    if (name and path.is_dir()) or not HUB_ID.fullmatch(name):
        return resolve(name)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and any(folder.glob("*.safetensors")) else None


def describe(name: str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """(where it lies, config.json, the headers of its tensors) of a repository, of which nothing else is fetched.

    Raises DownloadError.
    """
    with _explained(name):
        from huggingface_hub import HfApi, hf_hub_download

        raw = read_json(Path(hf_hub_download(name, "config.json")))
        found = HfApi().get_safetensors_metadata(name)
        place = Path(name)
        headers = {
            tensor: Tensor(place / file, tensor, info.dtype, tuple(info.shape))
            for file, held in found.files_metadata.items()
            for tensor, info in held.tensors.items()
        }
        return place, raw, headers


def on_disk_bytes(name: str) -> int:
    """What a hub repository's weights take in the hub's cache here; 0 if it was never fetched."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return 0
    return sum(file.stat().st_size for file in Path(config).parent.glob("*.safetensors"))


def _why_not(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF is not supported; name a folder with config.json and safetensors, or a hub id"
    return "a file; expected the folder that holds config.json and the weights"


def _download(name: str) -> Path:
    with _explained(name):
        # Imported here: a second that nobody pays who names a folder.
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=["*/*", *UNWANTED]))
        drafters = [f"{place}/{file}" for place in DRAFTER_FOLDERS for file in WANTED]
        snapshot_download(name, allow_patterns=drafters, ignore_patterns=["*/*/*", *UNWANTED])
        return folder


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise what the hub's client raises as a DownloadError of one line."""
    from huggingface_hub import errors

    try:
        yield
        return
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        message = f"access is restricted; accept the terms on huggingface.co/{name}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        message = "no such folder, and no such repository on the hub (or a private one: `hf auth login`)"
    except errors.IncompleteSnapshotError as error:
        message = f"only part of it is in the cache, and {_offline(error)}"
    except errors.NotASafetensorsRepoError:
        message = "its weights are no safetensors files; expected those, as in the google or mlx-community repositories"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        message = f"not in the cache, and {_offline(error)}"
    except errors.HFValidationError:
        message = "not a valid hub id; expected owner/name, or a folder that exists"
    except errors.HfHubHTTPError as error:
        message = f"the hub answered {error.response.status_code}; try again later"
    except OSError as error:
        message = f"{_line(error)}; check the disk and the connection, then try again"
    except Exception as error:  # whatever else the client's transport raises is still a failed download
        message = f"the download failed ({type(error).__name__}: {_line(error)}); try again"
    raise DownloadError(f"{name}: {message}")


def _offline(error: Exception) -> str:
    """Why the hub was not asked, or did not help."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download, or name a folder"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return f"the hub answered {error.__cause__.response.status_code}; try again later"
    return "the hub cannot be reached; check the connection, or name a folder"


def _line(error: Exception) -> str:
    return one_line(error, 160) or type(error).__name__
