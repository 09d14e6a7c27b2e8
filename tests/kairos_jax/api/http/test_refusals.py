"""Whatever is wrong with an HTTP request is told in OpenAI's shape, with the right status, and the
server goes on.
"""

import asyncio
import json
import time

import http_fakes
import httpx2
import pytest
from starlette.responses import Response
from starlette.routing import Route

from kairos_jax.api.gate import Gate
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.guard import OpenRoute
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = {"prompt": "hello", "max_tokens": 1}
TALK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
LIMIT = 1 << 20


def content(parts):
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.fixture(scope="module")
def client():
    with http_fakes.client_of_thread(app=HttpOptions(0, max_body_bytes=LIMIT)) as client:
        yield client


def check(answer, status, param=None, part="", code=None):
    """The answer refuses, in shape and for this reason."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert error["code"]
    assert error["param"] == param
    assert code in (None, error["code"])
    assert part in error["message"]
    assert len(error["message"]) < 1100


# Path, what is changed in a good body, the field that is named, a part of what is said.
BAD_FIELDS = [
    (TEXT, {"temperature": float("nan")}, "temperature", "0 or more, got nan"),
    (TEXT, {"temperature": -1}, "temperature", "0 or more, got -1"),
    (TEXT, {"temperature": 1e300}, "temperature", "got inf"),
    (TEXT, {"temperature": 10**400}, "temperature", "got inf"),
    (TEXT, {"temperature": "hot"}, "temperature", "a number"),
    (TEXT, {"temperature": True}, "temperature", "a number"),
    (TEXT, {"top_p": 0}, "top_p", "above 0 and at most 1"),
    (TEXT, {"top_p": 2}, "top_p", "above 0 and at most 1"),
    (TEXT, {"min_p": -0.5}, "min_p", "from 0 to 1"),
    (TEXT, {"top_k": -2}, "top_k", "0 (off) or more"),
    (TEXT, {"n": 0}, "n", "from 1 to 128, got 0"),
    (TEXT, {"n": 100_000}, "n", "from 1 to 128, got 100000"),
    (TEXT, {"n": 65}, "n", "65 choices; this server takes 64"),
    (TEXT, {"n": 2, "best_of": 3}, "best_of", "must be n"),
    (TEXT, {"max_tokens": -1}, "max_tokens", "from 1 to 64, got -1"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "from 1 to 64, got 0"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", "an integer, got 1.5"),
    (TEXT, {"max_tokens": 10**30}, "max_tokens", "more than 64 bits"),
    (TEXT, {"max_tokens": 2**40}, "max_tokens", "got 1099511627776"),
    (TEXT, {"max_tokens": 65}, "max_tokens", "from 1 to 64, got 65"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens", "got -1"),
    (TEXT, {"min_tokens": 2}, "min_tokens", "at most max_tokens, 1, got 2"),
    (TEXT, {"prompt": None}, "prompt", "is missing"),
    (TEXT, {"prompt": ""}, "prompt", "is empty"),
    (TEXT, {"prompt": []}, "prompt", "is empty"),
    (TEXT, {"prompt": ["x", ""]}, "prompt[1]", "is empty"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "is empty"),
    (TEXT, {"prompt": [[1], "x", [1, "x"]]}, "prompt[2]", "text or a list of token ids"),
    (TEXT, {"prompt": {"text": "x"}}, "prompt", "text or a list of token ids"),
    (TEXT, {"prompt": 7}, "prompt", "text or a list of token ids"),
    (TEXT, {"prompt": [True]}, "prompt[0]", "text or a list of token ids"),
    (TEXT, {"prompt": [5, 97]}, "prompt[1]", "from 0 to 96, got 97"),
    (TEXT, {"prompt": [[5], [6, -1]]}, "prompt[1][1]", "a token id, got -1"),
    (TEXT, {"prompt": [2**31]}, "prompt[0]", "a token id, got 2147483648"),
    (TEXT, {"prompt": "x" * 128}, "prompt", "128 tokens"),
    (TEXT, {"prompt": "x" * 127, "max_tokens": 2}, "max_tokens", "at most 1 after a prompt of 127"),
    (TEXT, {"prompt": ["x"] * 65}, "prompt", "65 choices; this server takes 64"),
    (TEXT, {"prompt": "\ud800"}, "prompt", "lone surrogate"),
    (TEXT, {"stop": ["\udfff"]}, "stop[0]", "lone surrogate"),
    (TEXT, {"stop": [""]}, "stop[0]", "from 1 to 256 characters"),
    (TEXT, {"stop": 5}, "stop", "a string or a list"),
    (TEXT, {"stop_token_ids": [97]}, "stop_token_ids[0]", "from 0 to 96"),
    (TEXT, {"stop_token_ids": "x"}, "stop_token_ids", "a list of token ids"),
    (TEXT, {"seed": 2**63}, "seed", "more than 64 bits"),
    (TEXT, {"logprobs": 21}, "logprobs", "from 0 to 20"),
    (TEXT, {"logprobs": 21, "echo": True}, "logprobs", "from 0 to 20"),
    (TEXT, {"max_tokens": 0, "logprobs": 1}, "max_tokens", "from 1 to 64, got 0"),
    (TEXT, {"stream": "yes"}, "stream", "true or false"),
    (TEXT, {"stream_options": []}, "stream_options", "an object"),
    (TEXT, {"presence_penalty": 0.5}, "presence_penalty", "must be 0"),
    (TEXT, {"frequency_penalty": 0.5}, "frequency_penalty", "must be 0"),
    (TEXT, {"repetition_penalty": 1.1}, "repetition_penalty", "must be 1"),
    (TEXT, {"logit_bias": {"5": 1}}, "logit_bias", "must be {}"),
    (TEXT, {"slo": {"ttft_ms": 0}}, "slo.ttft_ms", "positive number of milliseconds, got 0"),
    (TEXT, {"slo": {"tpot_ms": float("nan")}}, "slo.tpot_ms", "got nan"),
    (TEXT, {"slo": {"ttft": 1}}, "slo.ttft", "is not known"),
    (CHAT, {"messages": None}, "messages", "is missing"),
    (CHAT, {"messages": []}, "messages", "at least 1 message"),
    (CHAT, {"messages": "hi"}, "messages", "must be a list"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "must be an object"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", "is missing"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "a string or a list"),
    (CHAT, content("\ud83d"), "messages[0].content", "lone surrogate"),
    (
        CHAT,
        content([{"type": "image_url", "image_url": {}}]),
        "messages[0].content[0]",
        "image_url",
    ),
    (CHAT, content([{"type": "text", "text": 5}]), "messages[0].content[0].text", "a string"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": 1}, "logprobs", "true or false"),
    (CHAT, {"echo": True}, "echo", "for completions"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "must be []"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", 'must be "none" or "auto", as nothing else'),
    (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice", "got an object"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort", "must be null"),
    (CHAT, {"documents": [{"text": "x"}]}, "documents", "must be []"),
    (CHAT, {"prompt": "x"}, "prompt", "is for completions, and not for chat"),
    (TEXT, {"messages": []}, "messages", "is for chat, and not for completions"),
    (TEXT, {"top_logprobs": 5}, "top_logprobs", "is for chat, and not for completions; got 5"),
    (TEXT, {"chat_template": "x"}, "chat_template", "is for chat"),
    (TEXT, {"continue_final_message": True}, "continue_final_message", "is for chat"),
    (TEXT, {"allowed_token_ids": [5]}, "allowed_token_ids", "must be null"),
    (TEXT, {"bad_words": ["x"]}, "bad_words", "must be []"),
    (TEXT, {"priority": 1}, "priority", "must be 0"),
    (TEXT, {"cache_salt": "x"}, "cache_salt", "must be null"),
    (TEXT, {"truncation_side": "right"}, "truncation_side", 'must be "left"'),
    (TEXT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "from 1 to 127, or -1"),
    (TEXT, {"truncate_prompt_tokens": 128}, "truncate_prompt_tokens", "got 128"),
    (TEXT, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "got -2"),
    (TEXT, {"skip_special_tokens": "no"}, "skip_special_tokens", "true or false"),
    (TEXT, {"include_stop_str_in_output": 1}, "include_stop_str_in_output", "true or false"),
    (TEXT, {"request_id": "x" * 257}, "request_id", "at most 256 characters, got 257"),
    (
        CHAT,
        {"add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
        "must be false with add_generation_prompt",
    ),
    (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs", "an object"),
    (CHAT, {"chat_template": "x" * 65537}, "chat_template", "at most 65536 characters, got 65537"),
    (CHAT, {"chat_template": "\ud800"}, "chat_template", "lone surrogate"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]},
        "messages[0].reasoning_content",
        'must be ""',
    ),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "nothing else"),
    ("/tokenize", {"prompt": None}, "prompt", "is missing"),
    ("/tokenize", {"prompt": "\ud800"}, "prompt", "lone surrogate"),
    ("/tokenize", {"messages": []}, "messages", "at least 1 message"),
    ("/tokenize", {"chat_template": "x"}, "chat_template", "is for chat"),
    ("/tokenize", {"return_token_strs": True}, "return_token_strs", "must be false"),
    ("/detokenize", {}, "tokens", "is missing"),
    ("/detokenize", {"tokens": [97]}, "tokens[0]", "from 0 to 96"),
]


@pytest.mark.parametrize(("path", "changes", "param", "part"), BAD_FIELDS)
def test_a_bad_field_is_named(client, path, changes, param, part):
    body = (TALK if path == CHAT else GOOD) | changes
    check(client.post(path, content=json.dumps(body)), 400, param, part)


BAD_BODIES = [
    (b"", "must be JSON"),
    (b"{", "must be JSON"),
    (b'{"prompt": "\xff"}', "must be UTF-8"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested too deeply"),
    (b'{"x": ' * 30_000 + b"1" + b"}" * 30_000, "nested too deeply"),
    (b'{"max_tokens": ' + b"1" * 5000 + b"}", "must be JSON"),
]


@pytest.mark.parametrize(("body", "part"), BAD_BODIES, ids=[part for _, part in BAD_BODIES])
@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_a_bad_body_is_refused(client, path, body, part):
    check(client.post(path, content=body), 400, "body", part)


@pytest.mark.parametrize(
    ("headers", "param", "part"),
    [
        ({"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms", "must be a number"),
        ({"x-slo-tpot-ms": "-5"}, "x-slo-tpot-ms", "positive number of milliseconds, got -5"),
        ({"x-slo-tpot-ms": "nan"}, "x-slo-tpot-ms", "got nan"),
        ({"x-llm-d-slo-ttft-ms": "0"}, "x-llm-d-slo-ttft-ms", "got 0"),
        # Also of one that does not win.
        ({"x-llm-d-slo-tpot-ms": "5", "x-slo-tpot-ms": "soon"}, "x-slo-tpot-ms", "a number"),
        ({"x-request-id": "x" * 257}, None, "at most 256 characters, got 257"),
    ],
)
def test_a_bad_header_is_named(client, headers, param, part):
    check(client.post(TEXT, json=GOOD, headers=headers), 400, param, part)


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        (TEXT, {"prompt": "x" * 128}, "prompt"),
        (TEXT, {"prompt": ["x", [5] * 200]}, "prompt[1]"),
        (TEXT, {"prompt": "x" * 100, "max_tokens": 29}, "max_tokens"),
        (CHAT, content("x" * 200), "messages"),
        (CHAT, content("x" * 100) | {"max_completion_tokens": 60}, "max_completion_tokens"),
    ],
)
def test_what_is_too_long_has_the_code_that_clients_look_for(client, path, changes, param):
    body = (TALK if path == CHAT else GOOD) | changes
    if "max_completion_tokens" in changes:
        del body["max_tokens"]
    check(client.post(path, json=body), 400, param, code="context_length_exceeded")


def test_other_refusals_have_another_code(client):
    check(
        client.post(TEXT, json=GOOD | {"max_tokens": 65}), 400, "max_tokens", code="invalid_value"
    )


def test_40_megabytes_are_refused_unread(client):
    check(client.post(TEXT, content=b" " * (40 << 20)), 413, None, str(LIMIT))
    check(client.post(TEXT, content=(b" " * 65536 for _ in range(100))), 413, None, str(LIMIT))
    assert client.post(TEXT, json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "/nothing", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("GET", "/v1/models/other/model", 404, "model"),
        ("GET", TEXT, 405, None),
        ("DELETE", "/v1/models", 405, None),
        ("POST", "/health", 405, None),
    ],
)
def test_what_is_not_there(client, method, path, status, param):
    answer = client.request(method, path)
    check(answer, status, param)
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_told_which_is_known(client, path):
    body = GOOD | TALK | {"model": "o\ud800ther"}
    check(client.post(path, content=json.dumps(body)), 400, "model", "lone surrogate")
    body["model"] = "other" * 1000
    check(client.post(path, json=body), 404, "model", '"fake" is')


async def nothing(request):
    return Response()


def test_a_route_that_does_not_say_that_it_is_open_needs_a_key():
    opened = ["/health", "/metrics", "/version", "/probe"]
    added = [
        OpenRoute("/probe", nothing),
        Route("/new", nothing),
        *Live(Gate(time.monotonic)).routes(),
    ]
    app = make_app(Gate(time.monotonic), HttpOptions(0, keys=[digest(b"key")]), added)
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    assert {"/new", "/live", "/", "/page/live.js", *opened, TEXT} < set(paths)

    async def main():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://kairos") as client:
            asked = [path for path in paths if path != "/live"]
            refused = {path for path in asked if (await client.get(path)).status_code == 401}
            assert refused == {
                *("/new", TEXT, CHAT, "/tokenize", "/detokenize", "/v1/models"),
                "/v1/models/{id:path}",
            }
            for path in ("/live", "/nowhere", "/new/", "/health/"):
                assert (await client.get(path)).status_code == 401
            keyed = {"authorization": "Bearer key"}
            assert (await client.get("/new", headers=keyed)).status_code == 200
            assert (await client.get("/nowhere", headers=keyed)).status_code == 404

    asyncio.run(main())


def test_without_a_key_nothing_is_served_but_probes():
    app = HttpOptions(0, keys=[digest(b"first"), digest(b"second")])
    with http_fakes.client_of_thread(app=app) as client:
        assert client.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first"},
            {"authorization": "first"},
            {"authorization": "Bearer"},
            {"authorization": "Bearer first\xe4".encode("latin-1")},
        ):
            for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
                answer = client.post(path, json=GOOD, headers=headers)
                check(answer, 401, None, "API key")
                assert answer.headers["www-authenticate"] == "Bearer"
            check(client.get("/v1/models", headers=headers), 401)
        for key in ("first", "second"):
            headers = {"authorization": f"Bearer {key}"}
            assert client.post(TEXT, json=GOOD, headers=headers).status_code == 200
