"""From a client's message to a `Request`: everything is checked here, once.

Each refusal is a `BadField`, whose message names the field, the value and the limit.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kairos_jax.api.chat import render
from kairos_jax.api.refusal import BadField, TooLong, UnknownModel
from kairos_jax.api.slots import Lane
from kairos_jax.config import ServerConfig
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text.tokenizer import Tokenizer
from models.sampling import MAX_TOP_LOGPROBS, SamplingParams
from schedulers.ledger.request import Request, Slo

MAX_REQUEST_ID = 256
# No step is as short as the first, and no client waits as long as the last: a week.
LEAST_SLO_S, MOST_SLO_S = 1e-4, 604_800.0
# Characters of a text that is cut to its last tokens, where it is too long for the context: all of
# it is tokenized, since what its end becomes depends on what is before. That takes a second or two.
MAX_TRUNCATED = 1 << 20
# Log-probabilities of one prompt: they go over the wire, and to the client, all at once.
MAX_PROMPT_LOGPROBS = 1 << 18
_SEED_BITS = 64


@dataclass(frozen=True)
class Validator:
    """What requests are checked against. tokenizer: None if the model came without one.
    trusts_templates: whether conversations may bring chat templates.
    """

    model: str
    vocab_size: int
    eos_ids: frozenset[int]
    config: ServerConfig
    tokenizer: Tokenizer | None
    trusts_templates: bool = False

    def request(self, message: pb.GenerateRequest, arrival: float) -> Request:
        """The request that `message` asks for.

        Raises:
            BadField, UnknownModel: it cannot be served.
        """
        if message.HasField("model") and message.model != self.model:
            raise UnknownModel(f"model {message.model!r} is not served here; {self.model!r} is")
        if len(message.request_id) > MAX_REQUEST_ID:
            raise BadField(
                "request_id",
                f"must have at most {MAX_REQUEST_ID} characters, got {len(message.request_id)}",
            )
        prompt, sampling = self._prompt(message), _sampling(message.sampling)
        _check_prompt_logprobs(len(prompt), sampling.prompt_logprobs)
        return Request(
            id=message.request_id,
            arrival=arrival,
            prompt=prompt,
            max_tokens=self._max_tokens(message, len(prompt)),
            slo=self._slo(message.slo),
            stop=self._stop(message.sampling),
            sampling=sampling,
        )

    def _prompt(self, message: pb.GenerateRequest) -> Sequence[int]:
        kind = message.WhichOneof("prompt")
        if kind is None:
            raise BadField("prompt", "is missing: give text, token_ids or chat")
        if kind == "token_ids":
            ids = message.token_ids.ids
            if not message.HasField("truncate_prompt_tokens"):
                self._check_length(len(ids), kind)
            self.check_ids(ids, "prompt.token_ids")
            ids = list(ids)
        else:
            ids = self.encode(message, kind)
        if message.HasField("truncate_prompt_tokens"):
            ids = self._truncated(message, ids)
        if not ids:
            raise BadField(f"prompt.{kind}", "is empty: at least 1 token is needed")
        self._check_length(len(ids), kind)
        return ids

    def lane(self, size: int, template: object) -> Lane:
        """In which lane a request is tokenized. size: of its body, in bytes. template: the chat
        template that it names or brings, if it does.
        """
        named = template is None or bool(self.tokenizer and self.tokenizer.has_template(template))
        return Lane.of(size, self.trusts_templates and not named)

    def _check_length(self, count: int, kind: str) -> None:
        if count >= self.config.max_context:
            raise TooLong(
                f"prompt.{kind}",
                f"has {count} tokens; with at least 1 token of output it must "
                f"fit the context of {self.config.max_context}",
            )

    def encode(
        self, message: pb.GenerateRequest, kind: str, add_special_tokens: bool = True
    ) -> list[int]:
        """The ids of a message's text or chat.

        Args:
            kind: "text" or "chat", the one that the message holds.
            add_special_tokens: puts the BOS token in front of a text, where the model wants it.

        Raises:
            BadField: there is no tokenizer, the chat cannot be rendered, or it cannot fit.
        """
        if self.tokenizer is None:
            raise BadField(f"prompt.{kind}", "needs a tokenizer, and this model has none: send ids")
        # What a template makes of a conversation has its special tokens.
        special = add_special_tokens and kind == "text"
        if kind == "text":
            text = message.text
        else:
            text = render(self.tokenizer, message.chat, self.trusts_templates)
        if message.HasField("add_special_tokens"):
            special = message.add_special_tokens
        if not message.HasField("truncate_prompt_tokens") or len(text) > MAX_TRUNCATED:
            self._check_size(text, f"prompt.{kind}")
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _truncated(self, message: pb.GenerateRequest, ids: list[int]) -> list[int]:
        """The last tokens of a prompt, as many as the message says."""
        count, most = message.truncate_prompt_tokens, self.config.max_context - 1
        if count != -1 and not 1 <= count <= most:
            limit = f"from 1 to {most}, or -1 for as many as have room"
            raise BadField("truncate_prompt_tokens", f"must be {limit}, got {count}")
        if count == -1:
            asked = message.max_tokens if message.HasField("max_tokens") else 1
            count = max(1, self.config.max_context - max(asked, 1))
        return ids[-count:]

    def _check_size(self, text: str, field: str) -> None:
        """Refuses a text that cannot fit, which would take seconds to tokenize. Raises TooLong."""
        assert self.tokenizer
        least = self.tokenizer.least_tokens(text)
        if least > self.config.max_context:
            raise TooLong(
                field,
                f"has {len(text.encode())} bytes, which are at least {least} tokens; with at least "
                f"1 token of output it must fit the context of {self.config.max_context}",
            )

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises BadField for an id out of the vocabulary."""
        for index, id in enumerate(ids):
            if not 0 <= id < self.vocab_size:
                raise BadField(
                    f"{field}[{index}]", f"must be from 0 to {self.vocab_size - 1}, got {id}"
                )

    def _max_tokens(self, message: pb.GenerateRequest, num_prompt: int) -> int:
        room = self.config.max_context - num_prompt
        if not message.HasField("max_tokens"):
            return min(self.config.max_tokens, room)
        value = message.max_tokens
        if not 1 <= value <= self.config.max_tokens:
            raise BadField("max_tokens", f"must be from 1 to {self.config.max_tokens}, got {value}")
        if value > room:
            raise TooLong(
                "max_tokens",
                f"must be at most {room} after a prompt of {num_prompt} tokens in a "
                f"context of {self.config.max_context}, got {value}",
            )
        return value

    def _slo(self, slo: pb.Slo) -> Slo:
        default = self.config.default_slo
        for field in ("ttft_s", "tpot_s"):
            value = getattr(slo, field)
            if slo.HasField(field) and not LEAST_SLO_S <= value <= MOST_SLO_S:
                limits = f"from {LEAST_SLO_S:g} to {MOST_SLO_S:g} seconds"
                raise BadField(f"slo.{field}", f"must be {limits}, got {value:g}")
        return Slo(
            slo.ttft_s if slo.HasField("ttft_s") else default.ttft,
            slo.tpot_s if slo.HasField("tpot_s") else default.tpot,
        )

    def _stop(self, sampling: pb.Sampling) -> frozenset[int]:
        self.check_ids(sampling.stop_token_ids, "sampling.stop_token_ids")
        eos = frozenset() if sampling.ignore_eos else self.eos_ids
        return eos | frozenset(sampling.stop_token_ids)


