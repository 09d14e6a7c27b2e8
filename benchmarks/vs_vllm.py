"""Ours against vLLM on this machine: decode steps, prefill, and serving.

  python benchmarks/vs_vllm.py --vllm_python=PATH [--parts=decode,prefill,serve] [--output=json]

PATH is the Python of a virtual environment with vLLM for CPU (see benchmarks/NOTES.md). Same model
in float32, same prompts (random token ids) and lengths, greedy, end of sequence ignored, no prefix
cache, all cores. The two take turns, and the first alternates by round; vLLM, which spins when it
is idle, is stopped (SIGSTOP) while it is not its turn, and so is our side of decode and prefill.
Without --vllm_python ours is measured alone.

decode: ms between the tokens of a whole batch, once no prompt is left, as whoever drives the engine
sees it: ours through a worker's loop (ledger, policy, compiled step, events), vLLM's through
LLMEngine.step(), with its engine in a process of its own, as it is by default.
prefill: tokens of one prompt a second, from when it is given to its first token.
serve: open-loop Poisson arrivals of a long-tailed conversation workload, over gRPC and over vLLM's
streaming OpenAI API, at rates --rate_step apart up to 1.5 times vLLM's knee: the first rate at
which its end-to-end attainment is under 50 %.
"""

import asyncio
import contextlib
import itertools
import json
import operator
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai_replay
import rates
from absl import app, flags
from figures import say, short, spread, table, turns, where
from peers import Kairos, Steps, Vllm, awake
from rates import Replay

from kairos_jax.lab import replay as kairos_replay
from kairos_jax.process import hub
from models.checkpoint import open_checkpoint
from models.checkpoint.huggingface import HuggingFaceCheckpoint
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival, fit_lengths, rescale, synthetic

