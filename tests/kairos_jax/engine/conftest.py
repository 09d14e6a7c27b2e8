"""The engine's programs are compiled as for users."""

import functools

import jax
import pytest

# The opposite of QUICKLY_COMPILED, in tests/conftest.py.
_OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """Whatever is compiled ahead of its use, as the engine does it."""
    with pytest.MonkeyPatch.context() as patch:
        compiled = functools.partialmethod(jax.stages.Lowered.compile, _OPTIMIZED)
        patch.setattr(jax.stages.Lowered, "compile", compiled)
        yield
