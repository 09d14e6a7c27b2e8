"""Programs that put load on a server and measure it: each sends a few requests, and what it says of
them is held against what the server has counted.
"""

import json
import math
import os
from pathlib import Path

import pytest
import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

REQUESTS, PROMPT, OUTPUT = 8, 48, 12
# What the server adds to a prompt of chat: the template's own tokens, with its system message.
TEMPLATE = 40
# Refuses every connection: the port is reserved, and nobody listens.
NOWHERE = "http://127.0.0.1:1"


def assert_served(counted: dict[str, float], requests: int = REQUESTS) -> None:
    """The server has answered so many in full, and has nothing left of them."""
    assert counted["length"] == requests
    assert counted["output_tokens"] == requests * OUTPUT
    assert requests * (PROMPT - 4) <= counted["prompt_tokens"]
    assert counted["prompt_tokens"] <= requests * (PROMPT + TEMPLATE)
    assert counted.get("failed", 0) == counted.get("cancelled", 0) == counted["in_progress"] == 0


def assert_times(ttft_s: float, tpot_s: float, total_s: float) -> None:
    """They are times, and fit together: the mean of each, in seconds."""
    assert 0.001 < tpot_s < ttft_s < total_s < 60
    assert math.isclose(ttft_s + (OUTPUT - 1) * tpot_s, total_s, rel_tol=0.25)


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_vllm_bench_serve(served, tmp_path, backend, endpoint):
    if not (python := os.environ.get("VLLM_PYTHON")):
        pytest.skip("VLLM_PYTHON does not name a Python that has vLLM")
    before = served.totals()
    tools.run(
        [
            *(python, Path(__file__).parent / "vllm_bench_serve.py"),
            *("--backend", backend, "--base-url", served.url, "--endpoint", endpoint),
            *("--model", served.model, "--tokenizer", served.directory),
            *("--dataset-name", "random", "--input-len", str(PROMPT), "--output-len", str(OUTPUT)),
            *("--num-prompts", str(REQUESTS), "--max-concurrency", "2", "--ignore-eos"),
            *("--percentile-metrics", "ttft,tpot,itl,e2el"),
            *("--save-result", "--save-detailed", "--result-filename", tmp_path / "result.json"),
        ],
        tmp_path,
    )
    assert_served(served.since(before))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == REQUESTS
    assert result["errors"] == [""] * REQUESTS
    assert result["output_lens"] == [OUTPUT] * REQUESTS
    times = (result[f"mean_{name}_ms"] / 1000 for name in ("ttft", "tpot", "e2el"))
    assert_times(*times)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf(served, tmp_path, endpoint):
    """Offline by another way: with the usual variables it takes no path for a tokenizer's name."""
    offline = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "HF_ENDPOINT": NOWHERE}
    aiperf = tools.installed("aiperf") / "aiperf"
    before = served.totals()
    tools.run(
        [
            *(aiperf, "profile", "--model", served.model, "--url", served.url),
            *("--endpoint-type", endpoint, "--streaming", "--tokenizer", served.directory),
            *("--request-count", str(REQUESTS), "--concurrency", "2", "--workers-max", "1"),
            *("--synthetic-input-tokens-mean", str(PROMPT), "--output-tokens-mean", str(OUTPUT)),
            *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
            *("--random-seed", "1", "--ui", "none", "--artifact-dir", tmp_path / "out"),
        ],
        tmp_path,
        environment=offline,
    )
    assert_served(served.since(before))
    result = json.loads((tmp_path / "out/profile_export_aiperf.json").read_text())
    assert result["request_count"]["avg"] == REQUESTS
    assert not result.get("error_summary")
    assert result["output_sequence_length"]["avg"] == OUTPUT
    latency = ("time_to_first_token", "inter_token_latency", "request_latency")
    assert_times(*(result[name]["avg"] / 1000 for name in latency))


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(served, tmp_path, endpoint):
    guidellm = tools.installed("guidellm") / "guidellm"
    before = served.totals()
    target = f"target={served.url},model={served.model},request_format={endpoint}"
    tools.run(
        [
            *(guidellm, "run", "--backend", f"kind=openai_http,{target}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
            *("--tokenizer", f"kind=huggingface_auto,model={served.directory}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--output", f"kind=json,path={tmp_path / 'result.json'}"),
            "--disable-console-interactive",
        ],
        tmp_path,
    )
    assert_served(served.since(before))
    (benchmark,) = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (REQUESTS, [])
    assert [each["output_tokens"] for each in requests["successful"]] == [OUTPUT] * REQUESTS
    metrics = benchmark["metrics"]
    ttft, tpot, total = (
        metrics[name]["successful"]["mean"]
        for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")
    )
    assert_times(ttft / 1000, tpot / 1000, total)


INFERENCE_PERF = """
api:
  type: {api}
  streaming: true
  headers: {{x-slo-ttft-ms: "60000", x-slo-tpot-ms: "10000"}}
server: {{type: vllm, model_name: {model}, base_url: "{url}", ignore_eos: true}}
tokenizer: {{pretrained_model_name_or_path: {directory}}}
data:
  type: shared_prefix
  shared_prefix:
    num_unique_system_prompts: 2
    num_users_per_system_prompt: 4
    system_prompt_len: {half}
    question_len: {half}
    output_len: {output}
load: {{type: constant, num_workers: 1, stages: [{{rate: 2, duration: 4}}]}}
report: {{request_lifecycle: {{summary: true, per_stage: false}}}}
storage: {{local_storage: {{path: {folder}}}}}
"""


@pytest.mark.parametrize("api", ["completion", "chat"])
def test_inference_perf(served, tmp_path, api):
    """With an SLO by header, of which it keeps count too."""
    program = tools.installed("inference_perf", least=(3, 12)) / "inference-perf"
    config = INFERENCE_PERF.format(
        api=api,
        model=served.model,
        url=served.url,
        directory=served.directory,
        half=PROMPT // 2,
        output=OUTPUT,
        folder=tmp_path / "out",
    )
    (tmp_path / "config.yaml").write_text(config)
    before = served.totals()
    tools.run([program, "--config_file", tmp_path / "config.yaml"], tmp_path)
    assert_served(served.since(before))
    summary = json.loads(next(Path(tmp_path, "out").rglob("summary_lifecycle*.json")).read_text())
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (REQUESTS, 0)
    assert summary["successes"]["goodput_metrics"]["goodput_percentage"] == 100.0
    latency = summary["successes"]["latency"]
    names = ("time_to_first_token", "time_per_output_token", "request_latency")
    assert_times(*(latency[name]["mean"] for name in names))
