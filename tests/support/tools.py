"""Programs of others that use ours: each in a virtual environment of its own, and offline."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "tests/clients/requirements"
KEPT = ROOT / "out/clients"
_LAST_WORDS = 4000

# Nothing is looked up on a hub or told to anybody. The key is one that no service knows.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OPENAI_API_KEY": "none",
}


def installed(name: str, least: tuple[int, int] = (3, 11)) -> Path:
    """The folder of a tool's programs. What requirements/NAME.txt asks for is installed the first
    time, and kept until it asks for something else. Skips the test where that cannot be done.

    least: the Python that it needs. $NEWER_PYTHON names one, where ours is older and there is none
    on the path.
    """
    if (interpreter := _interpreter(least)) is None:
        pytest.skip(f"{name} needs Python {least[0]}.{least[1]}: name one, NEWER_PYTHON=PATH")
    file = REQUIREMENTS / f"{name}.txt"
    asked = hashlib.sha256(file.read_bytes() + interpreter.encode()).hexdigest()
    folder = KEPT / f"{name}-{asked[:12]}"
    done, programs = folder / "installed", folder / "bin"
    if done.exists():
        return programs
    shutil.rmtree(folder, ignore_errors=True)
    uv = (sys.executable, "-m", "uv")
    environment = (*uv, "venv", "--quiet", "--python", interpreter, str(folder))
    install = (*uv, "pip", "install", "--quiet", "--python", str(folder))
    packages = (*install, "--requirements", str(file))
    for command in (environment, packages):
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{name} cannot be installed here: {made.stderr.strip()[-_LAST_WORDS:]}")
    done.touch()
    return programs


def _interpreter(least: tuple[int, int]) -> str | None:
    """The first Python here that is new enough."""
    for name in (sys.executable, os.environ.get("NEWER_PYTHON"), "python3.12", "python3.13"):
        if (path := shutil.which(name or "")) is None:
            continue
        new_enough = f"import sys; sys.exit(sys.version_info < {least})"
        if subprocess.run([path, "-c", new_enough], capture_output=True).returncode == 0:
            return path
    return None


def run(
    command: Sequence[str | Path],
    folder: Path,
    timeout_s: float = 240,
    environment: Mapping[str, str] | None = None,
    code: int = 0,
) -> str:
    """What a command says on stdout. It runs in `folder`, and no process of it outlives this.

    Fails the test where it ends with another code, or not in time.
    """
    # Not what belongs to the Python that runs the tests.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    started = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=kept | OFFLINE | {"HF_HOME": str(folder / "hub")} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, errors = started.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(started)
        said, errors = started.communicate()
        errors += f"\nwas not done after {timeout_s:g} s"
    finally:
        _end(started)
    if started.returncode != code:
        words = said[-_LAST_WORDS:] + errors[-_LAST_WORDS:]
        pytest.fail(f"{command[0]} ended with code {started.returncode}, not {code}:\n{words}")
    return said


def _end(started: subprocess.Popen) -> None:
    """With all that it started, which may have been left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
