"""The log of a process: one line an event on stderr, as text or as JSON.

A record may carry what it is about: `extra=of_request(id, ...)`. In the text, the message says the
same as the fields.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

LEVELS = ("debug", "info", "warning", "error")

# Others' loggers, whose records below a warning are of no use to an operator.
_OTHERS_LEVEL = logging.WARNING
_OURS = "kairos_jax"
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))}
# Of a traceback, whose lines become one.
_CONTROL |= {ord("\n"): "\\n", ord("\t"): " ", ord("\r"): "\\r"}

ONCE: Mapping[str, Any] = {"once": True}
"""`extra` of a record that is dropped if the process has logged the same text before."""


def define_flags() -> None:
    """Of servers. Not at import: other binaries have flags of the same names."""
    flags.DEFINE_enum("log_level", "info", LEVELS, "Lowest level that is logged.")
    flags.DEFINE_enum("log_format", "text", list(_FORMATTERS), "Format of the log on stderr.")


def of_request(id: str, **fields: Any) -> dict[str, Any]:
    """`extra` of a record about a request. fields: what JSON says beside the message."""
    return {"request": id, "fields": fields}


def set_up(role: str = "") -> None:
    """Has the whole process log by `--log_level` and `--log_format`, or by their defaults where a
    binary does not have these flags. It replaces what was set up before, absl's handler too.

    role: of the process, for every line.
    """
    values = flags.FLAGS
    level = values.log_level if "log_level" in values else "warning"
    form = values.log_format if "log_format" in values else "text"
    handler = _Stderr()
    handler.setFormatter(_FORMATTERS[form](role))
    handler.addFilter(_Once())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_OTHERS_LEVEL)
    logging.getLogger("absl").setLevel(_OTHERS_LEVEL)  # Orbax logs by it, at INFO
    logging.getLogger(_OURS).setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`TIME LEVEL ROLE [REQUEST] MESSAGE`, the time in UTC; a traceback is at the end of the line.

    role: of the process.
    """

    def __init__(self, role: str = ""):
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        message, request = record.getMessage(), getattr(record, "request", None)
        if record.name.partition(".")[0] != _OURS:
            message = f"{record.name}: {message}"
        if trace := _traceback(self, record):
            message = f"{message}: {trace}"
        parts = [_time(record), f"{record.levelname:7}", self._role]
        parts += [f"[{request}]" if request is not None else "", message]
        return " ".join(part for part in parts if part).translate(_CONTROL)


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time, level, role, logger, request where there is one, message, and
    the record's fields. role: of the process.
    """

    def __init__(self, role: str = ""):
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        said: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
        }
        if (request := getattr(record, "request", None)) is not None:
            said["request"] = request
        said["message"] = record.getMessage()
        if trace := _traceback(self, record):
            said["traceback"] = trace
        return json.dumps(said | getattr(record, "fields", {}), default=str)


_FORMATTERS: Mapping[str, type[TextFormatter] | type[JsonFormatter]] = {
    "text": TextFormatter,
    "json": JsonFormatter,
}


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: while progress bars are shown, it is theirs."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("it is sys.stderr")


class _Once(logging.Filter):
    """Drops records with the `extra` ONCE whose text was logged before."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        if not getattr(record, "once", False):
            return True
        text = record.getMessage()
        known = text in self._logged
        self._logged.add(text)
        return not known


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03}Z"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    trace = formatter.formatException(record.exc_info) if record.exc_info else ""
    return "\n".join(part for part in (trace, record.stack_info) if part)
