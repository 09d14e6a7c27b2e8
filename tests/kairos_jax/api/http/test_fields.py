"""Fields beyond OpenAI's usual ones: what they do, and that none is ignored in silence that would
change an answer.
"""

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import fakes
import http_fakes
import pytest
from http_fakes import ids_of, of, says, served, text_in, text_of, until

from kairos_jax.api.http.answers.choice import StopTexts
from kairos_jax.api.http.body import known
from kairos_jax.text.tokenizer import Tokenizer

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


# How a conversation is rendered.


class Rendering(Tokenizer):
    """Notes how it is asked to render, and renders all options into the prompt."""

    def render_chat(self, messages, **options):
        turns = "".join(f"{turn['role'][0]}:{turn['content']}|" for turn in messages)
        return turns + ",".join(f"{name}={value}" for name, value in sorted(options.items()))


def rendering() -> Tokenizer:
    plain = http_fakes.tokenizer()
    return Rendering(plain.backend, plain.eos_ids, chat_template="x")


OPTIONS = [
    ({}, ""),
    ({"add_generation_prompt": None, "chat_template_kwargs": {}}, ""),
    ({"add_generation_prompt": False}, "add_generation_prompt=False"),
    ({"add_generation_prompt": True}, "add_generation_prompt=True"),
    (
        {"continue_final_message": True},
        "add_generation_prompt=False,continue_final_message=True",
    ),
    (
        {"continue_final_message": True, "add_generation_prompt": False},
        "add_generation_prompt=False,continue_final_message=True",
    ),
    ({"continue_final_message": False}, ""),
    ({"chat_template": "{{ 1 }}"}, "chat_template={{ 1 }}"),
    (
        {"chat_template_kwargs": {"enable_thinking": False, "n": [1, 2.5, None]}},
        "template_kwargs={'enable_thinking': False, 'n': [1, 2.5, None]}",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), OPTIONS)
def test_options_of_a_chat_reach_its_template(fields, expected):
    async def main():
        http = http_fakes.HttpOptions(0)
        async with fakes.running(
            tokenizer=rendering(), http=http, trusts_templates=True
        ) as harness:
            url = f"http://{harness.server.http.address}"
            async with http_fakes.httpx2.AsyncClient(base_url=url, timeout=30) as client:
                messages = [{"role": "user", "content": "hi"}]
                answer = await client.post("/tokenize", json={"messages": messages} | fields)
                prompt = "u:hi|" + expected
                assert text_of(answer.json()["tokens"]) == prompt
                body = http_fakes.ASK | {"messages": messages, "max_tokens": 4} | fields
                shown = of((await client.post(CHAT, json=body)).json())["message"]["content"]
                assert shown == says(prompt, 4)

    asyncio.run(main())


class Failing(Tokenizer):
    """Fails by a client's template, or renders a client's text."""

    def render_chat(self, messages, **options):
        if "chat_template" in options:
            raise ValueError(options["chat_template"])
        return options["template_kwargs"]["text"]


def test_a_template_that_fails_is_the_clients_mistake():
    async def main():
        plain = http_fakes.tokenizer()
        tokenizer = Failing(plain.backend, chat_template="x")
        http = http_fakes.HttpOptions(0)
        async with fakes.running(tokenizer=tokenizer, http=http, trusts_templates=True) as harness:
            url = f"http://{harness.server.http.address}"
            async with http_fakes.httpx2.AsyncClient(base_url=url, timeout=30) as client:
                body = {"messages": [{"role": "user", "content": "hi"}]}
                for path in (CHAT, "/tokenize"):
                    answer = await client.post(path, json=body | {"chat_template": "why"})
                    error = answer.json()["error"]
                    assert (answer.status_code, error["param"]) == (400, "messages")
                    assert error["message"] == "messages cannot be rendered: why"
                odd = json.dumps(body | {"chat_template_kwargs": {"text": "\ud800"}})
                answer = await client.post(CHAT, content=odd)
                assert answer.status_code == 400
                assert "lone surrogate" in answer.json()["error"]["message"]

    asyncio.run(main())


# Tokens and text.


