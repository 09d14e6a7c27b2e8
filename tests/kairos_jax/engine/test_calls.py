"""A step's work as the arrays that go to the device."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kairos_jax.engine import calls, lanes
from kairos_jax.engine.calls import Part
from models.sampling import INVALID, SamplingParams
from schedulers.ledger.instance import Limits
from schedulers.ledger.request import Request, Seq, Slo

PAGE = 4
LIMITS = Limits(4, 16, 6 * PAGE, PAGE, 12)


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


def part(seq, count, lane=0):
    end = seq.computed + count
    return Part(seq, seq.computed, count, end == seq.length, lane)


def step(parts, num_tokens=4, num_sequences=4, holders=None):
    """What a step of these parts computes, and how it samples. holders: of the lanes, of which the
    device knows nothing.
    """
    holders = holders or lanes.Holders(LIMITS)
    holders.begin()
    parts = [
        dataclasses.replace(each, lane=holders.lane(each.seq, each.start + each.num_tokens))
        for each in parts
    ]
    known = jnp.zeros(lanes.shape(LIMITS), jnp.int32)
    for fill in holders.fills():
        known = lanes.fill(known, *fill)
    arrays = map(jnp.asarray, calls.step(parts, num_tokens, num_sequences, LIMITS))
    return lanes.unpack(known, *arrays, LIMITS)[1:]


def test_a_step_says_what_is_computed_where_and_how_it_is_sampled():
    how = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 2**64 - 3}
    drawn = seq([3, 1, 4], 4, [7, 9], [1, 5], logprobs=2, **how)
    greedy = seq([2, 7, 1, 8], 3, [0, 5])
    inputs, sampling = step([part(drawn, 1), part(greedy, 1)])
    np.testing.assert_array_equal(inputs.tokens, [5, 8, 0, 0])
    np.testing.assert_array_equal(inputs.positions, [4, 3, 0, 0])
    past = LIMITS.num_pages * PAGE
    np.testing.assert_array_equal(inputs.slots, [9 * PAGE, 3, past + 2, past + 3])
    np.testing.assert_array_equal(inputs.starts, [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(inputs.contexts, [5, 4, 0, 0])
    np.testing.assert_array_equal(inputs.pages[:2, :2], [[7, 9], [0, 5]])
    np.testing.assert_array_equal(sampling.temperature, np.array([0.7, 0, 0, 0], np.float32))
    np.testing.assert_array_equal(sampling.top_k[:2], [5, 0])
    np.testing.assert_array_equal(sampling.top_p[:2], np.array([0.9, 1], np.float32))
    np.testing.assert_array_equal(sampling.min_p[:2], np.array([0.1, 0], np.float32))
    halves = np.array([[2**32 - 3, 2**32 - 1], [0, 0]], np.uint32)
    np.testing.assert_array_equal(sampling.seed[:2], halves)
    np.testing.assert_array_equal(sampling.position[:2], [5, 4])
    np.testing.assert_array_equal(sampling.logprobs, [1, 0, 0, 0])


def test_chunks_lie_beside_each_other_and_draw_after_the_last_of_a_prompt():
    """A chunk of a prompt, a decode step, and the rest of another prompt."""
    how = {"temperature": 1.0, "logprobs": 0}
    begun = seq([3, 1, 4, 1, 5, 9, 2, 6], 2, [4, 1], **how)
    decoded = seq([7, 7], 2, [2], [8], **how)
    ended = seq([1, 2, 3, 4, 5, 6], 3, [3, 6], **how)
    inputs, sampling = step([part(begun, 4), part(decoded, 1), part(ended, 3)], 10, 5)
    np.testing.assert_array_equal(inputs.tokens, [4, 1, 5, 9, 8, 4, 5, 6, 0, 0])
    np.testing.assert_array_equal(inputs.positions, [2, 3, 4, 5, 2, 3, 4, 5, 0, 0])
    slots = [4 * PAGE + 2, 4 * PAGE + 3, PAGE, PAGE + 1, 2 * PAGE + 2]
    slots += [3 * PAGE + 3, 6 * PAGE, 6 * PAGE + 1]
    np.testing.assert_array_equal(inputs.slots[:8], slots)
    np.testing.assert_array_equal(inputs.starts, [0, 4, 5, 8, 8, 8])
    np.testing.assert_array_equal(inputs.contexts, [6, 3, 6, 0, 0])
    np.testing.assert_array_equal(sampling.temperature, [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(sampling.logprobs, [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(sampling.position[1:3], [3, 6])


def test_no_two_tokens_of_a_step_have_a_slot_and_padding_has_none_in_the_pool():
    parts = [part(seq([1] * 9, 0, [0, 1, 2]), 9), part(seq([1] * 3, 2, [5]), 1)]
    for size in (10, 16):
        inputs, _ = step(parts, size, 3)
        assert len(set(inputs.slots.tolist())) == size
        past = inputs.slots >= LIMITS.num_pages * PAGE
        assert past.tolist() == [False] * 10 + [True] * (size - 10)


def test_a_step_keeps_its_arrays_when_the_next_is_made():
    """The device may still read them."""
    growing = seq([1, 2, 3], 3, [8], [4])
    first = calls.step([part(growing, 1)], 1, 1, LIMITS)
    before = [array.copy() for array in first]
    growing.pages.append(9)
    growing.tokens.append(5)
    calls.step([Part(growing, 4, 1, True, 0)], 1, 1, LIMITS)
    for array, copied in zip(first, before, strict=True):
        np.testing.assert_array_equal(array, copied)


def sampled(*ids):
    """What a device packs of these tokens."""
    packed = np.zeros((len(ids), 42), np.int32)
    packed[:, 0] = ids
    return packed


def test_a_sequence_with_one_part_that_is_not_finite_gives_no_token():
    long, other = seq([1] * 7, 0, [2]), seq([1, 2], 0, [3])
    other.request = dataclasses.replace(other.request, id="b")
    # What is beyond the largest step takes several runs.
    runs = [[Part(long, 0, 4, False, 0)], [Part(long, 4, 3, True, 0), part(other, 2)]]
    for bad in range(2):
        told = calls.merged(
            *(
                calls.tokens(parts, sampled(INVALID if run == bad else 6, 5))
                for run, parts in enumerate(runs)
            )
        )
        assert {id: token.id for id, token in told.items()} == {"a": INVALID, "b": 5}


def test_a_prompt_with_logits_that_are_not_finite_gives_no_token():
    for value, expected in ((-1.0, 5), (-np.inf, 5), (np.nan, INVALID)):
        scored = sampled(0, 0)
        scored.view(np.float32)[1, 1] = value
        asked = seq([1, 2, 3], 0, [2], prompt_logprobs=1)
        asked.scored = [(scored, 0, 2)]
        assert calls.tokens([part(asked, 3)], sampled(5))["a"].id == expected


def test_a_token_that_is_on_the_device_alone_is_named_as_that():
    ahead, other = seq([1, 2, 3], 4, [8, 9], [4, 5]), seq([7, 7], 1, [3])
    ahead.tokens.pop()
    call = calls.step([part(ahead, 1, 5), part(other, 1, 2)], 4, 4, LIMITS)
    assert call.tokens.tolist() == [lanes.LAST_SAMPLED, 7, 0, 0]
    past = lanes.past(LIMITS)
    assert call.sequences.tolist() == [
        [1, 5, 5, 1, 9],
        [1, 2, 2, 1, 3],
        [0, 0, past, 0, 0],
        [0, 0, past, 0, 0],
    ]
