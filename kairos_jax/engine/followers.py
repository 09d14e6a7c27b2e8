"""One engine on a mesh that spans processes: the first one leads, the others follow.

JAX asks that every process of a mesh run the same programs in the same order. The leader alone has
a ledger, a policy and a worker; each call of its engine, as arrays, is first sent to the followers,
which do nothing but run what comes. A step costs them a few kilobytes: the arrays of a `Step`.

The calls go over a TCP connection to each follower (kairos_jax.engine.connection). The leader
listens for them on the host of the coordinator's address, on a free port, until all have come. It
tells them the port, and a secret that they must show, through a collective of the mesh itself. What
is sent is not encrypted, and neither is what JAX sends between these processes: their network must
be a trusted one.

Each end shows a sign of life several times within a deadline. A process that the others lose ends
all of them: a mesh with a hole can compute nothing, and may hang in the attempt.
"""

import contextlib
import hashlib
import hmac
import logging
import os
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kairos_jax.engine import calls, lanes
from kairos_jax.engine.calls import Call, Read, Score, Step, Write
from kairos_jax.engine.connection import Connection, Frame, Kind
from kairos_jax.engine.devices import Processes, agree
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.engine.lanes import Fill
from kairos_jax.net.address import split_address

log = logging.getLogger(__name__)

# Silence after which a process counts as lost; it shows a sign of life four times as often, from a
# thread of its own, which no step keeps waiting. A compilation does: what it does within Python's
# lock kept such a thread away for 2.0 s, on a machine that others used too.
DEADLINE_S = 2.0
_COMPILING_S = 30.0
# For all followers to come, once each has its weights.
_MEET_S = 60.0
# For a call, from its dispatch to its result; the first of each shape compiles.
_CALL_S = 30.0
_COMPILE_S = 1800.0
# For the followers to end, once told to.
_CLOSE_S = 5.0

_SECRET_BYTES = 32
_HELLO = struct.Struct(f"!{_SECRET_BYTES}sI")  # the secret, and which process it is


class FollowerLost(ConnectionError):
    """A process of the mesh has ended, or is silent, or hangs."""


def end_process(error: Exception) -> None:
    """Ends this process at once: one of its threads may hang in a collective for ever."""
    log.critical("this process ends: %s", error)
    logging.shutdown()
    os._exit(1)


OnLost = Callable[[Exception], None]


class Leader:
    """Has every process of a mesh run what its engine runs. See `lead`."""

    def __init__(self, engine: JaxEngine, connections: list[Connection], on_lost: OnLost):
        self._engine, self._connections, self._on_lost = engine, connections, on_lost
        self._compiled: set[tuple[Kind, int, int]] = set()
        # By when the call under way must end; of a step, the result that shows it.
        self._last: tuple[float, Any] = (float("inf"), None)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._readers = [_thread(self._listen, connection) for connection in connections]
        _thread(self._watch)

    def dispatch(self, call: Call) -> Any:
        """Runs a call on all processes; its result lies whole on a device of this one."""
        shape = _shape(call)
        by = time.monotonic() + (_CALL_S if shape in self._compiled else _COMPILE_S)
        self._compiled.add(shape)
        self._last = by, None
        for connection in self._connections:
            arrays = _arrays(self._engine, call, connection.process)
            connection.send(Frame(*shape, b"".join(array.tobytes() for array in arrays)))
        if isinstance(call, Write):
            _, *shards = _arrays(self._engine, call, 0)
            call = Write(call.pages, _joined(self._engine, shards))
        result = jax.tree.map(lambda array: array.addressable_data(0), self._engine.run(call))
        # The reader of a block owns it and may delete it. A step after it hangs where a read does.
        samples = isinstance(call, Step | Score)
        self._last = (by, result) if samples else (float("inf"), None)
        return result

    def close(self) -> None:
        """Lets the followers end, and waits for that a little."""
        self._closing.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(Frame(Kind.END))
        for reader in self._readers:
            reader.join(_CLOSE_S)

    def _listen(self, connection: Connection) -> None:
        try:
            for _ in connection:
                pass  # a follower sends nothing but beats
        except OSError as error:
            self._lose(FollowerLost(f"process {connection.process} of the mesh was lost: {error}"))

    def _watch(self) -> None:
        """Shows the followers signs of life, and looks whether the call under way hangs."""
        while not self._closing.wait(min(connection.beat_s for connection in self._connections)):
            for connection in self._connections:
                with contextlib.suppress(OSError):  # its reader tells
                    connection.send(Frame(Kind.BEAT))
            by, result = self._last
            if time.monotonic() > by and not (result is not None and result.is_ready()):
                self._lose(FollowerLost("a call hangs on the mesh: it is beyond its deadline"))

    def _lose(self, error: Exception) -> None:
        with self._lock:  # once
            if not self._closing.is_set():
                self._closing.set()
                self._on_lost(error)


