"""A mesh of two real processes: the tokens of one, KV from outside, and what ends them."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import mesh_member
import numpy as np
import pytest
from absl import flags

from kairos_jax.engine import calls, connection, followers, lanes
from kairos_jax.engine.calls import Read, Score, Step, Write
from kairos_jax.engine.devices import (
    Processes,
    define_distributed_flags,
    start_distributed,
    start_jax,
)
from kairos_jax.engine.lanes import Fill
from kairos_jax.process import launch
from kairos_jax.process.command import UsageError
from schedulers.ledger.instance import Role

MEMBER = Path(mesh_member.__file__)
# So short that a silent process is missed soon, and longer than a core is away from a busy one.
DEADLINE_S = 5.0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Member:
    """A process that is one of two of a mesh. errors: what it writes to its standard error."""

    def __init__(self, address, id, directory, errors):
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, MEMBER, address, "2", str(id), directory, str(DEADLINE_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    def tell(self, what, argument):
        print(what, argument, file=self.process.stdin, flush=True)

    def answer(self):
        """Its next end of JSON; libraries print others."""
        for end in self.process.stdout:
            if end[0] in '"{':
                return json.loads(end)
        pytest.fail(f"it has ended: {self.told()}")

    def told(self):
        self.errors.seek(0)
        return self.errors.read()

    def end(self):
        self.process.kill()
        with self.process:
            pass


@contextlib.contextmanager
def mesh_of_two(directory):
    """The leader and its follower, once all is compiled."""
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        members = []
        for id in range(2):
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            members.append(Member(address, id, directory, errors))
            stack.callback(members[-1].end)
        assert members[0].answer() == "ready"
        yield members


def golden_requests(directory):
    cases = json.loads((directory / "golden.json").read_text())["cases"]
    requests = [
        {"id": str(i), "prompt": case["prompt"], "max_tokens": 32} for i, case in enumerate(cases)
    ]
    return requests, {str(i): case["output"] for i, case in enumerate(cases)}


def prefilled(directory, requests):
    """First tokens and KV, as the prefill engine of one process gives them."""
    engine = mesh_member.build(directory, jax.devices()[:1], Role.PREFILL)
    handed = {}
    for each in map(mesh_member.request, requests):
        seq = mesh_member.Seq(each)
        seq.pages = list(range(engine.limits.pages_for(len(each.prompt))))
        (token,) = engine.step([(seq, len(each.prompt))]).values()
        handed[each.id] = token.id, [np.asarray(kv) for kv in engine.read_pages(seq.pages)]
    return handed


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_and_end_together(tiny_llama, tmp_path):
    requests, expected = golden_requests(tiny_llama)
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    sampling = {"temperature": 0.8, "seed": 3, "prompt_logprobs": 2}
    sampled = [each | {"sampling": sampling} for each in requests]
    (tmp_path / "sampled.json").write_text(json.dumps(sampled))
    mesh_member.save_kv(tmp_path / "kv.npz", requests, prefilled(tiny_llama, requests))
    with mesh_of_two(tiny_llama) as (leader, follower):

        def ask(what, name):
            leader.tell(what, tmp_path / name)
            return leader.answer()

        assert ask("requests", "requests.json") == expected
        assert ask("kv", "kv.npz") == expected
        alone = mesh_member.build(tiny_llama, jax.devices()[:1])
        answers = mesh_member.serve(alone, [mesh_member.request(each) for each in sampled])
        assert ask("requests", "sampled.json") == answers
        follower.process.send_signal(signal.SIGTERM)  # for the leader to act on
        assert ask("requests", "requests.json") == expected
        leader.process.stdin.close()
        assert leader.answer() == "closed"
        assert (leader.process.wait(30), follower.process.wait(30)) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("lost", "other"), [(0, 1), (1, 0)])
def test_a_lost_process_ends_the_other(tiny_llama, lost, other, sign):
    """In the midst of steps, which then hang or fail."""
    with mesh_of_two(tiny_llama) as members:
        # Silence is allowed for longer until a sign of life has come after a step of a known shape.
        compiled_at = time.monotonic()
        while time.monotonic() < compiled_at + DEADLINE_S / 2:
            members[0].tell("steps", 100)
            members[0].answer()
        members[0].tell("steps", 10**6)
        members[lost].process.send_signal(sign)
        assert members[other].process.wait(4 * DEADLINE_S) != 0
        assert members[other].told()


# Without any second process.


def test_calls_travel_as_bytes(tiny_llama):
    engine = mesh_member.build(tiny_llama, jax.devices()[:2])
    rng = np.random.default_rng(0)
    like = calls.padding(16, 3, engine.limits)
    step = Step(*(rng.integers(0, 99, array.shape, np.int32) for array in like))
    ids = np.array([3, 1, 2, 0], np.int32)
    block = rng.normal(size=engine.block.shape).astype(engine.block.dtype)
    score = Score(rng.integers(-1, 9, 16, np.int32))
    empty = lanes.no_fill(engine.limits)
    fill = Fill(*(rng.integers(0, 99, array.shape, np.int32) for array in empty))
    twice = np.concatenate([ids, ids + 4])
    moves = Read(ids), Read(twice), Write(ids, (block,)), Write(twice, (block, 2 * block))
    for call in (step, fill, score, *moves):
        payload = b"".join(each.tobytes() for each in followers._arrays(engine, call, 0))
        message = connection.Frame(*followers._shape(call), payload)
        arrived = followers._call(engine, message)
        jax.tree.map(np.testing.assert_array_equal, arrived, call)
        with pytest.raises(ValueError, match="was expected"):
            followers._call(engine, message._replace(payload=payload + b"0"))


def test_whoever_does_not_know_the_secret_is_sent_away():
    secret, processes = b"s" * 32, Processes("127.0.0.1:1", 2, 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        guests = [socket.create_connection(listener.getsockname()) for _ in range(4)]
        guests[0].close()
        guests[1].sendall(followers._HELLO.pack(b"x" * 32, 1))
        guests[2].sendall(followers._HELLO.pack(secret, 7))
        guests[3].sendall(followers._HELLO.pack(secret, 1))
        (end,) = followers._accept(listener, processes, secret, 5.0)
        assert guests[1].recv(1) == guests[2].recv(1) == b""
        end.send(connection.Frame(connection.Kind.END))
        assert guests[3].recv(100) == connection.HEADER.pack(connection.Kind.END, 0, 0, 0)
        end.close()
    for guest in guests:
        guest.close()


@contextlib.contextmanager
def connection_to(deadline_s, compiling_s=None):
    """A end, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    end = connection.Connection(ours, 1, deadline_s, compiling_s or deadline_s)
    with theirs, contextlib.closing(end):
        yield end, theirs


