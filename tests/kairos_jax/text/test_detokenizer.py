"""The text of a growing output: what decoding adds to the text of its prompt."""

import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kairos_jax.text.detokenizer import Detokenizer
from kairos_jax.text.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), vocabularies.sentencepiece()
EMOJI = "a🙂é👩‍👩‍👧b"


def stream(tokenizer: Tokenizer, ids: list[int], size: int = 1, prompt=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    deltas = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*deltas, detokenizer.flush()]


def added(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What an output adds to the text of its prompt, whose end it may change."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    while not whole.startswith(before):
        before = before[:-1]
    return whole[len(before) :]


def token(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.backend.token_to_id(each) for each in tokens]


# Without a prompt.


def test_no_delta_holds_half_a_character():
    ids = BYTE_LEVEL.encode(EMOJI)
    deltas = stream(BYTE_LEVEL, ids)
    assert [delta for delta in deltas if delta] == list(EMOJI)
    fallback = token(SENTENCEPIECE, *(f"<0x{byte:02X}>" for byte in EMOJI.encode()))
    assert [delta for delta in stream(SENTENCEPIECE, fallback) if delta] == list(EMOJI)


def test_half_a_character_at_the_end_is_flushed():
    ids = BYTE_LEVEL.encode("🙂")[:3]
    assert stream(BYTE_LEVEL, ids) == ["", "", "", "\ufffd"]


def test_special_and_unknown_ids_give_no_text():
    (special,) = token(BYTE_LEVEL, "<s>")
    emoji = BYTE_LEVEL.encode("🙂")
    ids = [special, *emoji[:2], special, 10**6, *emoji[2:]]
    assert "".join(stream(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == "🙂"


_id = st.integers(0, BYTE_LEVEL.vocab_size - 1)
_text = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=8)
_runs = st.lists(st.tuples(_id, st.integers(1, 80)), max_size=8)  # Some longer than the window.
# Words, spaces, special tokens and whole characters in bytes.
_pieces = st.lists(st.one_of(st.integers(0, 8), _text), max_size=60)


def spelled(pieces: list[int | str]) -> list[int]:
    ids = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += token(SENTENCEPIECE, *(f"<0x{byte:02X}>" for byte in piece.encode()))
    return ids


@settings(deadline=None, max_examples=200)
@given(st.lists(_id, max_size=60), _runs, st.text(max_size=30), st.integers(1, 100))
def test_deltas_join_to_the_whole_for_any_ids(ids, runs, text, size):
    ids = ids + [id for id, count in runs for _ in range(count)] + BYTE_LEVEL.encode(text) + ids
    assert "".join(stream(BYTE_LEVEL, ids, size)) == BYTE_LEVEL.decode(ids)


@settings(deadline=None, max_examples=200)
@given(_pieces, st.integers(1, 100))
def test_deltas_join_to_the_whole_with_byte_fallback(pieces, size):
    ids = spelled(pieces)
    assert "".join(stream(SENTENCEPIECE, ids, size)) == SENTENCEPIECE.decode(ids)


@pytest.mark.parametrize("text", ["a" * 3000, EMOJI * 300, None])
@pytest.mark.parametrize("of_prompt", [False, True])
def test_a_push_decodes_a_bounded_window(text, of_prompt):
    longest = 0

    class Spy(Tokenizer):
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    # None: broken bytes without end.
    ids = [BYTE_LEVEL.encode("é")[0]] * 3000 if text is None else BYTE_LEVEL.encode(text)
    spy, prompt = Spy(BYTE_LEVEL.backend), ids if of_prompt else []
    assert "".join(stream(spy, ids, prompt=prompt)) == added(BYTE_LEVEL, prompt, ids)
    assert longest <= 65


# After a prompt.


@pytest.mark.parametrize("make", [vocabularies.sentencepiece, vocabularies.metaspace])
def test_the_first_word_after_a_prompt_keeps_its_space(make):
    tokenizer = make()
    prompt, ids = tokenizer.encode("a a"), token(tokenizer, "▁a", "a")
    assert tokenizer.decode([*prompt, *ids]) == "a a aa"
    assert stream(tokenizer, ids, prompt=prompt) == [" a", "a", ""]
    assert stream(tokenizer, ids) == ["a", "a", ""]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["<s>", "<turn>"], "a"),  # Decoding skips special tokens: the space is the first.
        (["<s>", "▁b", "<turn>"], " a"),
        (["<s>", "▁b", "<turn>", "<turn>", "<s>", "<turn>"], " a"),
        (["▁"], " a"),
    ],
)
def test_the_first_word_of_a_chat_is_what_decoding_gives(prompt, expected):
    prompt, ids = token(SENTENCEPIECE, *prompt), token(SENTENCEPIECE, "▁a")
    assert added(SENTENCEPIECE, prompt, ids) == expected
    assert "".join(stream(SENTENCEPIECE, ids, prompt=prompt)) == expected


@pytest.mark.parametrize("split", [1, 2, 3])
def test_an_output_ends_the_character_that_its_prompt_begins(split):
    ids = BYTE_LEVEL.encode("ab🙂c")
    prompt, output = ids[: 2 + split], ids[2 + split :]
    assert "".join(stream(BYTE_LEVEL, output, prompt=prompt)) == "🙂c"
    # Left as it is, it is the prompt's alone.
    assert "".join(stream(BYTE_LEVEL, ids[:1], prompt=prompt)) == "a"
    assert "".join(stream(BYTE_LEVEL, [], prompt=prompt)) == ""


@settings(deadline=None, max_examples=300)
@given(st.lists(_id, max_size=60), st.text(max_size=30), st.lists(_id, max_size=60), st.booleans())
def test_deltas_join_to_what_is_added_to_any_prompt(prompt, text, ids, cut):
    between = BYTE_LEVEL.encode(text)
    at = len(between) // 2 if cut else 0  # which may be within a character
    prompt, ids = prompt + between[:at], between[at:] + ids
    assert "".join(stream(BYTE_LEVEL, ids, prompt=prompt)) == added(BYTE_LEVEL, prompt, ids)


@settings(deadline=None, max_examples=300)
@given(_pieces, _pieces, st.integers(1, 10))
def test_deltas_join_to_what_is_added_with_byte_fallback(before, after, size):
    prompt, ids = spelled(before), spelled(after)
    assert "".join(stream(SENTENCEPIECE, ids, size, prompt)) == added(SENTENCEPIECE, prompt, ids)
