"""What asks a process that serves to end."""

import asyncio
import signal

import pytest

from kairos_jax.process import lifecycle


@pytest.fixture
def hangup():
    """Sets what SIGHUP does."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


async def asked(*signs):
    loop = asyncio.get_running_loop()
    stop = lifecycle.asked_to_stop()
    try:
        for sign in signs:
            signal.raise_signal(sign)
        return await asyncio.wait_for(stop, 30)
    finally:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(sign)


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGHUP, 1)]
)
def test_a_signal_asks_it_to_end(sign, code, hangup):
    hangup(signal.SIG_DFL)
    assert asyncio.run(asked(sign)) == code


def test_a_hangup_that_is_ignored_stays_so(hangup):
    hangup(signal.SIG_IGN)
    assert asyncio.run(asked(signal.SIGHUP, signal.SIGINT)) == 130
