import shutil

import pytest
from checkpoints import load
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def params(tiny_llama):
    """The weights of the tiny llama."""
    return load(tiny_llama)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny llama to damage, and its tensors."""
    shutil.copytree(tiny_llama, tmp_path / "copy")
    return tmp_path / "copy", load_file(tiny_llama / "model.safetensors")
