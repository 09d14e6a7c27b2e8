"""What the validator refuses, in which words; and what it makes of what it takes."""

import math
from dataclasses import replace

import fakes
import pytest
import tokenizers

from kairos_jax.api import validator as validator_module
from kairos_jax.api.refusal import BadField, TooLong, UnknownModel
from kairos_jax.api.slots import Lane
from kairos_jax.api.validator import Validator
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text.tokenizer import Tokenizer
from models.sampling import SamplingParams
from schedulers.ledger.request import Slo

NONE = Validator("fake", 97, frozenset({0}), fakes.CONFIG, None)


@pytest.fixture(scope="module")
def validator():
    vocab = {"<s>": 0, "a": 1, "b": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.content }} {% endfor %}b"
    return replace(NONE, tokenizer=Tokenizer(backend, chat_template=template))


def ids(*values, **fields):
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=values), **fields)


def sampled(**fields):
    return ids(1, sampling=pb.Sampling(**fields))


def chat(**fields):
    turns = [pb.Message(role="user", content="a")]
    return pb.GenerateRequest(chat=pb.Chat(messages=turns, **fields))


REFUSED = [
    (pb.GenerateRequest(), "prompt is missing: give text, token_ids or chat"),
    (ids(), "prompt.token_ids is empty: at least 1 token is needed"),
    (pb.GenerateRequest(text=""), "prompt.text is empty: at least 1 token is needed"),
    (pb.GenerateRequest(chat=pb.Chat()), "prompt.chat is empty: at least 1 message is needed"),
    (ids(5, 97), "prompt.token_ids[1] must be from 0 to 96, got 97"),
    (ids(-1), "prompt.token_ids[0] must be from 0 to 96, got -1"),
    (
        ids(*[1] * 128),
        "prompt.token_ids has 128 tokens; with at least 1 token of output it must fit the context "
        "of 128",
    ),
    (ids(1, max_tokens=0), "max_tokens must be from 1 to 64, got 0"),
    (ids(1, max_tokens=-5), "max_tokens must be from 1 to 64, got -5"),
    (ids(1, max_tokens=2**31 - 1), "max_tokens must be from 1 to 64, got 2147483647"),
    (
        ids(*[1] * 100, max_tokens=29),
        "max_tokens must be at most 28 after a prompt of 100 tokens in a context of 128, got 29",
    ),
    (ids(1, request_id="x" * 257), "request_id must have at most 256 characters, got 257"),
    (ids(1, slo=pb.Slo(ttft_s=0)), "slo.ttft_s must be from 0.0001 to 604800 seconds, got 0"),
    (
        ids(1, slo=pb.Slo(tpot_s=1e-6)),
        "slo.tpot_s must be from 0.0001 to 604800 seconds, got 1e-06",
    ),
    (
        ids(1, slo=pb.Slo(ttft_s=1.7e308)),
        "slo.ttft_s must be from 0.0001 to 604800 seconds, got 1.7e+308",
    ),
    (ids(1, slo=pb.Slo(ttft_s=-1)), "slo.ttft_s must be from 0.0001 to 604800 seconds, got -1"),
    (
        ids(1, slo=pb.Slo(tpot_s=math.nan)),
        "slo.tpot_s must be from 0.0001 to 604800 seconds, got nan",
    ),
    (
        ids(1, slo=pb.Slo(tpot_s=math.inf)),
        "slo.tpot_s must be from 0.0001 to 604800 seconds, got inf",
    ),
    (sampled(temperature=math.nan), "sampling.temperature must be 0 or more, got nan"),
    (sampled(temperature=-0.5), "sampling.temperature must be 0 or more, got -0.5"),
    (sampled(temperature=math.inf), "sampling.temperature must be 0 or more, got inf"),
    (sampled(top_k=-1), "sampling.top_k must be 0 (off) or more, got -1"),
    (sampled(top_p=0), "sampling.top_p must be above 0 and at most 1, got 0"),
    (sampled(top_p=1.5), "sampling.top_p must be above 0 and at most 1, got 1.5"),
    (sampled(min_p=-0.1), "sampling.min_p must be from 0 to 1, got -0.1"),
    (sampled(min_p=math.nan), "sampling.min_p must be from 0 to 1, got nan"),
    (sampled(logprobs=21), "sampling.logprobs must be 0 to 20, got 21"),
    (sampled(logprobs=-1), "sampling.logprobs must be 0 to 20, got -1"),
    (sampled(prompt_logprobs=21), "sampling.prompt_logprobs must be 0 to 20, got 21"),
    (
        sampled(stop_token_ids=[3, 500]),
        "sampling.stop_token_ids[1] must be from 0 to 96, got 500",
    ),
    (
        ids(1, truncate_prompt_tokens=128),
        "truncate_prompt_tokens must be from 1 to 127, or -1 for as many as have room, got 128",
    ),
    (
        ids(1, truncate_prompt_tokens=0),
        "truncate_prompt_tokens must be from 1 to 127, or -1 for as many as have room, got 0",
    ),
    (
        chat(continue_final_message=True, add_generation_prompt=True),
        "prompt.chat.continue_final_message must be false with add_generation_prompt: a new "
        "message would be begun, got true",
    ),
    (
        chat(template="x" * 65537),
        "prompt.chat.template must have at most 65536 characters, got 65537",
    ),
    (chat(template_kwargs="[]"), "prompt.chat.template_kwargs must be a JSON object, got list"),
]


