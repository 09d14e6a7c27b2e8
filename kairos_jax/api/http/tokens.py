"""What /tokenize and /detokenize answer."""

from kairos_jax.api.http.fields import Fields, read_object
from kairos_jax.api.http.request import check_model, messages_of, renamed
from kairos_jax.api.validator import BadField, Validator
from kairos_jax.rpc import kairos_pb2 as pb


def tokenized(validator: Validator, raw: bytes) -> list[int]:
    """The ids of the text or the conversation in a body. Raises BadField or UnknownModel."""
    fields = Fields(read_object(raw))
    check_model(fields, validator)
    text, chat = fields.text("prompt"), "messages" in fields.values
    if not chat and text is None:
        raise BadField("prompt", "is missing: give text, or messages")
    if (
        validator.tokenizer
        and text is not None
        and fields.boolean("add_special_tokens", True) is False
    ):
        return validator.tokenizer.encode(text, add_special_tokens=False)
    message = (
        pb.GenerateRequest(chat=messages_of(fields)) if chat else pb.GenerateRequest(text=text)
    )
    try:
        return validator.encode(message, "chat" if chat else "text")
    except BadField as error:
        place = "messages" if chat else "prompt"
        raise BadField(renamed(error.field, place), error.problem) from error


def detokenized(validator: Validator, raw: bytes) -> str:
    """The text of the ids in a body. Raises BadField or UnknownModel."""
    fields = Fields(read_object(raw))
    check_model(fields, validator)
    if fields.values.get("tokens") is None:
        raise BadField("tokens", "is missing")
    ids = fields.ids("tokens")
    validator.check_ids(ids, "tokens")
    if validator.tokenizer is None:
        raise BadField("tokens", "need a tokenizer, and this model has none")
    return validator.tokenizer.decode(ids)
