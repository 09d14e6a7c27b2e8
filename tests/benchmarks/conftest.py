"""The benchmarks are scripts beside the packages: their modules are found by folder."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def environment(optimized_environment) -> dict[str, str]:
    """What they measure is to be what users have."""
    return optimized_environment
