"""What runs on a mesh, as arrays: made of a ledger's work, and read again as tokens."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from models import sampling
from models.kv_cache import StepInput
from models.sampling import SamplingInput, SamplingParams
from schedulers.ledger.instance import Limits
from schedulers.ledger.request import Request, Seq


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a prompt's tokens after the first, each given those before it.

    logprobs: of the tokens themselves. top_ids, top_logprobs: of the likeliest in the place of
    each, likeliest first, equally many for each, one token's after the other's.
    """

    logprobs: tuple[float, ...] = ()
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def tokens(self, prompt: Sequence[int]) -> Iterator["Token"]:
        """Those of the prompt that they are of, after its first."""
        width = len(self.top_ids) // len(self.logprobs) if self.logprobs else 0
        top = list(zip(self.top_ids, self.top_logprobs, strict=True))
        for index, (id, value) in enumerate(zip(prompt[1:], self.logprobs, strict=True)):
            yield Token(id, value, tuple(top[index * width : (index + 1) * width]))


class Token(NamedTuple):
    """One sampled token. logprob and top (id, logprob) are None and () unless asked for; so is
    prompt, which only the first token has. id: `models.sampling.INVALID` where the numbers of the
    sequence are not finite, and there is no token.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt: PromptLogprobs | None = None


# A sequence's numbers, which stand before its pages: see `unpack`. One of them is its lane.
_NUMBERS, _LANE = 10, 6


def num_lanes(limits: Limits) -> int:
    """Lanes on the device, which hold samples of the last step: see `Part`. As many again, so that
    a step that reads some writes to others.
    """
    return 2 * limits.max_batch


_NO_LANES: Mapping[str, int] = {}


class Step(NamedTuple):
    """A call of the compiled forward step. tokens: int32 [3, T]; sequences: int32 [S, ...]. See
    `unpack`.
    """

    tokens: np.ndarray
    sequences: np.ndarray


class Score(NamedTuple):
    """A call for log-probabilities after all tokens of the step before it, where Step samples after
    the last of each sequence. targets: int32 [T], the token that follows; below 0: none is wanted.
    """

    targets: np.ndarray


class Read(NamedTuple):
    """A call that copies one block of pages out. pages: int32 ids [BLOCK_PAGES]."""

    pages: np.ndarray


class Write(NamedTuple):
    """A call that writes one block into the pool. Ids past the pool are dropped. block: an array,
    or its shape where the call is only described.
    """

    pages: np.ndarray
    block: Any


Call = Step | Score | Read | Write
"""All that ever runs on a mesh, as arrays."""


def wants_prompt_logprobs(request: Request) -> bool:
    """Whether logits are needed after each of its prompt's tokens: it must be computed whole."""
    how: SamplingParams | None = request.sampling
    return how is not None and how.prompt_logprobs is not None


class Part(NamedTuple):
    """Consecutive tokens of one sequence. samples: they are its last, after which the next token is
    sampled. lane: where that token stays on the device, for the next step; None: nowhere.
    """

    seq: Seq
    start: int
    num_tokens: int
    samples: bool
    lane: int | None = None

    @property
    def num_scored(self) -> int:
        """How many of its tokens, the first ones, precede one of the prompt whose log-probability
        is wanted.
        """
        request = self.seq.request
        if not wants_prompt_logprobs(request):
            return 0
        return max(min(self.num_tokens, len(request.prompt) - 1 - self.start), 0)


def unpack(tokens: Any, sequences: Any) -> tuple[StepInput, SamplingInput]:
    """What the arrays of a `Step` say: on the host as views of them, but for where the sequences'
    tokens start.

    tokens: of each its id, its position and its slot. sequences: of each ten numbers, then its
    pages. Two arrays for all, since every array that goes to a device takes its time, 20 us or
    more. An id below 0 names a lane, where the id is: see `from_lanes`.
    """
    count, context = sequences[:, 0], sequences[:, 1]
    xp: Any = np if isinstance(sequences, np.ndarray) else jnp
    inputs = StepInput(
        tokens=tokens[0],
        positions=tokens[1],
        slots=tokens[2],
        starts=xp.pad(xp.cumsum(count, dtype=xp.int32), (1, 0)),
        contexts=context,
        pages=sequences[:, _NUMBERS:],
    )
    return inputs, _how(sequences)


