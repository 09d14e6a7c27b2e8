"""A router, prefill and decode workers as processes."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import processes
import pytest
from processes import CONFIG, MODEL, ROOT

from kairos_jax.config import ServerConfig
from kairos_jax.net.credentials import Credentials
from kairos_jax.routing.links import Links
from kairos_jax.worker.messages import Died
from schedulers.ledger.instance import Role


@contextlib.contextmanager
def process(environment, binary, *arguments):
    """A process of kairos_jax that is ready, and where it serves."""
    started = processes.Process(binary, *arguments, env=environment)
    try:
        yield started.ready(), started.address
    finally:
        started.end()


def children(parent):
    """Process file descriptors of all that it has started."""
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
    return {int(pid): os.pidfd_open(int(pid)) for pid in listed.split()}


def assert_ended(pidfds):
    """Waits for these processes to end."""
    by = time.monotonic() + 60
    for pid, pidfd in pidfds.items():
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(max(by - time.monotonic(), 0) * 1000), f"process {pid} goes on"
        os.close(pidfd)


def ask(environment, address, index=0):
    cases = json.loads((ROOT / MODEL / "golden.json").read_text())["cases"]
    done = subprocess.run(
        (
            *(sys.executable, "-m", "kairos_jax.client", f"--address={address}", "--output=json"),
            f"--prompt_token_ids={','.join(map(str, cases[index]['prompt']))}",
            *("--max_tokens=32", "--temperature=0", "--ignore_eos"),
        ),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == cases[index]["output"]


@pytest.mark.slow
def test_a_cluster_answers_drains_and_leaves_no_process(environment, profile):
    plan = ("--num_prefill=1", "--num_decode=1")
    with process(environment, "cluster", profile, *plan) as (started, address):
        ask(environment, address)
        pidfds = children(started)
        assert len(pidfds) == 3
        started.send(signal.SIGTERM)
        assert started.wait(60) == 0
        assert_ended(pidfds)


@pytest.mark.slow
def test_a_cluster_makes_a_config_that_its_processes_share(environment, profile):
    given = (MODEL, "--port=0", "--http_port=0", "--num_prefill=1", "--num_decode=1", profile)
    small = ("--config.max_context=256", "--config.kernels=cpu")
    command = [sys.executable, "-m", "kairos_jax", "cluster", *given, *small]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as started:
        try:
            ready = next(line for line in started.stdout if line.startswith("ready"))
            ask(environment, ready.split()[-1])
        finally:
            started.send_signal(signal.SIGINT)
        assert started.wait(60) == 0


@pytest.mark.slow
def test_a_cluster_of_five_ends_with_any_of_them(environment, profile):
    with process(environment, "cluster", profile) as (started, address):
        for index in range(4):
            ask(environment, address, index)
        pidfds = children(started)
        assert len(pidfds) == 5
        os.kill(min(pidfds), signal.SIGKILL)
        assert started.wait(60) == 1
        assert_ended(pidfds)


@pytest.mark.slow
def test_a_cluster_that_is_killed_takes_its_processes_along(environment, profile):
    plan = ("--num_prefill=1", "--num_decode=1")
    with process(environment, "cluster", profile, *plan) as (started, _):
        pidfds = children(started)
        started.send(signal.SIGKILL)
        assert_ended(pidfds)


@pytest.mark.slow
def test_a_worker_measures_its_own_role_and_is_lost_when_it_stops(environment):
    """SIGSTOP: its connections stay open, and nothing comes any more."""

    async def lost(stopped, address):
        config = ServerConfig.from_dict(tiny_config())
        died: asyncio.Future[Died] = asyncio.get_running_loop().create_future()
        front = cluster.Front.start([], config)
        front.links = links = Links(front.router, config, Credentials(), front.changed.set)
        emit = front.router.emit

        def heard(event):
            emit(event)
            if isinstance(event, Died) and not died.done():
                died.set_result(event)

        front.router.emit = heard
        links.found(Role.DECODE, frozenset({address}))
        await front.linked(1)
        (linked,) = links.workers.values()
        assert linked.welcome.profile["decode"]["base_s"] > 0
        assert "prefill" not in linked.welcome.profile
        stopped.send(signal.SIGSTOP)
        begun = time.monotonic()
        event = await asyncio.wait_for(died, 30)
        took_s = time.monotonic() - begun
        stopped.send(signal.SIGCONT)
        await front.linked(1)
        await links.close()
        assert str(event.error) == "nothing came from it for 1 s"
        assert front.router.fleet.last_loss.endswith("it stopped answering"), "what clients read"
        return took_s

    with process(environment, "decode") as (started, address):
        # Detected within --hang_s, and what a busy machine adds.
        assert asyncio.run(lost(started, address)) < 1.5


def tiny_config():
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_config", ROOT / CONFIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**module.get_config().to_dict(), "model": MODEL}


@pytest.mark.slow
def test_wrong_use_is_one_line_and_code_2(environment):
    cases = {
        ("router", "--prefill=a", "--decode=b:1"): "--prefill: 'a' is not of the form host:port",
        ("prefill", "--config.colocated=true"): "config.colocated must be False",
        ("decode", "--host=0.0.0.0"): "--advertise is missing: peers cannot reach",
    }
    started = {
        subprocess.Popen(
            [sys.executable, "-m", f"kairos_jax.{binary}", f"--config={CONFIG}", *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ): words
        for (binary, *arguments), words in cases.items()
    }
    for process, words in started.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert words in stderr.splitlines()[-1]
        assert "Traceback" not in stderr
