"""The texts of answers and of their tokens, with a vocabulary in which a text begins with a space
that decoding drops, and in which characters are spread over tokens.
"""

import asyncio
from dataclasses import replace

import fakes
import http_fakes
import pytest
import vocabularies
from http_fakes import of, text_in

from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text.tokenizer import Tokenizer

# With as many tokens as the fake engines know.
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "of", "to"]
BYTES = [f"<0x{byte:02X}>" for byte in "🙂é\n".encode()]
TEMPLATE = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}<turn>"
PROMPT = "of a to b"
ANSWERED = 24


def tokenizer() -> Tokenizer:
    made = vocabularies.sentencepiece(WORDS, BYTES)
    spare = fakes.VOCAB - made.vocab_size
    made.backend.add_tokens([f"[{number}]" for number in range(spare)])
    return replace(made, chat_template=TEMPLATE)


TOKENIZER = tokenizer()


def answered(prompt: list[int]) -> list[int]:
    return fakes.expected_tokens(prompt, ANSWERED)


def added(prompt: list[int], ids: list[int]) -> str:
    return TOKENIZER.decode([*prompt, *ids]).removeprefix(TOKENIZER.decode(prompt))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Its answer begins with a word and has a part of a character."""
    assert TOKENIZER.vocab_size == fakes.VOCAB
    word = TOKENIZER.backend.token_to_id("▁of")
    parts = {TOKENIZER.backend.token_to_id(token) for token in BYTES}
    texts = [f"{PROMPT} {first}{second}" for first in WORDS for second in WORDS]
    for ids in map(TOKENIZER.encode, texts):
        first, *rest = answered(ids)
        if first == word and parts & set(rest):
            return ids
    raise AssertionError("no prompt has such an answer")


def run(test) -> None:
    async def main() -> None:
        async with http_fakes.serving(words=TOKENIZER) as api:
            await test(api)

    asyncio.run(main())


def test_an_answer_keeps_the_space_in_front(prompt):
    text, expected = TOKENIZER.decode(prompt), added(prompt, answered(prompt))
    assert expected.startswith(" of")

    async def test(api):
        body = {"prompt": text, "max_tokens": ANSWERED}
        assert of(await api.complete(**body))["text"] == expected
        assert of(await api.complete(**body, echo=True))["text"] == text + expected
        assert text_in(await api.events("/v1/completions", body)) == expected
        request = fakes.ask(prompt, ANSWERED)
        answers = [answer async for answer in api.harness.stub.Generate(request)]
        assert "".join(answer.text_delta for answer in answers) == expected
        assert answers[-1].finish_reason == pb.FINISH_REASON_LENGTH

    run(test)


def test_offsets_are_where_the_tokens_begin(prompt):
    text, ids = TOKENIZER.decode(prompt), answered(prompt)
    # In the text of the whole: what comes in front of each token.
    ends = [len(TOKENIZER.decode(prompt[:count])) for count in range(len(prompt))]
    certain = [
        TOKENIZER.decode([*prompt, *ids[:count]]).rstrip("\ufffd") for count in range(len(ids))
    ]

    async def test(api):
        body = {"prompt": text, "max_tokens": ANSWERED, "logprobs": 0}
        shown = of(await api.complete(**body))["logprobs"]
        assert shown["text_offset"][0] == 0
        assert shown["text_offset"] == [len(each) - len(text) for each in certain]
        events = await api.events("/v1/completions", body)
        offsets = [offset for event in events for offset in of(event)["logprobs"]["text_offset"]]
        assert offsets == shown["text_offset"]
        shown = of(await api.complete(**body, echo=True))["logprobs"]
        assert shown["text_offset"] == [*ends, *map(len, certain)]
        assert shown["tokens"][len(prompt)] == " of"
        assert shown["tokens"] == [
            TOKENIZER.token_bytes(id).decode(errors="replace") for id in [*prompt, *ids]
        ]

    run(test)


def test_the_bytes_of_tokens_are_their_own(prompt):
    async def test(api):
        body = {"max_tokens": ANSWERED, "logprobs": True, "top_logprobs": 1}
        shown = of(await api.chat("ab", **body))["logprobs"]["content"]
        asked = TOKENIZER.encode("<turn>ab<turn>", add_special_tokens=False)
        for id, entry in zip(answered(asked), shown, strict=True):
            assert bytes(entry["bytes"]) == TOKENIZER.token_bytes(id)
            assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]

    run(test)
