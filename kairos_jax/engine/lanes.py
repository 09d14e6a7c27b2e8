"""What stays of a sequence on the device from step to step: a lane each.

A lane holds the token that its sequence sampled last, how it samples, and its pages. So a step says
of a sequence no more than what is new: how many tokens, of how long a context, and the page of the
last one. All else is sent when a sequence gets a lane, or when other pages take the place of its
pages (`Holders`). The device runs all this in the order of the calls: a lane may go to another
sequence while a step that reads it is under way.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from models.kv_cache import StepInput, owners
from models.sampling import SamplingInput, SamplingParams
from schedulers.ledger.instance import Limits
from schedulers.ledger.request import Seq

# A lane's numbers, before its pages: the token, temperature, top_k, top_p, min_p, two halves of the
# seed, and whether log-probabilities are wanted. Floats by their bits.
_TOKEN, _SEED, _NUMBERS = 0, slice(5, 7), 8
# What a step says of a sequence: its tokens in this step, its context with them, its lane, whether
# it samples, and the page of its last token.
SAID = 5
CONTEXT, LANE, _SAMPLES, PAGE = range(1, SAID)
# Lanes of one `Fill`.
_FILLED = 8

LAST_SAMPLED = -1
"""In place of the id of a token that is on the device alone: what its sequence sampled last."""


class Fill(NamedTuple):
    """A call that writes lanes, but for their tokens. numbers: int32 [_FILLED], of the lanes; one
    past them is dropped. rows: int32 [_FILLED, ...].
    """

    numbers: np.ndarray
    rows: np.ndarray


def shape(limits: Limits) -> tuple[int, int]:
    """Of all lanes. There are twice as many as sequences in a step: a sequence of the last step
    keeps its lane, and with it its token, while all of the next step take others.
    """
    return 2 * limits.max_batch, _NUMBERS + limits.pages_for(limits.max_context)


def past(limits: Limits) -> int:
    """The number of a lane that there is not."""
    return shape(limits)[0]


def no_fill(limits: Limits) -> Fill:
    """A call that writes nothing."""
    _, width = shape(limits)
    numbers = np.full(_FILLED, past(limits), np.int32)
    return Fill(numbers, np.zeros((_FILLED, width - 1), np.int32))


# On the device.


def fill(lanes: Int[Array, "N W"], numbers: Any, rows: Any) -> Int[Array, "N W"]:
    """The lanes after a `Fill`."""
    return lanes.at[numbers, _TOKEN + 1 :].set(rows, mode="drop")


def unpack(
    lanes: Int[Array, "N W"], tokens: Any, sequences: Any, limits: Limits
) -> tuple[Int[Array, "N W"], StepInput, SamplingInput]:
    """The lanes with the pages that a step tells of, and what it computes. tokens, sequences: of
    `kairos_jax.engine.calls.Step`.

    A token that is `INVALID` in its lane becomes an id that there is: what comes of it is thrown
    away.
    """
    page_size = limits.page_size
    count, context, lane, samples, page = (sequences[:, column] for column in range(SAID))
    newest = (context - 1) // page_size
    lanes = lanes.at[lane, _NUMBERS + newest].set(page, mode="drop")
    own = lanes.at[lane].get(mode="clip")
    pages = jnp.where((count > 0)[:, None], own[:, _NUMBERS:], 0)
    starts = jnp.pad(jnp.cumsum(count, dtype=jnp.int32), (1, 0))
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    of, real = owners(starts, tokens.shape[0]), place < starts[-1]
    positions = jnp.where(real, (context - count - starts[:-1])[of] + place, 0)
    slots = pages[of, positions // page_size] * page_size + positions % page_size
    inputs = StepInput(
        tokens=jnp.where(tokens < 0, jnp.maximum(own[of, _TOKEN], 0), tokens),
        positions=positions,
        # No two are the same.
        slots=jnp.where(real, slots, limits.num_pages * page_size + place),
        starts=starts,
        contexts=context,
        pages=pages,
    )
    temperature, top_k, top_p, min_p, *_, logprobs = (own[:, at] for at in range(1, _NUMBERS))
    # After what is not its sequence's last token nothing is drawn.
    draws = samples > 0
    how = SamplingInput(
        temperature=jnp.where(draws, temperature.view("float32"), 0.0),
        top_k=top_k,
        top_p=top_p.view("float32"),
        min_p=min_p.view("float32"),
        seed=own[:, _SEED].view("uint32"),
        position=context,
        logprobs=jnp.where(draws, logprobs, 0),
    )
    return lanes, inputs, how


def keep(lanes: Int[Array, "N W"], sequences: Any, sampled: Any) -> Int[Array, "N W"]:
    """The lanes with what the sequences of a step have sampled, int32 [S], where they have."""
    lane = jnp.where(sequences[:, _SAMPLES] > 0, sequences[:, LANE], lanes.shape[0])
    return lanes.at[lane, _TOKEN].set(sampled, mode="drop")


# On the host.


@dataclass(slots=True, eq=False)
class Lane:
    """A lane while one sequence has it. pages: the sequence's list, of which the device knows the
    first `known`. step: the last one that computed something of it.
    """

    number: int
    pages: list[int]
    known: int = 0
    step: int = 0


class Holders:
    """Which sequence has which lane, and what the device knows of it."""

    def __init__(self, limits: Limits):
        self._limits, self._step = limits, 0
        self._lanes = [Lane(number, []) for number in range(past(limits))]
        # Lanes to give away, and the last step of each; the one to go first is the last.
        self._spare: list[tuple[int, int]] = []
        self._stale: list[tuple[Lane, Seq]] = []

    def begin(self) -> None:
        """A step begins: no lane that it uses goes to another sequence."""
        self._step += 1

    def lane(self, seq: Seq, context: int) -> int:
        """The lane of a sequence of this step, which computes its tokens up to `context`."""
        lane: Lane | None = seq.lane
        if lane is None or self._lanes[lane.number] is not lane:
            if seq.num_tokens > len(seq.tokens):
                raise ValueError(f"the last token of request {seq.request.id!r} is in no lane")
            lane = seq.lane = self._take()
        lane.step = self._step
        # The step itself tells the page of its last token. A list of pages only grows.
        newest = (context - 1) // self._limits.page_size
        if lane.pages is not seq.pages or lane.known < newest:
            lane.pages, lane.known = seq.pages, len(seq.pages)
            self._stale.append((lane, seq))
        elif lane.known == newest:
            lane.known += 1
        return lane.number

    def keep(self, seqs: Iterable[Seq]) -> bool:
        """Whether the sequences of this step, all of which the last one had, have their lanes and
        pages still. Where it tells of a further page of one, `lane` is to be asked too.
        """
        if any(seq.lane.pages is not seq.pages for seq in seqs):
            return False
        for seq in seqs:
            seq.lane.step = self._step
        return True

    def fills(self) -> Iterator[Fill]:
        """What the device lacks of the lanes that were asked for; to be run before their step."""
        for first in range(0, len(self._stale), _FILLED):
            call = no_fill(self._limits)
            for at, (lane, seq) in enumerate(self._stale[first : first + _FILLED]):
                call.numbers[at] = lane.number
                _describe(seq, call.rows[at])
            yield call
        self._stale.clear()

    def _take(self) -> Lane:
        """The lane that was not used for the longest time, as of another sequence."""
        while True:
            if not self._spare:
                used = sorted(self._lanes, key=lambda lane: -lane.step)
                self._spare = [(each.number, each.step) for each in used if each.step < self._step]
                if not self._spare:
                    raise ValueError(f"a step has more than {len(self._lanes)} sequences")
            number, step = self._spare.pop()
            if self._lanes[number].step == step:  # not used since
                lane = self._lanes[number] = Lane(number, [])
                return lane


def _describe(seq: Seq, row: np.ndarray) -> None:
    """Writes a sequence's lane into zeros, but for its token."""
    how: SamplingParams = seq.request.sampling or SamplingParams()
    floats, seeds = row.view(np.float32), row.view(np.uint32)
    row[[1, 6]] = how.top_k, how.logprobs is not None
    floats[[0, 2, 3]] = how.temperature, how.top_p, how.min_p
    seeds[4:6] = divmod(how.seed, 1 << 32)[::-1]
    row[_NUMBERS - 1 : _NUMBERS - 1 + len(seq.pages)] = seq.pages
