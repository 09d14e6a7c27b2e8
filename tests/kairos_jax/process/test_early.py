"""Signals while a binary's imports go on."""

import os
import signal
import subprocess
import sys

import pytest

# Stops the first import of numpy where exceptions are ignored, as in the callbacks of extensions.
_HOOK = """
import sys

class Swallows:
    def __del__(self):
        print("importing", flush=True)
        sys.stdin.read()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            sys.meta_path.remove(self)
            Swallows()

sys.meta_path.insert(0, Finder())
"""

# What an installer writes as bin/kairos, called as `kairos serve`.
CONSOLE_SCRIPT = (
    "-c",
    "import sys; sys.argv[0] = 'kairos'; from kairos_jax.__main__ import main; sys.exit(main())",
    "serve",
)


@pytest.fixture
def importing(tmp_path):
    """A server that is amid its imports; it goes on once its stdin ends."""
    (tmp_path / "sitecustomize.py").write_text(_HOOK)
    started = []

    def start(command=("-m", "kairos_jax.serve"), ignored=False):
        ignoring = ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh"] if ignored else []
        process = subprocess.Popen(
            [*ignoring, sys.executable, *command, "--config=nosuch.py"],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "importing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 1)])
@pytest.mark.parametrize("command", [("-m", "kairos_jax.serve"), CONSOLE_SCRIPT])
def test_a_signal_amid_imports_ends_it_with_one_line(importing, command, sign, code):
    process = importing(command)
    process.send_signal(sign)
    # Its stdin stays open: it ends by the signal alone.
    assert process.wait(60) == code
    assert process.stderr.read() == "stopped while starting\n"


def test_an_ignored_signal_stays_ignored(importing):
    process = importing(ignored=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith("error: --config=nosuch.py: there is no such file")
