"""How many requests met their SLO: the summary that live clients and the simulator both print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.ledger.request import Slo

# Seconds by which every token may be late and yet attain strictly: it pays the KV's transfer, which
# falls between the first token and the second.
STRICT_GRACE_S = 0.1
_DECILES = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds on the clock of the client that waited.

    ok: it was answered to its end; a rejected, failed or cancelled one misses every SLO. late_s: by
    how much the latest of its tokens missed the line of its TPOT, token k being due k * tpot after
    the first; 0 or less if none did, None if that is not known. num_asked: output tokens that it
    would have at its end, where that is known beforehand, so that a failed one counts as long.
    """

    slo: Slo
    arrival: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_output: int = 0
    ok: bool = True
    late_s: float | None = None
    num_asked: int = 0

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
    """The figures of a run; ready for JSON.

    num_requests, num_failed: that arrived; that were not answered to their end.
    ttft_attainment, tpot_attainment, e2e_attainment: percent of all that arrived; e2e is both.
    strict_attainment: percent whose first token came in time, and every further token within
      STRICT_GRACE_S of its TPOT line. None if that is not known of all the answered.
    e2e_by_output_decile: e2e_attainment of each tenth of all requests by their true output length,
      shortest first; None for a tenth without requests, as where there are fewer than ten.
    e2e_by_class: for each SLO, by TTFT: share (of all, 0 to 1), ttft, tpot (s), attainments.
    goodput_rps, decode_tokens_per_s: requests that attained e2e, and output tokens after the first,
      a second of duration_s, which is from the first arrival to the last token.
    ttft_s, tpot_s: p50, p90, p99 in seconds over the answered; None if there are none.
    latency_max_s, demoted_latency_max_s: longest from arrival to last token of the answered, and of
      those among them that missed their SLO; None if there are none.
    """
    table = _Table(outcomes)
    duration_s = table.duration_s
    tokens = float(np.maximum(table.num_output - 1, 0).sum())
    attained = int(np.count_nonzero(table.met))
    latency = table.last - table.arrival
    ttft, tpot = table.ttft_s[table.done], table.tpot_s[table.done]
    return {
        "num_requests": len(outcomes),
        "num_failed": int(np.count_nonzero(~table.done)),
        **table.attainments(slice(None)),
        "strict_attainment": table.strict_attainment(),
        "e2e_by_output_decile": [
            _percent(table.met[tenth]) if tenth.size else None
            for tenth in np.array_split(table.length.argsort(kind="stable"), _DECILES)
        ],
        "e2e_by_class": table.by_class(),
        "goodput_rps": attained / duration_s if duration_s > 0 else 0.0,
        "decode_tokens_per_s": tokens / duration_s if duration_s > 0 else 0.0,
        "ttft_s": _quantiles(ttft),
        "tpot_s": _quantiles(tpot[~np.isnan(tpot)]),
        "latency_max_s": _largest(latency[table.done]),
        "demoted_latency_max_s": _largest(latency[table.done & ~table.met]),
        "duration_s": duration_s,
    }


class _Table:
    """Outcomes as columns [R], nan for what is not there; the same verdicts as Outcome's own."""

    def __init__(self, outcomes: Sequence[Outcome]):
        rows = [
            (
                *(o.slo.ttft, o.slo.tpot, o.arrival, o.first_token_at, o.last_token_at),
                *(o.num_output, o.ok, o.late_s, o.num_asked),
            )
            for o in outcomes
        ]
        columns = np.array(rows, dtype=float).reshape(-1, 9).T  # None becomes nan
        self.slo_ttft, self.slo_tpot, self.arrival, self.first, self.last = columns[:5]
        self.num_output, ok, self.late_s, num_asked = columns[5:]
        self.length = np.maximum(self.num_output, num_asked)
        self.done = (ok > 0) & ~np.isnan(self.first) & ~np.isnan(self.last)
        self.ttft_s = self.first - self.arrival
        several = self.num_output >= 2
        gaps = np.where(several, self.num_output - 1, 1)
        self.tpot_s = np.where(several, (self.last - self.first) / gaps, np.nan)
        self.met_ttft = self.done & (self.ttft_s <= self.slo_ttft)
        self.met_tpot = self.done & ~(self.tpot_s > self.slo_tpot)
        self.met = self.met_ttft & self.met_tpot

    @property
    def duration_s(self) -> float:
        ended = self.last[~np.isnan(self.last)]
        return float(ended.max() - self.arrival.min()) if ended.size else 0.0

    def attainments(self, where: Any) -> dict[str, float]:
        return {
            "ttft_attainment": _percent(self.met_ttft[where]),
            "tpot_attainment": _percent(self.met_tpot[where]),
            "e2e_attainment": _percent(self.met[where]),
        }

    def strict_attainment(self) -> float | None:
        if np.isnan(self.late_s[self.done]).any():
            return None
        return _percent(self.met_ttft & (self.late_s <= STRICT_GRACE_S))

    def by_class(self) -> list[dict[str, Any]]:
        # As complex numbers the pairs sort in one go, by TTFT and then by TPOT.
        slos, which = np.unique(self.slo_ttft + 1j * self.slo_tpot, return_inverse=True)
        return [
            {
                "share": int(np.count_nonzero(which == index)) / which.size,
                "ttft": float(slo.real),
                "tpot": float(slo.imag),
                **self.attainments(which == index),
            }
            for index, slo in enumerate(slos)
        ]


def _percent(met: np.ndarray) -> float:
    return 100.0 * int(np.count_nonzero(met)) / met.size if met.size else 0.0


def _largest(values: np.ndarray) -> float | None:
    return float(values.max()) if values.size else None


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {k: float(np.quantile(values, q)) if values.size else None for k, q in names.items()}
