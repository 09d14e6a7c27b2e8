"""What runs on a mesh, as arrays: made of a ledger's work, and read again as tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kairos_jax.engine import lanes
from kairos_jax.engine.lanes import LAST_SAMPLED, Fill, Holders
from models import sampling
from models.sampling import SamplingParams
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


# A step makes hundreds of tokens and parts. A dataclass that is not frozen is made in 0.2 us, a
# NamedTuple in 0.5.


@dataclass(slots=True)
class Token:
    """One sampled token. logprob and top (id, logprob) are None and () unless asked for; so is
    prompt, which only the first token has. id: `models.sampling.INVALID` where the numbers of the
    sequence are not finite, and there is no token.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt: PromptLogprobs | None = None


class Step(NamedTuple):
    """A call of the compiled forward step. tokens: int32 [T], ids; `LAST_SAMPLED` where the id is
    on the device alone. sequences: int32 [S, 5], of each how many tokens it has in this step, its
    context with them, its lane, whether it samples, and the page of its last token: see
    `kairos_jax.engine.lanes.unpack`.

    Two arrays for all, since every array that goes to a device takes its time, 20 us or more.
    """

    tokens: np.ndarray
    sequences: np.ndarray


class Score(NamedTuple):
    """A call for log-probabilities after all tokens of the step before it, where Step samples after
    the last of each sequence. targets: int32 [T], the token that follows; below 0: none is wanted.
    """

    targets: np.ndarray


class Read(NamedTuple):
    """A call that copies blocks of pages out. pages: int32 ids, of each block BLOCK_PAGES."""

    pages: np.ndarray


class Write(NamedTuple):
    """A call that writes blocks into the pool. Ids past the pool are dropped. blocks: arrays, or
    their shapes where the call is only described.
    """

    pages: np.ndarray
    blocks: tuple[Any, ...]


Call = Step | Fill | Score | Read | Write
"""All that ever runs on a mesh, as arrays."""


def wants_prompt_logprobs(request: Request) -> bool:
    """Whether logits are needed after each of its prompt's tokens: it must be computed whole."""
    how: SamplingParams | None = request.sampling
    return how is not None and how.prompt_logprobs is not None


@dataclass(slots=True)
class Part:
    """Consecutive tokens of one sequence, which has a lane. samples: they are its last, after which
    the next token is sampled.
    """

    seq: Seq
    start: int
    num_tokens: int
    samples: bool
    lane: int

    @property
    def num_scored(self) -> int:
        """How many of its tokens, the first ones, precede one of the prompt whose log-probability
        is wanted.
        """
        request = self.seq.request
        if not wants_prompt_logprobs(request):
            return 0
        return max(min(self.num_tokens, len(request.prompt) - 1 - self.start), 0)


def padding(num_tokens: int, num_sequences: int, limits: Limits) -> Step:
    """A step of these sizes that computes nothing."""
    sequences = np.zeros((num_sequences, lanes.SAID), np.int32)
    sequences[:, lanes.LANE] = lanes.past(limits)
    return Step(np.zeros(num_tokens, np.int32), sequences)


def step(parts: Sequence[Part], num_tokens: int, num_sequences: int, limits: Limits) -> Step:
    """A step of these parts, of a sequence each, and padding up to these sizes."""
    call, page_size = padding(num_tokens, num_sequences, limits), limits.page_size
    said: list[int] = []
    ids: list[int] = []
    for part in parts:
        seq, start, count = part.seq, part.start, part.num_tokens
        context = start + count
        page = seq.pages[(context - 1) // page_size]
        said += count, context, part.lane, part.samples, page
        at = start - len(seq.request.prompt)
        if count == 1 and 0 <= at < len(seq.tokens):  # as most are
            ids.append(seq.tokens[at])
            continue
        known = seq.token_ids(start, context)
        ids += known
        if len(known) < count:
            ids.append(LAST_SAMPLED)
    call.tokens[: len(ids)] = ids
    call.sequences.ravel()[: len(said)] = said
    return call


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of a token of each of its sequences, all of which are past their prompts. The next is
    often one of the same sequences: then few of its numbers are other ones.

    parts: where they are in the first of such steps. ids: of their requests, if none of them asks
    for more than its tokens.
    """

    seqs: list[Seq]
    parts: list[Part]
    ids: list[str] | None
    call: Step

    @classmethod
    def of(cls, parts: list[Part], call: Step) -> "Decode | None":
        """The step, if it is such a one."""
        if not parts or any(part.start < len(part.seq.request.prompt) for part in parts):
            return None
        seqs = [part.seq for part in parts]
        plain = all(_is_plain(seq.request) for seq in seqs)
        return cls(seqs, parts, [seq.request.id for seq in seqs] if plain else None, call)

    def next(
        self, work: Sequence[tuple[Seq, int]], holders: Holders, limits: Limits
    ) -> "Decode | None":
        """The step after it, if `work` is a further token of each of the same sequences."""
        seqs, contexts = [seq for seq, _ in work], self.call.sequences[: len(work), lanes.CONTEXT]
        if seqs != self.seqs or [seq.computed for seq in seqs] != contexts.tolist():
            return None
        if not holders.keep(seqs):
            return None
        # The device may still read those of the last step.
        call = Step(np.zeros_like(self.call.tokens), self.call.sequences.copy())
        call.tokens[: len(seqs)] = LAST_SAMPLED
        call.sequences[: len(seqs), lanes.CONTEXT] += 1
        for row in (contexts % limits.page_size == 0).nonzero()[0].tolist():
            seq = seqs[row]
            holders.lane(seq, seq.computed + 1)
            call.sequences[row, lanes.PAGE] = seq.pages[seq.computed // limits.page_size]
        return Decode(seqs, self.parts, self.ids, call)

    def tokens(self, packed: np.ndarray) -> dict[str, Token]:
        """What was sampled: see the function of this name."""
        if self.ids is not None:
            sampled = sampling.unpack(packed).token[: len(self.ids)]
            if sampled.min() >= 0:
                return dict(zip(self.ids, map(Token, sampled.tolist()), strict=True))
        return tokens(self.parts, packed)


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
            plain = _is_plain(request)
            found[request.id] = Token(id) if plain else _token(part, id, sampled, index)
    return found | invalid if invalid else found


def merged(first: dict[str, Token], *others: Mapping[str, Token]) -> dict[str, Token]:
    """What the runs of one step gave: a sequence that is invalid in one of them stays so."""
    found = first
    for part in others:
        found |= {id: token for id, token in part.items() if found.get(id) is not _INVALID}
    return found


_INVALID = Token(sampling.INVALID)


def _is_plain(request: Request) -> bool:
    """Whether it asks for no log-probabilities."""
    how: SamplingParams | None = request.sampling
    return how is None or (how.logprobs is None and how.prompt_logprobs is None)


def _token(part: Part, id: int, sampled: sampling.Sampled, index: int) -> Token:
    """What part `index` has sampled, with log-probabilities."""
    request, token = part.seq.request, Token(id)
    how: SamplingParams = request.sampling
    if how.logprobs is not None:
        ids = sampled.top_tokens[index, : how.logprobs].tolist()
        values = sampled.top_logprobs[index, : how.logprobs].tolist()
        top = tuple(zip(ids, values, strict=True))
        token = Token(id, float(sampled.logprob[index]), top)
    if part.start + part.num_tokens == len(request.prompt) and wants_prompt_logprobs(request):
        prompt = _prompt_logprobs(part.seq)
        return _INVALID if prompt is None else replace(token, prompt=prompt)
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
