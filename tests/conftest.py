"""Settings and fixtures that more than one test file needs."""

import os

# Before anything imports huggingface_hub, which reads it once: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("repeatable")
