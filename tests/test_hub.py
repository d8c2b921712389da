"""Finding a checkpoint: folders, the hub's cache, and a hub that answers in every unpleasant way."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import checkpoints as ck
import pytest
from checkpoints import FIXTURES
from huggingface_hub import constants

from mlx_mtp.hub import resolve
from mlx_mtp.load import load_pair, load_target
from mlx_mtp.plan import read_pair
from mlx_mtp.rows import CheckpointError, DownloadError

COMMIT = "0" * 39 + "1"
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the settings are those of conftest.py, so offline."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go online, with a hub at that address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def put(cache: Path, name: str, source: Path) -> Path:
    """Place a repository in the cache as a download leaves it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    return folder / "snapshots" / COMMIT


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, o/ok, that holds `files`; others answer with the status in their name."""

    files = {
        "config.json": b"{}",
        "model.safetensors": b"12345678",
        "model.gguf": b"x",
        "original/a.json": b"x",
        "assistant/config.json": b"{}",
        "assistant/model.safetensors": b"1234",
    }
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.asked.append(self.path)
        kind = self.path.split("o/", 1)[-1].split("/")[0]
        if kind != "ok":
            code, error = kind.split("-")
            return self.reply(b"", int(code), {"X-Error-Code": error})
        if "/api/" not in self.path:
            name = self.path.split(f"{COMMIT}/" if COMMIT in self.path else "/main/")[1]
            tag = {"ETag": f'"{name.replace("/", "")}"', "X-Repo-Commit": COMMIT}
            part = re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", ""))
            body = self.files[name][: int(part[1]) + 1] if part else self.files[name]
            return self.reply(body, 206 if part else 200, tag)
        rows = [{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in self.files.items()]
        body = rows if "/tree/" in self.path else {"id": "o/ok", "sha": COMMIT, "siblings": []}
        return self.reply(json.dumps(body).encode(), 200, {"Content-Type": "application/json"})

    def reply(self, body: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A reachable hub on this machine; the paths it was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    Hub.asked.clear()
    yield Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


def complaint(name: str) -> str:
    """What `resolve` says of a name that it refuses."""
    with pytest.raises(DownloadError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself_and_nobody_is_asked(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_repository_is_downloaded_without_copies_in_other_formats(hub: list[str], cache: Path) -> None:
    stages = []
    folder = resolve("o/ok", lambda *step: stages.append(step))
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    assert names == ["assistant/config.json", "assistant/model.safetensors", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"12345678"
    assert folder.is_relative_to(cache)
    assert stages == [("fetching o/ok", 0, 0)]


def test_plan_reads_a_repositorys_headers_and_downloads_no_weights(
    hub: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ck.quantised(ck.mlx_community(ck.read(FIXTURES / "edge" / "target")), ck.Quant(4, 32))
    folder = ck.write(source, tmp_path / "here")
    names = ("config.json", "model.safetensors")
    monkeypatch.setattr(Hub, "files", {name: (folder / name).read_bytes() for name in names})
    there, here = read_pair("o/ok"), read_pair(str(folder))
    assert there.stored_bytes == here.stored_bytes and there.size.target_bytes == here.size.target_bytes
    assert [p.name for p in cache.rglob("*.*") if p.is_symlink()] == ["config.json"]


def test_a_cached_repository_is_used_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(cache, "google/gemma-4-E2B-it", FIXTURES / "edge" / "target")
    assert resolve("google/gemma-4-E2B-it") == folder
    point_at(CLOSED, monkeypatch)
    assert resolve("google/gemma-4-E2B-it") == folder


def test_a_pair_is_loaded_from_the_cache_and_auto_finds_its_drafter_there(cache: Path) -> None:
    put(cache, "google/gemma-4-E2B-it", FIXTURES / "edge" / "target")
    drafter = put(cache, "google/gemma-4-E2B-it-assistant", FIXTURES / "edge" / "assistant")
    pair = load_pair("google/gemma-4-E2B-it")
    assert pair.drafter is not None and pair.drafter.path == drafter
    assert pair.target.name == "google/gemma-4-E2B-it" and pair.notes == ()


def test_auto_decodes_plainly_with_a_note_where_the_drafter_cannot_be_fetched(cache: Path) -> None:
    put(cache, "google/gemma-4-E2B-it", FIXTURES / "edge" / "target")
    pair = load_pair("google/gemma-4-E2B-it")
    assert pair.drafter is None
    assert "google/gemma-4-E2B-it-assistant: not in the cache" in pair.notes[0]


def test_without_network_the_advice_depends_on_whose_choice_that_was(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "HF_HUB_OFFLINE is set" in complaint("google/gemma-4-E2B-it")
    point_at(CLOSED, monkeypatch)
    assert "not in the cache, and the hub cannot be reached" in complaint("google/gemma-4-E2B-it")


def test_half_a_download_is_not_taken_for_a_checkpoint(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (resolve("o/ok") / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "only part of it is in the cache" in complaint("o/ok")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("o/404-RepoNotFound", "no such repository"),
        ("o/401-RepoNotFound", "no such repository"),
        ("o/401-GatedRepo", "`hf auth login`"),
        ("o/403-GatedRepo", "accept the terms on huggingface.co/o/403-GatedRepo"),
        ("o/500-None", "the hub answered 500; try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(hub: list[str], name: str, advice: str) -> None:
    assert complaint(name).startswith(f"{name}: ")
    assert advice in complaint(name)


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "gemma", "a/b/c", "~/nothing/here", "", "a b/c"])
def test_what_is_neither_folder_nor_hub_id_is_not_looked_for_on_the_hub(hub: list[str], name: str) -> None:
    assert "no such folder" in complaint(name)
    assert hub == []


@pytest.mark.parametrize("name", ["owner/-name", "owner/na..me", "owner/" + "n" * 100])
def test_names_that_the_hub_forbids_are_refused_in_one_line(cache: Path, name: str) -> None:
    assert "expected" in complaint(name)


@pytest.mark.parametrize("file", ["model.gguf", "model.safetensors"])
def test_a_file_is_refused_with_what_is_wanted_instead(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="folder"):
        load_target(str(tmp_path / file))