def test_a_silent_end_and_a_closed_one_are_told_apart():
    with (
        connection_to(0.05) as (end, _),
        pytest.raises(TimeoutError, match=r"sign of life for 0\.05 s"),
    ):
        next(iter(end))
    with connection_to(5.0) as (end, theirs):
        theirs.sendall(connection.HEADER.pack(connection.Kind.BEAT, 0, 0, 0))
        theirs.close()
        with pytest.raises(ConnectionResetError, match="was closed"):
            next(iter(end))


def test_silence_may_last_longer_while_a_shape_is_compiled():
    known = connection.HEADER.pack(connection.Kind.READ, 0, 0, 0)
    with connection_to(0.05, 60.0) as (end, theirs):
        theirs.sendall(known * 2)
        assert len(list(itertools.islice(end, 2))) == 2
        with pytest.raises(TimeoutError, match=r"sign of life for 0\.05 s"):
            next(iter(end))
    for messages in (0, 1):  # at first, and after one of a new shape
        with connection_to(0.05, 0.4) as (end, theirs):
            theirs.sendall(known * messages)
            begun = time.monotonic()
            with pytest.raises(TimeoutError, match=r"sign of life for 0\.4 s"):
                list(end)
            assert time.monotonic() - begun >= 0.4
    with connection_to(0.05, 0.4) as (end, _):
        for kind in (connection.Kind.READ, connection.Kind.READ, connection.Kind.BEAT):
            end.send(connection.Frame(kind))
        with pytest.raises(TimeoutError, match=r"sign of life for 0\.05 s"):
            next(iter(end))
        end.send(connection.Frame(connection.Kind.STEP, 1, 1))
        assert end._socket.gettimeout() == 0.4


