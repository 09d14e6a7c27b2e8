"""The benchmarks that compare and decide run on a tiny model, and say what they promise to.

What needs vLLM runs where KAIROS_VLLM_PYTHON names a Python that has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG, MODEL = "--config=tests/support/tiny_config.py", "--model=tests/golden/llama"
TINY = (CONFIG, MODEL, "--overrides=", "--max_context=128", "--rounds=1")
VLLM = os.environ.get("KAIROS_VLLM_PYTHON")


def run(environment, name, *arguments, timeout=220):
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, "--output=json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert {"date", "cpu", "cores", "versions"} <= result.keys()
    return result


def test_steps_of_our_engine(environment):
    sizes = ("--batches=1,3", "--contexts=20", "--steps=4", "--prompts=16,50")
    result = run(environment, "vs_vllm", "--parts=decode,prefill", *TINY, *sizes)
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [(1, 20), (3, 20)]
    for row in result["decode"]:
        assert row["kairos"]["ms"]["median"] > 0
        # Of the steps that count, each sequence is at its own: near the prompt's length, above it.
        assert 20 < row["kairos"]["context"] < 40
    assert [row["tokens"] for row in result["prefill"]] == [16, 50]
    assert all(row["kairos"]["tokens_per_s"]["median"] > 0 for row in result["prefill"])


def test_without_vllm_a_person_reads_of_ours_alone(environment):
    command = [sys.executable, "benchmarks/vs_vllm.py", "--parts=prefill", "--prompts=16", *TINY]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *_, head, row = done.stdout.splitlines()
    assert head.split() == ["tokens", "kairos"]
    assert row.startswith("16 ")


def test_serving_of_ours(environment):
    load = ("--rates=4", "--duration_s=1", "--max_prompt=40", "--max_output=8", "--ttft=60")
    arguments = ("--parts=serve", "--layouts=colocated", "--tpot=20", *load)
    served = run(environment, "vs_vllm", *arguments, *TINY)["serve"]
    (row,) = served["rates"]
    assert (row["rate"], row["requests"]) == (4, 4)
    ours = {key: figure["median"] for key, figure in row["kairos colocated"].items()}
    assert (ours["num_failed"], ours["e2e_attainment"]) == (0, 100)
    assert ours["ttft_p50_s"] > 0
    assert served["knee_rps"] is None


def test_without_vllm_rates_must_be_given(environment):
    command = [sys.executable, "benchmarks/vs_vllm.py", "--parts=serve", "--layouts=", *TINY]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "--rates is needed" in done.stdout + done.stderr


def test_startup(environment):
    result = run(environment, "startup", CONFIG, MODEL, "--rounds=1", "--warm=1")
    cold, warm = result["cold"], result["warm"]
    for state in (cold, warm):
        assert 0 < state["listening_s"]["median"] < state["ready_s"]["median"]
    assert cold["programs"] == warm["programs"]
    assert warm["programs"]["median"] > 0


def test_roofline(environment):
    sizes = ("--batches=1,4", "--contexts=40", "--prompts=32,100", "--rounds=1")
    probes = ("--mib=8", "--matmul=128", "--model_shape=tiny")
    result = run(environment, "roofline", CONFIG, *sizes, *probes)
    assert result["ceilings"]["bandwidth"] > 0
    assert all(each["median"] > 0 for each in result["ceilings"]["matmul"].values())
    assert [row["batch"] for row in result["decode"]] == [1, 4]
    assert [row["tokens"] for row in result["prefill"]] == [32, 100]
    one, four = result["decode"]
    # Four sequences read the weights once, as one does, and four times its KV.
    assert 1 < four["limit_ms"] / one["limit_ms"] < 4
    for row in [*result["decode"], *result["prefill"]]:
        share = row["limit_ms"] / row["engine_ms"]["median"]
        assert row["engine_share"] == pytest.approx(share, abs=1e-3)
        assert row["plan_ms"] > row["limit_ms"]


def test_what_the_host_adds(environment):
    result = run(environment, "host_step", "--sizes=4:100", "--steps=10")
    (row,) = result["steps"]
    assert (row["batch"], row["context"]) == (4, 100)
    assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]


def test_what_sampling_takes(environment):
    result = run(environment, "sampling", "--vocab=100", "--rows=1,3", "--rounds=2")
    assert [row["rows"] for row in result["steps"]] == [1, 3]
    for row in result["steps"]:
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row["ms"].values())


def test_what_copies_take_of_the_step_loop(environment):
    result = run(environment, "copies", "--tokens=5000", "--blocks=1,4")
    assert [row["way"] for row in result["copies"]] == ["out", "in"]
    assert all(0 < row["ms"]["median"] <= row["longest_ms"] for row in result["copies"])


@pytest.mark.timeout(600)
def test_the_first_run_on_an_accelerator(environment, tmp_path):
    """On a CPU, which has all parts too."""
    output = tmp_path / "accelerator.json"
    given = (CONFIG, MODEL, "--model_shape=tiny", "--rounds=1", "--seconds=1")
    command = [sys.executable, "benchmarks/accelerator.py", *given, f"--output={output}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(output.read_text())
    assert {"kernels", "golden", "steps", "trace", "profile", "serving"} <= told.keys()
    assert all(row["good"] for row in [*told["kernels"], *told["golden"]])
    assert all(row["same"] == row["tokens"] for row in told["golden"] if row["dtype"] == "float32")
    assert told["profile"]["profile"]["source"] == "measured"
    assert told["serving"]["live"].keys() == {"ttft", "tpot", "e2e"}


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not VLLM, reason="needs vLLM: KAIROS_VLLM_PYTHON=PATH of a Python that has it")
def test_beside_vllm(environment):
    """On the default model: vLLM has no attention for the tiny one's heads."""
    given = ("--overrides=decode.max_batch=2,decode.kv_tokens=4096", f"--vllm_python={VLLM}")
    sizes = ("--batches=2", "--contexts=64", "--steps=4", "--prompts=64", "--rounds=1")
    load = ("--layouts=colocated", "--rates=1", "--duration_s=4", "--ttft=60", "--tpot=20")
    result = run(environment, "vs_vllm", *given, *sizes, *load, timeout=1800)
    for row in [*result["decode"], *result["prefill"]]:
        assert row["same_first_token"] == 1
        assert row["ratio"] > 0
    (row,) = result["serve"]["rates"]
    for name in ("kairos colocated", "vllm"):
        assert row[name]["num_failed"]["median"] == 0
        assert row[name]["e2e_attainment"]["median"] == 100
