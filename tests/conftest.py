"""What every test shares: one thread, fixed seeds, no network, a device by option, the golden vectors."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch or huggingface_hub; children inherit it. Tests run side by side, and their networks are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("reelflow", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.load_profile("reelflow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where device-independent and gpu tests run: cpu (default), cuda, cuda:1, mps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator: --device cuda"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same global random state before every test. Torch and NumPy are touched only where a test has imported them."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device that --device names, as torch spells it."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden vectors."""
    return Path(__file__).parent / "golden"
