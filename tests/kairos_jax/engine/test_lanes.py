"""What a step says with the help of the lanes on the device, against what is made anew of the
sequences.
"""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import packed

from kairos_jax.engine import calls, lanes
from kairos_jax.engine.calls import Part
from models.sampling import INVALID, SamplingParams
from schedulers.ledger.instance import Limits
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.ledger.rows import Column

PAGE = 4
LIMITS = Limits(max_batch=3, max_chunk=9, max_context=24, page_size=PAGE, num_pages=40)
SIZE = 12, 3
AT_ONCE = 5  # sequences, of which a step has three at most


FILL, KEEP = jax.jit(lanes.fill), jax.jit(lanes.keep)
UNPACK = jax.jit(lambda *arrays: lanes.unpack(*arrays, LIMITS))


class Device:
    """What runs the calls, in order."""

    def __init__(self):
        self.lanes = jnp.zeros(lanes.shape(LIMITS), jnp.int32)
        self.num_fills = 0

    def fill(self, call):
        self.lanes = FILL(self.lanes, *call)
        self.num_fills += 1

    def step(self, call, sampled):
        """Returns what the step computes, and how it samples. sampled: of each of its sequences."""
        self.lanes, inputs, how = UNPACK(self.lanes, *call)
        ids = np.full(len(call.sequences), 99, np.int32)
        ids[: len(sampled)] = sampled
        self.lanes = KEEP(self.lanes, call.sequences, ids)
        return jax.tree.map(np.asarray, (inputs, how))


def sequence(id, prompt, **sampling):
    how = SamplingParams(**sampling)
    return Seq(Request(id, 0.0, prompt, 99, Slo(1.0, 1.0), sampling=how))


class Model:
    """A few sequences as a ledger changes them. known: output tokens of each, as the device has
    sampled them; `Seq.tokens` may lack the last. decode: the last step, if it was one; repeated:
    steps that were made of such a one.
    """

    def __init__(self, seed):
        self.rng, self.device, self.holders = random.Random(seed), Device(), lanes.Holders(LIMITS)
        self.seqs, self.known, self.count = [], {}, 0
        self.some, self.decode, self.repeated = [], None, 0
        self.free = list(range(LIMITS.num_pages))

    def join(self):
        prompt = [self.rng.randrange(50) for _ in range(self.rng.randint(1, 14))]
        self.count += 1
        seq = sequence(
            str(self.count),
            prompt,
            temperature=self.rng.choice([0.0, 0.5]),
            top_k=self.count,
            top_p=0.75,
            min_p=0.25,
            seed=self.rng.randrange(2**64),
            logprobs=self.rng.choice([None, 2]),
        )
        self.known[seq] = []
        self.give(seq)
        self.seqs.append(seq)

    def give(self, seq):
        while len(seq.pages) * PAGE < seq.length:
            seq.pages.append(self.take())

    def take(self):
        return self.free.pop(self.rng.randrange(len(self.free)))

    def leave(self, seq):
        self.free += seq.pages
        self.seqs.remove(seq)

    def move(self, seq):
        """As an eviction, and the fetch after it."""
        self.tell(seq)
        self.free += seq.pages
        seq.pages = []
        self.give(seq)

    def exchange(self, seq):
        """As where another has cached the same page first."""
        at = self.rng.randrange(len(seq.pages))
        self.free.append(seq.pages[at])
        seq.pages = [*seq.pages[:at], self.take(), *seq.pages[at + 1 :]]

    def tell(self, seq):
        seq.tokens[:] = self.known[seq]

    def step(self):
        """Some sequences, of which some are on no more than their prompts."""
        stays = self.some and all(seq in self.seqs for seq in self.some)
        if not stays or self.rng.random() < 0.4:
            count = min(self.rng.randint(1, SIZE[1]), len(self.seqs))
            self.some = self.rng.sample(self.seqs, count)
        self.holders.begin()
        work, room = [], SIZE[0] - len(self.some)
        for seq in self.some:
            self.give(seq)
            count = self.rng.randint(1, min(seq.remaining, 1 + room))
            room -= count - 1
            work.append((seq, count))
        parts = [Part(seq, seq.computed, count, count == seq.remaining, 0) for seq, count in work]
        decode = self.decode and self.decode.next(work, self.holders, LIMITS)
        if decode:
            self.repeated += 1
            call = decode.call
        else:
            for part in parts:
                part.lane = self.holders.lane(part.seq, part.start + part.num_tokens)
            call = calls.step(parts, *SIZE, LIMITS)
            decode = calls.Decode.of(parts, call)
        self.decode = decode
        for fill in self.holders.fills():
            self.device.fill(fill)
        sampled = [self.rng.randrange(50) for _ in parts]
        inputs, how = self.device.step(call, sampled)
        self.check(parts, inputs, how)
        self.check_tokens(parts, sampled)
        for other in self.seqs:
            self.tell(other)  # the result of the step before is there
        for part, token in zip(parts, sampled, strict=True):
            cells = part.seq.cells
            cells[Column.COMPUTED] += part.num_tokens
            if part.samples:
                cells[[Column.LENGTH, Column.COUNT]] += 1
                self.known[part.seq].append(token)
        for part in parts:
            if part.seq.length >= LIMITS.max_context:
                self.leave(part.seq)

    def check(self, parts, inputs, how):
        count = len(parts)
        tables = np.zeros((count, LIMITS.pages_for(LIMITS.max_context)), np.int32)
        for row, part in zip(tables, parts, strict=True):
            row[: len(part.seq.pages)] = part.seq.pages
        ids = [[*part.seq.request.prompt, *self.known[part.seq]] for part in parts]
        of = [(at, part.start, part.num_tokens) for at, part in enumerate(parts)]
        expected = packed(of, tables, PAGE, LIMITS.num_pages, SIZE, ids)
        for name in ("tokens", "positions", "slots", "starts", "contexts"):
            given, anew = getattr(inputs, name), getattr(expected, name)
            np.testing.assert_array_equal(given, anew, name)
        for at, part in enumerate(parts):
            held = LIMITS.pages_for(part.start + part.num_tokens)
            np.testing.assert_array_equal(inputs.pages[at, :held], part.seq.pages[:held])
            params = part.seq.request.sampling
            asked = part.samples, params.logprobs is not None
            assert how.temperature[at] == params.temperature * part.samples
            assert how.logprobs[at] == all(asked)
            assert (how.top_k[at], how.top_p[at], how.min_p[at]) == (params.top_k, 0.75, 0.25)
            assert int(how.seed[at, 0]) + (int(how.seed[at, 1]) << 32) == params.seed
            assert how.position[at] == part.start + part.num_tokens
        assert not inputs.pages[count:].any()
        assert not how.temperature[count:].any()
        assert not how.logprobs[count:].any()

    def check_tokens(self, parts, sampled):
        """A decode step reads its samples as any other."""
        if self.decode is None:
            return
        packed = np.zeros((SIZE[1], 42), np.int32)
        for ids in (sampled, [INVALID, *sampled[1:]]):
            packed[: len(ids), 0] = ids
            assert self.decode.tokens(packed) == calls.tokens(parts, packed)


