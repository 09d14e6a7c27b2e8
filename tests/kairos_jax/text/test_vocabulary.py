"""What tokens stand for, and how few tokens a text can become."""

import sys
import threading
import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers
from vocabularies import ALPHABET, byte_level, metaspace, plain, sentencepiece

from kairos_jax.text.tokenizer import Tokenizer

# The bytes of tokens.


@pytest.mark.parametrize(
    ("tokenizer", "token", "expected"),
    [
        (byte_level(), "Ġhi", b" hi"),
        (byte_level(), "Ã", b"\xc3"),
        (byte_level(), "Ã©", "é".encode()),
        (byte_level(), "Ċ", b"\n"),
        (byte_level(content="<|é▁|>"), "<|é▁|>", "<|é▁|>".encode()),
        (sentencepiece(), "▁a", b" a"),
        (sentencepiece(), "▁▁", b"  "),
        (sentencepiece(), "<0x0A>", b"\n"),
        (sentencepiece(), "<0xF0>", b"\xf0"),
        (sentencepiece(), "<s>", b"<s>"),
        (metaspace(), "▁a", b" a"),
        (plain(), "a", b"a"),
    ],
)
def test_a_token_stands_for_its_bytes(tokenizer, token, expected):
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id(token)) == expected


def test_an_id_past_the_vocabulary_has_no_bytes():
    assert byte_level().token_bytes(10**6) == b""


def test_every_byte_has_its_character():
    tokenizer = byte_level()
    found = {tokenizer.token_bytes(tokenizer.backend.token_to_id(char)) for char in ALPHABET}
    assert found == {bytes([byte]) for byte in range(256)}


@given(st.text())
def test_bytes_of_all_tokens_join_to_the_text(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


# How few tokens a text can become.

BOUNDED = {
    "byte level": (byte_level(), 4),
    "byte level, a long special token": (byte_level(content="<|long|>"), 8),
    "a token that takes spaces": (byte_level(content="<|long|>", lstrip=True, rstrip=True), 8),
    "byte level without some bytes": (byte_level(sorted(set(ALPHABET) - set("ĆĂñ"))), 4),
    "NFC": (byte_level(normalizer=normalizers.NFC()), 16),
    "NFKC, lowercase": (
        byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        48,
    ),
    "strip": (byte_level(normalizer=normalizers.Strip()), 4),
    "replace": (byte_level(normalizer=normalizers.Replace("hihihi", "a")), 24),
    "sentencepiece": (sentencepiece(), 6),
    "metaspace": (metaspace(), 6),
    "unknown characters one by one": (plain(unk_token="a"), 4),
    "unknown characters joined": (plain(unk_token="a", fuse_unk=True), 4),
    "unknown characters dropped": (plain(), 4),
    "split at whitespace": (plain(splits=pre_tokenizers.WhitespaceSplit()), 4),
}
UNBOUNDED = {
    "accents": byte_level(normalizer=normalizers.StripAccents()),
    "a pattern": byte_level(normalizer=normalizers.Replace(tokenizers.Regex("a+"), "a")),
    "removed": byte_level(normalizer=normalizers.Replace("hi", "")),
    "removed by a split": plain(splits=pre_tokenizers.Split("a", "removed")),
    "punctuation": plain(splits=pre_tokenizers.Punctuation("removed")),
    "whole words": Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
    "word pieces": Tokenizer(tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))),
    "unigram": Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", 0.0)], 0, False))),
    "suffix": plain(tokens=("a</w>",), end_of_word_suffix="</w>"),
}
_PARTS = ["hi", " ", "hihihi", "<|long|>", "\u212a", "\x06", "\u3000", "a", "e\u0301", "▁", "🙂"]


@pytest.mark.parametrize("name", BOUNDED)
@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.one_of(st.sampled_from(_PARTS), st.text(max_size=3)), max_size=30))
@example(parts=["<|long|>", *["\u3000 "] * 50, "<|long|>"])
@example(parts=["\u03b9\u0308\u0301", *["\u1fbe\u0308\u0301"] * 50])
@example(parts=["\U0001d6d6\u0308\u0301"] * 50)
@example(parts=["🙂\x06"] * 50)
def test_no_text_becomes_fewer_tokens_than_the_bound(name, parts):
    tokenizer, longest = BOUNDED[name]
    text = "".join(parts)
    assert tokenizer.longest_token_bytes == longest
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_of_plain_text_grows_with_it(name):
    tokenizer, longest = BOUNDED[name]
    assert tokenizer.least_tokens("ab" * 480) == 960 / longest


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_tokenizer_that_may_drop_any_text_has_no_bound(name):
    assert UNBOUNDED[name].longest_token_bytes is None
    assert UNBOUNDED[name].least_tokens("x" * 1000) == 0


# Other threads run while a long text is tokenized.


@pytest.fixture
def quick_switches():
    """A thread that waits for the GIL gets it from one that runs Python, soon."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_long_work_lets_other_threads_run(what):
    tokenizer, text = byte_level(), "hi é🙂" * 30_000
    ids = tokenizer.encode(text)
    assert ids == tokenizer.backend.encode(text).ids
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids) == text
    many = ids * 9
    works = {"encode": lambda: tokenizer.encode(text), "decode": lambda: tokenizer.decode(many)}
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        works[what]()
        span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    gaps, last = [], time.perf_counter()  # in which this thread did not run
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        if now - last > 0.001:
            gaps.append((last, now))
        last = now
    gaps.append((last, time.perf_counter()))
    began, ended = span
    # With the GIL held, one gap is all of it.
    assert max(min(b, ended) - max(a, began) for a, b in gaps) < 0.8 * (ended - began)
