"""curl, as README.md has it, and what scripts do with it."""

import json
import shutil

import pytest
import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def curl(served, tmp_path):
    """Calls curl with a path and options; returns what it prints."""
    if (program := shutil.which("curl")) is None:
        pytest.skip("there is no curl")

    def call(path: str, *options: str, code: int = 0) -> str:
        command = [program, "--no-progress-meter", f"{served.url}{path}", *options]
        return tools.run(command, tmp_path, timeout_s=60, code=code)

    return call


def asked(**body) -> tuple[str, ...]:
    return "--header", "content-type: application/json", "--data", json.dumps(body)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_content_type_of_a_form_is_refused_with_a_reason(curl):
    said = curl("/v1/completions", "--fail-with-body", "--data", '{"prompt": "x"}', code=22)
    assert "content-type must be application/json" in json.loads(said)["error"]["message"]


def test_a_chat(curl):
    slo = ("--header", "x-slo-ttft-ms: 60000", "--header", "x-slo-tpot-ms: 10000")
    body = asked(messages=QUESTION, max_tokens=16, temperature=0, timing=True)
    answer = json.loads(curl("/v1/chat/completions", *slo, *body))
    (choice,) = answer["choices"]
    assert "Paris" in choice["message"]["content"]
    assert choice["timing"]["ttft_met"]
    assert choice["timing"]["tpot_met"]


def test_a_stream_is_events_and_ends_with_done(curl):
    body = asked(messages=QUESTION, max_tokens=8, temperature=0, stream=True)
    *events, done, rest = curl("/v1/chat/completions", "--no-buffer", *body).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("usage" not in chunk for chunk in chunks)


def test_who_is_served(curl, served):
    (model,) = json.loads(curl("/v1/models"))["data"]
    assert (model["id"], model["max_model_len"]) == (served.model, 2048)
    assert json.loads(curl(f"/v1/models/{served.model}")) == model
    assert curl("/health", "--write-out", "%{http_code}") == "200"


def test_text_goes_to_tokens_and_back(curl, served):
    found = json.loads(curl("/tokenize", *asked(model=served.model, prompt="Hello, world")))
    assert found["count"] == len(found["tokens"]) > 1
    assert json.loads(curl("/detokenize", *asked(tokens=found["tokens"]))) == {
        "prompt": "Hello, world"
    }
    wanted = {"max_tokens": 8, "temperature": 0}
    texts = [
        json.loads(curl("/v1/completions", *asked(prompt=prompt, **wanted)))["choices"][0]["text"]
        for prompt in ("Hello, world", found["tokens"])
    ]
    assert texts[0] == texts[1]


def test_metrics_answer_get_and_head(curl):
    assert "kairos_requests_total{" in curl("/metrics")
    assert curl("/metrics", "--head").startswith("HTTP/1.1 200 OK")


def test_a_refusal_is_an_exit_code_and_a_reason(curl):
    # 22 is curl's word for a status of 400 and above.
    body = asked(messages=QUESTION, max_tokens=-1)
    said = curl("/v1/chat/completions", "--fail-with-body", *body, code=22)
    error = json.loads(said)["error"]
    assert (error["param"], error["code"]) == ("max_tokens", "invalid_value")


def test_a_client_that_goes_away_is_forgotten(curl, served):
    before = served.totals()
    endless = asked(prompt="Once", max_tokens=1000, ignore_eos=True, stream=True)
    curl("/v1/completions", "--max-time", "2", *endless, code=28)
    counted = served.since(before)
    assert (counted["cancelled"], counted["in_progress"]) == (1, 0)
