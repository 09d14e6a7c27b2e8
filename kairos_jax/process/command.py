"""How every binary starts and ends: its flags, its errors, its exit codes.

Exit codes: 0; 1 what was asked could not be done; 2 it was wrong to ask; 130 Ctrl-C.
"""

import sys
from collections.abc import Callable

from absl import app, flags

from kairos_jax.process import early, logs


class UsageError(Exception):
    """What was asked for cannot be done; the message says why."""


def run(
    main: Callable[[list[str]], int | None],
    parse: Callable[[list[str]], list[str]] | None = None,
    serves: bool = False,
) -> None:
    """Runs a binary's `main`: wrong use ends it with one line and code 2.

    parse: instead of `parse_flags`. serves: `main` takes signals by `lifecycle.asked_to_stop`, and
    until then they end the process at once.
    """

    def guarded(argv: list[str]) -> int | None:
        logs.set_up()
        if not serves:
            early.restore()
        try:
            if len(argv) > 1:
                raise UsageError(f"unexpected argument {argv[1]!r}")
            return main(argv)
        except KeyboardInterrupt:
            return 130
        except UsageError as error:
            return fail(error)

    list_flags(flags.FLAGS)
    app.run(guarded, flags_parser=parse or parse_flags)


def list_flags(values: flags.FlagValues) -> None:
    """Has --help list the flags of all modules of this package, not those of the main one alone."""
    for module, defined in values.flags_by_module_dict().items():
        if module.startswith("kairos_jax."):
            for flag in defined:
                values.register_key_flag_for_module(sys.argv[0], flag)


def parse_flags(argv: list[str]) -> list[str]:
    """Like absl's own, which exits with 1."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(fail(error))


def fail(error: Exception) -> int:
    """Prints an error in one line; returns the exit code for wrong use."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
