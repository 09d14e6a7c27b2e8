"""Which tokens end an output of a GGUF file."""

import pytest

from models.checkpoint.gguf_tokens import end_tokens

# By hand from llama.cpp's rules: id is the place in the list.
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b"]
LLAMA3 = ["a", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]


def metadata(tokens, **ids):
    named = {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items()}
    return {"tokenizer.ggml.tokens": tokens, **named}


@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        # The case of a file whose eos is <|endoftext|> and whose chat ends with <|im_end|>.
        (CHATML, {"eos": 0}, {0, 2}),
        (CHATML, {"eos": 2}, {0, 2}),
        (CHATML, {}, {0, 2}),
        (LLAMA3, {"eos": 2}, {2, 3, 4}),
        (LLAMA3, {"eos": 0, "eot": 0}, {0, 2, 3, 4}),  # llama.cpp looks for the texts even so
        (["a", "b", "c"], {"eos": 0, "eot": 1, "eom": 2}, {0, 1, 2}),
        (["a", "b", "c"], {"bos": 1, "padding": 2}, set()),
        (["<s>", "</s>", "[/INST]"], {"eos": 1}, {1}),
        (["x", "<end_of_turn>", "<eos>"], {"eos": 2}, {1, 2}),
        (["x", "<\uff5cend\u2581of\u2581sentence\uff5c>"], {}, {1}),
        # Models that fill in the middle, as SmolLM2 and Qwen 2.5 have them.
        (["<reponame>", "<file_sep>", "<fim_prefix>", "x"], {"eos": 3}, {0, 3}),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_middle|>"], {}, {0, 1, 2}),
        (["<|fim_pad|>", "a", "b"], {"fim_pad": 1, "fim_rep": 2}, {1, 2}),
        # Texts that end nothing beside others.
        (["<|end|>", "x"], {"eos": 1}, {0, 1}),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 1}, {1, 2}),
        (["<|end|>", "<|flush|>", "<|calls|>"], {"eot": 0}, {1, 2}),
        (["<|end|>", "<|return|>"], {}, {0, 1}),
        (["</s>", "<|tool_response>"], {"eos": 0}, {1}),
        # Ids that are not in the vocabulary count as not given.
        (CHATML, {"eos": 2**32 - 1}, {0, 2}),
        (CHATML, {"eos": 5, "eot": -1}, {0, 2}),
        # Texts must be whole.
        (["<|im_end|> ", "x<|im_end|>", "<|IM_END|>"], {}, set()),
    ],
)
def test_the_tokens_that_end_an_output(tokens, ids, ends):
    found = end_tokens(metadata(tokens, **ids))
    assert set(found) == ends
    assert len(found) == len(ends)


def test_those_that_the_metadata_names_come_first():
    assert end_tokens(metadata(["<|im_end|>", "a", "b", "c"], eos=2, eot=1, eom=3)) == (2, 1, 3, 0)


def test_a_file_without_a_vocabulary():
    assert end_tokens({}) == ()
    assert end_tokens({"tokenizer.ggml.eos_token_id": 7}) == (7,)
    assert end_tokens({"tokenizer.ggml.eos_token_id": 2**32 - 1}) == ()


@pytest.mark.parametrize("value", ["2", [2], 2.0, True])
def test_an_id_of_another_type_is_named(value):
    with pytest.raises(ValueError, match=r"gguf: tokenizer\.ggml\.eot_token_id must be a token id"):
        end_tokens(metadata(CHATML, eot=value))


@pytest.mark.parametrize("value", ["abc", [1, 2], 5])
def test_a_vocabulary_of_another_type_is_named(value):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens must be a list of strings"):
        end_tokens({"tokenizer.ggml.tokens": value})
