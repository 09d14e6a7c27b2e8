"""What runs on a mesh, as arrays: made of a ledger's work, and read again as tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models import sampling
from models.kv_cache import StepInput
from models.sampling import SamplingInput, SamplingParams
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


# A row's numbers, which stand before its pages and its tokens: see `unpack`.
_NUMBERS = 10


class Step(NamedTuple):
    """A call of the compiled forward step. rows: int32 [R, ...], see `unpack`."""

    rows: np.ndarray


class Score(NamedTuple):
    """A call for log-probabilities after all tokens of the step before it, where Step samples after
    the last of each row. targets: int32 [R, Q], the token that follows; below 0: none is wanted.
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


class Row(NamedTuple):
    """Up to Q consecutive tokens of one sequence. samples: they are its last, after which the next
    token is sampled.
    """

    seq: Seq
    start: int
    num_tokens: int
    samples: bool

    @property
    def num_scored(self) -> int:
        """How many of its tokens, the first ones, precede one of the prompt whose log-probability
        is wanted.
        """
        request = self.seq.request
        left = min(self.num_tokens, len(request.prompt) - 1 - self.start)
        return left if left > 0 and wants_prompt_logprobs(request) else 0


def unpack(rows: Any, table_pages: int) -> tuple[StepInput, SamplingInput]:
    """What rows of int32 [R, 10 + table_pages + Q] say: on the host as views of them.

    One array for all, since every array that goes to a device takes its time, 20 us or more.
    """
    numbers = [rows[:, column] for column in range(_NUMBERS - 2)]
    start, count, temperature, top_k, top_p, min_p, position, logprobs = numbers
    inputs = StepInput(
        tokens=rows[:, _NUMBERS + table_pages :],
        start=start,
        count=count,
        page_table=rows[:, _NUMBERS : _NUMBERS + table_pages],
    )
    how = SamplingInput(
        temperature=temperature.view("float32"),
        top_k=top_k,
        top_p=top_p.view("float32"),
        min_p=min_p.view("float32"),
        seed=rows[:, _NUMBERS - 2 : _NUMBERS].view("uint32"),
        position=position,
        logprobs=logprobs,
    )
    return inputs, how


def rows_of(seq: Seq, count: int, queries: int) -> list[Row]:
    """The next `count` tokens of a sequence, as rows of up to `queries`."""
    start, length = seq.computed, seq.length
    end = start + count
    if count <= queries:
        return [Row(seq, start, count, end == length)]
    rows = [Row(seq, at, min(queries, end - at), False) for at in range(start, end, queries)]
    rows[-1] = rows[-1]._replace(samples=end == length)
    return rows


def padding(size: int, queries: int, table_pages: int) -> Step:
    """A step of `size` rows, all of them padding."""
    rows = np.zeros((size, _NUMBERS + table_pages + queries), np.int32)
    _, how = unpack(rows, table_pages)
    how.top_p[:] = 1.0
    return Step(rows)


def step(rows: Sequence[Row], size: int, queries: int, table_pages: int) -> Step:
    """A step of these rows, and padding up to `size`."""
    call, count = padding(size, queries, table_pages), len(rows)
    if not rows:
        return call
    heads = np.concatenate([_head(row.seq, table_pages) for row in rows])
    call.rows[:count, :-queries] = heads.reshape(count, -1)
    inputs, how = unpack(call.rows, table_pages)
    inputs.start[:count] = [row.start for row in rows]
    inputs.count[:count] = [row.num_tokens for row in rows]
    ids = [id for row in rows for id in row.seq.token_ids(row.start, row.start + row.num_tokens)]
    inputs.tokens[np.arange(queries) < inputs.count[:, None]] = ids
    how.position[:] = inputs.start + inputs.count
    # What is not its sequence's last row gives no token: nothing is to be drawn for it.
    rest = np.array([not row.samples for row in rows])
    how.temperature[:count][rest] = how.logprobs[:count][rest] = 0
    return call


