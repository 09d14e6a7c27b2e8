"""When requests arrive, how long they are and what they are due: synthetic, or recorded traces."""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from schedulers.ledger.request import Slo

# Of `Arrival.blocks`, as of Mooncake's traces.
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: seconds from the start of the workload, and its lengths in tokens.

    blocks: a number for each `BLOCK_TOKENS` of the prompt, and for what is left: the same in two
    prompts that are the same up to the end of it. None where that is not known.
    """

    at: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()

    def page_keys(self, page_size: int) -> tuple[int, ...]:
        """See `Request.page_keys`."""
        known = min(self.num_prompt, len(self.blocks) * BLOCK_TOKENS)
        ends = range(page_size - 1, known, page_size)
        return tuple(
            self.blocks[end // BLOCK_TOKENS] * BLOCK_TOKENS + end % BLOCK_TOKENS for end in ends
        )


@dataclass(frozen=True, slots=True)
class SloClass:
    """A kind of request: its share of all requests (0 to 1), and its SLO."""

    share: float
    slo: Slo

    def __post_init__(self):
        if not (math.isfinite(self.share) and self.share > 0):
            raise ValueError(f"share must be a positive number, got {self.share}")


def arrival_times(
    num_requests: int, rate: float, rng: np.random.Generator, cv: float = 1.0
) -> np.ndarray:
    """Times in seconds of a renewal process of `rate` requests a second, from 0.

    Gaps are gamma with coefficient of variation `cv`: 1 is Poisson, more is burstier.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be positive, got {rate}")
    if not 1e-3 <= cv <= 1e3:
        # Beyond, the gamma's shape leaves the range in which floats can draw it.
        raise ValueError(f"cv must be from 0.001 to 1000, got {cv}")
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


def poisson(arrivals: Sequence[Arrival], rate: float, seed: int) -> list[Arrival]:
    """The same lengths in the same order at Poisson times, so that N / (t_last - t_first) = `rate`.

    `rescale` keeps a trace's bursts; this takes them away.
    """
    times = arrival_times(len(arrivals), rate, np.random.default_rng(seed)).tolist()
    return rescale([replace(a, at=at) for a, at in zip(arrivals, times, strict=True)], rate)


def rescale(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Stretches time so that N / (t_last - t_first) = `rate` a second; bursts stay bursts.

    A single arrival has no rate, and is put at 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be positive, got {rate}")
    if len(arrivals) < 2:
        return [replace(a, at=0.0) for a in arrivals]
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
    for name, limit in (("max_prompt", max_prompt), ("max_output", max_output)):
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
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


def check_slo(ttft: float, tpot: float) -> Slo:
    """An SLO from a person's hand, in seconds.

    Raises:
      ValueError: a time that is not positive; a TPOT not below the TTFT, which is the two mixed up.
    """
    slo = Slo(ttft, tpot)
    if tpot >= ttft:
        raise ValueError(
            f"slo.tpot must be less than slo.ttft, got slo.tpot = {tpot} and slo.ttft = {ttft}"
        )
    return slo


def parse_classes(text: str) -> tuple[SloClass, ...]:
    """Classes of requests from SHARE:TTFT:TPOT,..., in seconds: "0.7:1:0.025,0.3:10:0.1".

    Raises:
      ValueError: a malformed class, by its number from 1; shares that don't sum to 1.
    """
    classes = []
    for number, part in enumerate(text.split(","), start=1):
        try:
            classes.append(_parse_class(part))
        except ValueError as error:
            raise ValueError(f"class {number}: {error}") from error
    total = sum(c.share for c in classes)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1 (within 1e-6), got {total:g}")
    return tuple(classes)


def assign_classes(num_requests: int, classes: Sequence[SloClass], seed: int) -> np.ndarray:
    """[num_requests], an index into `classes` for each, by share; the same for a same seed."""
    if not classes:
        raise ValueError("classes must hold at least one, got none")
    bounds = np.cumsum([c.share for c in classes])
    # Shares only sum to about 1. The last bound becomes 1 exactly, which no draw reaches.
    draws = np.random.default_rng(seed).random(num_requests)
    return np.searchsorted(bounds / bounds[-1], draws, side="right")


def _parse_class(text: str) -> SloClass:
    fields = text.split(":")
    if len(fields) != 3:
        raise ValueError(f"must be SHARE:TTFT:TPOT, got {_short(text)}")
    numbers = []
    for name, field in zip(("share", "slo.ttft", "slo.tpot"), fields, strict=True):
        try:
            numbers.append(float(field))
        except ValueError:
            raise ValueError(f"{name} must be a number, got {_short(field)}") from None
    share, ttft, tpot = numbers
    return SloClass(share, check_slo(ttft, tpot))


def _short(value: object) -> str:
    """For an error of one line: reprlib bounds depth and count, but not their product."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _clip(length: float, limit: int) -> int:
    return min(max(round(length), 1), limit)
