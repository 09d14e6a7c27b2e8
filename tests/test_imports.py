"""The import rules hold, and the checker would notice if they did not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(directory):
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("file", "breach", "contract"),
    [
        ("schedulers/policies/decode.py", "import time", "integers in, integers out"),
        ("schedulers/ledger/instance.py", "import jax", "integers in, integers out"),
        ("models/sampling.py", "import schedulers.ledger.instance", "arrays in, arrays out"),
        ("kairos_jax/engine/engine.py", "import kairos_jax.worker.worker", "never upward"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, file, breach, contract):
    for package in ("schedulers", "models", "kairos_jax"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text() + f"\n{breach}\n")
    code, out = lint(tmp_path)
    assert code == 1
    (broken,) = [line for line in out.splitlines() if line.endswith("BROKEN")]
    assert contract in broken


def test_the_tree_keeps_the_rules():
    code, out = lint(ROOT)
    assert code == 0, out