def lead(
    engine: JaxEngine,
    processes: Processes,
    on_lost: OnLost = end_process,
    deadline_s: float = DEADLINE_S,
) -> Leader:
    """Waits for the followers. All later calls of `engine`, warm-up too, run on every process.

    on_lost: called once, on a thread of the leader's, when a process is lost or a call hangs. A
    step may hang then: the process is to end.

    Raises:
        UsageError: a follower has another model.
        OSError, FollowerLost: it cannot listen, or a follower did not come.
    """
    agree(processes, _model(engine))
    host = _host(processes)
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    secret = os.urandom(_SECRET_BYTES)
    with socket.create_server((host, 0), family=family, backlog=processes.count) as listener:
        _meet(listener.getsockname()[1], secret)
        connections = _accept(listener, processes, secret, deadline_s)
    leader = Leader(engine, connections, on_lost)
    engine.dispatch = leader.dispatch
    return leader


def follow(engine: JaxEngine, processes: Processes, deadline_s: float = DEADLINE_S) -> None:
    """Runs what the leader says, until it ends; then this process is to end at once.

    Ends the process with code 1 if the leader is lost, or a call fails. Signals that ask it to end
    pass it by: the leader, which gets its own, still needs it to drain.

    Raises UsageError if the leader has another model.
    """
    agree(processes, _model(engine))
    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.SIG_IGN)
    port, secret = _meet(0, bytes(_SECRET_BYTES))
    sock = socket.create_connection((_host(processes), port), _MEET_S)
    sock.sendall(_HELLO.pack(secret, processes.id))
    connection = Connection(sock, 0, deadline_s, max(deadline_s, _COMPILING_S))
    messages: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    _thread(_receive, connection, messages)
    _thread(_beat, connection)
    try:
        while (message := messages.get()).kind is not Kind.END:
            engine.run(_call(engine, message))
    except Exception as error:
        log.exception("a call of the leader's failed")
        end_process(error)


def _model(engine: JaxEngine) -> dict[str, Any]:
    """Its description, and a hash of the weights that every process holds whole, which are the
    norms: of the others none has what another has.
    """
    digest = hashlib.sha256()
    for path, weight in sorted(engine.params.items()):
        if weight.is_fully_replicated:
            digest.update(f"{path} {weight.dtype}".encode())
            digest.update(np.asarray(weight.addressable_data(0)).tobytes())
    return {"model": asdict(engine.config), "hash of the norms": digest.hexdigest()[:32]}


def _receive(connection: Connection, messages: queue.SimpleQueue[Frame]) -> None:
    """On a thread of its own: the one that runs the calls may hang when the leader is lost."""
    try:
        for message in connection:
            messages.put(message)
            if message.kind is Kind.END:
                time.sleep(_CLOSE_S)
                end_process(TimeoutError("a call hangs on the mesh, whose leader has ended"))
    except OSError as error:
        end_process(ConnectionError(f"the leader of the mesh was lost: {error}"))


def _beat(connection: Connection) -> None:
    pause = threading.Event()
    with contextlib.suppress(OSError):  # `_receive` tells
        while not pause.wait(connection.beat_s):
            connection.send(Frame(Kind.BEAT))


def _meet(port: int, secret: bytes) -> tuple[int, bytes]:
    """Tells the followers the leader's port and secret; returns them, in every process."""
    mine = np.frombuffer(port.to_bytes(2, "big") + secret, np.uint8).astype(np.int32)
    told = np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()
    return int.from_bytes(told[:2], "big"), told[2:]


