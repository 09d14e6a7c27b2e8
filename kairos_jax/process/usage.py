"""What a binary says of itself: --help, --helpfull and --version."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from absl import flags

from kairos_jax import __version__

# Of the groups of flags, by the module that defines them; in this order, after a binary's own.
HEADINGS = {
    "kairos_jax.process.launch": "Model and config",
    "kairos_jax.role": "Instance",
    "kairos_jax.process.lifecycle": "Listening and draining",
    "kairos_jax.api.http.server": "HTTP API",
    "kairos_jax.routing.router": "Admission",
    "kairos_jax.net.credentials": "TLS, tokens and keys",
    "kairos_jax.net.health": "Health",
    "kairos_jax.kv.options": "KV transfer",
    "kairos_jax.engine.devices": "Meshes of several processes",
    "kairos_jax.engine.profile_file": "Step times",
    "kairos_jax.observe.recording": "Observation",
    "kairos_jax.observe.otlp": "Observation",
    "kairos_jax.api.http.debug": "Observation",
}
_OTHERS = "Help"
_FLAG_WIDTH, _MOST_EXAMPLES = 28, 2
_COMMAND = re.compile(r"^ *kairos ", re.MULTILINE)


class _Shown(flags.BooleanFlag):
    """A flag that prints something and ends the process."""

    def __init__(self, name: str, help: str, text: Callable[[], str], short: str | None = None):
        super().__init__(name, False, help, short_name=short, allow_override=True)
        self._text = text

    def parse(self, argument: str | bool) -> None:
        if self._parse(argument):
            say(self._text())
            sys.exit(0)


def define_flags(values: flags.FlagValues, positional: str | None = None) -> None:
    """To be called when all other flags are there, absl's own among them, some of which it
    replaces. positional: the flag whose value may be given without its name.
    """

    def show(name: str, help: str, text: Callable[[], str], short: str | None = None) -> None:
        flags.DEFINE_flag(_Shown(name, help, text, short), values, module_name=__name__)

    def brief() -> str:
        return help_text(values, positional)

    show("help", "Show this help.", brief, "h")
    show("helpshort", "As --help.", brief)
    show("helpfull", "Show all flags, those of libraries too.", values.get_help)
    show("version", "Show the version.", lambda: f"kairos_jax {__version__}")


def say(text: str) -> None:
    """Prints a long text, of which a reader such as `head` may take a part."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program() -> str:
    """How this binary is called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("kairos_jax."):
        return f"python {sys.argv[0]}"
    return f"kairos {spec.name.split('.')[1]}"


def help_text(values: flags.FlagValues, positional: str | None) -> str:
    """What --help prints: usage, purpose, examples, and the flags of this package in groups."""
    document = sys.modules["__main__"].__doc__ or ""
    argument = f" [{positional.upper()}]" if positional else ""
    parts = [f"Usage: {program()}{argument} [--FLAG=VALUE ...]", document.partition("\n\n")[0]]
    if found := examples(document):
        parts.append("\n".join(["Examples:", *found]))
    parts += [_group(*each) for each in _groups(values).items()]
    if positional == "model":
        parts.append("Config keys: --config.KEY=VALUE; `kairos config` explains them.")
    return "\n\n".join(parts)


def examples(document: str) -> list[str]:
    """The first commands of a docstring."""
    starts = [match.start() for match in _COMMAND.finditer(document)]
    commands = [re.split(r"\n\n|\n(?=\S)", document[start:])[0] for start in starts]
    found = []
    for command in commands[:_MOST_EXAMPLES]:
        first, *rest = (line.strip() for line in command.splitlines() if line.strip())
        ended = [first]
        for line in rest:
            if not ended[-1].endswith("\\"):
                break
            ended.append(line)
        found.append("\n      ".join(["  " + ended[0], *ended[1:]]))
    return found


def _groups(values: flags.FlagValues) -> dict[str, list[flags.Flag]]:
    """The flags to show, by heading."""
    own = f"Flags of {program()}"
    groups: dict[str, list[flags.Flag]] = {name: [] for name in (own, *HEADINGS.values())}
    for module, defined in values.flags_by_module_dict().items():
        if module == sys.argv[0]:
            heading = own
        elif module == __name__:
            continue
        elif module.startswith("kairos_jax."):
            is_own = module == f"kairos_jax.{program().split()[-1]}"
            last = module.rpartition(".")[2].replace("_", " ").capitalize()
            heading = own if is_own else HEADINGS.get(module, last)
        else:
            continue
        shown = [flag for flag in defined if not flag.name.startswith("config.")]
        groups.setdefault(heading, []).extend(shown)
    groups[_OTHERS] = [values[name] for name in ("help", "helpfull", "version")]
    return {name: found for name, found in groups.items() if found}


def _group(heading: str, defined: list[flags.Flag]) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    lines = [f"{heading}:"]
    for flag in sorted(defined, key=lambda each: each.name):
        name = f"  {_spelling(flag)}"
        # absl puts the choices of an enum in front.
        help = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))
        if default := _default(flag.default):
            help = f"{help.removesuffix('.')} (default: {default})."
        indent = " " * (_FLAG_WIDTH + 2)
        wrapped = textwrap.wrap(help, width, initial_indent=indent, subsequent_indent=indent)
        if len(name) <= _FLAG_WIDTH and wrapped:
            wrapped[0] = name.ljust(len(indent)) + wrapped[0][len(indent) :]
            lines += wrapped
        else:
            lines += [name, *wrapped]
    return "\n".join(lines)


def _spelling(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--{flag.name}" if not flag.default else f"--[no]{flag.name}"
    choices = getattr(flag.parser, "enum_values", None)
    return f"--{flag.name}={'|'.join(choices) if choices else 'VALUE'}"


def _default(value: Any) -> str:
    """In words; empty if there is nothing to say."""
    if value is None or value is False or value == "" or value == []:
        return ""
    if value is True:
        return "on"
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
