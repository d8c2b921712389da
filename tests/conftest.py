"""Settings and fixtures that more than one test file needs."""

import os

# Before anything imports huggingface_hub, which reads it once: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that compile Metal text with g++ are many and slow; `make test-kernels` runs them."""
    for item in items:
        if item.path.name.startswith(("test_kernel", "test_metal_emu")):
            item.add_marker("kernels")
