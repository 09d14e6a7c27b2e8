"""How every binary starts and ends: its flags, its errors, its exit codes.

Exit codes: 0; 1 what was asked could not be done; 2 it was wrong to ask; 130 Ctrl-C.
"""

import errno
import sys
from collections.abc import Callable

from absl import app, flags

from kairos_jax.process import descriptors, early, hints, logs, usage

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


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
            descriptors.ensure()
            if len(argv) > 1:
                raise UsageError(f"unexpected argument {argv[1]!r}")
            return main(argv)
        except KeyboardInterrupt:
            return 130
        except (UsageError, descriptors.TooFew) as error:
            return fail(error)
        except OSError as error:
            # A disk that fills while a run writes is no fault of the program.
            if error.errno not in _OF_DISKS:
                raise
            fail(UsageError(f"{error.filename or 'a file'}: {error.strerror}"))
            return 1

    app.run(guarded, flags_parser=parse or parse_flags)


def parse_flags(argv: list[str], positional: str | None = None) -> list[str]:
    """Like absl's own, which exits with 1. positional: as of `usage.define_flags`."""
    try:
        return read_flags(argv, positional)
    except flags.Error as error:
        sys.exit(fail(error))


def read_flags(argv: list[str], positional: str | None = None) -> list[str]:
    """Parses all flags; returns what else there is. Raises flags.Error, which says what to use
    instead of an unknown flag.
    """
    values = flags.FLAGS
    usage.define_flags(values, positional)
    try:
        return values(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        what = "no such config key" if name.startswith("config.") else "unknown flag"
        instead = hints.instead(name, values)
        raise flags.Error(f"{what} --{name}{': ' if instead else ''}{instead}") from error


def fail(error: Exception) -> int:
    """Prints an error in one line; returns the exit code for wrong use."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
