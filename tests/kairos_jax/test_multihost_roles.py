"""A decode mesh of two processes among the other roles, all of them the binaries: the tokens of one
process, and what becomes of the mesh and its streams when a part of it is stopped, lost or wrong.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass

import fakes
import grpc
import numpy as np
import pytest
from clients import Load, check_ok, some_asks, stub_of
from processes import HOST, MODEL, ROOT, Ended, Process
from safetensors.numpy import load_file, save_file

from kairos_jax.engine.followers import DEADLINE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Room for streams that last while something happens to them.
ROOM = (
    "--config.max_context=1024",
    "--config.max_tokens=960",
    "--config.decode.kv_tokens=8192",
    "--config.prefill.kv_tokens=4096",
    "--config.prefill.parked_tokens=4096",
)
# Every other one is sampled, with a seed.
SHORT = some_asks(6, (5, 90), (10, 40))
LONG = some_asks(4, (5, 90), (400, 500))
BOUND_S = 5.0  # for what takes milliseconds, on a busy machine


def free_port():
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


@dataclass
class Site:
    """Starts processes, which end with it."""

    env: dict[str, str]
    stack: contextlib.ExitStack

    def start(self, binary, *arguments, port=0):
        process = Process(binary, *ROOM, *arguments, env=self.env, port=port)
        self.stack.callback(process.end)
        return process

    def mesh(self, *arguments, of_follower=()):
        """The leader and its follower, not ready yet."""
        mesh = (
            "--config.decode.devices=2",
            f"--coordinator_address={HOST}:{free_port()}",
            "--num_processes=2",
            *self.profile,
            *arguments,
        )
        leader = self.start("decode", *mesh, "--process_id=0")
        return leader, self.start("decode", *mesh, "--process_id=1", *of_follower)

    def router(self, prefill, *decode, arguments=()):
        """Once the workers are ready."""
        of = {"prefill": [prefill.ready()], "decode": [each.ready() for each in decode]}
        targets = [f"--{role}={','.join(w.address for w in all)}" for role, all in of.items()]
        return self.start("router", *targets, *arguments).ready()

    @property
    def profile(self):
        return (f"--profile={self.env['XDG_CACHE_HOME']}/profile.json",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """For compiled steps, and with a profile."""
    path = tmp_path_factory.mktemp("cache")
    (path / "profile.json").write_text(json.dumps(fakes.PROFILE))
    return path


@pytest.fixture
def site(cache):
    with contextlib.ExitStack() as stack:
        yield Site(os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}, stack)


async def answered(router, asks):
    async with stub_of(router) as stub:
        answers = await Load(stub, asks, 60).done()
    for answer in answers:
        check_ok(answer)
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def expected(cache):
    """The tokens of the server that is one process: of SHORT, and of LONG."""
    with contextlib.ExitStack() as stack:
        site = Site(os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}, stack)
        server = site.start("serve", *site.profile).ready()
        tokens = asyncio.run(answered(server, [*SHORT, *LONG]))
    return tokens[: len(SHORT)], tokens[len(SHORT) :]


def all_have(count):
    return lambda answers: all(len(answer.tokens) >= count for answer in answers)


@pytest.mark.parametrize("kind", ["jax", "grpc"])
def test_it_gives_the_tokens_of_one_process_and_drains_as_one(site, expected, kind):
    """Kubernetes sends SIGTERM to all pods of a group at once; here the follower has it first."""
    short, long = expected
    transport = f"--kv_transport={kind}"
    leader, follower = site.mesh(transport, "--grace_s=60")
    router = site.router(site.start("prefill", transport, *site.profile), leader)

    async def run():
        assert await answered(router, SHORT) == short
        async with stub_of(router) as stub:
            load = Load(stub, LONG, 60)
            await load.until(all_have(20))
            follower.send(signal.SIGTERM)
            await load.until(all_have(60))
            leader.send(signal.SIGTERM)
            leader.line("draining")
            answers = await load.done()
        assert [answer.tokens for answer in answers] == long
        assert min(len(tokens) for tokens in long) > 100, "else it may have been over by then"

    asyncio.run(run())
    leader.line("drained")
    assert (leader.wait(), follower.wait()) == (0, 0)
    assert "lost" not in leader.errors() + follower.errors()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", ["leader", "follower"])
def test_its_streams_go_on_elsewhere_when_it_loses_a_process(site, expected, lost, sign):
    mesh = dict(zip(("leader", "follower"), site.mesh(), strict=True))
    left = mesh["follower" if lost == "leader" else "leader"]
    workers = mesh["leader"], site.start("decode", *site.profile)
    router = site.router(site.start("prefill", *site.profile), *workers)

    async def run():
        async with stub_of(router) as stub:
            load = Load(stub, LONG, 60)
            await load.until(all_have(20))
            assert (await asyncio.to_thread(mesh["leader"].state))["running"] > 0
            hit = mesh[lost].send(sign)
            code = await asyncio.to_thread(left.wait)
            detected_s = time.monotonic() - hit
            answers = await load.done()
        for answer in answers:
            check_ok(answer)
        assert [answer.tokens for answer in answers] == expected[1]
        return code, detected_s, max(answer.next_after(hit) for answer in answers) - hit

    code, detected_s, recovered_s = asyncio.run(run())
    print(f"{lost} {sign.name}: detected in {detected_s:.2f} s, next token in {recovered_s:.2f} s")
    print(left.errors())
    # Of one that is killed the connections end; one that is stopped is silent.
    assert detected_s < BOUND_S + (DEADLINE_S if sign == signal.SIGSTOP else 0.0)
    assert code not in (0, 2)
    assert "lost" in left.errors() or "another task died" in left.errors()


def test_clients_are_told_when_there_is_no_other(site):
    leader, follower = site.mesh()
    given = ["--rejoin_s=0"]  # none comes back
    router = site.router(site.start("prefill", *site.profile), leader, arguments=given)

    async def run():
        async with stub_of(router) as stub:
            load = Load(stub, LONG, 60)
            await load.until(all_have(20))
            killed = follower.send(signal.SIGKILL)
            answers = await load.done()
            (later,) = await Load(stub, LONG[:1], 60).done()
        for answer in (*answers, later):
            assert answer.code is grpc.StatusCode.UNAVAILABLE, answer.details
            assert "decode" in answer.details
        assert max(answer.ended_at for answer in answers) - killed < BOUND_S

    asyncio.run(run())
    assert leader.wait() == 1
    assert "process 1 of the mesh was lost" in leader.errors()


# What is wrong from the start.


def ends(process):
    """Its exit code and its last words, with nothing served."""
    with pytest.raises(Ended):
        process.line("ready", 120)
    code = process.wait()
    process.end()
    return code, process.errors()


def refused(mesh):
    """What both processes say when they refuse each other."""
    for process in mesh:
        code, errors = ends(process)
        assert code == 2, errors
        yield errors


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "--config.decode.max_batch=2",
            "process 1 of the mesh is not like the first: its config.decode.max_batch is 2, and 4 "
            "of process 0",
        ),
        (
            "--config.decode.devices=4",
            "every process of a mesh must have as many devices as the first, and they have 1, 2: ",
        ),
    ],
)
def test_a_follower_of_another_config_is_refused(site, other, message):
    for errors in refused(site.mesh(of_follower=(other,))):
        assert message in errors


def test_a_follower_of_another_model_is_refused(site, tmp_path):
    """Under the same name, since hosts may have it at different places."""
    copy = shutil.copytree(ROOT / MODEL, tmp_path / "llama")
    description = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(description | {"rms_norm_eps": 1e-6}))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(1)
    save_file(weights, copy / "model.safetensors")
    for errors in refused(site.mesh(of_follower=(f"--model={copy}",))):
        assert "model.norm_eps is 1e-06, and 1e-05 of process 0" in errors
        assert "hash of the norms" in errors


def test_a_follower_that_cannot_start_takes_its_leader_along(site, tmp_path):
    """Its model has too short a context."""
    (copy := tmp_path / "llama").mkdir()
    description = json.loads((ROOT / MODEL / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(description | {"max_position_embeddings": 512}))
    (copy / "model.safetensors").symlink_to(ROOT / MODEL / "model.safetensors")
    leader, follower = site.mesh(of_follower=(f"--model={copy}",))
    code, errors = ends(follower)
    assert code == 2, errors
    assert "config.max_context must be at most the model's 512, got 1024" in errors
    code, errors = ends(leader)
    assert code not in (0, 2), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "need each other: got '' and 2"),
        (
            [f"--coordinator_address={HOST}:1", "--num_processes=2", "--process_id=2"],
            "--process_id must be below --num_processes, 2, got 2",
        ),
        (
            ["--coordinator_address=leader", "--num_processes=2", "--process_id=1"],
            "--coordinator_address: 'leader' is not of the form host:port",
        ),
        (["--process_id=-1"], "--process_id=-1: -1 is not a non-negative integer"),
    ],
)
def test_wrong_flags(site, arguments, message):
    code, errors = ends(site.start("decode", *arguments))
    assert code == 2, errors
    assert message in errors
