"""Chat templates: Jinja sources that turn a conversation into its prompt, as Hugging Face does.

What a template finds is what `transformers` 5 gives it (`utils/chat_template_utils.py`). A template
is a program, and may run without end: `template_process.py` bounds it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Characters of a prompt. A request has at most 8 MiB, unless the server allows more.
_MAX_TEXT = 1 << 25
# Characters of what a template says of a fault.
_MAX_REASON = 500

# Stands behind the text that is to be continued. A template that strips the text strips the space.
_END = "kairos-end-of-final-message "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Fault(ValueError):
    """A template that cannot render a conversation. The message follows the template's name."""


class _Refusal(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks what the model writes, for training. Serving renders the body."""

    tags = {"generation"}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """See Jinja. The body is a scope of its own, as it is in `transformers`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


def _raise_exception(message: Any) -> NoReturn:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    # Sandboxed, since the source comes with a checkpoint or with a request.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Fault(f"can't be compiled: line {error.lineno}: {_cut(str(error))}") from error
    except MemoryError:
        raise
    except Exception as error:  # Python's compiler has limits of its own, too.
        raise Fault(f"can't be compiled: {type(error).__name__}: {_cut(str(error))}") from error


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    continue_final: bool = False,
) -> str:
    """The prompt for a conversation.

    Args:
      source: the template.
      messages: {"role", "content", ...} objects.
      variables: what the template finds beside `messages`.
      continue_final: ends the prompt with the content of the last message.

    Raises:
      Fault: the template cannot render the messages, for whatever reason.
      MemoryError: it takes more memory than there is.
    """
    template = _compile(source)
    expected = [_as_expected(message, source) for message in messages]
    if not continue_final:
        return _render(template, expected, variables)
    final = _mark(expected[-1])
    if "content" not in source:
        raise Fault("does not read the content of messages, so that none can be continued")
    text = _render(template, expected, variables)
    at = text.rfind(_END.strip())
    if final.strip() not in text or at < 0:
        raise Fault("does not show the final message as it is, so that it cannot be continued")
    kept = text[:at]
    return kept if text.startswith(_END, at) else kept.rstrip()


def _render(
    template: jinja2.Template, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> str:
    parts, size = [], 0
    try:
        for part in template.generate({**variables, "messages": messages}):
            size += len(part)
            if size > _MAX_TEXT:
                raise Fault(f"makes a text of more than {_MAX_TEXT} characters")
            parts.append(part)
        text = "".join(parts)
        text.encode()  # Lone surrogates are no text.
    except (Fault, MemoryError):
        raise
    except _Refusal as error:
        raise Fault(f"refused the messages: {_cut(str(error))}") from error
    except Exception as error:
        raise Fault(_failed(error)) from error
    return text


def _as_expected(message: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A message as templates expect it: without nulls, its reasoning under the usual names."""
    made = {key: value for key, value in message.items() if value is not None}
    reasoning = next((made[name] for name in _REASONING if name in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    # OpenAI's newer name for system messages.
    if made.get("role") == "developer" and "developer" not in source:
        made["role"] = "system"
    return made


def _mark(message: dict[str, Any]) -> str:
    """Puts the mark behind the text of a message; returns the text. Raises Fault."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
        return content
    parts = list(content) if isinstance(content, list) else []
    for at in reversed(range(len(parts))):
        if isinstance(parts[at], dict) and isinstance(text := parts[at].get("text"), str):
            parts[at] = {**parts[at], "text": text + _END}
            message["content"] = parts
            return text
    raise Fault("cannot continue the final message, which has no text")


def _failed(error: Exception) -> str:
    """Which error a template made, and at which line."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    where = "" if line is None else f" at line {line}"
    return f"failed{where}: {type(error).__name__}: {_cut(str(error))}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
