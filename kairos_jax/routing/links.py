"""The router's side of the wire: a link to each worker that discovery lists.

A link attaches to its worker, joins it to the router as a peer, and keeps listening for its
heartbeat. When the worker is lost, whether its connection ended or nothing comes from it any more,
the router hears that the peer died, and the link tries again for as long as the worker is listed. A
process that was started anew is another peer. Everything here lives on the event loop.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from kairos_jax.config import ServerConfig
from kairos_jax.net.credentials import Credentials
from kairos_jax.net.heartbeat import Heartbeat, first_of
from kairos_jax.net.well_formed import EOF
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.router import Router
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.rpc import internal_pb2_grpc
from kairos_jax.worker import codec
from kairos_jax.worker.codec import Sender
from kairos_jax.worker.messages import Died, Draining, Hello, Message, Outlined, Ping, Pong, Welcome
from kairos_jax.worker.service import STARTING
from kairos_jax.worker.status import Status
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role

log = logging.getLogger(__name__)

# What a worker is given to answer a Hello: it may be in the midst of a compilation.
_WELCOME_S = 5.0
_LEAST_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0
_OPTIONS = (
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
    # Each try connects by itself, rather than when gRPC's own, longer backoff has passed.
    ("grpc.use_local_subchannel_pool", 1),
)

# How a worker, or the way to it, is known to fail.
_KNOWN = (grpc.aio.AioRpcError, OSError, ValueError, codec.RemoteError)


@dataclass(frozen=True, slots=True)
class Linked:
    """A worker that is attached to. cost: of its own kind of step."""

    address: str
    welcome: Welcome
    cost: CostModel

    @property
    def id(self) -> str:
        """Of its peer: another for each start of its process."""
        return f"{self.welcome.instance}@{self.welcome.incarnation}"


class Links:
    """Keeps a router linked to its workers.

    workers: those that take requests, by the ids of their peers. heartbeat_s: between two pings.
    hang_s: a worker from which nothing comes for so long is lost. on_change: called when `workers`
    has changed.
    """

    def __init__(
        self,
        router: Router,
        config: ServerConfig,
        net: Credentials,
        on_change: Callable[[], None] = lambda: None,
        heartbeat_s: float = 0.25,
        hang_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.router, self.net, self.clock = router, net, clock
        self.heartbeat_s, self.hang_s = heartbeat_s, hang_s
        self.workers: dict[str, Linked] = {}
        self._links: set[_Link] = set()  # of workers that have joined
        self.identity = secrets.token_hex(8)
        self._config, self._on_change = config, on_change
        self._listed: dict[Role, frozenset[str]] = {}
        self._tasks: dict[tuple[Role, str], asyncio.Task[None]] = {}
        # Of each worker that fits but for its weights: which those are.
        self._weights: dict[tuple[Role, str], str] = {}

    def found(self, role: Role, addresses: frozenset[str]) -> None:
        """Takes the addresses at which workers of a role are to be had now. A link to another goes
        on until its worker ends it: one that drains is listed no more.
        """
        self._listed[role] = addresses
        for address in sorted(addresses):
            key = role, address
            if key not in self._tasks or self._tasks[key].done():
                self._tasks[key] = asyncio.ensure_future(self._keep(role, address))
                self._tasks[key].add_done_callback(_on_end)

    def of(self, role: Role) -> list[Linked]:
        """The workers of a role that take requests."""
        return [linked for linked in self.workers.values() if linked.welcome.role is role]

    async def close(self) -> None:
        """Leaves all workers; they cancel what they still have of this router."""
        # A call that fails in the same moment may swallow the cancel: its link ends by this.
        self._listed = dict.fromkeys(self._listed, frozenset())
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep(self, role: Role, address: str) -> None:
        """Attaches to the worker there, again and again."""
        delay, said = _LEAST_BACKOFF_S, ""
        while address in self._listed[role]:
            link = _Link(self, role, address)
            error = await link.attach()
            reason = _reason(error)
            if link.linked is not None:
                delay, said = _LEAST_BACKOFF_S, ""
            if not isinstance(error, ValueError):  # else it is there, and does not fit
                self._weights.pop((role, address), None)
            if reason.endswith(STARTING):  # which it will not be for long
                delay = _LEAST_BACKOFF_S
            if reason != said:  # once, not at every try
                # That a worker is not there yet, or has left, is no error.
                away = link.linked is None and isinstance(error, grpc.aio.AioRpcError)
                mild = away or isinstance(error, ConnectionError)
                log.log(
                    logging.WARNING if mild else logging.ERROR,
                    *("%s worker at %s: %s", role.value, address, reason),
                    exc_info=None if isinstance(error, _KNOWN) else error,
                )
            said = reason
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MOST_BACKOFF_S)
        self._weights.pop((role, address), None)

    # What a link tells.

    def join(self, link: "_Link", peer: Peer, linked: Linked) -> None:
        """The worker takes requests from now on."""
        self._links.add(link)
        self.router.join(peer)
        self.workers[linked.id] = linked
        log.info("%s worker at %s joined", peer.role.value, linked.address)
        if (prefill := self.of(Role.PREFILL)) and (decode := self.of(Role.DECODE)):
            self.router.fleet.cost = replace(prefill[0].cost, decode=decode[0].cost.decode)
        self._on_change()

    def left(self, link: "_Link") -> None:
        """The call to a worker that had joined is over."""
        self._links.discard(link)

    def part(self, id: str) -> None:
        """The worker takes no more requests."""
        if self.workers.pop(id, None):
            self._on_change()

    def check(self, welcome: Welcome, role: Role, address: str) -> None:
        """Raises ValueError that says what of a worker does not fit, and to what."""
        config, limits = self._config, welcome.limits
        codec.check_version(welcome.version, welcome.version)
        for what, theirs, ours in (
            ("role", welcome.role.value, role.value),
            ("model", welcome.model, config.name),
            ("dtype", welcome.dtype, config.dtype),
            ("page_size", limits.page_size, config.page_size),
        ):
            if theirs != ours:
                raise ValueError(f"its {what} is {theirs!r}, and this router is for {ours!r}")
        if limits.max_context < config.max_context:
            raise ValueError(
                f"its max_context is {limits.max_context}, below this router's {config.max_context}"
            )
        for other in self.workers.values():
            if other.welcome.incarnation == welcome.incarnation:
                raise ValueError(f"it is linked already, at {other.address}")
        self._weights[role, address] = welcome.fingerprint
        self._check_weights(welcome.fingerprint)

    def _check_weights(self, mine: str) -> None:
        """The weights that most workers have are served. Raises ValueError for a worker of others;
        where its weights are those of most, the workers that are linked leave.
        """
        others = [each for each in self._links if each.weights != mine]
        if not others:
            return
        served = others[0].weights
        votes = Counter(self._weights.values())
        if votes[mine] <= votes[served]:
            # A router reads no weights, so it cannot tell which are those of its model.
            tie = "; as many have either, so those that linked first are served: end the others"
            raise ValueError(
                f"its weights ({mine}) are those of {votes[mine]} workers, and {served}, of "
                f"{votes[served]} workers, are served{tie if votes[mine] == votes[served] else ''}"
            )
        for link in others:
            link.refuse(
                f"its weights ({served}) are those of {votes[served]} workers, and {mine}, of "
                f"{votes[mine]} workers, are served from now on"
            )


class _Link:
    """One call to one worker: from Hello until either side is gone."""

    def __init__(self, links: Links, role: Role, address: str):
        self.linked: Linked | None = None
        self.status: Status | None = None
        self._aboard: tuple[str, ...] | None = None  # see Died
        self._heartbeat = Heartbeat(links.heartbeat_s, links.hang_s)
        self._links, self._role, self._address = links, role, address
        self._outbox: asyncio.Queue[Message | Ping] = asyncio.Queue()
        self._refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def weights(self) -> str:
        """Fingerprint of those that its worker has; "" before it has joined."""
        return self.linked.welcome.fingerprint if self.linked else ""

    def refuse(self, reason: str) -> None:
        """Ends the call: its worker does not fit any more."""
        if not self._refused.done():
            self._aboard = ()  # none of its requests has to do with it
            self._refused.set_exception(ValueError(reason))

    async def attach(self) -> Exception:
        """Returns why it could not be, or why it is over; a peer that had joined has died then."""
        net = self._links.net
        async with net.channel(self._address, _OPTIONS) as channel:
            call = internal_pb2_grpc.WorkerStub(channel).Attach(metadata=net.metadata)
            try:
                await self._go_on(call, await self._greet(call))
            except Exception as error:
                self._lost(error)
                return error
            finally:
                call.cancel()
        raise AssertionError("it goes on until it fails")

    async def _greet(self, call: Any) -> Linked:
        """Hello, Welcome, and the first outline; then the worker joins."""
        links = self._links
        hello = Hello(links.identity, codec.VERSION, codec.OLDEST)
        async with asyncio.timeout(_WELCOME_S):
            await call.write(codec.encode(hello, 0.0))
            welcome = codec.decode(await _read(call), Sender())
            if not isinstance(welcome, Welcome):
                raise ValueError(f"a Hello was answered by a {type(welcome).__name__}")
            links.check(welcome, self._role, self._address)
            cost = CostModel.from_profile(welcome.profile, welcome.does.jobs)
            linked = Linked(self._address, welcome, cost)
            said = await _read(call)
        first = codec.decode(said, Sender(links.clock(), linked.id, welcome.does))
        if not isinstance(first, Outlined):
            raise ValueError(f"its Welcome was followed by a {type(first).__name__}")
        limits = linked.welcome.limits
        peer = Peer(
            linked.id,
            welcome.does,
            self._outbox.put_nowait,
            cost,
            first.summary,
            limits.kv_tokens,
            limits.page_size if linked.welcome.prefix_cache else 0,
            lambda: self.status,
        )
        self.linked = linked
        links.join(self, peer, linked)
        return linked

    async def _go_on(self, call: Any, linked: Linked) -> None:
        await first_of(
            self._listen(call, linked),
            self._speak(call),
            self._heartbeat.lost(lambda: self._outbox.put_nowait(Ping())),
            self._until_refused(),
        )

    async def _until_refused(self) -> None:
        await self._refused

    async def _listen(self, call: Any, linked: Linked) -> None:
        """Passes events on to the router until there are no more."""
        links, role = self._links, linked.welcome.does
        while (said := await call.read()) is not EOF:
            self._heartbeat.heard()
            match codec.decode(said, Sender(links.clock(), linked.id, role)):
                case Pong(status):
                    self.status = status
                case Welcome():
                    raise ValueError("a Welcome came, which only answers a Hello")
                case Died(_, error, aboard):
                    self._aboard = aboard
                    raise error
                case event:
                    if isinstance(event, Draining):
                        links.part(linked.id)
                    links.router.emit(event)
        raise ConnectionError("it has left")

    async def _speak(self, call: Any) -> None:
        while True:
            message = await self._outbox.get()
            try:
                await call.write(codec.encode(message, self._links.clock()))
            except asyncio.InvalidStateError:  # the call is over: its reader learns why
                await asyncio.Event().wait()

    def _lost(self, error: Exception) -> None:
        if self.linked is not None:
            self._links.left(self)
            self._links.part(self.linked.id)
            stood_still = self._aboard is None and self._heartbeat.stalled
            died = Died(self.linked.id, error, self._aboard, stood_still)
            self._links.router.emit(died)


async def _read(call: Any) -> pb.FromWorker:
    said = await call.read()
    if said is EOF:
        raise ConnectionError("it has left")
    return said


def _on_end(task: asyncio.Task[None]) -> None:
    """No link ends unheard."""
    if not task.cancelled() and (error := task.exception()):
        log.error("a link to a worker has ended by an error", exc_info=error)


def _reason(error: Exception) -> str:
    """One line of a call's error, which would be a page."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, TimeoutError):
        return str(error) or f"it did not answer within {_WELCOME_S:g} s"
    return str(error) or type(error).__name__
