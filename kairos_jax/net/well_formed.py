"""Reads the messages of gRPC calls, where gRPC itself would leave a client without a clear answer.

For bytes that are no message of the method, gRPC's server writes a traceback into the log and says
UNKNOWN; a call that should have a message and has none, it never ends; and for one that does not
come it waits without end, and keeps what has come of it.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

# What `read` of a call gives when there is no more.
EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
# For the one message of a call.
MESSAGE_S = 60.0
# Calls that wait for theirs at once, of those whose handlers do not see to that.
_MOST_WAITING = 256


class WellFormed(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a message that cannot be read, and to a call without one. Bounds
    how long a call may take over its one message, and how many do so. A handler without a
    deserializer reads by itself, with `read_message`.
    """

    def __init__(self) -> None:
        self._num_waiting = 0

    async def intercept_service(self, continuation, handler_call_details):
        """See gRPC."""
        handler = await continuation(handler_call_details)
        # All kinds take a stream here, as only that shows that it has ended without a message.
        if handler is None or handler.request_deserializer is None:
            return handler
        written = handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(handler), None, written)
        return grpc.stream_unary_rpc_method_handler(self._unary(handler), None, written)

    def _unary(self, handler):
        async def answer(raw, context):
            if handler.request_streaming:
                return await handler.stream_unary(_all(handler, raw, context), context)
            return await handler.unary_unary(await self._one(handler, context), context)

        return answer

    def _streaming(self, handler):
        async def answer(raw, context) -> None:
            if handler.request_streaming:
                said = handler.stream_stream(_all(handler, raw, context), context)
            else:
                said = handler.unary_stream(await self._one(handler, context), context)
            if not inspect.isasyncgen(said):
                return await said
            async for response in said:
                await context.write(response)

        return answer

    async def _one(self, handler, context):
        if self._num_waiting >= _MOST_WAITING:
            why = f"{_MOST_WAITING} calls have not sent their message yet, the most at once"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._num_waiting += 1
        try:
            return await read_message(handler.request_deserializer, context)
        finally:
            self._num_waiting -= 1


# By `read`, as a stream that is not iterated to its end is left to the garbage collector.
async def read_message(deserialize: Callable[[bytes], Any], context) -> Any:
    """The one message of a call, which is aborted where none comes in time."""
    try:
        async with asyncio.timeout(MESSAGE_S):
            raw = await context.read()
    except TimeoutError:
        why = f"the message did not come within {MESSAGE_S:g} s"
        return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, why)
    if raw is EOF:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    return await _message(deserialize, raw, context)


async def _all(handler, raw: AsyncIterator[bytes], context):
    async for each in raw:
        yield await _message(handler.request_deserializer, each, context)


async def _message(deserialize: Callable[[bytes], Any], raw: bytes, context):
    try:
        return deserialize(raw)
    except DecodeError as error:
        code, why = grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be read: {error}"
        await context.abort(code, why)
