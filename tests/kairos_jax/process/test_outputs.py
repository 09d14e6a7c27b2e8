"""Where a run writes is looked at before the work."""

import subprocess
import sys
from pathlib import Path

import pytest

from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import file_to_write, folder_to_write

ROOT = Path(__file__).parents[3]
CONFIG = ("--config=tests/support/tiny_config.py", "--model=tests/golden/llama")
SIMULATED = (
    *("--profile=llama3_8b_h100_roofline", "--trace=synthetic", "--ttft=1", "--tpot=0.025"),
)


def test_folders_are_made_and_nothing_is_left_in_them(tmp_path):
    assert folder_to_write("output", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert file_to_write("output", tmp_path / "c" / "file") == tmp_path / "c" / "file"
    assert list((tmp_path / "a" / "b").iterdir()) == list((tmp_path / "c").iterdir()) == []


def test_a_file_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_text("old")
    assert file_to_write("output", tmp_path / "file").read_text() == "old"
    assert file_to_write("journal", "/dev/null") == Path("/dev/null")


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    under = tmp_path / "file" / "deep" / "there"
    for check in (file_to_write, folder_to_write):
        with pytest.raises(UsageError, match=f"^--output={under}: {tmp_path}/file is not a folder"):
            check("output", under)
    with pytest.raises(UsageError, match=r"--journal=.*: it is a folder"):
        file_to_write("journal", tmp_path)
    with pytest.raises(UsageError, match=r"--output=/proc/none: "):
        folder_to_write("output", "/proc/none")


@pytest.mark.parametrize(
    ("binary", "flag", "arguments"),
    [
        ("profile", "output", CONFIG),
        ("demo", "output", CONFIG),
        ("agreement", "output", CONFIG),
        ("serve", "journal", (*CONFIG, "--port=0")),
        ("convert", "output", ("--source=tests/golden/llama",)),
        ("sweep", "output", ("--simulated", "--rates=1", *SIMULATED)),
        ("paper", "output", ("--trace=synthetic",)),
        ("simulate", "journal", SIMULATED),
        ("simulate", "perfetto", SIMULATED),
        ("journal", "perfetto", ("--journal=none",)),
    ],
)
def test_each_binary_looks_first(tmp_path, binary, flag, arguments):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out"
    command = [sys.executable, "-m", f"kairos_jax.{binary}", *arguments, f"--{flag}={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: --{flag}={path}: {tmp_path}/file is not a folder\n"


def test_a_disk_that_fills_is_told_in_one_line():
    program = (
        "from kairos_jax.process import command\n"
        "command.run(lambda argv: open('/dev/full', 'w', 1).write('x\\n'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: a file: No space left on device\n")
