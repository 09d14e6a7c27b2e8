"""The `openai` package, as its users call it."""

import json
import math
from pathlib import Path

import pytest
import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CALLS = Path(__file__).parent / "openai_calls.py"


@pytest.fixture(scope="module")
def answers(served, tmp_path_factory) -> dict:
    """What each call of openai_calls.py has returned."""
    python = tools.installed("openai") / "python"
    before = served.totals()
    said = tools.run(
        [python, CALLS, f"{served.url}/v1", served.model], tmp_path_factory.mktemp("openai")
    )
    return json.loads(said) | {"counted": served.since(before)}


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def test_models(answers, served):
    (listed,) = answers["models"]["listed"]
    assert listed == answers["models"]["one"]
    assert listed["id"] == served.model


def test_chat_is_the_same_whole_in_parts_streamed_and_gathered(answers):
    whole = answers["chat"]
    assert "Paris" in text(whole)
    assert text(answers["chat_of_parts"]) == text(whole)
    assert text(answers["chat_gathered"]) == text(whole)
    *chunks, last = answers["chat_stream"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == text(whole)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_usage_adds_up(answers):
    usage = answers["chat"]["usage"]
    assert usage["prompt_tokens"] > 10
    assert 1 <= usage["completion_tokens"] <= 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_logprobs(answers):
    tokens = answers["chat_logprobs"]["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 4
    for token in tokens:
        best = [each["logprob"] for each in token["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert token["logprob"] == best[0] <= 0.0  # it was greedy
        assert bytes(token["bytes"]).decode() == token["token"]
    assert "".join(token["token"] for token in tokens) == text(answers["chat_logprobs"])


def test_completion_logprobs(answers):
    choice = answers["completion_logprobs"]["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"][0] == 0
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 16
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())


def test_a_prompt_that_is_echoed_has_logprobs(answers):
    choice = answers["echoed"]["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith("One, two,")
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"][0] is None
    assert all(logprob < 0 for logprob in found["token_logprobs"][1:])
    first = answers["completion_logprobs"]["choices"][0]["logprobs"]
    assert found["tokens"][-1] == first["tokens"][0]
    assert math.isclose(found["token_logprobs"][-1], first["token_logprobs"][0], abs_tol=1e-3)


def test_several_prompts_and_choices(answers):
    choices = answers["several"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] != choices[1]["text"]  # two draws for one prompt
    assert answers["several"]["usage"]["completion_tokens"] <= 16


def test_a_seed_makes_it_the_same_again(answers):
    first, again, *others = answers["seeded"]
    assert first == again
    assert any(other != first for other in others)


def test_a_completion_streams(answers):
    whole = answers["completion_logprobs"]["choices"][0]["text"]
    chunks = [chunk["choices"][0] for chunk in answers["completion_stream"]]
    assert "".join(chunk["text"] for chunk in chunks) == whole
    assert chunks[-1]["finish_reason"] == "length"


def test_a_stop_text_ends_it(answers):
    whole, cut = (answer["choices"][0] for answer in answers["stops"])
    assert cut["text"] == whole["text"].partition(" 9,")[0] != whole["text"]
    assert (whole["finish_reason"], cut["finish_reason"]) == ("length", "stop")


def test_objectives_and_timing(answers):
    timing = answers["objectives"]["choices"][0]["timing"]
    assert timing["ttft_met"] is True
    assert timing["tpot_met"] is True
    assert 0 < timing["ttft_s"] < 60


def test_a_request_id_is_given_back(answers):
    assert answers["named"] == "mine"


def test_streams_side_by_side(answers):
    assert answers["at_once"] == [8] * 8


def test_errors_become_its_exceptions(answers):
    bad = "BadRequestError", 400
    assert answers["errors"] == {
        "another model": ["NotFoundError", 404, "model", "model_not_found"],
        "temperature": [*bad, "temperature", "invalid_value"],
        "no choices": [*bad, "n", "invalid_value"],
        "nothing to say": [*bad, "max_tokens", "invalid_value"],
        "no messages": [*bad, "messages", "invalid_value"],
        "tools": [*bad, "tools", "invalid_value"],
        "an image": [*bad, "messages[0].content[0]", "invalid_value"],
        "a format": [*bad, "response_format", "invalid_value"],
        "too long": [*bad, "messages", "context_length_exceeded"],
        "no such path": ["NotFoundError", 404, None, "not_found"],
    }


def test_nothing_failed_and_who_left_is_forgotten(answers):
    assert answers["left"]["choices"][0]["index"] == 0
    counted = answers["counted"]
    assert counted["cancelled"] == 1
    assert counted["in_progress"] == 0
    assert counted.get("failed", 0) == 0
