"""Fixtures of the tests with other people's programs. Only `make test-clients` runs them."""

from pathlib import Path

import pytest
from programs import Desk
from scripted import scripted

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("clients")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all programs."""
    with scripted(tmp_path_factory.mktemp("pair")) as server:
        yield server


@pytest.fixture
def desk(tmp_path):
    home, place = tmp_path / "home", tmp_path / "place"
    home.mkdir()
    place.mkdir()
    return Desk(home, place)