_PYTHON = flags.DEFINE_string("vllm_python", None, "Python that has vLLM; none: ours alone.")
_PARTS = flags.DEFINE_list("parts", ["decode", "prefill", "serve"], "What to measure.")
_MODEL = flags.DEFINE_string("model", hub.DEFAULT_MODEL, "Path or name of a model.")
_CONFIG = flags.DEFINE_string("config", "configs/smollm2_135m_cpu_colocated.py", "Of ours.")
_OVERRIDES = flags.DEFINE_list(
    "overrides", ["decode.max_batch=64", "decode.kv_tokens=93184"], "KEY=VALUE of the config."
)
_CONTEXT = flags.DEFINE_integer("max_context", 2176, "Longest prompt and output, of both.", 2)
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "32", "64"], "decode: sequences.")
_CONTEXTS = flags.DEFINE_list("contexts", ["200", "1000"], "decode: tokens of each prompt.")
_STEPS = flags.DEFINE_integer("steps", 24, "decode: steps that count, each round.", 1)
_PROMPTS = flags.DEFINE_list("prompts", ["128", "512", "1024", "2048"], "prefill: tokens.")
_LAYOUTS = flags.DEFINE_list("layouts", ["colocated", "disaggregated"], "serve: of ours.")
_RATES = flags.DEFINE_list("rates", [], "serve: requests a second, instead of up to the knee.")
_RATE_STEP = flags.DEFINE_float("rate_step", 0.5, "serve: between one rate and the next.", 0.01)
_DURATION = flags.DEFINE_float("duration_s", 60.0, "serve: seconds of arrivals at each rate.", 1.0)
_TTFT = flags.DEFINE_float("ttft", 1.0, "serve: SLO, seconds.")
_TPOT = flags.DEFINE_float("tpot", 0.1, "serve: SLO, seconds.")
_MAX_PROMPT = flags.DEFINE_integer("max_prompt", 864, "serve: longest prompt.", 1)
_MAX_OUTPUT = flags.DEFINE_integer("max_output", 136, "serve: longest output.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and arrivals.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

# Lengths are fitted on so many requests, so that they do not depend on how many are sent.
_TYPICAL = 4000

Answer = dict[str, Any]


def main(argv: list[str]) -> None:
    """Measures what --parts names, and prints it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    if unknown := set(_PARTS.value) - {"decode", "prefill", "serve"}:
        raise app.UsageError(f"--parts: unknown {sorted(unknown)}")
    if "serve" in _PARTS.value and not _RATES.value and not _PYTHON.value:
        raise app.UsageError("--rates is needed where there is no vLLM whose knee could be found")
    path = hub.resolve_model(_MODEL.value)
    config = open_checkpoint(path).config
    result = where() | {"model": _MODEL.value, "rounds": _ROUNDS.value}
    with tempfile.TemporaryDirectory() as folder:
        vllm = None
        if _PYTHON.value:
            directory = _hugging_face(path, Path(folder) / "model")
            vllm = Vllm(_PYTHON.value, directory, _CONTEXT.value)
        if {"decode", "prefill"} & set(_PARTS.value):
            result |= _steps(vllm, Path(folder), config.vocab_size)
        if "serve" in _PARTS.value:
            with _servers(vllm, Path(folder), config.vocab_size) as servers:
                result["serve"] = _serve(servers)
    print(json.dumps(result, indent=1) if _OUTPUT.value == "json" else _text(result))


def _hugging_face(path: Path, directory: Path) -> Path:
    """The model as vLLM reads it: itself if it is a Hugging Face directory, else converted."""
    if isinstance(open_checkpoint(path), HuggingFaceCheckpoint):
        return path
    given = (f"--source={path}", f"--output={directory}", "--format=hugging_face")
    command = [sys.executable, "-m", "kairos_jax.convert", *given]
    subprocess.run(command, stdout=sys.stderr, check=True)
    return directory


def _kairos(layout: str) -> Kairos:
    overrides = [*_OVERRIDES.value, f"max_context={_CONTEXT.value}"]
    overrides += [f"colocated={layout == 'colocated'}"]
    overrides += [f"{part}.prefix_cache=False" for part in ("prefill", "decode")]
    given = (f"--config.{each}" for each in overrides)
    return Kairos((f"--config={_CONFIG.value}", f"--model={_MODEL.value}", *given))


# Steps of the engines.


def _steps(vllm: Vllm | None, folder: Path, vocab_size: int) -> dict[str, Any]:
    peers: dict[str, Steps] = {}
    try:
        say("starting kairos")
        peers["kairos"] = Steps(_kairos("colocated").steps(), {}, folder / "kairos.log")
        if vllm:
            say("starting vllm")
            peers["vllm"] = Steps(vllm.steps(), vllm.environment, folder / "vllm.log")
        result: dict[str, Any] = {"peers": {name: peer.facts for name, peer in peers.items()}}
        rng = np.random.default_rng(_SEED.value)

        def prompts(count: int, length: int) -> list[list[int]]:
            return rng.integers(vocab_size, size=(count, length)).tolist()

        if "decode" in _PARTS.value:
            points = itertools.product(map(int, _CONTEXTS.value), map(int, _BATCHES.value))
            result["decode"] = [
                {"batch": batch, "context": context}
                | _decode(peers, prompts(batch, context), _STEPS.value)
                for context, batch in points
            ]
        if "prefill" in _PARTS.value:
            result["prefill"] = [
                {"tokens": length} | _prefill(peers, prompts(1, length))
                for length in map(int, _PROMPTS.value)
            ]
    finally:
        for peer in peers.values():
            peer.end()
    return result


def _asked(
    peers: Mapping[str, Steps], prompts: list[list[int]], full_steps: int
) -> dict[str, list[Answer]]:
    answers: dict[str, list[Answer]] = {name: [] for name in peers}
    for name in turns(list(peers), _ROUNDS.value):
        say(f"{name}: {len(prompts)} x {len(prompts[0])} tokens")
        answers[name].append(peers[name].ask(prompts, full_steps))
    return answers


def _decode(peers: Mapping[str, Steps], prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Of each peer: "ms" a step (median of a round), and "context", the mean at these steps."""
    answers = _asked(peers, prompts, steps + 1)
    row = {
        name: {"ms": spread(_step_ms(each, len(prompts)) for each in of_peer)}
        | {"context": round(statistics.mean(_context(each, prompts, steps) for each in of_peer))}
        for name, of_peer in answers.items()
    }
    return row | _compared(row, "ms", answers)


def _step_ms(answer: Answer, batch: int) -> float:
    """Median between steps that gave every sequence a token: in none of them is any prefill."""
    steps = zip(answer["counts"], answer["at"], strict=True)
    pairs = itertools.pairwise(steps)
    times = [b - a for (before, a), (count, b) in pairs if before == count == batch]
    return 1e3 * statistics.median(times)


def _context(answer: Answer, prompts: list[list[int]], steps: int) -> float:
    """Those that came first went on while others were prefilled, so this exceeds the prompt."""
    return len(prompts[0]) + sum(answer["counts"]) / len(prompts) - steps / 2


def _prefill(peers: Mapping[str, Steps], prompts: list[list[int]]) -> dict[str, Any]:
    """Of each peer: "tokens_per_s"; a first turn of each is not counted."""
    for peer in peers.values():
        peer.ask(prompts, 1)
    answers = _asked(peers, prompts, 1)
    length = len(prompts[0])
    row = {
        name: {"tokens_per_s": spread(length / each["at"][0] for each in of_peer)}
        for name, of_peer in answers.items()
    }
    return row | _compared(row, "tokens_per_s", answers)


def _compared(
    row: Mapping[str, Any], key: str, answers: Mapping[str, list[Answer]]
) -> dict[str, float]:
    """ratio: our median over vLLM's. same_first_token: share of prompts for which both began with
    the same token, so that they compute the same; prompts of random tokens have near ties, so a few
    may differ. Nothing, where ours is alone.
    """
    if "vllm" not in answers:
        return {}
    medians = (row[name][key]["median"] for name in ("kairos", "vllm"))
    firsts = zip(*(answers[name][0]["first"] for name in ("kairos", "vllm")), strict=True)
    return {
        "ratio": round(operator.truediv(*medians), 3),
        "same_first_token": statistics.mean(ours == theirs for ours, theirs in firsts),
    }


# Servers.


@contextlib.contextmanager
def _servers(vllm: Vllm | None, folder: Path, vocab_size: int) -> Iterator[dict[str, Replay]]:
    """Every server, up at once, and how to send it a workload."""
    slo = Slo(_TTFT.value, _TPOT.value)

    def ours(address: str) -> Replay:
        def run(arrivals: Sequence[Arrival]) -> list[Outcome]:
            replay = kairos_replay.replay(address, arrivals, slo, seed=_SEED.value)
            return [record.outcome for record in asyncio.run(replay)]

        return run

    def theirs(address: str, process: subprocess.Popen) -> Replay:
        def run(arrivals: Sequence[Arrival]) -> list[Outcome]:
            replay = openai_replay.replay(address, arrivals, slo, vocab_size, _SEED.value)
            with awake(process):
                return asyncio.run(replay)

        return run

    with contextlib.ExitStack() as stack:
        servers = {}
        for layout in _LAYOUTS.value:
            say(f"starting kairos, {layout}")
            address = stack.enter_context(_kairos(layout).serving()).grpc
            servers[f"kairos {layout}"] = ours(address)
        if vllm:
            say("starting vllm")
            servers["vllm"] = theirs(*stack.enter_context(vllm.serving(folder / "server.log")))
        yield servers


def _workload(rate: float) -> list[Arrival]:
    count = max(round(rate * _DURATION.value), 2)
    typical = synthetic(max(count, _TYPICAL), 1.0, _SEED.value)
    return rescale(fit_lengths(typical, _MAX_PROMPT.value, _MAX_OUTPUT.value)[:count], rate)


def _serve(servers: Mapping[str, Replay]) -> dict[str, Any]:
    for name, replay in servers.items():
        say(f"{name}: first requests, not counted")
        replay(_workload(2.0)[:4])
    given = [float(rate) for rate in _RATES.value]
    slo = {"ttft_s": _TTFT.value, "tpot_s": _TPOT.value}
    return {"slo": slo} | rates.serve(servers, _workload, given, _RATE_STEP.value, _ROUNDS.value)


# For a person.


def _text(result: dict[str, Any]) -> str:
    parts = [f"{result['cpu']}, {result['cores']} cores, load {result['load_average']}"]
    for part, key, unit in (("decode", "ms", "ms a step"), ("prefill", "tokens_per_s", "tokens/s")):
        if rows := result.get(part):
            peers = [name for name in ("kairos", "vllm") if name in rows[0]]
            sizes = [name for name in ("context", "batch", "tokens") if name in rows[0]]
            ratio = ["kairos / vllm"] * ("ratio" in rows[0])
            cells = [
                [str(row[size]) for size in sizes]
                + [short(row[name][key]) for name in peers]
                + [f"{row['ratio']:.2f}" for _ in ratio]
                for row in rows
            ]
            parts.append(f"{part}, {unit}\n" + table([*sizes, *peers, *ratio], cells))
    if served := result.get("serve"):
        slo, rows = served["slo"], served["rates"]
        head = ["rate", "server", "TTFT %", "TPOT %", "both %", "goodput/s", "tokens/s"]
        keys = ("ttft_attainment", "tpot_attainment", "e2e_attainment", "goodput_rps")
        keys += ("tokens_per_s", "ttft_p50_s", "ttft_p90_s", "tpot_p50_s", "tpot_p90_s")
        head += ["TTFT p50 s", "p90", "TPOT p50 s", "p90"]
        cells = [
            [f"{row['rate']:g}", name, *(_median(row[name][key]) for key in keys)]
            for row in rows
            for name in row
            if isinstance(row[name], dict)
        ]
        parts.append(
            f"serve, SLO TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s']:g} s; vLLM's knee "
            f"{served['knee_rps'] or 'not found'}\n" + table(head, cells)
        )
        for name, times in served.get("goodput_at_knee_of_vllm", {}).items():
            parts.append(f"goodput at the knee, {name}: {times} x vLLM's")
    return "\n\n".join(parts)


def _median(figure: dict[str, float | None]) -> str:
    return "-" if figure["median"] is None else f"{figure['median']:.3g}"


if __name__ == "__main__":
    app.run(main)
