"""From a JSON body to requests: /v1/completions and /v1/chat/completions.

A body becomes the message that gRPC clients send, so that `Validator` checks both alike; only the
names of fields differ in what a client is told.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kairos_jax.api.http.fields import Fields, check_int32, check_text, is_ids, shown
from kairos_jax.api.validator import BadField, UnknownModel, Validator
from kairos_jax.rpc import kairos_pb2 as pb
from models.sampling import MAX_TOP_LOGPROBS
from schedulers.ledger.request import Request

# Log-probabilities of one answer: 50 MB as JSON.
MAX_LOGPROBS = 1 << 19

MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256
# What OpenAI's completions generate where they are not told how much. Chat goes on to the end.
_DEFAULT_MAX_TOKENS = 16

# What is not served, and what may be asked of it nonetheless.
_NEUTRAL: Mapping[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "use_beam_search": False,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "structured_outputs": None,
    "prompt_logprobs": None,
}

_SLO_FIELDS = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s"}


@dataclass(frozen=True, slots=True)
class Ask:
    """What one HTTP request asks for: `n` choices for each of `requests`.

    prompts: as texts, where they came so. echo: answers begin with the prompt. logprobs: how many
    alternatives to report; None: no log-probabilities at all. silent: no output is wanted, only
    what is said of the prompt; one token is generated and not shown. stops: texts that end an
    output. late_stops: token ids that do so from `min_tokens` on.
    """

    chat: bool
    requests: Sequence[Request]
    prompts: Sequence[str | None]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    silent: bool
    logprobs: int | None
    stops: tuple[str, ...]
    min_tokens: int
    late_stops: frozenset[int]
    return_token_ids: bool
    timing: bool


def read(
    body: dict[str, Any],
    validator: Validator,
    arrival: float,
    slo: pb.Slo,
    request_id: str,
    chat: bool,
) -> Ask:
    """What a body asks for. slo: of the headers; that of the body comes first.

    Raises:
        BadField, UnknownModel: it cannot be served.
    """
    fields = Fields(body)
    check_model(fields, validator)
    for name, neutral in _NEUTRAL.items():
        fields.refuse_all_but(name, neutral)
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if (fields.integer("best_of", 1, MAX_CHOICES) or n) != n:
        raise BadField("best_of", f"must be n, {n}, as nothing else is served")
    echo = fields.boolean("echo")
    if echo and chat:
        raise BadField("echo", "is for completions, and not for chat")
    logprobs = _logprobs(fields, chat)
    max_name, max_tokens = _max_tokens(fields)
    silent = echo and max_tokens == 0
    message = pb.GenerateRequest(
        request_id=request_id,
        max_tokens=1 if silent else max_tokens,
        sampling=_sampling(fields, logprobs, logprobs if echo else None),
        slo=_slo(fields, slo),
    )
    places = [("messages", messages_of(fields))] if chat else _prompts(fields)
    choices = len(places) * n
    if choices > validator.config.max_requests:
        raise BadField(
            "n" if chat or n > 1 else "prompt",
            f"makes {choices} choices; this server takes {validator.config.max_requests} at once",
        )
    requests = [_request(validator, message, arrival, *place, max_name) for place in places]
    if max_tokens is None and not chat:
        most = _DEFAULT_MAX_TOKENS
        requests = [replace(each, max_tokens=min(most, each.max_tokens)) for each in requests]
    min_tokens = fields.integer("min_tokens", 0) or 0
    smallest = min(request.max_tokens for request in requests)
    if min_tokens > smallest:
        raise BadField("min_tokens", f"must be at most max_tokens, {smallest}, got {min_tokens}")
    late_stops = requests[0].stop if min_tokens else frozenset()
    if min_tokens:
        requests = [replace(request, stop=frozenset()) for request in requests]
    options = fields.part("stream_options")
    return Ask(
        chat=chat,
        requests=requests,
        prompts=[place[1] if isinstance(place[1], str) else None for place in places],
        n=n,
        stream=fields.boolean("stream"),
        include_usage=options.boolean("include_usage"),
        continuous_usage=options.boolean("continuous_usage_stats"),
        echo=echo,
        silent=silent,
        logprobs=logprobs,
        stops=_stops(fields, validator),
        min_tokens=min_tokens,
        late_stops=late_stops,
        return_token_ids=fields.boolean("return_token_ids"),
        timing=fields.boolean("timing"),
    )


def check_model(fields: Fields, validator: Validator) -> None:
    """Raises UnknownModel for another than this one; it may be left out."""
    model = fields.text("model")
    if model is not None and model != validator.model:
        raise UnknownModel(f"model {shown(model)} is not served here; {shown(validator.model)} is")


_Prompt = str | list[int] | pb.Chat


def _request(
    validator: Validator,
    base: pb.GenerateRequest,
    arrival: float,
    place: str,
    prompt: _Prompt,
    max_name: str,
) -> Request:
    """The request for one prompt. place: where it stands in the body."""
    message = pb.GenerateRequest()
    message.CopyFrom(base)
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, pb.Chat):
        message.chat.CopyFrom(prompt)
    else:
        message.token_ids.ids.extend(prompt)
        message.token_ids.SetInParent()  # so that an empty list is one
    try:
        return validator.request(message, arrival)
    except BadField as error:
        raise BadField(renamed(error.field, place, max_name), error.problem) from error


def renamed(field: str, place: str, max_name: str = "max_tokens") -> str:
    """What HTTP clients call a field of the message. place: where the prompt stands in the body."""
    for prefix in ("prompt.token_ids", "prompt.text", "prompt.chat"):
        if field.startswith(prefix):
            return place + field.removeprefix(prefix)
    if field == "max_tokens":
        return max_name
    if field == "sampling.prompt_logprobs":  # which are asked for by `echo` with `logprobs`
        return "logprobs"
    return field.removeprefix("sampling.")


def _prompts(fields: Fields) -> list[tuple[str, _Prompt]]:
    """Each prompt and its place in the body."""
    value = fields.values.get("prompt")
    if value is None:
        raise BadField("prompt", "is missing: give text, token ids, or a list of either")
    if value == []:
        raise BadField("prompt", "is empty: at least 1 token is needed")
    several = isinstance(value, list) and not is_ids(value)
    found: list[tuple[str, _Prompt]] = []
    for index, prompt in enumerate(value if several else [value]):
        place = f"prompt[{index}]" if several else "prompt"
        if isinstance(prompt, str):
            check_text(place, prompt)
        elif is_ids(prompt):
            check_int32(place, prompt)
        else:
            raise BadField(place, f"must be text or a list of token ids, got {shown(prompt)}")
        found.append((place, prompt))
    return found


def messages_of(fields: Fields) -> pb.Chat:
    """The conversation of a body. Raises BadField."""
    value = fields.values.get("messages")
    if value is None:
        raise BadField("messages", "is missing")
    if not isinstance(value, list):
        raise BadField("messages", f"must be a list, got {shown(value)}")
    chat = pb.Chat()
    for index, each in enumerate(value):
        place = f"messages[{index}]"
        if not isinstance(each, dict):
            raise BadField(place, f"must be an object, got {shown(each)}")
        turn = Fields(each, place + ".")
        turn.refuse_all_but("tool_calls", [])
        role = turn.text("role")
        if not role:
            raise BadField(f"{place}.role", "is missing")
        chat.messages.add(role=role, content=_content(each.get("content"), role, place))
    return chat


def _content(value: Any, role: str, place: str) -> str:
    """The text of a message: a string, or the text parts of a list."""
    field = f"{place}.content"
    if value is None and role == "assistant":
        return ""
    if isinstance(value, str):
        check_text(field, value)
        return value
    if not isinstance(value, list):
        raise BadField(field, f"must be a string or a list of parts, got {shown(value)}")
    texts = []
    for index, part in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadField(at, f'must be a part of type "text", got {shown(kind)}')
        check_text(f"{at}.text", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _max_tokens(fields: Fields) -> tuple[str, int | None]:
    """The field's name, and its value; None: as much as there is room for."""
    for name in ("max_completion_tokens", "max_tokens"):
        if (value := fields.integer(name)) is not None:
            return name, value
    return "max_tokens", None


