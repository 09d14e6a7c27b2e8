"""The HTTP API over real sockets, with fake engines: what it answers."""

import asyncio
from typing import Any

import fakes
import http_fakes
import pytest
from http_fakes import ids_of, of, says, served, text_in

from kairos_jax.api.http.answers.choice import StopTexts, token_text
from kairos_jax.api.http.server import HttpOptions

# Of all ids, the special ones among them.
TEXTS = [token_text(http_fakes.tokenizer(), id) for id in range(fakes.VOCAB)]
TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


def used(prompt: int, completion: int) -> dict[str, Any]:
    """The usage of an answer whose prompt was computed whole."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@served
async def test_a_completion(api):
    answer = await api.complete(prompt="hello", max_tokens=9)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [
            {"index": 0, "text": says("hello", 9), "logprobs": None, "finish_reason": "length"}
        ],
        "usage": used(5, 9),
    }
    whole = await api.complete(prompt="hello")
    assert whole["usage"]["completion_tokens"] == 16, "OpenAI's default"


@served
async def test_a_chat_completion(api):
    prompt = "u:hi|a:"
    for content in ("hi", [{"type": "text", "text": "hi"}]):
        answer = await api.chat(content, max_completion_tokens=9)
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion"
        message = {"role": "assistant", "content": says(prompt, 9), "refusal": None}
        assert of(answer)["message"] == message
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    most = await api.chat("hi")
    assert most["usage"]["completion_tokens"] == 64, "as much as the server allows"


@served
async def test_a_stream_of_text(api):
    events = await api.events(TEXT, {"prompt": "hello", "max_tokens": 9})
    assert text_in(events) == says("hello", 9)
    assert len({event["id"] for event in events}) == 1
    assert [of(event)["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert of(events[-1])["finish_reason"] == "length"
    assert not any("usage" in event for event in events)
    assert {event["object"] for event in events} == {"text_completion"}


@served
async def test_a_stream_of_chat(api):
    messages = [{"role": "user", "content": "hi"}]
    options = {"include_usage": True}
    body = {"messages": messages, "max_tokens": 9, "stream_options": options}
    first, *rest, last, usage = await api.events(CHAT, body)
    assert of(first)["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in of(event)["delta"] for event in [*rest, last])
    assert text_in([*rest, last]) == says("u:hi|a:", 9)
    assert of(last)["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == used(7, 9)
    assert all(event["usage"] is None for event in [first, *rest, last])
    assert {event["object"] for event in [first, usage]} == {"chat.completion.chunk"}


@served
async def test_usage_may_come_with_each_event(api):
    options = {"continuous_usage_stats": True}
    body = {"prompt": "hello", "max_tokens": 9, "stream_options": options}
    events = await api.events(TEXT, body)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(set(counts))
    assert counts[-1] == 9


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_come_in_four_forms_and_choices_in_order(shared, stream):
    async def run(api):
        ids = [ids_of("ab"), ids_of("cde")]
        for prompt in ("ab", ids[0], ["ab", "cde"], ids, ["ab", ids[1]]):
            several = isinstance(prompt, list) and not isinstance(prompt[0], int)
            body = {"prompt": prompt, "max_tokens": 5, "n": 2}
            if stream:
                shown = [of(event) for event in await api.events(TEXT, body)]
            else:
                shown = (await api.complete(**body))["choices"]
            texts = {}
            for choice in shown:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            expected = [says("ab", 5)] * 2 + [says("cde", 5)] * 2 * several
            assert [texts[index] for index in sorted(texts)] == expected

    shared(run)


@served
async def test_an_output_ends_where_a_stop_text_begins(api):
    whole = says("hello", 40)
    for stop in (whole[7:10], ["\n", whole[7:10], whole[20:22]]):
        body = {"prompt": "hello", "max_tokens": 40, "stop": stop}
        answer = of(await api.complete(**body))
        assert (answer["text"], answer["finish_reason"]) == (whole[:7], "stop")
        assert text_in(await api.events(TEXT, body)) == whole[:7]
    # Held back to the end, since it might have gone on.
    body = {"prompt": "hello", "max_tokens": 8, "stop": whole[6:10]}
    answer = of(await api.complete(**body))
    assert (answer["text"], answer["finish_reason"]) == (whole[:8], "length")


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["ab"], ["xa", "by"], ("x", True)),
        (["ab"], ["xa", "cab"], ("xac", True)),
        (["aab"], ["aa", "ab"], ("a", True)),
        (["ab"], ["xa"], ("xa", False)),
        (["abc", "b"], ["ab"], ("a", True)),
        (["cd", "abcd"], ["ab", "cd"], ("", True)),
        (["ab"], ["", ""], ("", False)),
    ],
)
def test_stop_texts(stops, pieces, expected):
    watch, text, stopped = StopTexts(stops), "", False
    for piece in pieces:
        more, stopped = watch.push(piece)
        assert not any(stop in text + more for stop in stops)
        text += more
    assert (text + watch.flush(), stopped) == expected


@served
async def test_stop_tokens_and_min_tokens(api):
    tokens = fakes.expected_tokens(ids_of("hello"), 40)
    stop = tokens[5]
    later = next(at for at in range(6, 40) if tokens[at] == stop) if stop in tokens[6:] else None
    body = {"prompt": "hello", "max_tokens": 40, "stop_token_ids": [stop]}
    at = tokens.index(stop)
    answer = await api.complete(**body, min_tokens=at + 1)
    assert answer["usage"]["completion_tokens"] == at + 1
    assert of(answer)["finish_reason"] == "stop"
    answer = await api.complete(**body, min_tokens=at + 2)
    assert answer["usage"]["completion_tokens"] == (40 if later is None else later + 1)


@served
async def test_logprobs_of_a_completion(api):
    expected = says("hello", 3)
    answer = await api.complete(prompt="hello", max_tokens=3, logprobs=1)
    assert of(answer)["logprobs"] == {
        "tokens": list(expected),
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{character: -0.5} for character in expected],
        "text_offset": [0, 1, 2],
    }
    body = {"prompt": "hello", "max_tokens": 3, "logprobs": 1}
    events = await api.events(TEXT, body)
    shown = [of(event)["logprobs"] for event in events]
    assert [offset for each in shown for offset in each["text_offset"]] == [0, 1, 2]


def scored(prompt: str, count: int) -> dict[str, Any]:
    """What a completion is to tell of its prompt with `echo` and `logprobs`."""
    logprobs = fakes.expected_prompt_logprobs(ids_of(prompt), count)
    tokens = list(logprobs.tokens(ids_of(prompt)))
    return {
        "tokens": list(prompt),
        "token_logprobs": [None, *(token.logprob for token in tokens)],
        "top_logprobs": [
            None,
            *({TEXTS[id]: value for id, value in token.top} for token in tokens),
        ],
        "text_offset": list(range(len(prompt))),
    }


def with_more(shown: dict[str, Any], output: str) -> dict[str, Any]:
    """The same, followed by that of these tokens, of which one alternative is told."""
    at = len(shown["tokens"])
    more = {
        "tokens": list(output),
        "token_logprobs": [-0.5] * len(output),
        "top_logprobs": [{character: -0.5} for character in output],
        "text_offset": list(range(at, at + len(output))),
    }
    return {name: values + more[name] for name, values in shown.items()}


@pytest.mark.parametrize("colocated", [False, True])
def test_an_echo_with_logprobs_tells_those_of_the_prompt(colocated):
    """As lm-eval asks for them; of a prompt of which an earlier one has left pages, too."""

    async def main():
        async with http_fakes.serving(fakes.altered(colocated=colocated)) as api:
            prompts = ["long enough to fill a page or two, and more than a chunk", "ab"]
            lists = [ids_of(prompt) for prompt in prompts]
            await api.complete(prompt=lists[0])
            asked = {"prompt": lists, "max_tokens": 1, "echo": True, "logprobs": 1, "n": 2}
            choices = (await api.complete(**asked))["choices"]
            assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
            for choice, prompt in zip(choices, [p for p in prompts for _ in range(2)], strict=True):
                first = says(prompt, 1)
                assert choice["text"] == prompt + first
                assert choice["logprobs"] == with_more(scored(prompt, 1), first)
            # Only what is said of the prompt.
            answer = await api.complete(prompt="hello", max_tokens=0, echo=True, logprobs=3)
            assert of(answer)["logprobs"] == scored("hello", 3)
            assert answer["usage"]["completion_tokens"] == 0
            await api.harness.assert_nothing_held()

    asyncio.run(main())


@served
async def test_a_stream_begins_with_the_logprobs_of_its_prompt(api):
    body = {"prompt": "hello", "max_tokens": 3, "echo": True, "logprobs": 1}
    events = [of(event)["logprobs"] for event in await api.events(TEXT, body)]
    whole = {name: [value for event in events for value in event[name]] for name in events[0]}
    assert events[0] == scored("hello", 1)
    assert whole == with_more(scored("hello", 1), says("hello", 3))
    (one,) = (await api.complete(prompt="x", max_tokens=0, echo=True, logprobs=0))["choices"]
    assert one["logprobs"]["token_logprobs"] == [None]


@served
async def test_logprobs_of_a_chat(api):
    answer = await api.chat("hi", max_tokens=2, logprobs=True, top_logprobs=1)
    for character, entry in zip(says("u:hi|a:", 2), of(answer)["logprobs"]["content"], strict=True):
        shown = {"token": character, "logprob": -0.5, "bytes": [ord(character)]}
        assert entry == shown | {"top_logprobs": [shown]}
    answer = await api.chat("hi", max_tokens=2, logprobs=True)
    assert of(answer)["logprobs"]["content"][0]["logprob"] == -0.5


@served
async def test_an_echo(api):
    answer = await api.complete(prompt="hello", max_tokens=4, echo=True)
    assert of(answer)["text"] == "hello" + says("hello", 4)
    answer = await api.complete(prompt=[ids_of("hello")], max_tokens=0, echo=True)
    assert of(answer)["text"] == "hello"
    assert answer["usage"] == used(5, 0)
    assert text_in(await api.events(TEXT, {"prompt": "ab", "max_tokens": 4, "echo": True})) == (
        "ab" + says("ab", 4)
    )


@served
async def test_seeds_and_slos_reach_the_engine(api):
    seen = []
    submit = api.harness.router.submit

    def spy(request, trace):
        seen.append(request)
        return submit(request)

    api.harness.router.submit = spy
    slo = {"ttft_ms": 250, "tpot_ms": 25}
    body = {"prompt": "x", "max_tokens": 1, "seed": 7, "n": 2, "slo": slo, "unknown": {"a": None}}
    headers = {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "50", "x-request-id": "mine"}
    answer = await api.post(TEXT, body, headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    assert [request.id for request in seen] == ["mine-0", "mine-1"]
    assert [request.sampling.seed for request in seen] == [7, 8]
    assert {(request.slo.ttft, request.slo.tpot) for request in seen} == {(0.25, 0.025)}
    del body["slo"], body["n"]
    await api.post(TEXT, body | {"top_k": -1, "top_p": 1, "min_p": None}, headers=headers)
    assert (seen[-1].slo.ttft, seen[-1].slo.tpot, seen[-1].id) == (0.5, 0.05, "mine")
    assert seen[-1].sampling.top_k == 0
    del api.harness.router.submit  # the spy


@served
async def test_models_tokens_and_the_like(api):
    models = (await api.client.get("/v1/models")).json()
    (model,) = models["data"]
    assert (models["object"], model["id"], model["max_model_len"]) == ("list", "fake", 128)
    assert (await api.client.get("/v1/models/fake")).json() == model
    assert "version" in (await api.client.get("/version")).json()
    answer = (await api.post("/tokenize", {"model": "fake", "prompt": "hello"})).json()
    assert answer == {"count": 5, "max_model_len": 128, "tokens": ids_of("hello")}
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await api.post("/tokenize", chat)).json()["tokens"] == ids_of("u:hi|a:")
    assert (await api.post("/detokenize", {"tokens": ids_of("hi")})).json() == {"prompt": "hi"}


@served
async def test_closed_it_says_so(api):
    gate = api.harness.server.gate
    backend = gate.backend
    await api.harness.server.shut("waiting for a decode worker")
    for answer in (await api.client.get("/health"), await api.post(TEXT, {"prompt": "x"})):
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "waiting for a decode worker"
        assert "retry-after" in answer.headers
    await api.harness.server.open(backend)
    assert (await api.client.get("/health")).status_code == 200


@served
async def test_an_id_in_use_does_not_stand_in_the_way(api):
    headers = {"x-request-id": "same"}
    body = http_fakes.ASK | {"prompt": "x", "max_tokens": 4}
    answers = await asyncio.gather(*(api.post(TEXT, body, headers=headers) for _ in range(8)))
    assert {of(answer.json())["text"] for answer in answers} == {says("x", 4)}


def test_cors_is_off_unless_asked_for():
    async def main(app, allowed):
        async with http_fakes.serving(app=app) as api:
            headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
            asked = await api.client.options(TEXT, headers=headers)
            refused = await api.post(TEXT, {}, headers=headers)
            for answer in (asked, refused):
                assert answer.headers.get("access-control-allow-origin") == allowed
            assert asked.status_code == (200 if allowed else 405)

    asyncio.run(main(None, None))
    keyed = HttpOptions(0, keys=[b"x"], cors_origins=["https://page.example"])
    asyncio.run(main(keyed, "https://page.example"))
