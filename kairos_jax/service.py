"""The gRPC service kairos.v1.Kairos, with health and reflection beside it."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection
from starlette.routing import BaseRoute

from kairos_jax.calls import PromptLogprobs, Token
from kairos_jax.channels import PLAIN, Wire
from kairos_jax.command import UsageError
from kairos_jax.discovery import join_address
from kairos_jax.edge import BadField, UnknownModel
from kairos_jax.gate import Backend, Closed, Gate
from kairos_jax.health import Health
from kairos_jax.http_server import HttpOptions, HttpServer
from kairos_jax.live import Live
from kairos_jax.messages import Output
from kairos_jax.openai_api import make_app
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc
from kairos_jax.streams import Full, IdInUse, Stream, WorkerLost
from kairos_jax.tokenizer import Detokenizer
from kairos_jax.tracing import trace_of

SERVICE = "kairos.v1.Kairos"
MAX_MESSAGE_BYTES = 4 << 20
# Prompt tokens a message: with 20 alternatives each, 250 KB of the 4 MiB that clients take.
_PROMPT_PART = 1000

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class Servicer(kairos_pb2_grpc.KairosServicer):
    """Reads requests and writes answers; the backend's router does the rest."""

    def __init__(self, gate: Gate):
        self.gate = gate

    async def GetModel(self, request: pb.GetModelRequest, context) -> pb.Model:
        """See kairos.proto."""
        return (await self._entered(context, self.gate.enter)).model

    async def Generate(self, request: pb.GenerateRequest, context) -> None:
        """See kairos.proto."""
        arrival = self.gate.clock()
        backend = await self._entered(context, self.gate.admit)
        try:
            backend.router.check_room()
            # In a thread: a long text takes the tokenizer longer than others should wait.
            checked = await asyncio.to_thread(backend.edge.request, request, arrival)
            await self._entered(context, self.gate.admit)  # it may have closed meanwhile
            trace = trace_of(context.invocation_metadata() or ())
            stream = backend.router.submit(checked, trace)
        except UnknownModel as error:
            backend.router.metrics.rejected("unknown_model")
            await context.abort(grpc.StatusCode.NOT_FOUND, _cut(error))
        except BadField as error:
            backend.router.metrics.rejected("bad_request")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _cut(error))
        except IdInUse as error:
            backend.router.metrics.rejected("id_in_use")
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, _cut(error))
        except Full as error:
            retry = (("retry-after-s", f"{error.retry_after_s:.3g}"),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _cut(error), retry)
        except WorkerLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, _cut(error))
        else:
            await _answer(backend, stream, context)

    async def _entered(self, context, enter: Callable[[], Backend]) -> Backend:
        try:
            return enter()
        except Closed as error:
            return await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


async def _answer(backend: Backend, stream: Stream, context) -> None:
    tokenizer = backend.edge.tokenizer
    detokenizer = Detokenizer(tokenizer) if tokenizer else None
    ended = False
    try:
        while not ended:
            # All that wait go out together: a message costs far more than a token.
            outputs = await stream.take()
            ended = outputs[-1].finish_reason is not None
            if (prompt := outputs[0].token.prompt) is not None:
                for part in _of_prompt(stream, prompt):
                    await context.write(part)
            response = _response(stream, outputs, detokenizer)
            if ended:
                _finish(response, stream)
            await context.write(response)
    except WorkerLost as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, _cut(error))
    finally:
        # Where the client went away, or its deadline passed, this task was cancelled.
        backend.router.cancel(stream)


def _cut(error: Exception) -> str:
    """The message, which may quote the client, within what gRPC carries in a status."""
    text = str(error)
    return text if len(text) <= 1000 else text[:1000] + "..."


def _of_prompt(stream: Stream, logprobs: PromptLogprobs) -> Iterator[pb.GenerateResponse]:
    tokens = logprobs.tokens(stream.request.prompt)
    while part := list(itertools.islice(tokens, _PROMPT_PART)):
        entries = [_logprobs(token) for token in part]
        yield pb.GenerateResponse(request_id=stream.name, prompt_logprobs=entries)


