"""From a conversation to the text of its prompt."""

from typing import Any

from kairos_jax.api.json_text import read_json
from kairos_jax.api.refusal import BadField
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 16  # characters
REMEDY = "--trust_request_chat_template lets clients bring theirs"


def render(tokenizer: Tokenizer, chat: pb.Chat, trusts_templates: bool) -> str:
    """The prompt for a conversation, by the model's template, or by the client's where these are
    trusted. Raises BadField.
    """
    if not chat.messages:
        raise BadField("prompt.chat", "is empty: at least 1 message is needed")
    turns = [
        {"role": turn.role, "content": turn.content}
        | ({"name": turn.name} if turn.HasField("name") else {})
        for turn in chat.messages
    ]
    options = _options(chat)
    own = not chat.HasField("template") or tokenizer.has_template(chat.template)
    if not own and not trusts_templates:
        problem = "is refused: the model's own templates alone are rendered here, by name"
        raise BadField("prompt.chat.template", f"{problem} ({REMEDY})")
    try:
        text = tokenizer.render_chat(turns, **options)
    except ValueError as error:
        raise BadField("prompt.chat", f"cannot be rendered: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(text[error.start])
        problem = f"cannot be rendered: the text has the lone surrogate {surrogate}"
        raise BadField("prompt.chat", problem) from error
    return text


def _options(chat: pb.Chat) -> dict[str, Any]:
    """How a conversation is rendered: only what was asked for. Raises BadField."""
    options: dict[str, Any] = {}
    if chat.continue_final_message:
        if chat.add_generation_prompt:
            problem = "must be false with add_generation_prompt: a new message would be begun"
            raise BadField("prompt.chat.continue_final_message", f"{problem}, got true")
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    elif chat.HasField("add_generation_prompt"):
        options["add_generation_prompt"] = chat.add_generation_prompt
    if chat.HasField("template"):
        if len(chat.template) > MAX_TEMPLATE:
            problem = f"must have at most {MAX_TEMPLATE} characters, got {len(chat.template)}"
            raise BadField("prompt.chat.template", problem)
        options["chat_template"] = chat.template
    if chat.HasField("template_kwargs"):
        options["template_kwargs"] = _kwargs(chat.template_kwargs)
    return options


def _kwargs(text: str) -> dict[str, Any]:
    field = "prompt.chat.template_kwargs"
    value = read_json(text.encode(), field)
    if not isinstance(value, dict):
        raise BadField(field, f"must be a JSON object, got {type(value).__name__}")
    return value