def beginning() -> Tokenizer:
    """One that puts a token before each text, as most do."""
    tokenizer = http_fakes.tokenizer()
    tokenizer.backend.post_processor = http_fakes.tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def test_special_tokens_are_put_before_a_prompt_as_is_asked():
    async def main():
        http = http_fakes.HttpOptions(0)
        async with fakes.running(tokenizer=beginning(), http=http) as harness:
            url = f"http://{harness.server.http.address}"
            async with http_fakes.httpx2.AsyncClient(base_url=url, timeout=30) as client:
                text, chat = {"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}
                rendered = "u:hi|a:"
                for body, path, plain, default in (
                    (text, TEXT, ids_of("hi"), True),
                    (chat, CHAT, ids_of(rendered), False),
                ):
                    for special in (None, True, False):
                        asked = body | {"add_special_tokens": special}
                        expected = [1] * (default if special is None else special) + plain
                        tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
                        assert tokens == expected
                        answer = await client.post(path, json=http_fakes.ASK | asked)
                        assert answer.json()["usage"]["prompt_tokens"] == len(expected)

    asyncio.run(main())


@served
async def test_a_prompt_may_be_cut_to_its_last_tokens(api):
    whole = "abcdefgh"
    for prompt in (whole, ids_of(whole)):
        answer = await api.complete(
            prompt=prompt, max_tokens=4, truncate_prompt_tokens=3, echo=True
        )
        assert of(answer)["text"] == "fgh" + says("fgh", 4)
        assert answer["usage"]["prompt_tokens"] == 3
    answer = await api.complete(prompt=whole, max_tokens=4, truncate_prompt_tokens=100)
    assert answer["usage"]["prompt_tokens"] == len(whole)
    chat = await api.chat("hi", max_tokens=4, truncate_prompt_tokens=2)
    assert of(chat)["message"]["content"] == says("a:", 4)


@served
async def test_a_prompt_may_be_cut_to_what_has_room(api):
    long = "x" * 300
    answer = await api.complete(prompt=long, max_tokens=20, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == 128 - 20
    answer = await api.complete(prompt=long, truncate_prompt_tokens=-1)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (112, 16)
    answer = await api.chat(long, max_tokens=64, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == 64
    refused = await api.post(
        TEXT, {"prompt": long, "max_tokens": 2**31 - 1, "truncate_prompt_tokens": -1}
    )
    assert refused.json()["error"]["param"] == "max_tokens"


def prompt_that_says(id: int, at: int) -> list[int]:
    """A prompt of which this token is that one of the output."""
    prompts = ([first, second] for first in range(2, 97) for second in range(2, 97))
    return next(prompt for prompt in prompts if fakes.expected_tokens(prompt, at + 1)[at:] == [id])


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_show_where_that_is_asked_for(shared, stream):
    async def run(api):
        async def said(**fields):
            body = {"max_tokens": 9} | fields
            if stream:
                return text_in(await api.events(TEXT, body))
            return of(await api.complete(**body))["text"]

        prompt = prompt_that_says(0, at=4)  # that ends an output, unless it is ignored
        tokens = fakes.expected_tokens(prompt, 9)
        assert (tokens.index(0), tokens.index(1), tokens.count(0), tokens.count(1)) == (4, 5, 1, 1)
        before, after = text_of(tokens[:4]), text_of(tokens[6:])
        all_shown = f"{before}</s><s>{after}"
        shown = {"prompt": prompt, "skip_special_tokens": False}
        assert await said(prompt=prompt) == before + after
        assert await said(**shown) == all_shown
        ends = {"ignore_eos": False}
        assert await said(**shown, **ends) == before
        assert await said(**shown, **ends, include_stop_str_in_output=True) == before + "</s>"
        assert await said(prompt=prompt, **ends, include_stop_str_in_output=True) == before
        # Before min_tokens it ends nothing.
        assert await said(**shown, **ends, min_tokens=6) == all_shown
        assert await said(**shown, **ends, min_tokens=5) == before
        # The echo of a prompt of ids.
        prompt = [1, *prompt]
        expected = f"<s>{text_of(prompt)}"
        echoed = await said(prompt=prompt, max_tokens=1, echo=True, skip_special_tokens=False)
        assert echoed.startswith(expected)

    shared(run)


@served
async def test_an_output_may_end_with_its_stop_text(api):
    whole = says("hello", 40)
    for stop, expected in (
        (whole[7:10], whole[:10]),
        (["\n", whole[20:22], whole[7:10]], whole[:10]),
        ([whole[7:9], whole[7:12]], whole[:9]),
    ):
        body = {"prompt": "hello", "max_tokens": 40, "stop": stop}
        body["include_stop_str_in_output"] = True
        answer = of(await api.complete(**body))
        assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
        assert text_in(await api.events(TEXT, body)) == expected


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["ab"], ["xa", "by"], ("xab", True)),
        (["abc", "b"], ["ab"], ("ab", True)),
        (["cd", "abcd"], ["ab", "cd", "ef"], ("abcd", True)),
        (["abc", "ab"], ["xabc"], ("xab", True)),
        (["ab"], ["xa"], ("xa", False)),
    ],
)
def test_stop_texts_that_show(stops, pieces, expected):
    watch, text, stopped = StopTexts(stops, show=True), "", False
    for piece in pieces:
        more, stopped = watch.push(piece)
        text += more
        if stopped:
            break
    assert (text + watch.flush(), stopped) == expected


