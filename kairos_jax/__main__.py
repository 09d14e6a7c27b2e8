"""The command `kairos`: `kairos serve` is `python -m kairos_jax.serve`, and so on.

It imports nothing of a binary before it runs it, so that a list of the commands comes at once.
"""

import sys
from pathlib import Path

from kairos_jax.process import early

COMMANDS = (
    *("serve", "client", "demo", "config"),
    *("cluster", "router", "prefill", "decode"),
    *("profile", "convert", "plan"),
    *("simulate", "sweep", "journal", "paper", "agreement"),
)


def main() -> int:
    """Runs the command that the arguments name. Returns the exit code of what it does itself."""
    early.end_on_signals()
    name, *rest = sys.argv[1:] or ["help"]
    if name == "help" and rest:  # kairos help serve
        name, rest = rest[0], ["--help"]
    if name in ("help", "--help", "-h", "-help"):
        print(_overview())
        return 0
    if name in ("--version", "-version", "version"):
        from kairos_jax import __version__

        print(f"kairos_jax {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return 2
    import runpy

    sys.argv[1:] = rest
    # As `python -m` does: processes that this one starts find its module by the same name.
    runpy.run_module(f"kairos_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name.ljust(width)}{_summary(name)}" for name in COMMANDS)
    return (
        "Usage: kairos COMMAND [--FLAG=VALUE ...]\n\n"
        f"{listed}\n\n"
        "kairos COMMAND --help shows the flags of a command, kairos --version the version."
    )


def _summary(name: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    package = Path(__file__).parent
    path = package / name / "__main__.py"
    if not path.exists():
        path = package / f"{name}.py"
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("r").strip('"')


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS)
    words = f"did you mean {' or '.join(near)}? " if near else ""
    return f"kairos has no command {name!r}: {words}kairos alone lists them"


if __name__ == "__main__":
    sys.exit(main())
