"""A step's work as the one array that goes to the device."""

import dataclasses

import numpy as np
import pytest

from kairos_jax.engine import calls
from kairos_jax.engine.calls import Row, rows_of
from models.sampling import INVALID, SamplingParams
from schedulers.ledger.request import Request, Seq, Slo

TABLE_PAGES = 6


def seq(prompt, computed=0, pages=(), tokens=(), **sampling):
    slo, how = Slo(1.0, 1.0), SamplingParams(**sampling)
    made = Seq(
        Request("a", 0.0, prompt, 9, slo, sampling=how),
        computed=computed,
        num_tokens=len(tokens),
        tokens=tokens,
    )
    made.pages = list(pages)
    return made


def step(rows, size=4, queries=1):
    return calls.unpack(calls.step(rows, size, queries, TABLE_PAGES).rows, TABLE_PAGES)


def test_rows_say_what_is_computed_where_and_how_it_is_sampled():
    how = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 2**64 - 3}
    drawn = seq([3, 1, 4], 4, [7, 9], [1, 5], logprobs=2, **how)
    greedy = seq([2, 7, 1, 8], 3, [0, 5])
    inputs, sampling = step(rows_of(drawn, 1, 1) + rows_of(greedy, 1, 1))
    np.testing.assert_array_equal(inputs.tokens, [[5], [8], [0], [0]])
    np.testing.assert_array_equal(inputs.start, [4, 3, 0, 0])
    np.testing.assert_array_equal(inputs.count, [1, 1, 0, 0])
    np.testing.assert_array_equal(inputs.page_table[:2, :2], [[7, 9], [0, 5]])
    np.testing.assert_array_equal(sampling.temperature, np.array([0.7, 0, 0, 0], np.float32))
    np.testing.assert_array_equal(sampling.top_k, [5, 0, 0, 0])
    np.testing.assert_array_equal(sampling.top_p, np.array([0.9, 1, 1, 1], np.float32))
    np.testing.assert_array_equal(sampling.min_p, np.array([0.1, 0, 0, 0], np.float32))
    halves = np.array([[2**32 - 3, 2**32 - 1], [0, 0], [0, 0], [0, 0]], np.uint32)
    np.testing.assert_array_equal(sampling.seed, halves)
    np.testing.assert_array_equal(sampling.position[:2], [5, 4])
    np.testing.assert_array_equal(sampling.logprobs, [1, 0, 0, 0])


def test_a_chunk_lies_in_several_rows_of_which_the_last_alone_draws():
    drawn = seq([3, 1, 4, 1, 5, 9, 2, 6], 0, [4], temperature=1.0, logprobs=0)
    inputs, sampling = step(rows_of(drawn, 8, 3), queries=3)
    np.testing.assert_array_equal(inputs.tokens, [[3, 1, 4], [1, 5, 9], [2, 6, 0], [0, 0, 0]])
    np.testing.assert_array_equal(sampling.temperature, [0, 0, 1, 0])
    np.testing.assert_array_equal(sampling.logprobs, [0, 0, 1, 0])
    assert sampling.position[2] == len(drawn.request.prompt)


def append(pages):
    pages.append(3)


def exchange(pages):
    pages[0] = 5  # as the ledger does where another has cached the same


def give_back(pages):
    pages[:] = [6]


@pytest.mark.parametrize("change", [append, exchange, give_back])
def test_rows_follow_a_sequence_to_other_pages(change):
    moving = seq([1, 2, 3], 3, [8, 9], [4])
    step(rows_of(moving, 1, 1))
    change(moving.pages)
    inputs, _ = step(rows_of(moving, 1, 1))
    assert inputs.page_table[0, : len(moving.pages)].tolist() == moving.pages


def test_a_step_keeps_its_array_when_the_next_is_made():
    """The device may still read it."""
    growing = seq([1, 2, 3], 3, [8], [4])
    first = calls.step(rows_of(growing, 1, 1), 1, 1, TABLE_PAGES)
    before = first.rows.copy()
    growing.pages.append(9)
    growing.tokens.append(5)
    calls.step([Row(growing, 4, 1, True)], 1, 1, TABLE_PAGES)
    np.testing.assert_array_equal(first.rows, before)


def sampled(*ids):
    """What a device packs of these tokens."""
    packed = np.zeros((len(ids), 42), np.int32)
    packed[:, 0] = ids
    return packed


def test_a_sequence_with_one_row_that_is_not_finite_gives_no_token():
    long, other = seq([1] * 7, 0, [2]), seq([1, 2], 0, [3])
    other.request = dataclasses.replace(other.request, id="b")
    rows = rows_of(long, 7, 3) + rows_of(other, 2, 3)
    for place in range(3):
        ids = [INVALID if at == place else 5 for at in range(4)]
        told = calls.tokens(rows, sampled(*ids))
        assert {id: token.id for id, token in told.items()} == {"a": INVALID, "b": 5}
    # Also where its rows are in several runs.
    for bad in (0, 1):
        parts = [
            calls.tokens(part, sampled(*[INVALID if run == bad else 5] * len(part)))
            for run, part in enumerate((rows[:2], rows[2:]))
        ]
        assert calls.merged(parts)["a"].id == INVALID


def test_a_prompt_with_logits_that_are_not_finite_gives_no_token():
    for value, expected in ((-1.0, 5), (-np.inf, 5), (np.nan, INVALID)):
        scored = sampled(0, 0)
        scored.view(np.float32)[1, 1] = value
        asked = seq([1, 2, 3], 0, [2], prompt_logprobs=1)
        asked.scored = [(scored[None], 0, 2)]
        assert calls.tokens(rows_of(asked, 3, 4), sampled(5))["a"].id == expected
