"""The summary, against figures worked out by hand."""

import json

import pytest

from schedulers.attainment import Outcome, summarize
from schedulers.core import Slo

SLO = Slo(ttft=1.0, tpot=0.1)


def test_summary_counts_every_request():
    outcomes = [
        Outcome(SLO, 0.0, 0.5, 1.4, 10),  # both met
        Outcome(SLO, 0.0, 2.0, 2.9, 10),  # late first token
        Outcome(SLO, 0.0, 1.0, 3.0, 11),  # slow tokens
        Outcome(SLO, 1.0, 1.5, 1.5, 1),  # one token: nothing to wait for after it
        Outcome(SLO, 1.0, ok=False),  # rejected
        Outcome(SLO, 1.0, 1.1, 1.2, 2, ok=False),  # failed on the way
    ]
    summary = summarize(outcomes)
    assert summary["num_requests"] == 6
    assert summary["num_failed"] == 2
    assert summary["ttft_attainment"] == pytest.approx(50.0)
    assert summary["tpot_attainment"] == pytest.approx(50.0)
    assert summary["e2e_attainment"] == pytest.approx(100 / 3)
    assert summary["duration_s"] == 3.0
    assert summary["goodput_rps"] == pytest.approx(2 / 3)
    assert summary["decode_tokens_per_s"] == pytest.approx((9 + 9 + 10 + 0 + 1) / 3)
    assert summary["ttft_s"]["p50"] == pytest.approx(0.75)
    assert summary["tpot_s"]["p50"] == pytest.approx(0.1)
    assert summary["latency_max_s"] == 3.0
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("outcomes", [[], [Outcome(SLO, 5.0, ok=False)]])
def test_nothing_answered(outcomes):
    summary = summarize(outcomes)
    assert summary["e2e_attainment"] == 0
    assert summary["goodput_rps"] == 0
    assert summary["latency_max_s"] is None
    assert summary["ttft_s"] == {"p50": None, "p90": None, "p99": None}
