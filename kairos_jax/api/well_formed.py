"""Reads the messages of gRPC calls, where gRPC itself would leave a client without a clear answer.

For bytes that are no message of the method, gRPC's server writes a traceback into the log and says
UNKNOWN; a call that should have a message and has none, it never ends.
"""

import inspect
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError


class WellFormed(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a message that cannot be read, and to a call without one."""

    async def intercept_service(self, continuation, handler_call_details):
        """See gRPC."""
        handler = await continuation(handler_call_details)
        # All kinds take a stream here, as only that shows that it has ended without a message.
        if handler is None:
            return None
        written = handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_streaming(handler), None, written)
        return grpc.stream_unary_rpc_method_handler(_unary(handler), None, written)


def _unary(handler):
    async def answer(raw, context):
        if handler.request_streaming:
            return await handler.stream_unary(_all(handler, raw, context), context)
        return await handler.unary_unary(await _one(handler, context), context)

    return answer


def _streaming(handler):
    async def answer(raw, context) -> None:
        if handler.request_streaming:
            said = handler.stream_stream(_all(handler, raw, context), context)
        else:
            said = handler.unary_stream(await _one(handler, context), context)
        if not inspect.isasyncgen(said):
            return await said
        async for response in said:
            await context.write(response)

    return answer


# By `read`, as a stream that is not iterated to its end is left to the garbage collector.
async def _one(handler, context):
    raw = await context.read()
    if not isinstance(raw, bytes):  # the mark of its end
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    return await _message(handler, raw, context)


async def _all(handler, raw: AsyncIterator[bytes], context):
    async for each in raw:
        yield await _message(handler, each, context)


async def _message(handler, raw: bytes, context):
    try:
        return handler.request_deserializer(raw)
    except DecodeError as error:
        code, why = grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be read: {error}"
        await context.abort(code, why)
