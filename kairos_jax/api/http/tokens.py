"""What /tokenize and /detokenize answer."""

from kairos_jax.api.http.fields import Fields, read_object
from kairos_jax.api.http.request import check_model, messages_of, renamed
from kairos_jax.api.validator import BadField, Edge
from kairos_jax.rpc import kairos_pb2 as pb


def tokenized(edge: Edge, raw: bytes) -> list[int]:
    """The ids of the text or the conversation in a body. Raises BadField or UnknownModel."""
    fields = Fields(read_object(raw))
    check_model(fields, edge)
    text, chat = fields.text("prompt"), "messages" in fields.values
    if not chat and text is None:
        raise BadField("prompt", "is missing: give text, or messages")
    if edge.tokenizer and text is not None and fields.boolean("add_special_tokens", True) is False:
        return edge.tokenizer.encode(text, add_special_tokens=False)
    message = (
        pb.GenerateRequest(chat=messages_of(fields)) if chat else pb.GenerateRequest(text=text)
    )
    try:
        return edge.encode(message, "chat" if chat else "text")
    except BadField as error:
        place = "messages" if chat else "prompt"
        raise BadField(renamed(error.field, place), error.problem) from error


def detokenized(edge: Edge, raw: bytes) -> str:
    """The text of the ids in a body. Raises BadField or UnknownModel."""
    fields = Fields(read_object(raw))
    check_model(fields, edge)
    if fields.values.get("tokens") is None:
        raise BadField("tokens", "is missing")
    ids = fields.ids("tokens")
    edge.check_ids(ids, "tokens")
    if edge.tokenizer is None:
        raise BadField("tokens", "need a tokenizer, and this model has none")
    return edge.tokenizer.decode(ids)