def _check_prompt_logprobs(num_prompt: int, count: int | None) -> None:
    if count is not None and (total := num_prompt * (1 + count)) > MAX_PROMPT_LOGPROBS:
        raise BadField(
            "sampling.prompt_logprobs",
            f"of {num_prompt} tokens and {count} alternatives each make {total} numbers; at most "
            f"{MAX_PROMPT_LOGPROBS} are served",
        )


def _sampling(message: pb.Sampling) -> SamplingParams:
    def given(name, default):
        return getattr(message, name) if message.HasField(name) else default

    seed = given("seed", secrets.randbits(_SEED_BITS))
    params = SamplingParams(
        temperature=given("temperature", 1.0),
        top_k=given("top_k", 0),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        seed=seed % 2**_SEED_BITS,
        logprobs=given("logprobs", None),
        prompt_logprobs=given("prompt_logprobs", None),
    )
    top = f"0 to {MAX_TOP_LOGPROBS}"
    limits = {
        "temperature": (math.isfinite(params.temperature) and params.temperature >= 0, "0 or more"),
        "top_k": (params.top_k >= 0, "0 (off) or more"),
        "top_p": (0 < params.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= params.min_p <= 1, "from 0 to 1"),
        "logprobs": (0 <= (params.logprobs or 0) <= MAX_TOP_LOGPROBS, top),
        "prompt_logprobs": (0 <= (params.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS, top),
    }
    for name, (holds, limit) in limits.items():
        if not holds:
            raise BadField(f"sampling.{name}", f"must be {limit}, got {getattr(params, name):g}")
    return params