# SLOs of gateways.


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({"x-slo-ttft-ms": "500"}, {}, (0.5, 30.0)),
        ({"x-llm-d-slo-ttft-ms": "400"}, {}, (0.4, 30.0)),
        ({"x-llm-d-slo-ttft-ms": "400", "x-slo-ttft-ms": "500"}, {}, (0.4, 30.0)),
        ({"x-llm-d-slo-ttft-ms": "400", "x-slo-tpot-ms": "50"}, {}, (0.4, 0.05)),
        ({"x-llm-d-slo-tpot-ms": "40", "x-slo-tpot-ms": "50"}, {}, (30.0, 0.04)),
        ({"x-llm-d-slo-ttft-ms": "400", "x-slo-ttft-ms": "500"}, {"ttft_ms": 3}, (0.003, 30.0)),
    ],
)
def test_both_names_of_slo_headers_are_known_and_the_newer_wins(shared, headers, body, expected):
    async def run(api):
        seen, submit = [], api.harness.router.submit

        def spy(request, trace):
            seen.append((request.slo.ttft, request.slo.tpot))
            return submit(request)

        api.harness.router.submit = spy
        try:
            asked = {"prompt": "x", "max_tokens": 1, "slo": body}
            assert (await api.post(TEXT, asked, headers=headers)).status_code == 200
        finally:
            del api.harness.router.submit
        assert seen == [expected]

    shared(run)


# The table.


def test_every_field_stands_in_the_table_once():
    parts = (known.SERVED, known.OF_CHAT, known.OF_COMPLETIONS, known.NEUTRAL, known.HARMLESS)
    parts = (*parts, known.NEUTRAL_OF_OTHERS, known.NAMES_OF_OTHERS)
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names))


def test_every_field_of_the_table_is_in_the_reference():
    text = (Path(__file__).parents[4] / "docs/reference/http-api.md").read_text()
    parts = (known.SERVED, known.OF_CHAT, known.OF_COMPLETIONS, known.NEUTRAL, known.HARMLESS)
    parts = (*parts, known.NEUTRAL_OF_OTHERS, known.NAMES_OF_OTHERS)
    names = {name for part in (*parts, known.NEUTRAL_OF_MESSAGE) for name in part}
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_neutral_values_and_harmless_fields_change_nothing(shared, path):
    async def run(api):
        chat = path == CHAT
        say = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        say["max_tokens"] = 5
        harmless = dict.fromkeys(known.HARMLESS, "anything")
        others = known.OF_COMPLETIONS if chat else known.OF_CHAT
        refused = known.NEUTRAL | known.NEUTRAL_OF_OTHERS
        neutral = {name: values[0] for name, values in refused.items() if values}
        neutral |= {name: values[0] for name, values in others.items() if values}
        nothing = dict.fromkeys([*refused, *known.NAMES_OF_OTHERS, *known.HARMLESS, *others])
        plain = of((await api.post(path, http_fakes.ASK | say)).json())
        for more in (harmless, neutral, nothing):
            answer = await api.post(path, http_fakes.ASK | say | more)
            assert answer.status_code == 200, answer.text
            assert of(answer.json()) == plain
            assert "x-kairos-warning" not in answer.headers

    shared(run)


@pytest.mark.parametrize("name", sorted(known.NEUTRAL | known.NEUTRAL_OF_OTHERS))
def test_any_other_value_is_refused_by_name(shared, name):
    async def run(api):
        for path, say in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": []})):
            answer = await api.post(path, say | {name: {"type": "other"}})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert error["message"].startswith(f"{name} must be ")

    shared(run)


