"""Workloads: the statistics that the builders promise, and classes of SLOs."""

import numpy as np
import pytest

from schedulers.ledger.request import Slo
from schedulers.simulation.workload import (
    Arrival,
    SloClass,
    arrival_times,
    assign_classes,
    check_slo,
    fit_lengths,
    parse_classes,
    poisson,
    rescale,
    synthetic,
)


def test_synthetic_is_long_tailed_and_repeats():
    arrivals = synthetic(5000, rate=10.0, seed=3)
    assert arrivals == synthetic(5000, rate=10.0, seed=3) != synthetic(5000, rate=10.0, seed=4)
    assert arrivals[0].at == 0
    assert 5000 / arrivals[-1].at == pytest.approx(10.0, rel=0.1)
    for lengths, limit in (
        ([a.num_prompt for a in arrivals], 16384),
        ([a.num_output for a in arrivals], 2048),
    ):
        assert 1 <= min(lengths) <= max(lengths) <= limit
        assert np.mean(lengths) > 1.25 * np.median(lengths)
        assert np.quantile(lengths, 0.99) > 6 * np.median(lengths)
    prompts = sorted(a.num_prompt for a in arrivals)
    assert 0.35 < sum(prompts[-500:]) / sum(prompts) < 0.55


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_burstiness_asked_for(cv):
    gaps = np.diff(arrival_times(20_000, 4.0, np.random.default_rng(0), cv))
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_empty_workloads():
    assert synthetic(0, rate=1.0, seed=0) == []
    assert rescale([], 1.0) == []
    assert fit_lengths([], 1, 1) == []