def _how(sequences: Any) -> SamplingInput:
    """How each sequence samples: the second of what `unpack` gives."""
    context, temperature, top_k, top_p, min_p, _, logprobs = (
        sequences[:, column] for column in range(1, _NUMBERS - 2)
    )
    return SamplingInput(
        temperature=temperature.view("float32"),
        top_k=top_k,
        top_p=top_p.view("float32"),
        min_p=min_p.view("float32"),
        seed=sequences[:, _NUMBERS - 2 : _NUMBERS].view("uint32"),
        position=context,
        logprobs=logprobs,
    )


def from_lanes(inputs: StepInput, lanes: Any) -> StepInput:
    """With the ids that are on the device alone. lanes: int32 [num_lanes]. A token that is
    `INVALID` there becomes an id that there is: what comes of it is thrown away.
    """
    ids = jnp.asarray(inputs.tokens)
    sampled = jnp.maximum(lanes[jnp.maximum(-1 - ids, 0)], 0)
    return dataclasses.replace(inputs, tokens=jnp.where(ids < 0, sampled, ids))


def to_lanes(lanes: Any, sequences: Any, sampled: Any) -> Any:
    """The lanes with what the sequences have sampled, int32 [S], where they have one."""
    return lanes.at[sequences[:, _LANE]].set(sampled, mode="drop")


def padding(num_tokens: int, num_sequences: int, limits: Limits) -> Step:
    """A step of these sizes that computes nothing."""
    table_pages = limits.pages_for(limits.max_context)
    sequences = np.zeros((num_sequences, _NUMBERS + table_pages), np.int32)
    tokens = np.zeros((3, num_tokens), np.int32)
    _how(sequences).top_p[:] = 1.0
    sequences[:, _LANE] = num_lanes(limits)  # past them
    past = limits.num_pages * limits.page_size
    tokens[2] = np.arange(past, past + num_tokens)
    return Step(tokens, sequences)


def step(
    parts: Sequence[Part],
    num_tokens: int,
    num_sequences: int,
    limits: Limits,
    lanes: Mapping[str, int] = _NO_LANES,
) -> Step:
    """A step of these parts, of a sequence each, and padding up to these sizes. lanes: where the
    last token of a sequence is, by request id, if it is on the device alone.
    """
    call, count = padding(num_tokens, num_sequences, limits), len(parts)
    if not parts:
        return call
    tokens, sequences = call
    heads = np.concatenate([_head(part.seq, sequences.shape[1]) for part in parts])
    sequences[:count] = heads.reshape(count, -1)
    past = num_lanes(limits)
    rows = [
        (number, start, samples, past if lane is None else lane)
        for _, start, number, samples, lane in parts
    ]
    numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int32, 4 * count)
    counts, starts, samples, lanes_to = numbers.reshape(count, 4).T
    sequences[:count, 0], sequences[:count, 1] = counts, starts + counts
    sequences[:count, _LANE] = lanes_to
    # After what is not its sequence's last nothing is to be drawn.
    how, rest = _how(sequences), samples == 0
    how.temperature[:count][rest] = how.logprobs[:count][rest] = 0
    ids = _ids(parts, lanes)
    total = len(ids)
    tokens[0, :total] = ids
    owner = np.repeat(np.arange(count), counts)
    before = np.cumsum(counts) - counts
    tokens[1, :total] = positions = np.arange(total) + (starts - before)[owner]
    page, offset = np.divmod(positions, limits.page_size)
    tokens[2, :total] = sequences[owner, _NUMBERS + page] * limits.page_size + offset
    return call


def _ids(parts: Iterable[Part], lanes: Mapping[str, int]) -> list[int]:
    """Of all tokens; a lane, below 0, for the last one of a sequence where the id is to come."""
    ids: list[int] = []
    for seq, start, count, *_ in parts:
        at = start - len(seq.request.prompt)
        if count == 1 and 0 <= at < len(seq.tokens):  # as most are
            ids.append(seq.tokens[at])
            continue
        known = seq.token_ids(start, start + count)
        ids += known
        if len(known) < count:
            ids.append(-1 - lanes[seq.request.id])
    return ids


