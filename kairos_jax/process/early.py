"""Signals while a process starts: it ends at once, with one line.

Python's own answer to Ctrl-C is an exception at any place. Amid imports it becomes a traceback, or
the import of an extension swallows it and the process goes on. Nothing has begun yet that an
immediate end could lose.
"""

import os
import signal
from types import FrameType

STOPPED = "stopped while starting"
# Of a process that is stopped before it is ready, by signal.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 1, signal.SIGHUP: 1}
_USUAL = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


def end_on_signals() -> None:
    """From now on. A signal that is ignored, as in a background job, stays so."""
    for sign, usual in _USUAL.items():
        if signal.getsignal(sign) is usual:
            signal.signal(sign, _end)


def restore() -> None:
    """Signals mean what they usually do from now on: the start is over."""
    for sign, usual in _USUAL.items():
        if signal.getsignal(sign) is _end:
            signal.signal(sign, usual)


def interrupt_on_signals() -> None:
    """SIGTERM and the loss of the terminal are as Ctrl-C, an exception, so that no process which
    this one has started is left behind.
    """
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) is not signal.SIG_IGN:
            signal.signal(sign, signal.default_int_handler)


def _end(sign: int, frame: FrameType | None) -> None:
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(CODES[signal.Signals(sign)])
