"""JAX on eight CPU devices, set before its first use; and the tiny models of tests/golden."""

import functools
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fakes
import jax
import pytest

from kairos_jax.process.cache import cache_dir
from models.ops import KERNELS, attention_gpu, native

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Flags of XLA with which it compiles in half of the time: most of the tests' time went into that.
# The floats of a program may differ in their last bits, as between machines. XLA reads them once:
# they are for this process, whose engine's programs are compiled as for users all the same (see
# tests/kairos_jax/engine), and for those of `environment`.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED}".strip())
    jax.devices()

# As it is where there is no cuDNN.
without = functools.partial(attention_gpu.attention, cudnn=False)
KERNELS["gpu"] = KERNELS["gpu"]._replace(attention=without)
# Not those that need arrays of their own, or do not run here: see
# tests/models/ops/test_accelerators.py.
RUN_HERE = [name for name in KERNELS if name not in ("tpu", "gpu_hopper")]


@pytest.fixture(scope="session", params=RUN_HERE)
def kernels(request) -> str:
    """Each backend's kernels, by name."""
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


@pytest.fixture(scope="session")
def native_kernels() -> str:
    """The name of the kernels in C++, compiled."""
    try:
        native.load(cache_dir("native"))
    except native.NotAvailable as error:
        pytest.skip(str(error))
    return "native"


@pytest.fixture(scope="session")
def optimized_environment(tmp_path_factory, worker_id) -> dict[str, str]:
    """Of processes: a cache of the tests' own, which also makes their later starts quick. The
    workers of a run share it.
    """
    place = tmp_path_factory.getbasetemp()
    cache = (place if worker_id == "master" else place.parent) / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    return os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def environment(optimized_environment) -> dict[str, str]:
    """The same for processes whose steps need not be fast: compiled in a third of the time."""
    given = optimized_environment.get("XLA_FLAGS", "")
    return optimized_environment | {"XLA_FLAGS": f"{given} {QUICKLY_COMPILED}".strip()}


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    """The flag for made-up step times, so that none need be measured."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_text(json.dumps(fakes.PROFILE))
    return f"--profile={path}"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Where make_golden.py wrote: smollm2.json, and a directory for each tiny model."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_llama(golden: Path) -> Path:
    """A Hugging Face checkpoint with 24 q heads and 12 kv heads: splits over 2, 3, 4 or 6."""
    return golden / "llama"