@pytest.mark.parametrize("name", sorted(known.NAMES_OF_OTHERS))
def test_another_servers_name_is_refused_with_the_name_that_is_known(shared, name):
    async def run(api):
        for path, say in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": []})):
            error = (await api.post(path, say | {name: 1})).json()["error"]
            assert error["param"] == name
            assert error["message"] == f"{name} is not known here: {known.NAMES_OF_OTHERS[name]} is"

    shared(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", True),
        ("presence_penalty", False),
        ("priority", False),
        ("use_beam_search", 0),
        ("include_reasoning", 1),
        ("echo", 0),
        ("top_logprobs", False),
    ],
)
def test_a_truth_is_no_number_and_a_number_no_truth(shared, name, value):
    async def run(api):
        path, say = (TEXT, {"prompt": "x"})
        if name == "echo":  # as of the other endpoint
            path, say = (CHAT, {"messages": [{"role": "user", "content": "hi"}]})
        error = (await api.post(path, say | {name: value})).json()["error"]
        assert error["param"] == name

    shared(run)


NAMED = (
    "{% for m in messages %}{{ m.name if m.name is defined else m.role }}:{{ m.content }}|"
    "{% endfor %}"
)


def test_the_name_of_who_speaks_reaches_the_template():
    async def main():
        words = replace(http_fakes.tokenizer(), chat_template=NAMED)
        async with http_fakes.serving(words=words) as api:
            messages = [
                {"role": "user", "content": "hi", "name": "Ada"},
                {"role": "user", "content": "ho", "name": None},
            ]
            told = (await api.post("/tokenize", {"messages": messages})).json()
            assert text_of(told["tokens"]) == "Ada:hi|user:ho|"
            messages[0]["name"] = 3
            error = (await api.post(CHAT, {"messages": messages})).json()["error"]
            assert error["param"] == "messages[0].name"

    asyncio.run(main())


# Fields that are near known ones.


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if "of a request" in record.message]


def test_a_name_near_a_known_one_is_told_of_and_ignored(caplog):
    caplog.set_level(logging.WARNING)

    async def main():
        async with http_fakes.serving() as api:
            body = http_fakes.ASK | {"prompt": "x", "max_token": 3}
            for stream in (False, True, False):
                answer = await api.post(TEXT, body | {"stream": stream})
                assert answer.status_code == 200
                assert answer.headers["x-kairos-warning"] == (
                    'field "max_token" is not known and was ignored: "max_tokens" is known'
                )
            assert of(answer.json())["text"] == says("x", 16)
            assert len(warnings_of(caplog)) == 1, "a line for each name, not each request"
            more = {"Temperatur": 1, "stream_options": {"include_usages": True}, "é\r\nx": 1}
            answer = await api.post(TEXT, http_fakes.ASK | {"prompt": "x"} | more)
            told = answer.headers["x-kairos-warning"]
            assert '"temperature" is known; field "stream_options.include_usages"' in told
            assert len(warnings_of(caplog)) == 3
            answer = await api.post(TEXT, http_fakes.ASK | {"prompt": "x", "unheard_of": 1})
            assert "x-kairos-warning" not in answer.headers

    asyncio.run(main())