def _accept(
    listener: socket.socket, processes: Processes, secret: bytes, deadline_s: float
) -> list[Connection]:
    """A connection to each follower. A process that does not know the secret is cut off."""
    connections: dict[int, Connection] = {}
    by = time.monotonic() + _MEET_S
    while missing := set(range(1, processes.count)) - set(connections):
        listener.settimeout(max(by - time.monotonic(), 0.001))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            raise FollowerLost(f"processes {sorted(missing)} of the mesh did not come") from None
        process = _greet(sock, secret)
        if process in missing:
            connections[process] = Connection(
                sock, process, deadline_s, max(deadline_s, _COMPILING_S)
            )
        else:
            sock.close()
    return list(connections.values())


def _greet(sock: socket.socket, secret: bytes) -> int | None:
    """Which process has come, if it is one of ours."""
    sock.settimeout(1.0)
    try:
        hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:
        return None
    if len(hello) < _HELLO.size:
        return None
    shown, process = _HELLO.unpack(hello)
    return process if hmac.compare_digest(shown, secret) else None


# Calls as bytes, and back.


def _shape(call: Call) -> tuple[Kind, int, int]:
    if isinstance(call, Step):
        return Kind.STEP, call.tokens.shape[0], call.sequences.shape[0]
    if isinstance(call, Score):
        return Kind.SCORE, *call.targets.shape, 0
    if isinstance(call, Fill):
        return Kind.FILL, 0, 0
    kind = Kind.READ if isinstance(call, Read) else Kind.WRITE
    return kind, len(call.pages) // BLOCK_PAGES, 0


def _arrays(engine: JaxEngine, call: Call, process: int) -> list[np.ndarray]:
    """What a process needs of a call: of each block, the shards that lie there."""
    if not isinstance(call, Write):
        return jax.tree.leaves(call)
    indices = [index for _, index in _shards(engine, process)]
    blocks = map(np.asarray, call.blocks)
    return [call.pages, *(whole[index] for whole in blocks for index in indices)]


def _call(engine: JaxEngine, message: Frame) -> Call:
    """The call that a message tells this process of."""
    if message.kind is Kind.STEP:
        like = calls.padding(message.tokens, message.sequences, engine.limits)
        return Step(*_unpack(message.payload, like))
    if message.kind is Kind.SCORE:
        return Score(*_unpack(message.payload, [np.empty(message.tokens, np.int32)]))
    if message.kind is Kind.FILL:
        return Fill(*_unpack(message.payload, lanes.no_fill(engine.limits)))
    ids = np.empty(message.tokens * BLOCK_PAGES, np.int32)
    if message.kind is Kind.READ:
        return Read(*_unpack(message.payload, [ids]))
    block = engine.block
    shard = np.empty(block.sharding.shard_shape(block.shape), block.dtype)
    mine = [shard] * (message.tokens * len(_shards(engine, jax.process_index())))
    ids, *shards = _unpack(message.payload, [ids, *mine])
    return Write(ids, _joined(engine, shards))


def _unpack(payload: bytes, like: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Arrays of these shapes and dtypes that lie one after the other."""
    arrays, offset = [], 0
    for each in like:
        arrays.append(np.frombuffer(payload, each.dtype, each.size, offset).reshape(each.shape))
        offset += each.nbytes
    if offset != len(payload):
        raise ValueError(f"a call of {offset} bytes was expected, {len(payload)} came")
    return arrays


def _shards(engine: JaxEngine, process: int) -> list[tuple[Any, tuple[slice, ...]]]:
    """The devices of a process, and what part of a block each holds."""
    indices = engine.block.sharding.devices_indices_map(engine.block.shape)
    return [each for each in indices.items() if each[0].process_index == process]


def _joined(engine: JaxEngine, shards: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
    """The blocks of which this process has these shards."""
    devices = [device for device, _ in _shards(engine, jax.process_index())]
    block, each = engine.block, len(devices)

    def joined(some: Sequence[np.ndarray]) -> jax.Array:
        placed = [jax.device_put(*pair) for pair in zip(some, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(block.shape, block.sharding, placed)

    return tuple(joined(shards[at : at + each]) for at in range(0, len(shards), each))


def _host(processes: Processes) -> str:
    return split_address(processes.address)[0]


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    """Daemons: none of them is to keep a process alive."""
    thread = threading.Thread(target=target, args=args, name="followers", daemon=True)
    thread.start()
    return thread
