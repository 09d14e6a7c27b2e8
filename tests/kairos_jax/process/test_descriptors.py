"""How many files a server may open."""

import resource
import subprocess
import sys

import pytest

from kairos_jax.process import descriptors


@pytest.fixture
def limits(monkeypatch):
    """The soft and the hard limit, as the test has them."""
    now = [64, 64]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: now.__setitem__(slice(None), new))
    return now


def test_the_own_limit_is_raised_as_far_as_it_may_be(limits):
    limits[:] = 256, 4096
    assert descriptors.ensure() == 4096
    assert limits == [4096, 4096]
    assert descriptors.for_clients() == (4096 - descriptors.LEAST) // 3


def test_a_limit_that_is_too_low_is_named(limits):
    with pytest.raises(descriptors.TooFew, match="may open 64 files, and needs at least 128"):
        descriptors.ensure()


@pytest.mark.parametrize(
    ("binary", "limit"),
    [("serve", 8), ("router", 64), ("decode", 16), ("cluster", 16), ("convert", 8), ("client", 8)],
)
def test_a_binary_says_so_in_one_line(binary, limit):
    command = f"ulimit -n {limit}; exec {sys.executable} -m kairos_jax.{binary}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: this process may open {limit} files, and needs at least 128: ulimit -n 128\n"
    )
