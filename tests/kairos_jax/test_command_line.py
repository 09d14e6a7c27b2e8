"""The command `kairos`, and what every binary answers to --help and --version."""

import re
import subprocess
import sys
from pathlib import Path

import documents
import pytest

from kairos_jax.__main__ import COMMANDS
from kairos_jax.config.keys import config_keys

PACKAGE = Path(__file__).parents[2] / "kairos_jax"
LIGHT = "import sys; from kairos_jax.__main__ import main; code = main()"


def kairos(*arguments):
    command = [sys.executable, "-m", "kairos_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_binary_is_a_command():
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]
    binaries = {
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in files
        if '\nif __name__ == "__main__":' in path.read_text()
    }
    assert set(COMMANDS) == binaries - {"kairos_jax"}


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands(arguments):
    done = kairos(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  (\w+) +(\S.*)$", done.stdout, re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    for name, summary in listed:
        assert summary.endswith("."), name
        assert len(summary) <= 95


def test_the_list_needs_none_of_what_the_binaries_import():
    """Which is what makes it come in a tenth of a second."""
    script = f"{LIGHT}; print(sorted(sys.modules.keys() & {{'jax', 'numpy', 'absl', 'grpc'}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--version"], ["version"], ["simulate", "--version"]])
def test_the_version(arguments):
    done = kairos(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"kairos_jax \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    ("name", "words"),
    [("sevre", "did you mean serve"), ("zzz", "kairos alone lists them"), ("--x", "'--x'")],
)
def test_an_unknown_command_is_one_line_and_code_2(name, words):
    done = kairos(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: kairos has no command ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_command_is_the_binary_with_its_flags():
    arguments = ["--profile=llama3_8b_h100_roofline", "--trace=synthetic", "--num_requests=20"]
    arguments += ["--ttft=1", "--tpot=0.05", "--seed=3", "--workers=2", "--rates=1,2"]
    done = kairos("sweep", "--simulated", *arguments, "--output=/dev/null/x")
    module = [sys.executable, "-m", "kairos_jax.sweep", "--simulated", *arguments]
    same = subprocess.run([*module, "--output=/dev/null/x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (same.returncode, same.stdout) == (2, "")
    assert done.stderr == same.stderr


SHOWN = documents.everywhere()
KEYS = {each.name for each in config_keys()}
OFTEN = ("serve", "client", "config", "simulate")
HELPED = [pytest.param(each, marks=() if each in OFTEN else pytest.mark.slow) for each in COMMANDS]


@pytest.mark.parametrize("name", HELPED)
def test_help_is_of_the_binary_alone(name):
    done = kairos(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: kairos {name} ")
    assert f"\n  kairos {name}" in done.stdout  # an example
    for foreign in ("absl", "--verbosity", "--pdb", "--flagfile", "--undefok", "--jax_"):
        assert foreign not in done.stdout
    for command in SHOWN:
        if documents.words(command)[:2] == ["kairos", name]:
            for flag in documents.flags(command):
                key = flag.removeprefix("config.")
                assert (
                    key in KEYS if key != flag else re.search(rf"--(\[no\])?{flag}\b", done.stdout)
                )
    takes_model = name not in ("client", "config", "convert", "simulate", "journal", "paper")
    assert ("[MODEL]" in done.stdout) == takes_model


def test_the_commands_that_documents_show_are_found():
    shown = {documents.words(command)[1] for command in SHOWN if command.startswith("kairos ")}
    assert shown == set(COMMANDS)


def test_helpfull_has_the_flags_of_libraries_too():
    done = kairos("simulate", "--helpfull")
    assert done.returncode == 0
    assert "--[no]use_cprofile_for_profiling" in done.stdout


def test_a_reader_that_leaves_is_no_error():
    shell = f"{sys.executable} -m kairos_jax simulate --helpfull | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
