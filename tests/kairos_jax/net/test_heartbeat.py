"""When the other side counts as lost."""

import asyncio

import pytest

from kairos_jax.net.heartbeat import Heartbeat, first_of


def test_silence_beyond_the_limit_ends_it_with_a_beat_each_period():
    beats = []

    async def main():
        with pytest.raises(TimeoutError, match=r"nothing came from it for 0\.05 s"):
            await asyncio.wait_for(Heartbeat(0.01, 0.05).lost(lambda: beats.append(None)), 10)

    asyncio.run(main())
    assert 3 <= len(beats) <= 5


def test_what_is_heard_keeps_it_going():
    async def main():
        heartbeat, beats = Heartbeat(0.01, 0.03), 0

        def answered():
            nonlocal beats
            beats += 1
            if beats < 20:
                heartbeat.heard()

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(heartbeat.lost(answered), 10)
        assert beats >= 20

    asyncio.run(main())


def test_a_stall_of_ones_own_is_no_silence_of_the_other(monkeypatch):
    now = 0.0

    async def sleep(seconds):
        nonlocal now
        now += 100.0

    monkeypatch.setattr("kairos_jax.net.heartbeat.time.monotonic", lambda: now)
    monkeypatch.setattr("kairos_jax.net.heartbeat.asyncio.sleep", sleep)
    beats = []
    with pytest.raises(TimeoutError):
        asyncio.run(Heartbeat(0.25, 2.0).lost(lambda: beats.append(None)))
    assert len(beats) == 4


def test_a_stall_of_ones_own_is_known_for_as_long_as_it_may_matter(monkeypatch):
    now, naps = 0.0, [0.25, 0.3, 100.0, 0.25, 1.0, 1.0]
    known = []

    async def sleep(seconds):
        nonlocal now
        for part in (0.1, 0.9):  # looked at amid the nap, and when it is over
            now += part * naps[0]
            known.append(heartbeat.stalled)
        naps.pop(0)

    monkeypatch.setattr("kairos_jax.net.heartbeat.time.monotonic", lambda: now)
    monkeypatch.setattr("kairos_jax.net.heartbeat.asyncio.sleep", sleep)
    heartbeat = Heartbeat(0.25, 2.0)

    def beat():
        heartbeat.heard()
        if not naps:
            raise EOFError

    with pytest.raises(EOFError):
        asyncio.run(heartbeat.lost(beat))
    # The long one shows as soon as it is longer than the limit, and until the limit after it.
    assert known == [*[False] * 4, *[True] * 7, False]


def test_first_of_ends_the_others_and_raises_what_ended_it():
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fails():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(first_of(forever(), fails()))
    assert ended == [True]
