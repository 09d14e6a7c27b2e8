"""What the way of the KV from prefill to decode adds to the first tokens of a request.

  python benchmarks/handover.py [--prompt_tokens=1900] [--rounds=7] [--output=json]
      [-- --config.prefill.max_chunk=256 ...]

One server for each way, one after the other, and one request at a time: in one process (`local`),
and as a router, a prefill and a decode worker, with KV by the `jax` and by the `grpc` transport.
"chunks" hands a prompt over while it is computed, part by part; "whole" (--kv_staged_mib=0) begins
when all of it is there. With the default model a token has 45 KiB of KV, the default prompt 84 MiB,
in four chunks. What stands after "--" goes to the servers.

Medians of what a client sees. The first token comes from prefill and waits for no KV; the second
one waits for it. So what is added is the time between these two beyond what it is in one process;
its shares are of the time to the first and to the second token. transfer: as the server says it,
from the first token to the KV's being in the pool of the decode worker.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import processes
from clients import stub_of

from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc

_CONFIG = flags.DEFINE_string("config", "configs/smollm2_135m_cpu.py", "Of the servers.")
_MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "Of the servers.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 1900, "Length of each prompt.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Requests of each way that count.", 1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

LOCAL = "local"
_CLUSTER = ("cluster", "--num_prefill=1", "--num_decode=1")
WAYS: dict[str, tuple[str, ...]] = {LOCAL: ("serve",)} | {
    f"{kind}, {how}": (*_CLUSTER, f"--kv_transport={kind}", *staged)
    for kind in ("jax", "grpc")
    for how, staged in (("chunks", ()), ("whole", ("--kv_staged_mib=0",)))
}
_NUM_OUT = 4
_VOCAB = 256  # which all models have
_START_S = 600.0  # for a first start, which compiles and measures


async def ask(stub: kairos_pb2_grpc.KairosStub, prompt: list[int]) -> dict[str, float]:
    """One request: seconds to the first token, from it to the second, and of its transfer."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        max_tokens=_NUM_OUT,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
        slo=pb.Slo(ttft_s=_START_S, tpot_s=_START_S),  # lest it be put off, having missed them
    )
    begin, times, last = time.monotonic(), [], pb.GenerateResponse()
    async for last in stub.Generate(request):
        times += [time.monotonic() - begin] * len(last.token_ids)
    first, second = times[:2]
    return {"ttft_s": first, "gap_s": second - first, "transfer_s": last.timing.transfer_s}


async def measure(server: processes.Process) -> dict[str, float]:
    """Medians of one server; a request before is not counted."""
    rng = random.Random(0)
    prompts = [
        [rng.randrange(4, _VOCAB) for _ in range(_PROMPT_TOKENS.value)]
        for _ in range(_ROUNDS.value + 1)
    ]
    async with stub_of(server) as stub:
        found = [await ask(stub, prompt) for prompt in prompts][1:]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def shares(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """All figures of each way, with what is added to those in one process."""
    rows = {}
    for way, of in found.items():
        added = of["gap_s"] - found[LOCAL]["gap_s"]
        rows[way] = of | {
            "added_s": added,
            "of_first": added / of["ttft_s"],
            "of_second": added / (of["ttft_s"] + of["gap_s"]),
        }
    return {way: {name: round(each, 4) for name, each in of.items()} for way, of in rows.items()}


def run(way: str, more: list[str]) -> dict[str, float]:
    """Starts a server, measures it, and ends it."""
    binary, *arguments = WAYS[way]
    server = processes.Process(
        *(binary, *arguments, *more), env=os.environ, config=_CONFIG.value, model=_MODEL.value
    )
    try:
        found = asyncio.run(measure(server.ready(_START_S)))
    finally:
        server.end()
    print(f"done: {way} {found}", file=sys.stderr, flush=True)
    return found


def text(result: dict[str, Any]) -> str:
    """A line for each way."""
    lines = [
        f"{result['prompt_tokens']} prompt tokens, {result['rounds']} rounds, "
        f"load {result['load_average']}",
        f"{'':14}first token  to second  transfer  added     of first  of second",
    ]
    for way, of in result["ways"].items():
        lines.append(
            f"{way:14}{of['ttft_s']:8.3f} s  {of['gap_s']:7.3f} s  {of['transfer_s']:6.3f} s"
            f"  {of['added_s']:6.3f} s  {of['of_first']:7.1%}  {of['of_second']:8.1%}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures all ways and prints what came out."""
    found = {way: run(way, argv[1:]) for way in WAYS}
    result = {
        "prompt_tokens": _PROMPT_TOKENS.value,
        "rounds": _ROUNDS.value,
        "ways": shares(found),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result, indent=1) if _OUTPUT.value == "json" else text(result), flush=True)


if __name__ == "__main__":
    app.run(main)
