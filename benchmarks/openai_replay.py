"""Replays a workload to an OpenAI-style completions server, as kairos_jax.lab.replay does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np

from kairos_jax.lab.replay import Received
from kairos_jax.rpc import kairos_pb2
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival


async def replay(
    address: str,
    arrivals: Sequence[Arrival],
    slo: Slo,
    vocab_size: int,
    seed: int = 0,
    timeout_s: float = 600.0,
) -> list[Outcome]:
    """An outcome for each arrival, in their order. The prompts are those of `kairos_jax.lab.replay`
    for the same seed; greedy, end of sequence ignored; TTFT counts from the scheduled time.

    The client is a bare one, on purpose: it runs on the cores of the server that it measures.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(vocab_size, size=a.num_prompt).tolist() for a in arrivals]
    start = time.monotonic()

    async def run(arrival: Arrival, prompt: list[int]) -> Outcome:
        received = Received()
        await asyncio.sleep(start + arrival.at - time.monotonic())
        try:
            async with asyncio.timeout(timeout_s):
                async for ids in _tokens(address, prompt, arrival.num_output):
                    received.token_times += [time.monotonic()] * len(ids)
            received.last = kairos_pb2.GenerateResponse()
        except (OSError, EOFError, ValueError):
            pass  # counts as a failed request
        return received.outcome(slo, arrival.at, start, arrival.num_output)

    return await asyncio.gather(*map(run, arrivals, prompts))


async def _tokens(address: str, prompt: list[int], num_output: int) -> AsyncIterator[list[int]]:
    """The token ids of each event of a streamed completion.

    Raises:
        ValueError: the server refused. EOFError, OSError: it broke off.
    """
    host, port = address.rsplit(":", 1)
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise ValueError(status.split(b"\r\n", 1)[0].decode(errors="replace"))
        async for event in _events(reader):
            if event == b"[DONE]":
                return
            message = json.loads(event)
            if "error" in message:
                raise ValueError(message["error"])
            for choice in message["choices"]:
                yield choice["token_ids"] or []
    finally:
        writer.close()
    raise EOFError("the stream ended without [DONE]")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Data of each server-sent event of a chunked body."""
    text = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        text += (await reader.readexactly(size + 2))[:-2]
        *whole, text = text.split(b"\n\n")
        for event in whole:
            yield event.removeprefix(b"data:").strip()
