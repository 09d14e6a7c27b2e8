"""Errors as clients are told them, whatever they quote."""

import fakes
import grpc
import pytest

from kairos_jax.api.refusal import message_of


@pytest.mark.parametrize("character", ["x", "%", "\n", "é", "語", "\U0001f600"])
def test_an_error_that_quotes_a_long_text_reaches_its_client(character):
    """gRPC sends three bytes for one of UTF-8 that is not ASCII, and clients take 8 KiB or more."""

    @fakes.served_as(fakes.CONFIG)
    async def test(harness):
        name = character * 5000
        whole = ValueError(f"model {name!r} is not served here; 'fake' is")
        for _ in range(8):  # From 8 to 16 KiB it is left to chance what clients take.
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await harness.generate([1], 1, model=name)
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            assert error.value.details() == message_of(whole)

    test()


@pytest.mark.parametrize(("text", "length"), [("x" * 1000, 1000), ("x" * 1001, 1003)])
def test_an_error_is_cut_where_it_is_long(text, length):
    assert len(message_of(ValueError(text))) == length


@pytest.mark.parametrize(("text", "length"), [("é" * 500, 500), ("é" * 501, 503)])
def test_it_is_cut_earlier_where_it_is_not_ascii(text, length):
    assert len(message_of(ValueError(text))) == length
