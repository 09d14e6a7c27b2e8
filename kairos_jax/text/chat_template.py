"""Chat templates: Jinja sources that come with a model, and turn a conversation into its prompt."""

import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox


def compile_template(source: str) -> jinja2.Template:
    """Compiles with the conventions that chat templates are written for."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # Sandboxed, since the source comes with the checkpoint.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template can't be compiled: {error}") from error