@pytest.mark.parametrize("seed", range(20))
def test_lanes_say_what_is_made_anew_of_the_sequences(seed):
    model = Model(seed)
    for _ in range(60):
        if not model.seqs or (len(model.seqs) < AT_ONCE and model.rng.random() < 0.3):
            model.join()
        if model.rng.random() < 0.7:
            model.step()
        elif model.seqs:
            seq = model.rng.choice(model.seqs)
            getattr(model, model.rng.choice(["leave", "move", "exchange"]))(seq)
    assert model.repeated > 2


def test_a_decode_step_is_made_of_the_last_one_only_if_that_was_of_the_same_sequences():
    seqs, holders = [sequence(str(number), [1, 2, 3]) for number in range(3)], lanes.Holders(LIMITS)
    for number, seq in enumerate(seqs):
        seq.pages = [number]
    first, *_ = seqs
    holders.begin()
    parts = [Part(seq, 0, 3, True, holders.lane(seq, 3)) for seq in seqs]
    assert calls.Decode.of(parts, calls.step(parts, *SIZE, LIMITS)) is None, "of prompts"
    for seq in seqs:
        seq.cells[Column.COMPUTED] = 3
        seq.cells[[Column.LENGTH, Column.COUNT]] += 1
    holders.begin()
    parts = [Part(seq, 3, 1, True, holders.lane(seq, 4)) for seq in seqs]
    decode = calls.Decode.of(parts, calls.step(parts, *SIZE, LIMITS))
    work = [(seq, 1) for seq in seqs]
    assert decode.next(work, holders, LIMITS) is None, "the ledger has not booked it"
    for seq in seqs:
        seq.cells[[Column.COMPUTED, Column.LENGTH, Column.COUNT]] += 1
        seq.pages.append(seq.pages[0] + 10)
    holders.begin()
    assert decode.next(work[1:], holders, LIMITS) is None, "one has left"
    assert decode.next(work[::-1], holders, LIMITS) is None, "in another order"
    following = decode.next(work, holders, LIMITS)
    assert following.call.sequences[:, lanes.CONTEXT].tolist() == [5, 5, 5]
    assert following.call.sequences[:, lanes.PAGE].tolist() == [10, 11, 12]
    assert decode.call.sequences[:, lanes.CONTEXT].tolist() == [4, 4, 4], "the device may read it"
    first.pages = [30, 31]
    assert decode.next(work, holders, LIMITS) is None, "other pages took the place of its own"


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_decode_step_that_is_made_of_the_last_one_tells_each_new_page(page_size):
    limits = Limits(max_batch=1, max_chunk=9, max_context=24, page_size=page_size, num_pages=24)
    seq, holders = sequence("a", [1, 2, 3]), lanes.Holders(limits)
    seq.cells[Column.COMPUTED] = 3
    seq.tokens = [7]
    seq.cells[[Column.LENGTH, Column.COUNT]] += 1
    decode = None
    while seq.length <= limits.max_context:
        while len(seq.pages) * page_size < seq.length:
            seq.pages.append(23 - len(seq.pages))
        holders.begin()
        decode = decode and decode.next([(seq, 1)], holders, limits)
        part = Part(seq, seq.computed, 1, True, holders.lane(seq, seq.length))
        anew = calls.step([part], 1, 1, limits)
        if decode is None:
            assert seq.length == 4, "only the first is made anew"
            decode = calls.Decode.of([part], anew)
        np.testing.assert_array_equal(decode.call.sequences, anew.sequences)
        seq.cells[[Column.COMPUTED, Column.LENGTH, Column.COUNT]] += 1


