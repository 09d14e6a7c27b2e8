"""lm-eval, with tasks of our own: log-likelihoods of prompts, and generation."""

import json
import shutil
from pathlib import Path

import pytest
import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.fixture
def evaluate(served, tmp_path):
    """Runs one task; returns its results and its samples."""
    program = tools.installed("lm_eval") / "lm-eval"
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    for task in tasks.glob("*.yaml"):  # the files beside it have no path of their own
        task.write_text(task.read_text().replace("    test: ", f"    test: {tasks}/"))

    def call(task: str, *options: str, **changed: object) -> tuple[dict, list[dict]]:
        model = {
            "model": served.model,
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": served.directory,
            "num_concurrent": 2,
            "max_retries": 1,
        } | changed
        arguments = ",".join(f"{name}={value}" for name, value in model.items())
        tools.run(
            [
                *(program, "run", "--model", "local-completions", "--model_args", arguments),
                *("--tasks", task, "--include_path", tasks),
                *("--output_path", tmp_path / "out", "--log_samples", *options),
            ],
            tmp_path,
        )
        results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
        (samples,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        return results["results"][task], [
            json.loads(line) for line in samples.read_text().splitlines()
        ]

    return call


@pytest.mark.parametrize("tokenized", [True, False])
def test_loglikelihood(served, evaluate, tokenized):
    before = served.totals()
    result, samples = evaluate("kairos_choice", tokenized_requests=tokenized)
    counted = served.since(before)
    assert result["acc,none"] >= 5 / 6
    assert len(samples) == 6
    found = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    assert all(-60 < logprob < 0 for logprob in found)
    assert counted["length"] == 18  # each answer of each question
    assert counted.get("failed", 0) == counted["in_progress"] == 0


def test_loglikelihood_of_several_prompts_in_one_body(served, evaluate):
    before = served.totals()
    result, samples = evaluate("kairos_choice", "--batch_size", "4")
    assert result["acc,none"] >= 5 / 6
    assert len(samples) == 6
    assert served.since(before)["length"] == 18


def test_generate_until(served, evaluate):
    before = served.totals()
    result, samples = evaluate("kairos_count")
    counted = served.since(before)
    assert result["exact_match,stripped"] >= 0.5
    assert all("," not in sample["resps"][0][0] for sample in samples)
    assert counted["stop"] == len(samples) == 4
    assert counted.get("failed", 0) == counted["in_progress"] == 0
