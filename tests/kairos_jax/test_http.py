"""The HTTP API over real sockets, with fake engines: what it answers, and what it leaves behind."""

import asyncio
import json

import fakes
import http_fakes
import httpx2
import pytest
from http_fakes import ids_of, text_of

from kairos_jax.choice import StopTexts
from kairos_jax.http_guard import Options

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared():
    """Runs an async test against a server that all tests share which leave it as it was."""
    with http_fakes.serving_in_thread() as run:
        yield run


def served(test):
    """Runs an async test against the shared server, whose client it is given."""

    def run(shared):
        shared(test)

    return run


def says(prompt: str, count: int) -> str:
    return text_of(fakes.expected_tokens(ids_of(prompt), count))


def text_in(events) -> str:
    shown = [choice for event in events for choice in event["choices"]]
    return "".join(
        each["delta"].get("content", "") if "delta" in each else each["text"] for each in shown
    )


def of(event):
    """The one choice of an event."""
    (choice,) = event["choices"]
    return choice


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
        "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14},
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
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
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
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_all_within_one_step(stream):
    async def run(api):
        _, engine = api.harness.engines
        stepped, step = asyncio.Event(), engine.step
        loop = asyncio.get_running_loop()

        def told(work):
            loop.call_soon_threadsafe(stepped.set)
            return step(work)

        engine.step = told
        body = {"prompt": ["a", "b"], "max_tokens": 60, "n": 2, "stream": stream}
        call = asyncio.ensure_future(api.post(TEXT, http_fakes.ASK | body))
        await asyncio.wait_for(stepped.wait(), 30)
        engine.gate.clear()  # the step under way is the last one that may touch the request
        call.cancel()
        await asyncio.wait_for(api.harness.router.drained(), 30)
        before = engine.num_steps
        engine.gate.set()
        await api.harness.assert_nothing_held()
        assert engine.num_steps <= before + 1

    async def main():
        async with http_fakes.serving() as api:
            await run(api)

    asyncio.run(main())


def test_more_than_max_requests_are_told_when_to_retry():
    async def main():
        async with http_fakes.serving(fakes.altered(max_requests=2)) as api:
            api.harness.engines[1].gate.clear()
            body = http_fakes.ASK | {"prompt": "x", "max_tokens": 4}
            first = asyncio.ensure_future(api.post(TEXT, body))
            while not api.harness.router.num_streams:
                await asyncio.sleep(0)
            # Two choices, and room for one: the one that had begun is given up.
            for more in ({"n": 2}, {"n": 2, "stream": True}):
                answer = await api.post(TEXT, body | more)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert float(answer.headers["retry-after-ms"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
                assert api.harness.router.num_streams == 1
            api.harness.engines[1].gate.set()
            assert of((await first).json())["text"] == says("x", 4)

    asyncio.run(main())


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


@pytest.mark.parametrize("which", [0, 1])
def test_a_dead_engine_is_told_of(which):
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[which].fail = RuntimeError("the device is on fire")
            body = http_fakes.ASK | {"prompt": "x", "max_tokens": 9, "stream": True}
            answer = await api.post(TEXT, body)
            if which == 0:  # before anything was written
                assert answer.status_code == 503
                error = answer.json()
            else:
                *_, event, rest = answer.text.split("\n\n")
                error, done = json.loads(event.removeprefix("data: ")), rest
                assert done == "", "what has failed is not DONE"
            assert "on fire" in error["error"]["message"]
            assert error["error"]["code"] == "service_unavailable"

    asyncio.run(main())


@served
async def test_an_id_in_use_does_not_stand_in_the_way(api):
    headers = {"x-request-id": "same"}
    body = http_fakes.ASK | {"prompt": "x", "max_tokens": 4}
    answers = await asyncio.gather(*(api.post(TEXT, body, headers=headers) for _ in range(8)))
    assert {of(answer.json())["text"] for answer in answers} == {says("x", 4)}


def test_a_drain_finishes_what_runs():
    async def main():
        async with http_fakes.serving() as api:
            engine = api.harness.engines[1]
            engine.gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": True}
            async with api.client.stream("POST", TEXT, json=body) as answer:
                drain = asyncio.ensure_future(api.harness.server.drain(30))
                await asyncio.sleep(0)
                assert (await api.client.get("/health")).status_code == 503
                engine.gate.set()
                text = (await answer.aread()).decode()
            events = [json.loads(each[6:]) for each in text.split("\n\n")[:-2]]
            assert text_in(events) == says("hello", 10)
            assert await drain is True

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_longer_than_a_drain_is_told(stream):
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[0].gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": stream}
            call = asyncio.ensure_future(api.post(TEXT, body))
            while not api.harness.router.num_streams:
                await asyncio.sleep(0)
            assert await api.harness.server.drain(0) is False
            answer = await call
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the server has ended"
            api.harness.engines[0].gate.set()
            await api.harness.assert_nothing_held()

    asyncio.run(main())


def test_a_stream_that_outlasts_a_drain_is_cut_off():
    async def main():
        async with http_fakes.serving() as api:
            api.harness.engines[1].gate.clear()
            body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 10, "stream": True}
            async with api.client.stream("POST", TEXT, json=body) as answer:
                assert await api.harness.server.drain(0) is False
                with pytest.raises(httpx2.TransportError):
                    await answer.aread()
            api.harness.engines[1].gate.set()
            await api.harness.assert_nothing_held()

    asyncio.run(main())


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
    keyed = Options(keys=[b"x"], cors_origins=["https://page.example"])
    asyncio.run(main(keyed, "https://page.example"))
