"""What the binaries that run many cells read off their flags, and say of it in their reports."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from kairos_jax.process.command import UsageError
from kairos_jax.process.files import check_regular
from schedulers.simulation.traces import read_trace
from schedulers.simulation.workload import Arrival, SloClass, synthetic

NUM_SYNTHETIC = 2000

T = TypeVar("T")


def workload(trace: str, num_requests: int, seed: int) -> list[Arrival]:
    """The first requests of a trace, or a synthetic long tail; 0: all. Raises UsageError."""
    try:
        if trace == "synthetic":
            return synthetic(num_requests or NUM_SYNTHETIC, 1.0, seed)
        check_regular(trace)
        arrivals = read_trace(trace)
    except OSError as error:
        raise UsageError(f"--trace={trace}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if num_requests > len(arrivals):
        raise UsageError(f"--num_requests={num_requests}, but {trace} has only {len(arrivals)}")
    return arrivals[: num_requests or None]


def parse_list(name: str, text: str, parse: Callable[[str], T]) -> list[T]:
    """The values of a flag, each once. Raises UsageError."""
    try:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--{name}: {error}") from error


def to_number(text: str) -> float:
    """Raises ValueError, in words for a person."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None


def workload_text(arrivals: Sequence[Arrival], source: str) -> str:
    """In words, for a report. source: as --trace says."""
    prompts = sorted(arrival.num_prompt for arrival in arrivals)
    outputs = sorted(arrival.num_output for arrival in arrivals)
    middle = len(arrivals) // 2
    return (
        f"{len(arrivals)} requests of {Path(source).name}; "
        f"median prompt {prompts[middle]} tokens, longest {prompts[-1]}; "
        f"median output {outputs[middle]}, longest {outputs[-1]}"
    )


def slo_text(classes: Sequence[SloClass]) -> str:
    """In words, for a report."""
    texts = [f"TTFT {c.slo.ttft:g} s, TPOT {1000 * c.slo.tpot:g} ms" for c in classes]
    if len(texts) == 1:
        return texts[0]
    return "; ".join(f"{c.share:.0%} {text}" for c, text in zip(classes, texts, strict=True))
