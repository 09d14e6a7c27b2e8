"""JAX on eight CPU devices, set before its first use; and the tiny models of tests/golden."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Where make_golden.py wrote: smollm2.json, and a directory for each tiny model."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_llama(golden: Path) -> Path:
    """A Hugging Face checkpoint with 24 q heads and 12 kv heads: splits over 2, 3, 4 or 6."""
    return golden / "llama"
