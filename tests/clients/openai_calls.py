"""Calls of the `openai` package, for test_openai.py: run in an environment that has it.

  python openai_calls.py BASE_URL MODEL

Prints a JSON object: what each of the functions below has returned. Every answer has been held
against the package's own types.
"""

import asyncio
import json
import sys
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "max_tokens": 16}


def checked(answer: Any) -> dict[str, Any]:
    """As JSON. The package itself does not mind what a server leaves out; its types do."""
    came = answer.model_dump(exclude_unset=True)
    type(answer).model_validate(came)
    return came


def models(client: OpenAI, model: str) -> Any:
    listed = [checked(each) for each in client.models.list().data]
    return {"listed": listed, "one": checked(client.models.retrieve(model))}


def chat(client: OpenAI, model: str) -> Any:
    return checked(client.chat.completions.create(model=model, messages=QUESTION, **GREEDY))


def chat_of_parts(client: OpenAI, model: str) -> Any:
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    messages = [{"role": "user", "content": parts}]
    return checked(client.chat.completions.create(model=model, messages=messages, **GREEDY))


def chat_stream(client: OpenAI, model: str) -> Any:
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options=options, **GREEDY
    )
    return [checked(chunk) for chunk in stream]


def chat_gathered(client: OpenAI, model: str) -> Any:
    """By the package's own gathering of a stream."""
    asked = client.chat.completions.stream(model=model, messages=QUESTION, **GREEDY)
    with asked as stream:
        return stream.get_final_completion().model_dump(exclude_unset=True)


def chat_logprobs(client: OpenAI, model: str) -> Any:
    wanted = {"logprobs": True, "top_logprobs": 3, "temperature": 0, "max_completion_tokens": 4}
    return checked(client.chat.completions.create(model=model, messages=QUESTION, **wanted))


def several(client: OpenAI, model: str) -> Any:
    prompts = ["The sky is", "One, two,"]
    return checked(
        client.completions.create(model=model, prompt=prompts, n=2, max_tokens=4, seed=1)
    )


def seeded(client: OpenAI, model: str) -> Any:
    asked = {"model": model, "prompt": "Once", "max_tokens": 8, "temperature": 1.0}
    return [
        client.completions.create(**asked, seed=seed).choices[0].text for seed in (7, 7, 8, 9, 10)
    ]


def completion_stream(client: OpenAI, model: str) -> Any:
    """Not held against the type, which knows of no chunk that is not the last."""
    stream = client.completions.create(model=model, prompt="One, two,", stream=True, **GREEDY)
    return [chunk.model_dump(exclude_unset=True) for chunk in stream]


def completion_logprobs(client: OpenAI, model: str) -> Any:
    return checked(client.completions.create(model=model, prompt="One, two,", logprobs=2, **GREEDY))


def echoed(client: OpenAI, model: str) -> Any:
    """Not held against the type, which knows of no token without a log-probability."""
    asked = {"prompt": "One, two,", "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
    return client.completions.create(model=model, **asked).model_dump(exclude_unset=True)


def stops(client: OpenAI, model: str) -> Any:
    asked = {"model": model, "prompt": "1, 2, 3, 4, 5,", "temperature": 0, "max_tokens": 32}
    whole = client.completions.create(**asked)
    cut = client.completions.create(**asked, stop=[" 9,", "never"])
    return [checked(whole), checked(cut)]


def objectives(client: OpenAI, model: str) -> Any:
    """SLOs, and where the time went."""
    extra = {"slo": {"ttft_ms": 60_000, "tpot_ms": 10_000}, "timing": True}
    answer = client.completions.create(model=model, prompt="Once", extra_body=extra, **GREEDY)
    return checked(answer)


def named(client: OpenAI, model: str) -> Any:
    headers = {"X-Request-ID": "mine"}
    raw = client.completions.with_raw_response.create(
        model=model, prompt="Once", max_tokens=1, extra_headers=headers
    )
    return raw.headers.get("x-request-id")


def left(client: OpenAI, model: str) -> Any:
    """A stream that is closed after its first token."""
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        return next(iter(stream)).model_dump(exclude_unset=True)


def at_once(client: OpenAI, model: str) -> Any:
    """Eight streams side by side."""

    async def one(client: AsyncOpenAI, number: int) -> int:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Say {number}."}],
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        chunks = [checked(chunk) async for chunk in stream]
        return chunks[-1]["usage"]["completion_tokens"]

    async def all_of_them() -> list[int]:
        async with AsyncOpenAI(base_url=client.base_url, max_retries=0) as together:
            return await asyncio.gather(*(one(together, number) for number in range(8)))

    return asyncio.run(all_of_them())


def errors(client: OpenAI, model: str) -> Any:
    """What the package raises for what is not served."""
    asked = {
        "another model": {"model": "gpt-4", "messages": QUESTION},
        "temperature": {"temperature": -1.0},
        "no choices": {"n": 0},
        "nothing to say": {"max_tokens": 0},
        "no messages": {"messages": []},
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "an image": {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "a format": {"response_format": {"type": "json_object"}},
        "too long": {"messages": [{"role": "user", "content": "long " * 5000}]},
    }
    found = {}
    for name, changed in asked.items():
        try:
            client.chat.completions.create(**{"model": model, "messages": QUESTION} | changed)
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.param, error.code]
    try:
        client.embeddings.create(model=model, input="x")
    except openai.APIStatusError as error:
        found["no such path"] = [type(error).__name__, error.status_code, error.param, error.code]
    return found


CALLS = (
    models,
    chat,
    chat_of_parts,
    chat_stream,
    chat_gathered,
    chat_logprobs,
    several,
    seeded,
    completion_stream,
    completion_logprobs,
    echoed,
    stops,
    objectives,
    named,
    left,
    at_once,
    errors,
)


def main() -> None:
    url, model = sys.argv[1:]
    with OpenAI(base_url=url, max_retries=0) as client:
        print(json.dumps({call.__name__: call(client, model) for call in CALLS}))


if __name__ == "__main__":
    main()
