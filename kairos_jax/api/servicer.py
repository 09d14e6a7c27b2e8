"""The gRPC service kairos.v1.Kairos: reads requests, and writes answers."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import grpc

from kairos_jax.api.backend import Backend
from kairos_jax.api.gate import Closed, Gate
from kairos_jax.api.refusal import BadField, UnknownModel, message_of
from kairos_jax.api.slots import WRITE_S, Slot
from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.net.well_formed import read_message
from kairos_jax.observe.tracing import trace_of
from kairos_jax.process.logs import of_request
from kairos_jax.routing.fleet import Full, WorkerLost
from kairos_jax.routing.router import IdInUse
from kairos_jax.routing.stream import RequestFailed, Stream
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text.detokenizer import Detokenizer
from kairos_jax.worker.messages import Output

log = logging.getLogger(__name__)

SERVICE = "kairos.v1.Kairos"
MAX_MESSAGE_BYTES = 4 << 20
# In which the message of a call comes, where nothing keeps it.
_WITH_HEAD_S = 0.25
# Log-probabilities of a prompt in a message: some 10 ms of work.
_PROMPT_PART = 1000

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class Servicer:
    """Reads requests and writes answers; the backend's router does the rest."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has a server answer by it."""
        handlers = {
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.GetModel, pb.GetModelRequest.FromString, pb.Model.SerializeToString
            ),
            # Reads its one message by itself, once it has a slot for it.
            "Generate": grpc.stream_stream_rpc_method_handler(
                self.Generate, None, pb.GenerateResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def GetModel(self, request: pb.GetModelRequest, context) -> pb.Model:
        """See kairos.proto."""
        return (await self._entered(context, self.gate.enter)).model

    async def Generate(self, raw: object, context) -> None:
        """See kairos.proto."""
        arrival = self.gate.clock()
        backend = await self._entered(context, self.gate.admit)
        try:
            with self.gate.slots.take() as slot:
                request = await _message(context, slot)
                stream = await self._submit(backend, request, arrival, context)
                slot.hold_body(0)
                await _answer(backend, stream, context)
        except UnknownModel as error:
            backend.router.rejected("unknown_model")
            await context.abort(grpc.StatusCode.NOT_FOUND, message_of(error))
        except BadField as error:
            backend.router.rejected("bad_request")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message_of(error))
        except IdInUse as error:
            backend.router.rejected("id_in_use")
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, message_of(error))
        except Full as error:
            retry = (("retry-after-s", f"{error.retry_after_s:.3g}"),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message_of(error), retry)
        except WorkerLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, message_of(error))

    async def _submit(
        self, backend: Backend, request: pb.GenerateRequest, arrival: float, context
    ) -> Stream:
        template = request.chat.template if request.chat.HasField("template") else None
        lane = backend.validator.lane(request.ByteSize(), template)
        checked = await self.gate.slots.tokenize(
            lambda: backend.validator.request(request, arrival), lane
        )
        await self._entered(context, self.gate.admit)  # it may have closed since
        return backend.router.submit(checked, trace_of(context.invocation_metadata() or ()))

    async def _entered(self, context, enter: Callable[[], Backend]) -> Backend:
        try:
            return enter()
        except Closed as error:
            return await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


async def _message(context, slot: Slot) -> pb.GenerateRequest:
    """The message of a call. What of it has come is not known: one that does not come with its head
    counts as the longest. Raises Full.
    """
    reading = asyncio.ensure_future(read_message(pb.GenerateRequest.FromString, context))
    try:
        await asyncio.wait({reading}, timeout=_WITH_HEAD_S)
        if not reading.done():
            slot.hold_body(MAX_MESSAGE_BYTES)
        request = await reading
    finally:
        reading.cancel()
    slot.hold_body(request.ByteSize())
    return request


async def _answer(backend: Backend, stream: Stream, context) -> None:
    tokenizer = backend.validator.tokenizer
    detokenizer = Detokenizer(tokenizer, stream.request.prompt) if tokenizer else None
    ended = False
    try:
        while not ended:
            # All that wait go out together: a message costs far more than a token.
            outputs = await stream.take()
            ended = outputs[-1].finish_reason is not None
            if (prompt := outputs[0].token.prompt) is not None:
                for part in _of_prompt(stream, prompt):
                    await _write(context, part)
            response = _response(stream, outputs, detokenizer)
            if ended:
                _finish(response, stream)
            await _write(context, response)
            await asyncio.sleep(0)  # others have their turn, where more is there already
    except WorkerLost as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, message_of(error))
    except RequestFailed as error:
        await context.abort(grpc.StatusCode.INTERNAL, message_of(error))
    except TimeoutError:
        why = f"the client has read nothing of its answer for {WRITE_S:g} s"
        log.warning("%s: it is cut off", why, extra=of_request(stream.name))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
    finally:
        # Where the client went away, or its deadline passed, this task was cancelled.
        backend.router.cancel(stream)


async def _write(context, response: pb.GenerateResponse) -> None:
    """Raises TimeoutError where the client does not read."""
    async with asyncio.timeout(WRITE_S):
        await context.write(response)


def _of_prompt(stream: Stream, logprobs: PromptLogprobs) -> Iterator[pb.GenerateResponse]:
    tokens = logprobs.tokens(stream.request.prompt)
    how = stream.request.sampling
    alternatives = (how.prompt_logprobs or 0) if how else 0
    most = max(1, _PROMPT_PART // (1 + alternatives))
    while part := list(itertools.islice(tokens, most)):
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