def test_the_time_for_compiling_ends_with_it_and_not_with_the_next_sign_of_life():
    """A process that is lost right after its first known call is not waited for by the minute."""
    threads = concurrent.futures.ThreadPoolExecutor(1)
    with threads, connection_to(0.05, 60.0) as (end, _):
        heard = threads.submit(next, iter(end), None)
        for _ in range(2):
            end.send(connection.Frame(connection.Kind.READ))
        with pytest.raises(TimeoutError, match=r"sign of life for 0\.05 s"):
            heard.result(30)


class StuckEngine:
    """Gives results that never come."""

    def run(self, call):
        return self

    def addressable_data(self, index):
        return self

    def is_ready(self):
        return False


def test_a_call_that_hangs_is_told_once_and_an_orderly_end_is_not(monkeypatch):
    lost = queue.Queue()
    step = Step(np.zeros(4, np.int32), np.zeros((1, lanes.SAID), np.int32))
    with connection_to(2.0) as (end, theirs):
        leader = followers.Leader(StuckEngine(), [end], lost.put)
        leader.dispatch(step)
        monkeypatch.setattr(followers, "_CALL_S", 0.0)
        leader.dispatch(step)  # the first of its shape was given time to compile
        assert "hangs" in str(lost.get(timeout=30))
        theirs.close()
        leader.close()
    with connection_to(2.0) as (end, theirs):
        leader = followers.Leader(StuckEngine(), [end], lost.put)
        closing = threading.Thread(target=leader.close)
        closing.start()
        assert theirs.recv(100) == connection.HEADER.pack(connection.Kind.END, 0, 0, 0)
        theirs.close()
        closing.join(30)
    assert lost.empty()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (connection.Kind.END, "a call hangs on the mesh, whose leader has ended"),
        (connection.Kind.READ, "the leader of the mesh was lost: its connection was closed"),
    ],
)
def test_a_follower_whose_call_hangs_does_not_outlast_its_leader(kind, words, monkeypatch):
    """What comes waits for a call that never returns: nobody takes it."""
    ended, messages = queue.Queue(), queue.Queue()
    monkeypatch.setattr(followers, "end_process", ended.put)
    monkeypatch.setattr(followers, "_CLOSE_S", 0.1)
    with connection_to(5.0) as (end, theirs):
        theirs.sendall(connection.HEADER.pack(kind, 0, 0, 0))
        theirs.close()
        begun = time.monotonic()
        followers._receive(end, messages)
        took_s = time.monotonic() - begun
    assert messages.get_nowait().kind is kind
    assert words in str(ended.get_nowait())
    # Once told to end, it has a little time to return from the call.
    assert took_s >= (0.1 if kind is connection.Kind.END else 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "need each other"),
        (["--coordinator_address=127.0.0.1:1"], "need each other"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "below --num_processes, 2, got 2",
        ),
    ],
)
def test_flags_that_contradict_each_other(arguments, message, monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(launch.flags, "FLAGS", values)
    for define in (flags.DEFINE_string, flags.DEFINE_integer):
        monkeypatch.setattr(
            launch.flags,
            define.__name__,
            lambda *args, define=define: define(*args, flag_values=values),
        )
    define_distributed_flags()
    values(["program", *arguments])
    with pytest.raises(UsageError, match=message):
        start_distributed()
    assert values.num_processes in (1, 2)


def test_no_flags_is_one_process_and_devices_must_divide():
    with pytest.raises(UsageError, match="3 devices cannot be spread evenly over"):
        start_jax(3, processes=Processes("127.0.0.1:1", 2, 0))