@pytest.mark.parametrize("name", ["rate", "cv"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rates_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        arrival_times(3, **{"rate": 1.0, "cv": 1.0, name: value}, rng=np.random.default_rng(0))


def test_pages_have_equal_keys_as_far_as_blocks_are_equal():
    one, other = (Arrival(0.0, 1100, 1, blocks) for blocks in ((5, 6, 7), (5, 6, 8)))
    assert len(one.page_keys(200)) == 5, "whole pages alone"
    assert len(set(one.page_keys(200))) == 5
    # Of the first 1024 tokens, which are the same, and of a page that goes on into the third block.
    equal = [a == b for a, b in zip(one.page_keys(200), other.page_keys(200), strict=True)]
    assert equal == [True] * 5
    equal = [a == b for a, b in zip(one.page_keys(100), other.page_keys(100), strict=True)]
    assert equal == [True] * 10 + [False]
    assert Arrival(0.0, 1100, 1).page_keys(100) == ()
    assert len(Arrival(0.0, 1100, 1, (5,)).page_keys(16)) == 512 // 16


def test_poisson_keeps_lengths_and_has_the_rate_exactly():
    arrivals = [Arrival(0.0, i, 2 * i) for i in range(1, 2001)]
    made = poisson(arrivals, 4.0, seed=1)
    assert made == poisson(arrivals, 4.0, seed=1) != poisson(arrivals, 4.0, seed=2)
    assert [(a.num_prompt, a.num_output) for a in made] == [(i, 2 * i) for i in range(1, 2001)]
    assert made[0].at == 0
    assert 2000 / made[-1].at == pytest.approx(4.0, rel=1e-12)
    gaps = np.diff([a.at for a in made])
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.1)
    assert poisson([], 4.0, seed=1) == []
    assert poisson([Arrival(7.0, 1, 2)], 4.0, seed=1) == [Arrival(0.0, 1, 2)]
    with pytest.raises(ValueError, match="rate"):
        poisson(arrivals, 0.0, seed=1)


def test_rescale_keeps_bursts():
    arrivals = [Arrival(5.0, 1, 1), Arrival(6.0, 2, 2), Arrival(6.0, 3, 3), Arrival(9.0, 4, 4)]
    scaled = rescale(arrivals, rate=0.5)
    assert [a.at for a in scaled] == [0.0, 2.0, 2.0, 8.0]
    assert [a.num_prompt for a in scaled] == [1, 2, 3, 4]
    assert rescale(arrivals[3:], 0.5) == [Arrival(0.0, 4, 4)]
    with pytest.raises(ValueError, match="one time"):
        rescale(arrivals[1:3], 1.0)
    with pytest.raises(ValueError, match="rate"):
        rescale(arrivals, 0.0)


def test_fit_lengths_shrinks_by_one_factor_and_clips():
    arrivals = [Arrival(float(i), 10 * i, i) for i in range(1, 101)]
    whole = fit_lengths(arrivals, 100, 1000, percentile=100)
    assert [a.num_prompt for a in whole] == list(range(1, 101)), "a tenth of each"
    assert [a.num_output for a in whole] == list(range(1, 101)), "never stretched"
    cut = fit_lengths(arrivals, 100, 1000, percentile=50)
    assert max(a.num_prompt for a in cut) == 100
    assert cut[9].num_prompt == pytest.approx(20, abs=1)
    with pytest.raises(ValueError, match="max_output must be at least 1, got 0"):
        fit_lengths(arrivals, 1, 0)


def test_classes():
    classes = parse_classes("0.7:1:0.025, 0.3:10:0.1")
    assert classes == (SloClass(0.7, Slo(1, 0.025)), SloClass(0.3, Slo(10, 0.1)))
    assert parse_classes("1:2:1") == (SloClass(1.0, Slo(2, 1)),)
    thirds = parse_classes("0.3333333:1:0.1,0.3333333:2:0.1,0.3333333:3:0.1")
    assert len(thirds) == 3, "shares need only sum to about 1"

    drawn = assign_classes(20_000, classes, seed=5)
    assert drawn.shape == (20_000,)
    assert set(drawn.tolist()) == {0, 1}
    assert drawn.mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(drawn, assign_classes(20_000, classes, seed=5))
    assert not np.array_equal(drawn, assign_classes(20_000, classes, seed=6))
    assert np.array_equal(np.unique(assign_classes(10_000, thirds, seed=0)), [0, 1, 2])
    assert assign_classes(0, classes, seed=0).shape == (0,)
    with pytest.raises(ValueError, match="classes must hold at least one"):
        assign_classes(3, (), seed=0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "class 1: must be SHARE:TTFT:TPOT, got ''"),
        ("1:1:0.1,", "class 2: must be SHARE:TTFT:TPOT, got ''"),
        ("1:1", "class 1: must be SHARE:TTFT:TPOT, got '1:1'"),
        ("half:1:0.1", "class 1: share must be a number, got 'half'"),
        ("0.5:1:0.1,0.5:1s:0.1", "class 2: slo.ttft must be a number, got '1s'"),
        ("1:1:fast", "class 1: slo.tpot must be a number, got 'fast'"),
        ("0:1:0.1", "class 1: share must be a positive number, got 0"),
        ("-1:1:0.1,2:1:0.1", "class 1: share must be a positive number, got -1"),
        ("nan:1:0.1", "class 1: share"),
        ("1:inf:0.1", "class 1: slo.ttft must be a positive number of seconds, got inf"),
        ("1:1:0", "class 1: slo.tpot must be a positive number of seconds, got 0"),
        ("1:0.025:1", "slo.tpot must be less than slo.ttft, got slo.tpot = 1.0 and .* = 0.025"),
        ("0.5:1:0.1,0.6:1:0.1", r"shares must sum to 1 \(within 1e-6\), got 1.1"),
        ("1e308:1:0.1,1e308:1:0.1", "shares must sum to 1"),
        ("x" * 10_000, "class 1: must be"),
    ],
)
def test_bad_classes_are_named(text, why):
    with pytest.raises(ValueError, match=why) as caught:
        parse_classes(text)
    assert len(str(caught.value)) < 200


def test_check_slo():
    assert check_slo(1.0, 0.025) == Slo(1.0, 0.025)
    for ttft, tpot in ((0.025, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match=f"got slo.tpot = {tpot} and slo.ttft = {ttft}"):
            check_slo(ttft, tpot)
    with pytest.raises(ValueError, match=r"slo\.ttft must be a positive"):
        check_slo(-1.0, 0.1)
