"""A step's work as the one array that goes to the device."""

import numpy as np
import pytest

from kairos_jax.engine import calls
from kairos_jax.engine.calls import Row, rows_of
from models.sampling import SamplingParams
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
    how = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 2**32 - 1}
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
    np.testing.assert_array_equal(sampling.seed, np.array([2**32 - 1, 0, 0, 0], np.uint32))
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
