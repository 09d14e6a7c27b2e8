"""The bound, against all subsets of few jobs and against the plain algorithm on some hundreds."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers.simulation.bound import most_on_time

Jobs = list[tuple[float, float]]


def last_end(jobs: Jobs, ttft: float) -> float | None:
    """When first come, first served ends; None if a job is late."""
    end = -np.inf
    for release, seconds in jobs:
        end = max(end, release) + seconds
        if end > release + ttft + 1e-9:
            return None
    return end


def best_subset(jobs: Jobs, ttft: float) -> int:
    best = 0
    for mask in range(1 << len(jobs)):
        kept = [job for i, job in enumerate(jobs) if mask >> i & 1]
        if len(kept) > best and last_end(kept, ttft) is not None:
            best = len(kept)
    return best


def plain_algorithm(jobs: Jobs, ttft: float) -> int:
    """The rule as its authors state it: tries each removal in turn."""
    kept: Jobs = []
    for job in jobs:
        kept.append(job)
        if last_end(kept, ttft) is None:
            without = [kept[:i] + kept[i + 1 :] for i in range(len(kept))]
            ends = [last_end(some, ttft) if some else -np.inf for some in without]
            kept = min(zip(ends, without, strict=True), key=lambda e: (e[0] is None, e[0]))[1]
    return len(kept)


def bound(jobs: Jobs, ttft: float) -> int:
    return most_on_time([r for r, _ in jobs], [s for _, s in jobs], ttft)


# Steps of a thousandth: inexact sums, but never within the rounding allowance of a deadline.
thousandths = st.integers(0, 12_000).map(lambda n: n / 1000)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=8).map(sorted),
    st.integers(1, 10),
)
def test_as_many_as_the_best_subset_integers(jobs, ttft):
    # Small integers: many ties, among jobs and between an end and its deadline.
    assert bound(jobs, ttft) == best_subset(jobs, ttft)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(thousandths, thousandths), max_size=8).map(sorted),
    thousandths.filter(bool),
)
def test_as_many_as_the_best_subset_floats(jobs, ttft):
    assert bound(jobs, ttft) == best_subset(jobs, ttft)


@pytest.mark.parametrize("load", [0.8, 1.3, 3.0])
@pytest.mark.parametrize("ttft", [0.3, 3.0, 30.0])
def test_as_many_as_the_plain_algorithm(load, ttft):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        releases = np.cumsum(rng.exponential(1 / load, 100)).tolist()
        jobs = list(zip(releases, rng.lognormal(-0.5, 1.0, 100).tolist(), strict=True))
        assert bound(jobs, ttft) == plain_algorithm(jobs, ttft)


@pytest.mark.parametrize(
    ("jobs", "ttft", "count"),
    [
        ([], 1.0, 0),
        ([(0, 1)], 1.0, 1),
        ([(0, 1.01)], 1.0, 0),
        ([(5, 2), (6, 2), (7, 2)], 4, 3),  # the last ends at 11, its deadline
        ([(0, 4), (0, 1), (0, 1), (0, 1)], 4, 3),  # the long one gives way to three
        ([(0, 3), (1, 1), (1, 1)], 3, 2),  # 3, 4, then 5 is late; without the first 2 and 3
        ([(0, 5), (4, 5), (8, 5)], 6, 2),  # 5, 10, then 15 is late; the middle one gives most
        ([(0, 4), (3, 1), (9, 7)], 6, 2),  # dropping early jobs cannot help one after idleness
        ([(0, 9)] * 4, 8, 0),
        ([(0, 0)] * 4, 1, 4),
    ],
)
def test_by_hand(jobs, ttft, count):
    assert bound(jobs, ttft) == count == best_subset(jobs, ttft)


def test_an_end_at_the_deadline_is_on_time_whatever_the_rounding():
    # Ten times 0.1 is 0.9999999999999999 or 1.0000000000000002, by the order of the sums.
    for start in (0.0, 1e6 / 3, 1.7e9):
        assert most_on_time([start] * 10, [0.1] * 10, 1.0) == 10
        assert most_on_time([start] * 10, [0.1] * 10, 1.0 - 1e-6) == 9
    # A busy period of a day, where each job ends at its deadline.
    releases = np.arange(86_400) * 1.1
    assert most_on_time(releases, np.r_[3.3, np.full(86_399, 1.1)], 3.3) == 86_400


@pytest.mark.parametrize(
    ("release", "seconds", "ttft", "named"),
    [
        ([1.0, 0.5], [1, 1], 1.0, "release must be sorted, got 0.5 at index 1"),
        ([0.0, np.nan], [1, 1], 1.0, "release must be finite, got nan at index 1"),
        ([0.0, np.inf, np.inf], [1, 1, 1], 1.0, "release must be finite, got inf at index 1"),
        ([0.0, 1.0], [1, -2], 1.0, "seconds must be finite and not negative, got -2.0 at index 1"),
        ([0.0], [np.nan], 1.0, "seconds must be finite"),
        ([0.0], [1], 0.0, "ttft must be a positive number of seconds, got 0.0"),
        ([0.0], [1], -1.0, "ttft"),
        ([0.0], [1], np.nan, "ttft"),
        ([0.0], [1, 2], 1.0, r"same length, got shapes \(1,\) and \(2,\)"),
        ([[0.0]], [[1]], 1.0, "one dimension"),
    ],
)
def test_bad_input_is_named(release, seconds, ttft, named):
    with pytest.raises(ValueError, match=named):
        most_on_time(release, seconds, ttft)


@pytest.mark.parametrize("ttft", [0.5, 100.0])
def test_a_long_overload_takes_seconds(ttft):
    rng = np.random.default_rng(0)
    releases = np.cumsum(rng.exponential(0.5, 200_000))
    seconds = rng.lognormal(-0.5, 1.0, 200_000)
    begun = time.perf_counter()
    count = most_on_time(releases, seconds, ttft)
    assert time.perf_counter() - begun < 20, "about 1 s on an idle core"
    assert 0 < count < 200_000
