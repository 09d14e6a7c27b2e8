"""Processes of kairos_jax on loopback, with a tiny model: started, asked, stopped, killed."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import fakes

ROOT = Path(__file__).parents[2]
CONFIG = "tests/support/tiny_config.py"
MODEL = "tests/golden/llama"
HOST = "127.0.0.1"


class Ended(Exception):
    """A process ended before it said what was waited for; the message is its stderr."""


class Process:
    """One process. address: where it serves, once `ready` has returned. code: of its end.

    Its lines are read by threads, so that it never waits for a reader, and each has a time.
    """

    def __init__(
        self,
        binary: str,
        *arguments: str,
        env: Mapping[str, str],
        port: int = 0,
        config: str = CONFIG,
        model: str = MODEL,
    ):
        self.binary, self.address = binary, ""
        self._errors: list[tuple[float, str]] = []
        self._error_came = threading.Condition()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._popen = subprocess.Popen(
            [
                *(sys.executable, "-m", f"kairos_jax.{binary}", f"--port={port}"),
                *(f"--config={config}", f"--model={model}", *arguments),
            ],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._threads = [
            threading.Thread(target=read, daemon=True) for read in (self._read_out, self._read_err)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ready(self, timeout_s: float = 120) -> "Process":
        """Returns when it serves. Raises Ended."""
        self.address = self.line("ready", timeout_s).split()[-1]
        return self

    def line(self, start: str, timeout_s: float = 30) -> str:
        """Its next line on stdout that starts so. Raises Ended, or queue.Empty: none came in
        time.
        """
        by = time.monotonic() + timeout_s
        while (line := self._lines.get(timeout=max(by - time.monotonic(), 0.001))) is not None:
            if line.startswith(start):
                return line
        raise Ended(f"{self.binary}: {self.errors()}")

    def errors(self) -> str:
        """What it has said on stderr."""
        return "".join(line for _, line in self._errors)

    def said(self, words: str, since: float, timeout_s: float = 30) -> float:
        """When it said so on stderr, the first time since then; waits for it. Seconds of this
        process's monotonic clock. Raises TimeoutError.
        """

        def when() -> float | None:
            found = (at for at, line in self._errors if at >= since and words in line)
            return next(found, None)

        with self._error_came:
            at = self._error_came.wait_for(when, timeout_s)
        if at is None:
            raise TimeoutError(f"{self.binary} did not say {words!r}: {self.errors()}")
        return at

    def state(self) -> dict[str, int]:
        """What a worker holds now; see kairos_jax.role."""
        self.send(signal.SIGUSR1)
        return json.loads(self.line("state: ").removeprefix("state: "))

    def resources(self) -> dict[str, int]:
        """Threads, open file descriptors and resident memory, in MiB, as the kernel counts them."""
        proc = Path(f"/proc/{self.pid}")
        pairs = (line.split(":") for line in (proc / "status").read_text().splitlines())
        status = {name: value.split() for name, value in pairs if name in ("Threads", "VmRSS")}
        return {
            "threads": int(status["Threads"][0]),
            "fds": len(list((proc / "fd").iterdir())),
            "rss_mib": int(status["VmRSS"][0]) // 1024,
        }

    def send(self, sign: int) -> float:
        """Sends a signal. Returns when, in seconds of the monotonic clock."""
        self._popen.send_signal(sign)
        return time.monotonic()

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit code, once it has ended."""
        return self._popen.wait(timeout_s)

    def end(self) -> None:
        """Kills it if it goes on, and takes its last words."""
        self._popen.kill()  # also where it is stopped
        self._popen.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            assert stream is not None
            stream.close()

    def _read_out(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_err(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            with self._error_came:
                self._errors.append((time.monotonic(), line))
                self._error_came.notify_all()


@dataclass
class Cluster:
    """A router and workers of each role. Ended workers are replaced at the same address.

    arguments: of all processes. of_workers: of the workers alone.
    """

    env: Mapping[str, str]
    arguments: tuple[str, ...]
    of_workers: tuple[str, ...]
    workers: dict[str, list[Process]] = field(default_factory=dict)
    router: Process = field(init=False)
    _started: list[Process] = field(default_factory=list, init=False)

    def start(self, num_prefill: int, num_decode: int) -> None:
        """Starts all, and returns when they serve."""
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            # One after the other: the first fills the compilation cache for its role.
            self.workers[role] = [self._worker(role).ready() for _ in range(count)]
        self.router = self.start_router()

    def start_router(self, *arguments: str) -> Process:
        """Another router for the same workers."""
        targets = (
            f"--{role}={','.join(each.address for each in of)}" for role, of in self.workers.items()
        )
        return self._launch("router", *targets, *arguments).ready()

    def replace(self, worker: Process) -> Process:
        """Starts a worker anew that has ended, or ends here, and waits until all that route to it
        have found it.
        """
        worker.end()
        of = self.workers[worker.binary]
        of[of.index(worker)] = new = self._worker(worker.binary, worker.port).ready()
        return new

    @property
    def all_workers(self) -> list[Process]:
        return [worker for of in self.workers.values() for worker in of]

    async def settled(self, num_routers: int = 1, timeout_s: float = 15) -> int:
        """Returns when no worker holds anything and each has its routers; after `timeout_s`, how
        many pages they miss. Raises TimeoutError where they miss none, and hold something else.
        """
        by, states, idle = time.monotonic() + timeout_s, [], False
        while not idle and time.monotonic() < by:
            states = await self.states()
            idle = all(is_idle(each) and each["routers"] == num_routers for each in states)
        missing = sum(state["pages"] - state["pages_free"] for state in states)
        if not idle and not missing:
            raise TimeoutError(f"not idle, each with {num_routers} routers: {states}")
        return missing

    async def states(self) -> list[dict[str, int]]:
        """Of all workers, those that prefill first."""
        asked = [asyncio.to_thread(worker.state) for worker in self.all_workers]
        return await asyncio.gather(*asked)

    def _worker(self, role: str, port: int = 0) -> Process:
        return self._launch(role, *self.of_workers, port=port)

    def _launch(self, binary: str, *arguments: str, port: int = 0) -> Process:
        process = Process(binary, *self.arguments, *arguments, env=self.env, port=port)
        self._started.append(process)  # before it is ready, which it may never be
        return process

    def end(self) -> None:
        """Ends every process that it has started."""
        for each in self._started:
            each.end()


def is_idle(state: Mapping[str, int]) -> bool:
    """Whether a worker holds nothing of any request."""
    names = ("waiting", "running", "parked", "offers", "fetches", "requests")
    return state["pages_free"] == state["pages"] and not any(state[name] for name in names)


@contextlib.contextmanager
def cluster(
    cache: Path,
    num_prefill: int,
    num_decode: int,
    *arguments: str,
    of_workers: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """A cluster that ends with the block. cache: a directory for compiled steps and the profile."""
    cache.mkdir(parents=True, exist_ok=True)
    profile = cache / "profile.json"
    profile.write_text(json.dumps(fakes.PROFILE))
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    made = Cluster(env, arguments, (f"--profile={profile}", *of_workers))
    try:
        made.start(num_prefill, num_decode)
        yield made
    finally:
        made.end()
