"""The prompts of a body: text, token ids, or a conversation."""

import json
from typing import Any

from kairos_jax.api.http.body.fields import Fields, check_int32, check_text, is_ids, shown
from kairos_jax.api.http.body.known import NEUTRAL_OF_MESSAGE
from kairos_jax.api.refusal import BadField
from kairos_jax.rpc import kairos_pb2 as pb

Prompt = str | list[int] | pb.Chat


def prompts_of(fields: Fields) -> list[tuple[str, Prompt]]:
    """Each prompt and its place in the body. Raises BadField."""
    value = fields.values.get("prompt")
    if value is None:
        raise BadField("prompt", "is missing: give text, token ids, or a list of either")
    if value == []:
        raise BadField("prompt", "is empty: at least 1 token is needed")
    several = isinstance(value, list) and not is_ids(value)
    found: list[tuple[str, Prompt]] = []
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


def chat_of(fields: Fields) -> pb.Chat:
    """The conversation of a body, and how it is to be rendered. Raises BadField."""
    chat = _messages(fields)
    generation = fields.flag("add_generation_prompt")
    if generation is not None:
        chat.add_generation_prompt = generation
    chat.continue_final_message = fields.boolean("continue_final_message")
    if (template := fields.text("chat_template")) is not None:
        chat.template = template
    if kwargs := fields.part("chat_template_kwargs").values:
        chat.template_kwargs = json.dumps(kwargs)
    return chat


def _messages(fields: Fields) -> pb.Chat:
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
        for name, neutral in NEUTRAL_OF_MESSAGE.items():
            turn.refuse_all_but(name, *neutral)
        role = turn.text("role")
        if not role:
            raise BadField(f"{place}.role", "is missing")
        content = _content(each.get("content"), role, place)
        chat.messages.add(role=role, content=content, name=turn.text("name"))
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