@pytest.mark.parametrize(("message", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_refusals_name_field_value_and_limit(validator, message, words):
    with pytest.raises(BadField) as error:
        validator.request(message, 0.0)
    assert str(error.value) == words


@pytest.fixture(scope="module")
def bounded():
    """Whose longest token, "abcd", has 4 bytes: 512 bytes are 128 tokens at least."""
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab", "cd", "abcd"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    vocab = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    class Spy(Tokenizer):
        def encode(self, text, add_special_tokens=True):
            assert len(text.encode()) <= 512, "a text that cannot fit was tokenized"
            return super().encode(text, add_special_tokens)

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return replace(NONE, tokenizer=Spy(backend, chat_template=template))


def of_text(text):
    return pb.GenerateRequest(text=text)


def of_chat(*texts):
    chat = pb.Chat(messages=[pb.Message(role="user", content=text) for text in texts])
    return pb.GenerateRequest(chat=chat)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (of_text("abcd" * 128 + "a"), "prompt.text has 513 bytes, which are at least 129 tokens; "),
        (of_text("é" * 256 + "a"), "prompt.text has 513 bytes, which are at least 129 tokens; "),
        (
            of_text("a" * 2**23),
            "prompt.text has 8388608 bytes, which are at least 2097152 tokens; ",
        ),
        (of_chat("abcd", "é" * 255), "prompt.chat has 514 bytes, which are at least 129 tokens; "),
        (of_text("abcd" * 128), "prompt.text has 128 tokens; "),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(bounded, message, words):
    with pytest.raises(BadField) as error:
        bounded.request(message, 0.0)
    limit = "with at least 1 token of output it must fit the context of 128"
    assert str(error.value) == words + limit


def test_a_text_that_fits_by_its_bytes_is_tokenized(bounded):
    assert len(bounded.request(of_text("abcd" * 127), 0.0).prompt) == 127
    assert len(bounded.request(of_chat("abcd" * 120, "ab" * 7), 0.0).prompt) == 127


def test_an_unknown_model_is_refused(validator):
    with pytest.raises(UnknownModel, match="model 'other' is not served here; 'fake' is"):
        validator.request(ids(1, model="other"), 0.0)


def test_a_model_without_a_tokenizer_takes_ids_alone():
    assert list(NONE.request(ids(3, 4), 0.0).prompt) == [3, 4]
    with pytest.raises(BadField, match=r"prompt\.text needs a tokenizer"):
        NONE.request(pb.GenerateRequest(text="a"), 0.0)


def test_defaults_are_the_configs(validator):
    request = validator.request(pb.GenerateRequest(text="a b"), 7.5)
    assert list(request.prompt) == [1, 2]
    assert request.arrival == 7.5
    assert request.max_tokens == 64
    assert request.slo == Slo(30.0, 30.0)
    assert request.stop == {0}
    assert replace(request.sampling, seed=0) == SamplingParams(temperature=1.0)


def test_given_values_are_taken(validator):
    sampling = pb.Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        seed=2**40 + 1,
        logprobs=0,
        prompt_logprobs=2,
        stop_token_ids=[4],
        ignore_eos=True,
    )
    chat = pb.Chat(messages=[pb.Message(role="user", content="a")])
    request = validator.request(
        pb.GenerateRequest(chat=chat, max_tokens=5, sampling=sampling, slo=pb.Slo(tpot_s=0.5)), 0.0
    )
    assert list(request.prompt) == [1, 2]
    assert request.max_tokens == 5
    assert request.slo == Slo(30.0, 0.5)
    assert request.stop == {4}
    assert request.sampling == SamplingParams(0.5, 3, 0.5, 0.25, 2**40 + 1, 0, 2)


def test_prompt_logprobs_are_bounded_by_their_number(validator):
    long = replace(validator, config=fakes.altered(max_context=20_000))
    most = 2**18 // 21
    sampling = pb.Sampling(prompt_logprobs=20)
    assert len(long.request(ids(*[1] * most, sampling=sampling), 0.0).prompt) == most
    with pytest.raises(BadField) as error:
        long.request(ids(*[1] * (most + 1), sampling=sampling), 0.0)
    assert str(error.value) == (
        "sampling.prompt_logprobs of 12484 tokens and 20 alternatives each make 262164 numbers; at "
        "most 262144 are served"
    )


def test_the_context_bounds_the_default_output(validator):
    assert validator.request(ids(*[1] * 120), 0.0).max_tokens == 8


def test_seeds_differ_in_all_of_their_bits(validator):
    seeds = [0, -1, 1, 2**32, 2**32 - 1, -(2**32), 2**63 - 1, -(2**63)]
    made = [validator.request(sampled(seed=seed), 0.0).sampling.seed for seed in seeds]
    assert len(set(made)) == len(seeds)
    assert made == [seed % 2**64 for seed in seeds]
    drawn = {validator.request(ids(1), 0.0).sampling.seed for _ in range(20)}
    assert len(drawn) == 20


def test_template_kwargs_that_are_no_json_are_refused(validator):
    with pytest.raises(BadField, match=r"^prompt\.chat\.template_kwargs must be JSON: "):
        validator.request(chat(template_kwargs="{"), 0.0)


@pytest.mark.parametrize(
    ("count", "max_tokens", "expected"),
    [(3, None, 3), (127, None, 127), (-1, None, 127), (-1, 20, 108), (-1, 64, 64)],
)
def test_a_prompt_is_cut_to_its_last_tokens(validator, count, max_tokens, expected):
    prompt = [at % 90 for at in range(300)]
    request = ids(*prompt, truncate_prompt_tokens=count, max_tokens=max_tokens)
    assert list(validator.request(request, 0.0).prompt) == prompt[-expected:]


def test_what_is_too_long_is_an_error_of_its_own(validator):
    for message in (ids(*[1] * 128), ids(*[1] * 100, max_tokens=29)):
        with pytest.raises(TooLong):
            validator.request(message, 0.0)
    with pytest.raises(BadField) as error:
        validator.request(ids(1, max_tokens=65), 0.0)
    assert not isinstance(error.value, TooLong)


# Templates of clients.


def test_a_template_of_a_client_is_refused_unless_they_are_trusted(validator):
    with pytest.raises(BadField) as error:
        validator.request(chat(template="{{ 1 }}"), 0.0)
    assert str(error.value) == (
        "prompt.chat.template is refused: the model's own templates alone are rendered here, by "
        "name (--trust_request_chat_template lets clients bring theirs)"
    )
    trusting = replace(validator, trusts_templates=True)
    assert list(trusting.request(chat(template="a b"), 0.0).prompt) == [1, 2]
    named = replace(validator.tokenizer, named_templates={"short": "b"})
    assert list(
        replace(validator, tokenizer=named).request(chat(template="short"), 0.0).prompt
    ) == [2]


def test_a_template_of_a_client_waits_for_others_of_its_kind_alone(validator):
    trusting = replace(validator, trusts_templates=True)
    assert trusting.lane(1000, "{{ 1 }}") is Lane.TEMPLATE
    for own in (None, "default"):
        assert trusting.lane(1000, own) is Lane.SHORT
        assert trusting.lane(1 << 20, own) is Lane.LONG
    assert validator.lane(1000, "{{ 1 }}") is Lane.SHORT, "it is refused and not rendered"


# Long texts to cut.


def test_a_text_to_cut_is_tokenized_up_to_a_length(bounded, monkeypatch):
    monkeypatch.setattr(validator_module, "MAX_TRUNCATED", 520)
    bounded = replace(bounded, tokenizer=Tokenizer(bounded.tokenizer.backend))
    cut = pb.GenerateRequest(text="abcd" * 130, truncate_prompt_tokens=4)
    assert len(bounded.request(cut, 0.0).prompt) == 4
    cut.text += "a"
    with pytest.raises(TooLong, match="has 521 bytes, which are at least 131 tokens"):
        bounded.request(cut, 0.0)


def test_too_many_ids_are_refused_before_they_are_looked_at(validator):
    with pytest.raises(TooLong, match="has 129 tokens"):
        validator.request(ids(*[-1] * 129), 0.0)
