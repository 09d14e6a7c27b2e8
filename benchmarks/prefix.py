"""What the prefix cache takes off the time to the first token and off what is sent to be decoded,
and what it costs where it finds nothing.

  python benchmarks/prefix.py [--prefix_tokens=500] [--tail_tokens=12] [--rounds=9] [--output=json]
      [-- --config.prefill.max_chunk=256 ...]

Two servers, with the cache and without, asked in turns, one request at a time. Each round: a prompt
that is new from its first token on, and one that begins with the tokens that all rounds begin with.
Medians of what a client sees and of the KV that moved for it, and that the tokens of both servers
are the same. What stands after "--" goes to the servers.
"""

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import processes
from clients import stub_of
from prometheus_client.parser import text_string_to_metric_families

from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc

_CONFIG = flags.DEFINE_string("config", "configs/smollm2_135m_cpu.py", "Of the servers.")
_MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "Of the servers.")
_PREFIX = flags.DEFINE_integer("prefix_tokens", 500, "Tokens that are repeated.", 1)
_TAIL = flags.DEFINE_integer("tail_tokens", 12, "New tokens after them.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds that count.", 1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

SERVERS = {"cache": True, "no cache": False}
PROMPTS = ("new", "repeated")
_NUM_OUT = 4
_VOCAB = 256  # which all models have
_START_S = 600.0  # for a first start, which compiles and measures


@dataclass(frozen=True, slots=True)
class Answer:
    """first_s: to the first token. cached: tokens of the prompt. kv_bytes: that moved for it."""

    first_s: float
    cached: int
    kv_bytes: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Server:
    """http: where its metrics are."""

    process: processes.Process
    http: str

    @classmethod
    def start(cls, *arguments: str) -> "Server":
        """Returns before it serves."""
        process = processes.Process(
            *("serve", *arguments), env=os.environ, config=_CONFIG.value, model=_MODEL.value
        )
        _, _, addresses = process.line("starting", _START_S).partition("HTTP on ")
        return cls(process, addresses.partition(",")[0])

    def received_bytes(self) -> int:
        """KV that was brought to decode so far."""
        with urllib.request.urlopen(f"http://{self.http}/metrics") as page:
            text = page.read().decode()
        name = "kairos_kv_received_bytes_total"
        families = text_string_to_metric_families(text)
        return int(next(s.value for each in families for s in each.samples if s.name == name))


async def ask(server: Server, stub: kairos_pb2_grpc.KairosStub, prompt: Sequence[int]) -> Answer:
    """One request."""
    before = server.received_bytes()
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        max_tokens=_NUM_OUT,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
        slo=pb.Slo(ttft_s=_START_S, tpot_s=_START_S),
    )
    begin, first_s, ids, last = time.monotonic(), None, [], pb.GenerateResponse()
    async for last in stub.Generate(request):
        ids += last.token_ids
        if ids and first_s is None:
            first_s = time.monotonic() - begin
    assert first_s is not None
    moved = server.received_bytes() - before
    return Answer(first_s, last.usage.cached_tokens, moved, tuple(ids))


async def measure(servers: dict[str, Server]) -> list[dict[str, Any]]:
    """A row for each server and kind of prompt; a round before is not counted."""
    rng = random.Random(0)

    def fresh(count: int) -> list[int]:
        return [rng.randrange(4, _VOCAB) for _ in range(count)]

    prefix = fresh(_PREFIX.value)
    found: dict[tuple[str, str], list[Answer]] = {}
    async with contextlib.AsyncExitStack() as stack:
        stubs = {
            name: await stack.enter_async_context(stub_of(server.process))
            for name, server in servers.items()
        }
        for _ in range(_ROUNDS.value + 1):
            tail = fresh(_TAIL.value)
            prompts = dict(zip(PROMPTS, (fresh(len(prefix)) + tail, prefix + tail), strict=True))
            for kind, prompt in prompts.items():
                for name, stub in stubs.items():
                    answer = await ask(servers[name], stub, prompt)
                    found.setdefault((name, kind), []).append(answer)
    for kind in PROMPTS:
        one, other = ([each.ids for each in found[name, kind]] for name in SERVERS)
        if one != other:
            raise RuntimeError(f"the tokens after {kind} prompts differ: {one} and {other}")
    rows = []
    for (name, kind), (_, *rounds) in found.items():
        seconds = [each.first_s for each in rounds]
        rows.append(
            {
                "server": name,
                "prompt": kind,
                "cached_tokens": statistics.median(each.cached for each in rounds),
                "kv_bytes": statistics.median(each.kv_bytes for each in rounds),
                "ttft_s": statistics.median(seconds),
                "least_s": min(seconds),
                "most_s": max(seconds),
            }
        )
    return rows


def text(result: dict[str, Any]) -> str:
    """A line a row."""
    lines = [
        f"{result['prefix_tokens']} + {result['tail_tokens']} prompt tokens, "
        f"{result['rounds']} rounds, load {result['load_average']}",
        f"{'server':10}{'prompt':10}  cached  KV moved   first token (least, most)",
    ]
    lines += [
        f"{row['server']:10}{row['prompt']:10}{row['cached_tokens']:8.0f}"
        f"{row['kv_bytes'] / 2**20:6.2f} MiB"
        f"  {row['ttft_s']:.3f} s ({row['least_s']:.3f}, {row['most_s']:.3f})"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Starts both servers, measures, and prints what came out."""
    servers: dict[str, Server] = {}
    try:
        for name, cache in SERVERS.items():
            options = [f"--config.{part}.prefix_cache={cache}" for part in ("prefill", "decode")]
            servers[name] = Server.start(*options, *argv[1:])
            servers[name].process.ready(_START_S)
        rows = asyncio.run(measure(servers))
    finally:
        for server in servers.values():
            server.process.end()
    result = {
        "prefix_tokens": _PREFIX.value,
        "tail_tokens": _TAIL.value,
        "rounds": _ROUNDS.value,
        "rows": rows,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result, indent=1) if _OUTPUT.value == "json" else text(result), flush=True)


if __name__ == "__main__":
    app.run(main)
