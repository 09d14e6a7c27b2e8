"""From a JSON body to requests: /v1/completions and /v1/chat/completions.

A body becomes the message that gRPC clients send, so that `Validator` checks both alike; only the
names of fields differ in what a client is told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kairos_jax.api.http.body.fields import Fields, check_text, shown
from kairos_jax.api.http.body.known import refuse_not_served, refuse_of_others
from kairos_jax.api.http.body.prompts import Prompt, chat_of, prompts_of
from kairos_jax.api.http.body.slo import slo_of_body
from kairos_jax.api.refusal import BadField, UnknownModel
from kairos_jax.api.validator import Validator
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


@dataclass(frozen=True, slots=True)
class Ask:
    """What one HTTP request asks for: `n` choices for each of `requests`.

    prompts: as texts, where they came so and are whole. named: the client gave the requests their
    name in the body, and wants no other. echo: answers begin with the prompt. logprobs: how many
    alternatives to report; None: no log-probabilities at all. silent: no output is wanted, only
    what is said of the prompt; one token is generated and not shown. stops: texts that end an
    output; show_stop: it ends after the text, not before. late_stops: token ids that end it from
    `min_tokens` on. show_special: special tokens are shown as text.
    """

    chat: bool
    requests: Sequence[Request]
    prompts: Sequence[str | None]
    named: bool
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    silent: bool
    logprobs: int | None
    stops: tuple[str, ...]
    show_stop: bool
    min_tokens: int
    late_stops: frozenset[int]
    show_special: bool
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
    """What a body asks for. slo, request_id: of the headers; those of the body come first.

    Raises:
        BadField, UnknownModel: it cannot be served.
    """
    fields = Fields(body)
    check_model(fields, validator)
    refuse_not_served(fields)
    refuse_of_others(fields, chat)
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if (fields.integer("best_of", 1, MAX_CHOICES) or n) != n:
        raise BadField("best_of", f"must be n, {n}, as nothing else is served")
    places = [("messages", chat_of(fields))] if chat else prompts_of(fields)
    _check_choices(len(places), n, validator, chat)
    max_name, max_tokens = _max_tokens(fields)
    message = _message(fields, validator, max_tokens, slo, request_id, chat)
    requests = [_request(validator, message, arrival, *place, max_name) for place in places]
    if max_tokens is None and not chat:
        most = _DEFAULT_MAX_TOKENS
        requests = [replace(each, max_tokens=min(most, each.max_tokens)) for each in requests]
    min_tokens = _min_tokens(fields, requests)
    late_stops = requests[0].stop if min_tokens else frozenset()
    if min_tokens:
        requests = [replace(request, stop=frozenset()) for request in requests]
    whole = not message.HasField("truncate_prompt_tokens")
    options, echo = fields.part("stream_options"), fields.boolean("echo")
    return Ask(
        chat=chat,
        requests=requests,
        prompts=[prompt if whole and isinstance(prompt, str) else None for _, prompt in places],
        named=bool(fields.text("request_id")),
        n=n,
        stream=fields.boolean("stream"),
        include_usage=options.boolean("include_usage"),
        continuous_usage=options.boolean("continuous_usage_stats"),
        echo=echo,
        silent=echo and max_tokens == 0,
        logprobs=_logprobs(fields, chat),
        stops=_stops(fields, validator),
        show_stop=fields.boolean("include_stop_str_in_output"),
        min_tokens=min_tokens,
        late_stops=late_stops,
        show_special=not fields.boolean("skip_special_tokens", True),
        return_token_ids=fields.boolean("return_token_ids"),
        timing=fields.boolean("timing"),
    )


def _message(
    fields: Fields,
    validator: Validator,
    max_tokens: int | None,
    slo: pb.Slo,
    request_id: str,
    chat: bool,
) -> pb.GenerateRequest:
    """The message that a body asks for, but for its prompt."""
    echo, logprobs = fields.boolean("echo"), _logprobs(fields, chat)
    silent = echo and max_tokens == 0
    return pb.GenerateRequest(
        request_id=fields.text("request_id") or request_id,
        max_tokens=1 if silent else max_tokens,
        sampling=_sampling(fields, logprobs, logprobs if echo else None),
        slo=slo_of_body(fields, slo),
        add_special_tokens=fields.flag("add_special_tokens"),
        truncate_prompt_tokens=_truncation(fields, validator, max_tokens is None and not chat),
    )


def check_model(fields: Fields, validator: Validator) -> None:
    """Raises UnknownModel for another than this one; it may be left out."""
    model = fields.text("model")
    if model is not None and model != validator.model:
        raise UnknownModel(f"model {shown(model)} is not served here; {shown(validator.model)} is")


def _request(
    validator: Validator,
    base: pb.GenerateRequest,
    arrival: float,
    place: str,
    prompt: Prompt,
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
        raise type(error)(renamed(error.field, place, max_name), error.problem) from error


_CHAT_OPTIONS = {
    "continue_final_message": "continue_final_message",
    "template": "chat_template",
    "template_kwargs": "chat_template_kwargs",
}


def renamed(field: str, place: str, max_name: str = "max_tokens") -> str:
    """What HTTP clients call a field of the message. place: where the prompt stands in the body."""
    if (option := field.removeprefix("prompt.chat.")) in _CHAT_OPTIONS:
        return _CHAT_OPTIONS[option]
    for prefix in ("prompt.token_ids", "prompt.text", "prompt.chat"):
        if field.startswith(prefix):
            return place + field.removeprefix(prefix)
    if field == "max_tokens":
        return max_name
    if field == "sampling.prompt_logprobs":  # which are asked for by `echo` with `logprobs`
        return "logprobs"
    return field.removeprefix("sampling.")


def _check_choices(num_prompts: int, n: int, validator: Validator, chat: bool) -> None:
    choices, most = num_prompts * n, validator.config.max_requests
    if choices > most:
        field = "n" if chat or n > 1 else "prompt"
        raise BadField(field, f"makes {choices} choices; this server takes {most} at once")


def _truncation(fields: Fields, validator: Validator, default_output: bool) -> int | None:
    """default_output: as much as completions generate by default is to have room."""
    count, context = fields.integer("truncate_prompt_tokens"), validator.config.max_context
    if count == -1 and default_output:
        return max(1, context - min(_DEFAULT_MAX_TOKENS, validator.config.max_tokens))
    return count


def _min_tokens(fields: Fields, requests: Sequence[Request]) -> int:
    value, most = fields.integer("min_tokens", 0) or 0, min(each.max_tokens for each in requests)
    if value > most:
        raise BadField("min_tokens", f"must be at most max_tokens, {most}, got {value}")
    return value


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


def _num_shown(ask: Ask, request: Request) -> int:
    """Tokens that one choice may show."""
    output = 0 if ask.silent else request.max_tokens
    return output + len(request.prompt) if ask.echo else output


def check_size(ask: Ask) -> None:
    """Raises BadField for an answer with more numbers than one is made of."""
    if ask.logprobs is None:
        return
    tokens = ask.n * sum(_num_shown(ask, request) for request in ask.requests)
    if (total := tokens * (1 + ask.logprobs)) > MAX_LOGPROBS:
        where = "all choices and their prompts" if ask.echo else "all choices"
        raise BadField(
            "logprobs",
            f"of {tokens} tokens in {where} and {ask.logprobs} alternatives each make {total} "
            f"numbers; at most {MAX_LOGPROBS} are served",
        )
