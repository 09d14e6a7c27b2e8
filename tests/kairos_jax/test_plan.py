"""The binary that plans, as far as it goes without a compiler for other chips."""

import json
import subprocess
import sys

import pytest

from kairos_jax.engine import profile_file


def plan(*arguments):
    command = [sys.executable, "-m", "kairos_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_plan_by_shapes_and_its_profile(tmp_path):
    done = plan("--config=llama3_8b:v5e8", "--fast", f"--output={tmp_path}/p.json")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("TPU v5e: 1 x 4 prefill + 1 x 4 decode", "weights", "decode 64 x 1024", "80%"):
        assert words in done.stdout
    assert profile_file.read(tmp_path / "p.json")["source"] == "predicted"
    assert json.loads((tmp_path / "p.json").read_text())["assumed"]["bandwidth"] == 0.8


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--chip=h1000"], "error: flag --chip=h1000: value should be one of <v5e|v6e|h100|h200>"),
        (
            ["--config.decode.kv_tokens=4000000"],
            "error: config.decode.kv_tokens must be at most 361408, got 4000000: 16.1 GB of",
        ),
        (["--config.prefill.devices=16"], "error: config.prefill.devices must be at most 8, "),
        (["--chip=v5e"], "error: config.decode.kv_tokens must be at most 4416, got"),
        (["--config.page_size=48", "--chip=v6e"], "error: kernels tpu: page_size must be one of"),
        (["--of_flops=-1"], "error: flag --of_flops=-1: "),
    ],
)
def test_what_does_not_fit_is_one_line_and_code_2(arguments, line):
    done = plan("--config=llama3_8b:gpu1", "--fast", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_config_for_no_chip_needs_one():
    done = plan("--config=tests/support/tiny_config.py", "--model=tests/golden/llama", "--fast")
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.chip is not given: give --chip, one of v5e, ")
