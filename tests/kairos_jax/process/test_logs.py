"""The log: one line an event, as text and as JSON, and nothing of others that is no warning."""

import json
import logging
import re
import sys

import pytest
from absl import logging as absl_logging

from kairos_jax.process import logs
from kairos_jax.process.logs import ONCE, JsonFormatter, TextFormatter, of_request

OURS = logging.getLogger("kairos_jax.test")


def record(message: str, *args, name: str = OURS.name, **more) -> logging.LogRecord:
    made = OURS.makeRecord(name, logging.INFO, "file.py", 1, message, args, None, extra=more)
    made.created, made.msecs = 1_000_000_000.25, 250.0
    return made


def test_a_line_of_text():
    text = TextFormatter("router").format
    start = "2001-09-09T01:46:40.250Z INFO    router "
    assert text(record("has %d", 3)) == start + "has 3"
    assert text(record("ended", **of_request("mine", tokens=3))) == start + "[mine] ended"
    assert text(record("bad", name="uvicorn.error")) == start + "uvicorn.error: bad"
    # What a client chose cannot make a line of its own, nor speak to a terminal.
    assert text(record("ended", **of_request("a\nb\x1b"))) == start + r"[a\nb\x1b] ended"


def test_a_line_of_json():
    line = JsonFormatter("router").format(record("ended", **of_request("a\nb", tokens=3)))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2001-09-09T01:46:40.250Z",
        "level": "info",
        "role": "router",
        "logger": "kairos_jax.test",
        "request": "a\nb",
        "message": "ended",
        "tokens": 3,
    }


@pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
def test_a_traceback_is_part_of_its_line(formatter):
    try:
        raise ValueError("deep")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    line = formatter("").format(made)
    assert "\n" not in line
    assert "it failed" in line
    assert "ValueError: deep" in line


@pytest.fixture
def stderr(capsys):
    """The lines that the process has logged, with the log set up for a role."""
    root, levels = logging.getLogger(), {}
    for name in ("", "absl", "kairos_jax"):
        levels[name] = logging.getLogger(name).level
    handlers = root.handlers[:]
    logs.set_up("serve")
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_each_event_is_logged_once(stderr):
    logs.set_up("serve")  # a second time
    OURS.warning("one")
    (line,) = stderr()
    assert re.fullmatch(r"\S+Z WARNING serve one", line)
    for _ in range(2):
        OURS.warning("no compiler", extra=ONCE)
        OURS.warning("again")
    assert [line.rpartition(" ")[2] for line in stderr()] == ["compiler", "again", "again"]


def test_others_are_heard_from_warnings_on(stderr):
    absl_logging.info("Orbax says so")
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("bad request")
    (line,) = stderr()
    assert line.endswith("WARNING serve uvicorn.error: bad request")