def _logprobs(fields: Fields, chat: bool) -> int | None:
    if not chat:
        return fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if fields.boolean("logprobs"):
        return top or 0
    if top:
        raise BadField("top_logprobs", "needs logprobs to be true")
    return None


def _sampling(fields: Fields, logprobs: int | None, prompt_logprobs: int | None) -> pb.Sampling:
    top_k = fields.integer("top_k")
    return pb.Sampling(
        temperature=fields.number("temperature"),
        top_k=0 if top_k == -1 else top_k,  # both are in use for "off"
        top_p=fields.number("top_p"),
        min_p=fields.number("min_p"),
        seed=fields.seed("seed"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=fields.ids("stop_token_ids"),
        ignore_eos=fields.boolean("ignore_eos"),
    )


def _stops(fields: Fields, validator: Validator) -> tuple[str, ...]:
    value = fields.values.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise BadField("stop", f"must be a string or a list of at most {_MAX_STOPS}")
    for index, stop in enumerate(stops):
        place = f"stop[{index}]"
        check_text(place, stop)
        if not 1 <= len(stop) <= _MAX_STOP_LENGTH:
            raise BadField(
                place, f"must have from 1 to {_MAX_STOP_LENGTH} characters, got {len(stop)}"
            )
    if stops and validator.tokenizer is None:
        raise BadField("stop", "needs a tokenizer, and this model has none: send stop_token_ids")
    return tuple(stops)


def _slo(fields: Fields, of_headers: pb.Slo) -> pb.Slo:
    slo, given = pb.Slo(), fields.part("slo")
    slo.CopyFrom(of_headers)
    for name in given.values:
        if name not in _SLO_FIELDS:
            raise BadField(f"slo.{name}", f"is not known; {' and '.join(_SLO_FIELDS)} are")
    for name, field in _SLO_FIELDS.items():
        if (value := given.number(name)) is not None:
            setattr(slo, field, seconds(f"slo.{name}", value))
    return slo


def slo_of_headers(headers: Mapping[str, str]) -> pb.Slo:
    """Of x-slo-ttft-ms and x-slo-tpot-ms. Raises BadField."""
    slo = pb.Slo()
    for name, field in _SLO_FIELDS.items():
        header = f"x-slo-{name.replace('_', '-')}"
        if (given := headers.get(header)) is not None:
            try:
                value = float(given)
            except ValueError:
                raise BadField(header, f"must be a number, got {shown(given)}") from None
            setattr(slo, field, seconds(header, value))
    return slo


def seconds(field: str, milliseconds: float) -> float:
    """Raises BadField."""
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise BadField(field, f"must be a positive number of milliseconds, got {milliseconds:g}")
    return milliseconds / 1000


def check_size(ask: Ask) -> None:
    """Raises BadField for an answer with more numbers than one is made of."""
    if ask.logprobs is None:
        return
    tokens = ask.n * sum(request.max_tokens for request in ask.requests)
    if (total := tokens * (1 + ask.logprobs)) > MAX_LOGPROBS:
        raise BadField(
            "logprobs",
            f"of {tokens} tokens in all choices and {ask.logprobs} alternatives each make {total} "
            f"numbers; at most {MAX_LOGPROBS} are served",
        )