def _response(
    stream: Stream, outputs: Sequence[Output], detokenizer: Detokenizer | None
) -> pb.GenerateResponse:
    ids = [output.token.id for output in outputs]
    response = pb.GenerateResponse(request_id=stream.name, token_ids=ids)
    if detokenizer:
        response.text_delta = detokenizer.push(ids)
        if outputs[-1].finish_reason:
            response.text_delta += detokenizer.flush()
    if outputs[0].token.logprob is not None:
        response.logprobs.extend(_logprobs(output.token) for output in outputs)
    return response


def _logprobs(token: Token) -> pb.TokenLogprobs:
    top = [pb.Alternative(token_id=id, logprob=value) for id, value in token.top]
    return pb.TokenLogprobs(token_id=token.id, logprob=token.logprob, top=top)


def _finish(response: pb.GenerateResponse, stream: Stream) -> None:
    timing = stream.timing()
    assert stream.finish_reason is not None
    response.finish_reason = _FINISH[stream.finish_reason]
    response.usage.prompt_tokens = len(stream.request.prompt)
    response.usage.completion_tokens = len(stream.tokens)
    response.usage.cached_tokens = stream.cached_tokens
    response.timing.CopyFrom(
        pb.Timing(
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            transfer_s=timing.transfer_s or 0.0,
            ttft_s=timing.ttft_s,
            tpot_s=timing.tpot_s or 0.0,
            total_s=timing.total_s,
            ttft_met=timing.ttft_met,
            tpot_met=timing.tpot_met,
        )
    )


class Server:
    """The gRPC server, and the HTTP server beside it. Health says NOT_SERVING until `open`, and
    again from `drain` on. http: None where there is none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        clock: Callable[[], float],
        net: Wire = PLAIN,
        health_port: int = 0,
        http: HttpOptions | None = None,
        routes: Sequence[BaseRoute] = (),
    ):
        """Raises UsageError if an address cannot be listened on.

        port: 0 for any free one. health_port: for health alone, without TLS; 0 for none. routes: of
        HTTP, beside those of the API and the live page.
        """
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
        ]
        self._grpc = grpc.aio.server(options=options)
        self.gate, self._draining = Gate(clock), False
        kairos_pb2_grpc.add_KairosServicer_to_server(Servicer(self.gate), self._grpc)
        try:  # first: what is wrong with the host is wrong with all the ports
            self.port = net.add_port(self._grpc, host, port)
        except OSError as error:
            raise UsageError(f"--host={host} --port={port}: {error}") from error
        self._health = Health(self._grpc, SERVICE, host, health_port)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self.address = join_address(host, self.port)
        self._live = Live(self.gate)
        self.http = None
        if http:
            app = make_app(self.gate, http.app, [*self._live.routes(), *routes])
            self.http = HttpServer(app, host, http.port, net)

    @property
    def addresses(self) -> str:
        """Where it listens, in words; gRPC last."""
        http = f"HTTP on {self.http.address}, " if self.http else ""
        return f"{http}gRPC on {self.address}"

    async def start(self) -> None:
        """Listens; requests are answered UNAVAILABLE until `open`."""
        await self._health.say(serving=False)
        await self._grpc.start()
        await self._health.listen()
        if self.http:
            await self.http.start()

    async def open(self, backend: Backend) -> None:
        """Serves, until `shut`, and again after; not any more once it drains."""
        if self._draining:
            return
        self.gate.backend, self.gate.closed = backend, None
        await self._health.say(serving=True)

    async def shut(self, reason: str) -> None:
        """Answers UNAVAILABLE with this reason; requests in progress go on."""
        if self._draining:
            return
        self.gate.closed = reason
        await self._health.say(serving=False)

    async def drain(self, grace_s: float) -> bool:
        """Takes no new requests, waits for those in progress, and stops listening. After `grace_s`
        seconds it ends those that are left. True if there were none.
        """
        self._draining, self.gate.closed = True, "the server is draining"
        await self._health.say(serving=False)
        drained = True
        if self.gate.backend and self.gate.backend.router.num_streams:
            try:
                await asyncio.wait_for(self.gate.backend.router.drained(), grace_s)
            except TimeoutError:
                drained = False
        self._live.close()
        # The last answers may still be on their way out.
        stops = [self._grpc.stop(grace=1.0 if drained else 0.0)]
        if self.http:
            stops.append(self.http.stop(grace_s=1 if drained else 0))
        await asyncio.gather(*stops)
        await self._health.close()
        return drained
