"""Files of flags that are no files: they are named, and not waited for."""

import os

import pytest

from kairos_jax import client, journal
from kairos_jax.config import ConfigError, files
from kairos_jax.engine import profile_file
from kairos_jax.lab import flags
from kairos_jax.process.command import UsageError


class Values:
    num_requests, rate, seed = 1, None, 0

    def __init__(self, trace):
        self.trace = trace


@pytest.fixture(params=[os.mkfifo, os.mkdir])
def path(tmp_path, request):
    request.param(tmp_path / "odd")
    return str(tmp_path / "odd")


@pytest.mark.parametrize(
    "read",
    [
        profile_file.read,
        journal.read,
        lambda path: flags.workload(path, 1, 0),
        lambda path: client._read_arrivals(Values(path)),
    ],
    ids=["profile", "journal", "trace", "client's trace"],
)
def test_a_file_that_is_none_is_named(path, read):
    with pytest.raises(UsageError, match="/odd: not a regular file"):
        read(path)


def test_a_config_that_is_no_file_is_named(path):
    for name in (path, f"{path}:variant"):
        with pytest.raises(ConfigError, match=r"/odd.*: not a regular file"):
            files.read_file(name)
