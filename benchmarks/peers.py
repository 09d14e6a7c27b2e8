"""The processes that benchmarks/vs_vllm.py measures: started, asked, ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kairos_jax.demo import Addresses, server

HERE = Path(__file__).parent
HOST = "127.0.0.1"
# vLLM compiles when it starts, for minutes where its cache is cold.
_START_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 40.0
_LOG_TAIL = 2000


class PeerFailed(Exception):
    """A process ended, or did not answer; the message has the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Kairos:
    """Ours. arguments: flags of its binaries."""

    arguments: tuple[str, ...]

    def steps(self) -> list[str]:
        """The command of the side that is asked for steps."""
        return [sys.executable, str(HERE / "steps_kairos.py"), *self.arguments]

    def serving(self) -> contextlib.AbstractContextManager[Addresses]:
        """A server; see `kairos_jax.demo.server`."""
        return server(self.arguments, Console(stderr=True))


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM. python: of its virtual environment; model: a Hugging Face directory."""

    python: str
    model: Path
    max_context: int

    @property
    def environment(self) -> dict[str, str]:
        """Both cores: left alone, vLLM keeps one free. Nothing is looked up on a hub."""
        return {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def steps(self) -> list[str]:
        """The command of the side that is asked for steps."""
        return [self.python, str(HERE / "steps_vllm.py"), str(self.model), str(self.max_context)]

    @contextlib.contextmanager
    def serving(self, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
        """Its OpenAI server, stopped once it is ready (see `awake`); yields the address and it.
        Raises PeerFailed.
        """
        port = _free_port()
        command = [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model), "--served-model-name", "model"),
            *("--host", HOST, "--port", str(port), "--dtype", "float32"),
            *("--max-model-len", str(self.max_context), "--no-enable-prefix-caching"),
        ]
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _until_healthy(process, f"http://{HOST}:{port}/health", log)
            _signal(process, signal.SIGSTOP)
            yield f"{HOST}:{port}", process
        finally:
            _end(process)


class Steps:
    """A process that takes steps when asked to (see steps_vllm.py). facts: what it said of itself.

    Raises PeerFailed.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        try:
            self.facts = self._answer()
        except BaseException:  # no one else could end it yet
            _end(self._process)
            raise
        _signal(self._process, signal.SIGSTOP)

    def ask(self, prompts: Sequence[Sequence[int]], full_steps: int) -> dict[str, Any]:
        """Runs these prompts until so many steps have given a token to each. Raises PeerFailed."""
        assert self._process.stdin is not None
        with awake(self._process):
            with contextlib.suppress(BrokenPipeError):  # told of by the answer that is missing
                print(
                    json.dumps({"prompts": prompts, "full_steps": full_steps}),
                    file=self._process.stdin,
                    flush=True,
                )
            return self._answer()

    def end(self) -> None:
        """Ends it, with all that it started. It ends by itself once nothing more can be asked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        _signal(self._process, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        _end(self._process)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            raise PeerFailed(f"the side that takes steps ended:\n{_tail(self._log)}")
        return json.loads(line)


@contextlib.contextmanager
def awake(process: subprocess.Popen) -> Iterator[None]:
    """Lets the session of a stopped process run, and stops it again. Idle processes of vLLM spin:
    they would take half of two cores from the other side.
    """
    _signal(process, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(process, signal.SIGSTOP)


def _signal(process: subprocess.Popen, sign: signal.Signals) -> None:
    """To its whole session, which is of its own: vLLM runs its engine in further processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def _until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    by = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < by:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.5)
            raise PeerFailed(f"vLLM ended with code {code} before it was ready:\n{_tail(log)}")
    raise PeerFailed(f"vLLM was not ready after {_START_TIMEOUT_S:.0f} s:\n{_tail(log)}")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    _signal(process, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:]
