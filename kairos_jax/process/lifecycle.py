"""How a process that serves starts, waits and ends."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from absl import flags
from rich.console import Console

from kairos_jax.process import early

T = TypeVar("T")


def define_flags(port: int) -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
    flags.DEFINE_integer("port", port, "Port to listen on; 0: any free one.", 0, 65535)
    flags.DEFINE_float("grace_s", 30.0, "Seconds that a drain waits for requests.", 0.0)
    flags.DEFINE_bool(
        "end_with_stdin",
        False,
        "Drain when stdin closes, for example when the parent process dies.",
    )


def asked_to_stop() -> asyncio.Future[int]:
    """What is done once SIGTERM, SIGHUP or Ctrl-C asks the process to drain; a second Ctrl-C ends
    it at once. Its result is the exit code of a process that is not ready yet.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    asking = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        asking.append(signal.SIGHUP)
    for sign in asking:
        loop.add_signal_handler(sign, _on_signal, sign, stop)
    if "end_with_stdin" in flags.FLAGS and flags.FLAGS.end_with_stdin:
        loop.add_reader(sys.stdin.fileno(), _on_stdin, loop, stop)
    return stop


async def prepared(
    prepare: Callable[[], T],
    stopping: asyncio.Future[int],
    close: Callable[[], Awaitable[object]],
) -> T | None:
    """What `prepare` returns, or None if the process is asked to stop before. Raises what it does,
    after `close`, which ends the server that listens already.

    It runs on a thread that does not keep the process alive: a compilation cannot be interrupted.
    """
    result = _in_daemon(prepare)
    try:
        await asyncio.wait({result, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
    except BaseException:
        await close()
        raise
    Console(stderr=True).show_cursor()  # which a progress bar has hidden
    print(early.STOPPED, flush=True)
    return None


def end(code: int) -> None:
    """Ends the process at once: a step may never end, so no thread is waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_signal(sign: signal.Signals, stop: asyncio.Future[int]) -> None:
    if not stop.done():
        stop.set_result(early.CODES[sign])
    elif sign is signal.SIGINT:
        os._exit(early.CODES[sign])


def _on_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Future[int]) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        if not stop.done():
            stop.set_result(1)


def _in_daemon(job: Callable[[], T]) -> asyncio.Future[T]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(method: Callable[[Any], None], value: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(method, value)

    def run() -> None:
        try:
            result = job()
        except BaseException as error:
            finish(done.set_exception, error)
        else:
            finish(done.set_result, result)

    threading.Thread(target=run, name="prepare", daemon=True).start()
    return done
