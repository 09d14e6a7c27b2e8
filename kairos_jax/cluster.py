"""A router, prefill and decode workers as processes of this host.

  kairos cluster --config=smollm2_135m_cpu --num_prefill=2 --num_decode=2

They live as long as this process. It prints one line, "ready: HTTP on HOST:PORT, gRPC on
HOST:PORT", and ends all of them at Ctrl-C or SIGTERM, or when one ends by itself. When it is
killed, they notice that their stdin has ended, and end too. What it is told of the config, the wire
and the transport goes on to them. Without --config they share one made for this machine.

Exit codes: 0 when it was asked to end; 1 if a process ended before, or it was stopped before it was
ready, 130 by Ctrl-C; 2 for a wrong flag, which a process may have found.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from kairos_jax.api.http import server
from kairos_jax.engine import profile_file
from kairos_jax.kv import options as kv_options
from kairos_jax.net import credentials
from kairos_jax.observe import otlp, request_log
from kairos_jax.process import early, launch, lifecycle, logs

# Beyond their own --grace_s: to end in when asked to, before they are killed.
_END_S = 10.0
_ROUTER = "router"
# Whose flags go on to all processes.
_COMMON = (launch.__name__, credentials.__name__, otlp.__name__, logs.__name__)


class Ended(Exception):
    """A process ended that was to go on. code: by which."""

    def __init__(self, name: str, code: int):
        super().__init__(f"{name} ended with code {code}")
        self.code = code


class Member:
    """One process of the cluster."""

    def __init__(self, name: str, process: Process):
        self.name, self.process = name, process
        self._started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._readers = [
            asyncio.ensure_future(self._read_out()),
            asyncio.ensure_future(self._read_err()),
        ]

    @classmethod
    async def start(cls, name: str, binary: str, arguments: Sequence[str]) -> "Member":
        """Runs a binary of kairos_jax."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"kairos_jax.{binary}", "--end_with_stdin", *arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
        )
        return cls(name, process)

    async def started(self) -> str:
        """Its address, once it listens. Raises Ended."""
        return await self._or_ended(self._started)

    async def ready(self) -> str:
        """Its address, once it serves. Raises Ended."""
        return await self._or_ended(self._ready)

    async def listening(self) -> str:
        """Where, in its own words, once it serves. Raises Ended."""
        await self.ready()
        return self._ready.result().rpartition("; ")[2]

    async def ended(self) -> None:
        """Raises Ended when it has."""
        code = await self.process.wait()
        raise Ended(self.name, code)

    async def end(self, grace_s: float) -> None:
        """Asks it to end; where it does not, kills it."""
        if self.process.returncode is None:
            # Not `send_signal`, which takes the code of a process that has just ended from asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), grace_s + _END_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await asyncio.gather(*self._readers)

    async def _or_ended(self, line: asyncio.Future[str]) -> str:
        ended = asyncio.ensure_future(self.ended())
        try:
            await asyncio.wait({line, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not line.done():
                ended.result()
        finally:
            ended.cancel()
        return line.result().split()[-1]

    async def _read_out(self) -> None:
        assert self.process.stdout is not None
        async for line in _lines(self.process.stdout):
            for word, seen in (("starting", self._started), ("ready", self._ready)):
                if line.startswith(word) and not seen.done():
                    seen.set_result(line)
            print(f"[{self.name}] {line}", file=sys.stderr, flush=True)

    async def _read_err(self) -> None:
        assert self.process.stderr is not None
        async for line in _lines(self.process.stderr):
            print(f"[{self.name}] {line}", file=sys.stderr, flush=True)


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    async for line in reader:
        yield line.decode(errors="replace").rstrip()


@dataclass(frozen=True, slots=True)
class Plan:
    """counts: workers of each role. host, port: where the router listens. common,
    of_workers, of_router: arguments for all processes, for the workers alone, and for the router.
    """

    counts: dict[str, int]
    host: str
    port: int
    grace_s: float
    common: list[str]
    of_workers: list[str]
    of_router: list[str]


async def run(plan: Plan) -> int:
    """Runs a cluster until it is asked to stop. Returns the exit code."""
    stopping = lifecycle.asked_to_stop()
    members: list[Member] = []
    try:
        starting = asyncio.ensure_future(_start(members, plan))
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            print(f"ready: {starting.result()}", flush=True)
            ended = [asyncio.ensure_future(member.ended()) for member in members]
            await asyncio.wait({stopping, *ended}, return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                if each.done():
                    each.result()
                each.cancel()
        else:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            print(early.STOPPED, flush=True)
            return stopping.result()
        return 0
    except Ended as error:
        print(f"error: {error}; ending all", file=sys.stderr, flush=True)
        return 2 if error.code == 2 else 1
    finally:
        # The router first: it drains, and then nothing is left for the workers to wait for.
        for member in [each for each in members if each.name == _ROUTER]:
            await member.end(plan.grace_s)
        await asyncio.gather(*(member.end(plan.grace_s) for member in members))


async def _start(members: list[Member], plan: Plan) -> str:
    """Starts all, and adds them to `members`. Returns where the router listens. Raises Ended."""
    common = [f"--grace_s={plan.grace_s:g}", *plan.common]
    of_role: dict[str, list[Member]] = {role: [] for role in plan.counts}
    for role, count in plan.counts.items():
        for index in range(count):
            name = f"{role}-{index}"
            own = ["--port=0", f"--name={name}", *plan.of_workers]
            of_role[role].append(await Member.start(name, role, [*own, *common]))
            members.append(of_role[role][-1])
    workers = list(members)
    targets = [
        f"--{role}={','.join([await each.started() for each in of_role[role]])}" for role in of_role
    ]
    where = [f"--host={plan.host}", f"--port={plan.port}", *plan.of_router]
    router = await Member.start(_ROUTER, _ROUTER, [*where, *targets, *common])
    members.append(router)
    for member in workers:
        await member.ready()
    return await router.listening()


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    lifecycle.define_flags(port=50051)
    credentials.define_flags()
    kv_options.define_flags()
    server.define_flags()
    profile_file.define_flags()
    otlp.define_flags()
    logs.define_flags()
    request_log.define_flags()
    flags.DEFINE_integer("num_prefill", 2, "Prefill workers.", 1)
    flags.DEFINE_integer("num_decode", 2, "Decode workers.", 1)


def _said(name: str) -> list[str]:
    """A flag as it was given, or nothing."""
    flag = flags.FLAGS[name]
    return [flag.serialize()] if flag.present else []


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    values = flags.FLAGS
    counts = {"prefill": values.num_prefill, "decode": values.num_decode}
    with tempfile.TemporaryDirectory(prefix="kairos-cluster-") as folder:
        if not launch.has_config():
            sizes = [f"--config.{role}.instances={count}" for role, count in counts.items()]
            launch.make_config(Path(folder) / "config.py", "--config.colocated=false", *sizes)
        launch.read_config()  # so that what is wrong with it is told once
        return asyncio.run(run(_plan(counts)))


def _plan(counts: dict[str, int]) -> Plan:
    """What the flags say."""
    values = flags.FLAGS
    common, of_workers, of_router = [], _said("profile"), []
    for name in values:
        module = values.find_module_defining_flag(name)
        if module in _COMMON:
            common += _said(name)
        elif module == kv_options.__name__:
            of_workers += _said(name)
        elif module in (server.__name__, request_log.__name__):
            of_router += _said(name)
    where = values.host, values.port
    return Plan(counts, *where, values.grace_s, common, of_workers, of_router)


if __name__ == "__main__":
    define_flags()
    launch.run(main, serves=True)