def test_headers_of_slos_and_tokenize_are_told_of_too():
    async def main():
        async with http_fakes.serving() as api:
            body, headers = http_fakes.ASK | {"prompt": "x"}, {"x-slo-ttft": "9", "x-other": "1"}
            answer = await api.post(TEXT, body, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["x-kairos-warning"] == (
                'field "x-slo-ttft" is not known and was ignored: "x-slo-ttft-ms" is known'
            )
            answer = await api.post(TEXT, body, headers={"x-slo-ttft-ms": "9000"})
            assert "x-kairos-warning" not in answer.headers
            said = {"prompt": "x", "add_special_token": False, "return_token_strs": False}
            answer = await api.post("/tokenize", said)
            assert '"add_special_tokens" is known' in answer.headers["x-kairos-warning"]
            assert "return" not in answer.headers["x-kairos-warning"]
            answer = await api.post("/detokenize", {"tokens": [1, 2]})
            assert "x-kairos-warning" not in answer.headers

    asyncio.run(main())


def test_an_error_names_near_misses_too():
    """Where the field that is missing is there under another name, they are the reason."""

    async def main():
        async with http_fakes.serving() as api:
            for path, name, known in ((TEXT, "promt", "prompt"), (CHAT, "mesages", "messages")):
                answer = await api.post(path, {name: "x", "max_tokens": 3})
                assert answer.status_code == 400
                assert f'"{name}" is not known' in (told := answer.headers["x-kairos-warning"])
                assert told.endswith(f'"{known}" is known')

    asyncio.run(main())


def test_any_number_of_unknown_fields_costs_little(caplog):
    many = {f"max_tokens{number}": 1 for number in range(60_000)}
    found = known.near_misses(many | {"x" * 1000: 1})
    assert 0 < len(found) <= 16
    odd = known.near_misses({"max_tokén\r\n": 1, "\ud800max_tokens": 1})
    warned = known.near_misses({"top-p": 1, "topK": 1, "max_tokens_new": 1})
    assert dict(warned) == {"top-p": "top_p", "topK": "top_k", "max_tokens_new": "max_tokens"}

    async def main():
        async with http_fakes.serving() as api:
            for number in range(150):
                body = http_fakes.ASK | {"prompt": "x", "max_tokens": 1, f"seed{number}": 1}
                await api.post(TEXT, body)
            for name, _ in odd:
                body = json.dumps(http_fakes.ASK | {"prompt": "x", "max_tokens": 1, name: 1})
                answer = await api.post(TEXT, content=body)
                assert answer.headers["x-kairos-warning"].isascii()

    asyncio.run(main())
    assert len(warnings_of(caplog)) == 100


# Names of requests.


def test_a_client_that_takes_the_servers_names_stands_in_nobodys_way():
    async def main():
        async with http_fakes.serving() as api:
            router = api.harness.router
            for engine in api.harness.engines:
                engine.gate.clear()
            calls = []

            def begin(**fields):
                body = http_fakes.ASK | {"prompt": "x", "max_tokens": 2} | fields
                calls.append(asyncio.ensure_future(api.post(TEXT, body)))

            taken = [f"request-{number}" for number in range(20)]
            taken += [f"{router._prefix}-{number}" for number in range(20)]
            for name in taken:
                begin(request_id=name)
            await until(lambda: router.num_streams == len(taken))
            for _ in range(10):
                begin()
            await until(lambda: router.num_streams == len(taken) + 10)
            assert len({stream.name for stream in router.streams}) == len(taken) + 10
            for engine in api.harness.engines:
                engine.gate.set()
            answers = await asyncio.gather(*calls)
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 2])
def test_a_name_of_the_body_that_is_taken_is_refused(n):
    async def main():
        async with http_fakes.serving() as api:
            router = api.harness.router
            for engine in api.harness.engines:
                engine.gate.clear()
            body = http_fakes.ASK | {"prompt": "x", "max_tokens": 2, "request_id": "mine", "n": n}
            first = asyncio.ensure_future(api.post(TEXT, body))
            await until(lambda: router.num_streams == n)
            for stream in (False, True):
                answer = await api.post(TEXT, body | {"stream": stream})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (409, "request_id")
                assert "'mine" in error["message"]
            # What proxies send is not the client's own choice.
            headers = {"x-request-id": "mine" if n == 1 else "mine-0"}
            del body["request_id"], body["n"]
            second = asyncio.ensure_future(api.post(TEXT, body, headers=headers))
            await until(lambda: router.num_streams == n + 1)
            (name,) = {stream.name for stream in router.streams} - {"mine", "mine-0", "mine-1"}
            assert name.startswith(f"{headers['x-request-id']}~")
            for engine in api.harness.engines:
                engine.gate.set()
            assert (await first).status_code == 200
            answer = await second
            assert (answer.status_code, answer.headers["x-request-id"]) == (
                200,
                headers["x-request-id"],
            )
            rejected = api.harness.metrics.registry.get_sample_value(
                "kairos_requests_rejected_total", {"reason": "id_in_use", "class": "unknown"}
            )
            assert rejected == 2

    asyncio.run(main())


@served
async def test_a_name_of_the_body_comes_before_that_of_the_headers(api):
    seen, submit = [], api.harness.router.submit

    def spy(request, trace):
        seen.append(request.id)
        return submit(replace(request, id=""))

    api.harness.router.submit = spy
    try:
        body = http_fakes.ASK | {"prompt": "x", "max_tokens": 1}
        for own in ("mine", "", None):
            headers = {"x-request-id": "theirs"}
            await api.post(TEXT, body | {"request_id": own}, headers=headers)
    finally:
        del api.harness.router.submit
    assert seen == ["mine", "theirs", "theirs"]
