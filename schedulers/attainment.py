"""How many requests met their SLO: the summary that live clients and the simulator both print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.core import Slo


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds on the clock of whoever waited for it.

    ok: it was answered to its end; a rejected, failed or cancelled one misses every SLO.
    """

    slo: Slo
    arrival: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_output: int = 0
    ok: bool = True

    @property
    def done(self) -> bool:
        return self.ok and self.first_token_at is not None and self.last_token_at is not None

    @property
    def ttft_s(self) -> float | None:
        """From arrival to first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None where there is no second token."""
        if self.first_token_at is None or self.last_token_at is None or self.num_output < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_output - 1)

    @property
    def met_ttft(self) -> bool:
        return self.done and self.ttft_s is not None and self.ttft_s <= self.slo.ttft

    @property
    def met_tpot(self) -> bool:
        """A one-token answer meets it: there is nothing to wait for."""
        return self.done and (self.tpot_s is None or self.tpot_s <= self.slo.tpot)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Attainment in percent of all requests that arrived; goodput and decode tokens a second from
    the first arrival to the last token; TTFT and TPOT quantiles and the longest latency in seconds
    over the answered ones (None where there are none).
    """
    done = [o for o in outcomes if o.done]
    begin = min((o.arrival for o in outcomes), default=0.0)
    end = max((o.last_token_at for o in outcomes if o.last_token_at is not None), default=begin)
    attained = sum(o.met_ttft and o.met_tpot for o in outcomes)
    tokens = sum(max(o.num_output - 1, 0) for o in outcomes)
    duration = end - begin
    return {
        "num_requests": len(outcomes),
        "num_failed": len(outcomes) - len(done),
        "ttft_attainment": _percent(sum(o.met_ttft for o in outcomes), len(outcomes)),
        "tpot_attainment": _percent(sum(o.met_tpot for o in outcomes), len(outcomes)),
        "e2e_attainment": _percent(attained, len(outcomes)),
        "goodput_rps": attained / duration if duration > 0 else 0.0,
        "decode_tokens_per_s": tokens / duration if duration > 0 else 0.0,
        "ttft_s": _quantiles([o.ttft_s for o in done if o.ttft_s is not None]),
        "tpot_s": _quantiles([o.tpot_s for o in done if o.tpot_s is not None]),
        "latency_max_s": max(
            (o.last_token_at - o.arrival for o in done if o.last_token_at is not None),
            default=None,
        ),
        "duration_s": duration,
    }


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {k: float(np.quantile(values, q)) if values else None for k, q in names.items()}
