"""Where a checkpoint lies: a folder as it is, or a Hugging Face repository brought into the hub's cache.

Knows nothing of what the files mean. Cache, token and endpoint are huggingface_hub's own configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mlx_mtp.rows import CheckpointError, DownloadError, one_line

# Weights, configuration and tokenizer; neither GGUF nor PyTorch copies of the same weights.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
UNWANTED = ["*/*", "*.gguf", "*.bin", "*.pt", "*.pth"]
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
    # Imported here: a second that nobody pays who names a folder.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError:
        message = f"access is restricted; accept the terms on huggingface.co/{name}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        message = "no such folder, and no such repository on the hub (or a private one: `hf auth login`)"
    except errors.IncompleteSnapshotError as error:
        message = f"only part of it is in the cache, and {_offline(error)}"
    except errors.LocalEntryNotFoundError as error:
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

    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download, or name a folder"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return f"the hub answered {error.__cause__.response.status_code}; try again later"
    return "the hub cannot be reached; check the connection, or name a folder"


def _line(error: Exception) -> str:
    return one_line(error, 160) or type(error).__name__
