"""Fixtures of the tests at published widths. They run with `make test-real-shapes` alone."""

import gc
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from shelf import CUTS, Shelf

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Size by size: the folders of one are removed before those of the next are made."""
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.add_marker("real_shapes")
    sizes = list(CUTS)
    ours.sort(key=lambda item: sizes.index(item.callspec.params["size"]))
    items[:] = [*(item for item in items if item.path.parent != HERE), *ours]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    shelf = Shelf(tmp_path_factory.mktemp("real-shapes"))
    yield shelf
    shelf.clear()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """What a test has loaded is gone before the next one loads."""
    yield
    mx.synchronize()
    gc.collect()
    mx.clear_cache()


@pytest.fixture
def tell(capsys):
    """Prints a line that is a result, whatever pytest captures."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return line