def _head(seq: Seq, width: int) -> np.ndarray:
    """The numbers and pages of a sequence, but for what this step computes: int32 [width].

    It stays with the sequence: a step changes nothing of it, save for a page now and then.
    """
    if seq.head is None:
        params: SamplingParams = seq.request.sampling or SamplingParams()
        row = np.zeros((1, width), np.int32)
        how = _how(row)
        how.temperature[0], how.seed[0] = params.temperature, divmod(params.seed, 1 << 32)[::-1]
        how.top_k[0], how.top_p[0], how.min_p[0] = params.top_k, params.top_p, params.min_p
        how.logprobs[0] = params.logprobs is not None
        seq.head = row[0], []
    row, pages = seq.head
    if pages != seq.pages:
        row[_NUMBERS : _NUMBERS + len(seq.pages)] = seq.pages
        pages[:] = seq.pages
    return row


def targets(parts: Sequence[Part], num_tokens: int) -> np.ndarray:
    """Of a `Score` after a step of these parts."""
    ids, at = np.full(num_tokens, -1, np.int32), 0
    for part in parts:
        if count := part.num_scored:
            first = part.start + 1
            ids[at : at + count] = part.seq.request.prompt[first : first + count]
        at += part.num_tokens
    return ids


def tokens(parts: Sequence[Part], packed: np.ndarray) -> dict[str, Token]:
    """What was sampled, by request id, and `_INVALID` for each sequence with a part that is not
    finite, also one that samples nothing. packed: see models.sampling.unpack.
    """
    sampled = sampling.unpack(packed)
    found: dict[str, Token] = {}
    invalid: dict[str, Token] = {}
    for index, (part, id) in enumerate(zip(parts, sampled.token.tolist(), strict=False)):
        request = part.seq.request
        if id < 0:
            invalid[request.id] = _INVALID
        elif part.samples:
            found[request.id] = _token(part, id, sampled, index)
    return found | invalid


def merged(parts: Iterable[Mapping[str, Token]]) -> dict[str, Token]:
    """What several runs of one step gave: a sequence that is invalid in one of them stays so."""
    found: dict[str, Token] = {}
    for part in parts:
        found |= {id: token for id, token in part.items() if found.get(id) is not _INVALID}
    return found


_INVALID = Token(sampling.INVALID)


def _token(part: Part, id: int, sampled: sampling.Sampled, index: int) -> Token:
    """What part `index` has sampled."""
    request = part.seq.request
    params: SamplingParams = request.sampling or SamplingParams()
    token = Token(id)
    if params.logprobs is not None:
        ids = sampled.top_tokens[index, : params.logprobs].tolist()
        values = sampled.top_logprobs[index, : params.logprobs].tolist()
        top = tuple(zip(ids, values, strict=True))
        token = Token(id, float(sampled.logprob[index]), top)
    if part.start + part.num_tokens == len(request.prompt) and wants_prompt_logprobs(request):
        prompt = _prompt_logprobs(part.seq)
        return _INVALID if prompt is None else token._replace(prompt=prompt)
    return token


def _prompt_logprobs(seq: Seq) -> PromptLogprobs | None:
    """Of all its parts, which are in order. None: some of the logits were not finite."""
    width = seq.request.sampling.prompt_logprobs
    parts = [np.asarray(packed)[first : first + count] for packed, first, count in seq.scored]
    seq.scored = []
    if not parts:
        return PromptLogprobs()
    scored = sampling.unpack(np.concatenate(parts))
    if np.isnan(scored.logprob).any():  # as all of a token's are, if one is
        return None
    return PromptLogprobs(
        tuple(scored.logprob.tolist()),
        tuple(scored.top_tokens[:, :width].ravel().tolist()),
        tuple(scored.top_logprobs[:, :width].ravel().tolist()),
    )