def step(holders, device, seqs):
    """A decode step of these."""
    holders.begin()
    parts = []
    for seq in seqs:
        lane = holders.lane(seq, seq.length)
        parts.append(Part(seq, seq.length - 1, 1, True, lane))
    for call in holders.fills():
        device.fill(call)
    return device.step(calls.step(parts, *SIZE, LIMITS), [7] * len(parts))[0]


def grown(seq):
    """It has one token more, which the host knows."""
    seq.tokens.append(7)
    seq.cells[[Column.LENGTH, Column.COUNT]] += 1
    if seq.length > PAGE * len(seq.pages):
        seq.pages.append(max(seq.pages) + 1)


def test_nothing_is_sent_of_a_sequence_that_grows_page_by_page():
    seq, device, holders = sequence("a", [1, 2]), Device(), lanes.Holders(LIMITS)
    seq.pages = [5]
    for _ in range(LIMITS.max_context - 2):
        inputs = step(holders, device, [seq])
        assert inputs.pages[0, : len(seq.pages)].tolist() == seq.pages
        assert inputs.slots[0] == seq.pages[-1] * PAGE + (seq.length - 1) % PAGE
        grown(seq)
    assert device.num_fills == 1


def test_several_join_by_few_calls():
    limits = dataclasses.replace(LIMITS, max_batch=20)
    holders = lanes.Holders(limits)
    holders.begin()
    for number in range(20):
        seq = sequence(str(number), [1])
        seq.pages = [number]
        holders.lane(seq, 1)
    sent = [call.numbers.tolist() for call in holders.fills()]
    assert len(sent) == 3
    told = [number for numbers in sent for number in numbers if number < lanes.past(limits)]
    assert len(set(told)) == 20
    assert not list(holders.fills())


def test_sequences_that_take_turns_keep_their_lanes():
    """While no more are here than there are lanes; those that have left give theirs first."""
    seqs = [sequence(str(number), [1, 2]) for number in range(9)]
    for number, seq in enumerate(seqs):
        seq.pages = [number]
    device, holders = Device(), lanes.Holders(LIMITS)
    for _ in range(4):
        for first in (0, 3):
            step(holders, device, seqs[first : first + 3])
    assert device.num_fills == 2
    for _ in range(4):
        step(holders, device, seqs[3:6])
        step(holders, device, seqs[6:9])
    assert device.num_fills == 3


def test_a_step_has_no_more_sequences_than_there_are_lanes():
    holders = lanes.Holders(LIMITS)
    holders.begin()
    for number in range(6):
        holders.lane(sequence(str(number), [1]), 1)
    with pytest.raises(ValueError, match="a step has more than 6 sequences"):
        holders.lane(sequence("6", [1]), 1)


def test_a_token_that_is_in_no_lane_is_an_error():
    seq = sequence("a", [1, 2])
    seq.cells[[Column.LENGTH, Column.COUNT]] += 1
    with pytest.raises(ValueError, match="the last token of request 'a' is in no lane"):
        lanes.Holders(LIMITS).lane(seq, 3)


def test_a_token_that_is_not_finite_is_computed_as_one_that_there_is():
    seq, device, holders = sequence("a", [1, 2]), Device(), lanes.Holders(LIMITS)
    seq.pages = [3]
    holders.begin()
    part = Part(seq, 0, 2, True, holders.lane(seq, 2))
    for call in holders.fills():
        device.fill(call)
    device.step(calls.step([part], *SIZE, LIMITS), [INVALID])
    seq.cells[[Column.LENGTH, Column.COUNT]] += 1
    inputs = step(holders, device, [seq])
    assert inputs.tokens.tolist() == [0] * SIZE[0]