def _head(seq: Seq, table_pages: int) -> np.ndarray:
    """What all rows of a sequence begin with, but for their places: int32 [10 + table_pages].

    It stays with the sequence: a step changes nothing of it, save for a page now and then.
    """
    if seq.head is None:
        params: SamplingParams = seq.request.sampling or SamplingParams()
        row = padding(1, 0, table_pages).rows
        _, how = unpack(row, table_pages)
        how.temperature[0], how.seed[0] = params.temperature, divmod(params.seed, 1 << 32)[::-1]
        how.top_k[0], how.top_p[0], how.min_p[0] = params.top_k, params.top_p, params.min_p
        how.logprobs[0] = params.logprobs is not None
        seq.head = row[0], []
    row, pages = seq.head
    if pages != seq.pages:
        row[_NUMBERS : _NUMBERS + len(seq.pages)] = seq.pages
        pages[:] = seq.pages
    return row


def targets(rows: Sequence[Row], size: int, queries: int) -> np.ndarray:
    """Of a `Score` after a step of these rows."""
    ids = np.full((size, queries), -1, np.int32)
    for index, row in enumerate(rows):
        if count := row.num_scored:
            first = row.start + 1
            ids[index, :count] = row.seq.request.prompt[first : first + count]
    return ids


def tokens(rows: Sequence[Row], packed: np.ndarray) -> dict[str, Token]:
    """What was sampled, by request id, and `_INVALID` for each sequence with a row that is not
    finite, also one that samples nothing. packed: see models.sampling.unpack.
    """
    sampled = sampling.unpack(packed)
    found: dict[str, Token] = {}
    invalid: dict[str, Token] = {}
    for index, (row, id) in enumerate(zip(rows, sampled.token.tolist(), strict=False)):
        request = row.seq.request
        if id < 0:
            invalid[request.id] = _INVALID
        elif row.samples:
            found[request.id] = _token(row, id, sampled, index)
    return found | invalid


def merged(parts: Iterable[Mapping[str, Token]]) -> dict[str, Token]:
    """What several runs of one step gave: a sequence that is invalid in one of them stays so."""
    found: dict[str, Token] = {}
    for part in parts:
        found |= {id: token for id, token in part.items() if found.get(id) is not _INVALID}
    return found


_INVALID = Token(sampling.INVALID)


def _token(row: Row, id: int, sampled: sampling.Sampled, index: int) -> Token:
    """What row `index` has sampled."""
    request = row.seq.request
    params: SamplingParams = request.sampling or SamplingParams()
    token = Token(id)
    if params.logprobs is not None:
        ids = sampled.top_tokens[index, : params.logprobs].tolist()
        values = sampled.top_logprobs[index, : params.logprobs].tolist()
        top = tuple(zip(ids, values, strict=True))
        token = Token(id, float(sampled.logprob[index]), top)
    if row.start + row.num_tokens == len(request.prompt) and wants_prompt_logprobs(request):
        prompt = _prompt_logprobs(row.seq)
        return _INVALID if prompt is None else token._replace(prompt=prompt)
    return token


def _prompt_logprobs(seq: Seq) -> PromptLogprobs | None:
    """Of all its rows, which are in order. None: some of the logits were not finite."""
    width = seq.request.sampling.prompt_logprobs
    rows = [np.asarray(packed)[index, :count] for packed, index, count in seq.scored]
    seq.scored = []
    if not rows:
        return PromptLogprobs()
    scored = sampling.unpack(np.concatenate(rows))
    if np.isnan(scored.logprob).any():  # as all of a row are, if one is
        return None
    return PromptLogprobs(
        tuple(scored.logprob.tolist()),
        tuple(scored.top_tokens[:, :width].ravel().tolist()),
        tuple(scored.top_logprobs[:, :width].ravel().tolist()),
    )
