"""What every test shares: an offline, single-threaded process and the repository's root."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before a test imports torch or a hub client; processes that tests start inherit it. Several test workers share the
# cores, and OpenMP threads that wait for one another cost more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# The user's shell must not change which errors come out.
os.environ.pop("HYDRA_FULL_ERROR", None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds conf/, data/ and the Makefile."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def denormals_come_back() -> Iterator[None]:
    """A stage that runs in this process flushes denormal numbers for good; hypothesis draws them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
