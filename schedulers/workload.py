"""When requests arrive and how long they are: synthetic long tails and recorded traces."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: seconds from the start of the workload, and its lengths in tokens."""

    at: float
    num_prompt: int
    num_output: int


def arrival_times(num_requests: int, rate: float, rng: np.random.Generator, cv: float = 1.0):
    """Times in seconds of a renewal process of `rate` requests a second, from 0.

    Gaps are gamma with coefficient of variation `cv`: 1 is Poisson, more is burstier.
    """
    for name, value in (("rate", rate), ("cv", cv)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    shape = cv**-2
    gaps = rng.gamma(shape, 1 / (rate * shape), num_requests)
    return np.cumsum(gaps) - gaps[0] if num_requests else gaps


def synthetic(
    num_requests: int,
    rate: float,
    seed: int,
    *,
    cv: float = 1.0,
    prompt_median: float = 760.0,
    prompt_sigma: float = 1.0,
    max_prompt: int = 16384,
    output_median: float = 150.0,
    output_sigma: float = 0.86,
    max_output: int = 2048,
) -> list[Arrival]:
    """A long-tailed conversation workload at `rate` requests a second; the same for a same seed.

    Lengths are independent and lognormal, then clipped. Medians and sigmas (of the logarithm) are
    those of the Azure 2023 conversation trace; the lognormal's tail is heavier than the trace's
    (99th percentiles: prompts near 7800 tokens for its 4142, outputs near 1100 for its 601). The
    longest tenth of the prompts holds two fifths of all prompt tokens.
    """
    rng = np.random.default_rng(seed)
    times = arrival_times(num_requests, rate, rng, cv)
    prompts = rng.lognormal(math.log(prompt_median), prompt_sigma, num_requests)
    outputs = rng.lognormal(math.log(output_median), output_sigma, num_requests)
    return [
        Arrival(float(at), _clip(prompt, max_prompt), _clip(output, max_output))
        for at, prompt, output in zip(times, prompts, outputs, strict=True)
    ]


def read_azure_csv(path: str | Path) -> list[Arrival]:
    """Reads an Azure LLM inference trace: TIMESTAMP,ContextTokens,GeneratedTokens.

    Raises ValueError with the line's number where a line is malformed, and for an empty trace.
    """
    columns = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    with open(path, newline="", encoding="utf-8") as file:
        lines = enumerate(csv.reader(file), start=1)
        _, header = next(lines, (1, []))
        if header != columns:
            raise ValueError(f"{path}: line 1: the header must be {','.join(columns)}")

        def parse(row: list[str]) -> Arrival:
            at, num_prompt, num_output = row
            # Relative to a date near the trace's, not to 1970: a float keeps its microseconds.
            seconds = (datetime.fromisoformat(at) - datetime(2023, 1, 1)).total_seconds()
            return Arrival(seconds, int(num_prompt), int(num_output))

        return _trace(path, lines, parse)


def read_mooncake_jsonl(path: str | Path) -> list[Arrival]:
    """Reads a Mooncake trace: a JSON object a line with timestamp (ms), input_length and
    output_length.

    Raises ValueError with the line's number where a line is malformed, and for an empty trace.
    """

    def parse(line: str) -> Arrival:
        entry = json.loads(line)
        lengths = entry["input_length"], entry["output_length"]
        if not all(type(length) is int for length in lengths):
            raise ValueError(f"lengths must be whole numbers, got {lengths}")
        return Arrival(float(entry["timestamp"]) / 1000, *lengths)

    with open(path, encoding="utf-8") as file:
        return _trace(path, enumerate(file, start=1), parse)


def rescale(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Stretches time so that N / (t_last - t_first) = `rate` a second; bursts stay bursts."""
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be positive, got {rate}")
    if not arrivals:
        return []
    first, last = arrivals[0].at, arrivals[-1].at
    if last <= first:
        raise ValueError(f"{len(arrivals)} arrivals at one time have no rate to rescale")
    factor = len(arrivals) / rate / (last - first)
    return [replace(a, at=(a.at - first) * factor) for a in arrivals]


def fit_lengths(
    arrivals: Sequence[Arrival], max_prompt: int, max_output: int, percentile: float = 99.0
) -> list[Arrival]:
    """Shrinks lengths for a model of small context, keeping the long tail's shape.

    One factor for all prompts and one for all outputs (never above 1) bring the given percentile
    to the limit; the few above are clipped to it. So a small percentile keeps lengths near the
    trace's and cuts the tail; 100 cuts nothing.
    """
    if not arrivals:
        return []
    prompts = np.percentile([a.num_prompt for a in arrivals], percentile)
    outputs = np.percentile([a.num_output for a in arrivals], percentile)
    shrink_prompt, shrink_output = min(1, max_prompt / prompts), min(1, max_output / outputs)
    return [
        replace(
            a,
            num_prompt=_clip(a.num_prompt * shrink_prompt, max_prompt),
            num_output=_clip(a.num_output * shrink_output, max_output),
        )
        for a in arrivals
    ]


def _trace(
    path: str | Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], Arrival]
) -> list[Arrival]:
    arrivals: list[Arrival] = []
    for number, line in lines:
        try:
            arrival = parse(line)
            if not math.isfinite(arrival.at) or min(arrival.num_prompt, arrival.num_output) < 1:
                raise ValueError(f"lengths must be at least 1 and times finite, got {arrival}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number}: {line!r}: {error!r}") from error
        arrivals.append(arrival)
    if not arrivals:
        raise ValueError(f"{path}: the trace holds no requests")
    arrivals.sort(key=lambda a: a.at)
    first = arrivals[0].at
    return [replace(a, at=a.at - first) for a in arrivals]


def _clip(length: float, limit: int) -> int:
    return min(max(round(length), 1), limit)
