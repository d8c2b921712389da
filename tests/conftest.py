"""Settings and fixtures that more than one test file needs."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads what earlier runs have kept in the user's home, or leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(place))
        yield place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that compile Metal text with g++ are many and slow; `make test-kernels` runs them."""
    for item in items:
        if item.path.name.startswith(("test_kernel", "test_metal_emu")):
            item.add_marker("kernels")
