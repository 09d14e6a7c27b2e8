"""Which Python `make` takes, and which environment it makes for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(folder, python):
    """What `make setup` would run: nothing is installed."""
    command = ["make", "--dry-run", "setup", f"PYTHON={python}"]
    # Without what `make test` tells the makes below it.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=60)


def script(folder, text):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_python_gets_the_plain_name(folder):
    assert f"{sys.executable} -m venv --clear .venv\n" in setup(folder, sys.executable).stdout


def test_another_python_leaves_the_environment_alone(folder):
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python3.0").touch()
    said = setup(folder, sys.executable).stdout
    assert f"{sys.executable} -m venv --clear .venv-{VERSION}\n" in said
    (folder / ".venv" / "bin" / f"python{VERSION}").touch()
    assert f"{sys.executable} -m venv --clear .venv\n" in setup(folder, sys.executable).stdout


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("nosuch", "PYTHON=nosuch is not there"),
        ("", "PYTHON= is empty"),
        ("exit 127", "a pyenv shim whose version is not active"),
        ("echo 3.10", "is Python 3.10, and 3.11 to 3.13 are supported"),
    ],
)
def test_a_python_that_will_not_do_is_one_line(folder, python, words):
    done = setup(folder, script(folder, python) if " " in python else python)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.endswith("name another, make PYTHON=/path/to/python3.12.  Stop.\n")
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
