"""Renders chat templates in processes of their own, which bounds what a template can cost.

A template is a program: it may loop for hours, or build a string of a terabyte in one operation
that nothing within Python can stop. So it runs in a process that the kernel ends when its time is
used up, and that gets no more memory than its limit.
"""

import contextlib
import marshal
import queue
import resource
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kairos_jax.text import chat_template

# Processor time for one conversation. 8 MiB take about 0.1 s.
_SECONDS = 5.0
# The same with a template of a client's, which is short, and may mean to take long.
CLIENTS_SECONDS = 1.0
# Address space of a process. Python and Jinja take 30 MiB of it.
_MEMORY = 1 << 30
# So that one slow template does not hold up all conversations. The second process starts when it
# is needed.
_PROCESSES = 2

# In front of a question: its size. In front of an answer: its kind, then its size.
_QUESTION, _ANSWER = struct.Struct("Q"), struct.Struct("cQ")
_TEXT, _FAULT, _FULL = b"t", b"f", b"m"

_ROOT = Path(__file__).resolve().parents[2]
_MAIN = (
    "import sys; sys.path[:] = sys.argv[3:]; from kairos_jax.text import template_process; "
    "template_process.main(float(sys.argv[1]), int(sys.argv[2]))"
)


class TemplateRenderer:
    """Renders conversations within bounds, for any number of threads.

    Its processes start when they are needed. They end with it, or with the process that holds it.

    Args:
      seconds: processor time for one conversation.
      memory: bytes of address space of a process.
      processes: how many conversations are rendered at once.
    """

    def __init__(
        self, seconds: float = _SECONDS, memory: int = _MEMORY, processes: int = _PROCESSES
    ):
        # The process that was used last is used next.
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(_Process(seconds, memory))

    def render(
        self,
        name: str,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        continue_final: bool = False,
    ) -> str:
        """The prompt for a conversation, as `chat_template.render` makes it.

        Args:
          name: of the template, for errors.

        Raises:
          ValueError: the template failed, in any way, or a value is of no JSON type.
          OSError, RuntimeError: the process cannot be started.
        """
        try:
            # Faster than JSON, for which all other threads would have to wait.
            question = marshal.dumps([source, messages, variables, continue_final])
        except ValueError as error:
            raise ValueError(
                f"{name} can't be given the messages: a value is of no JSON type, or nested too "
                "deeply"
            ) from error
        process = self._idle.get()
        try:
            kind, text = process.ask(question)
        finally:
            self._idle.put(process)
        if kind != _TEXT:
            raise ValueError(f"{name} {text}")
        return text


class _Process:
    """A process that renders one conversation at a time."""

    def __init__(self, seconds: float, memory: int):
        self._seconds, self._memory = seconds, memory
        self._running: subprocess.Popen[bytes] | None = None
        self._end = _nothing

    def ask(self, question: bytes) -> tuple[bytes, str]:
        """Sends a question; returns the kind and the text of the answer, or of the fault for which
        there is none.
        """
        running = self._running
        if running is None or running.poll() is not None:
            running = self._start()
        try:
            answer = _exchange(running, question)
        except BaseException:
            self._end()  # The next question would get this answer.
            raise
        if answer is None:
            return _FAULT, self._fault(running.wait())
        kind, text = answer
        if kind == _FULL:
            self._end()
        return kind, text.decode()

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        limits = [str(self._seconds), str(self._memory)]
        # A session of its own: a Ctrl-C at the terminal is for the server.
        running = subprocess.Popen(
            [sys.executable, "-S", "-c", _MAIN, *limits, str(_ROOT), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._running, self._end = running, weakref.finalize(self, _kill, running)
        return running

    def _fault(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"took more than {self._seconds:g} s of processor time"
        if code >= 0:
            raise RuntimeError(f"the process that renders chat templates ended with code {code}")
        return f"ended its process: {signal.strsignal(-code)}"


def _exchange(running: subprocess.Popen[bytes], question: bytes) -> tuple[bytes, bytes] | None:
    """The kind and the text of an answer; None: the process has ended without one."""
    assert running.stdin
    assert running.stdout
    try:
        running.stdin.write(_QUESTION.pack(len(question)))
        running.stdin.write(question)
        running.stdin.flush()
    except BrokenPipeError:
        return None
    head = running.stdout.read(_ANSWER.size)
    if len(head) < _ANSWER.size:
        return None
    kind, size = _ANSWER.unpack(head)
    text = running.stdout.read(size)
    return (kind, text) if len(text) == size else None


def _nothing() -> None:
    """There is no process to end."""


def _kill(running: subprocess.Popen[bytes]) -> None:
    running.kill()
    running.wait()
    for pipe in (running.stdin, running.stdout):
        assert pipe
        with contextlib.suppress(BrokenPipeError):  # What was not read is not needed.
            pipe.close()


def main(seconds: float, memory: int) -> None:
    """The process: answers questions, until its input ends."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        memory = min(memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := questions.read(_QUESTION.size)) == _QUESTION.size:
        question = questions.read(*_QUESTION.unpack(head))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        kind, text = _answer(question, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_ANSWER.pack(kind, len(text)))
        answers.write(text)
        answers.flush()


def _answer(question: bytes, memory: int) -> tuple[bytes, bytes]:
    """The kind of an answer, and its text."""
    try:
        return _TEXT, chat_template.render(*marshal.loads(question)).encode()
    except chat_template.Fault as error:
        return _FAULT, str(error).encode(errors="replace")
    except MemoryError:
        return _FULL, f"took more than {memory >> 20} MiB of memory".encode()
