"""What a client asked for, and how far it has come."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.ledger.rows import Column

# As names of this module they are found sooner.
_COMPUTED, _LENGTH = Column.COMPUTED, Column.LENGTH


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives of one request, in seconds.

    ttft: time to first token, from arrival. tpot: mean time per output token after the first.
    """

    ttft: float
    tpot: float

    def __post_init__(self):
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"slo.{name} must be a positive number of seconds, got {value}")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. Made once, at the edge, and never changed.

    prompt: token ids (the simulator passes a `range`: only the length is looked at here).
    stop: token ids that end the output. sampling: opaque to schedulers. serial: a number of the
    caller's own, which stands in the columns. page_keys: of each whole page of the prompt, a number
    that stands for its tokens and all before them; none where nothing is to be shared.
    """

    id: str
    arrival: float
    prompt: Sequence[int]
    max_tokens: int
    slo: Slo
    stop: frozenset[int] = frozenset()
    sampling: Any = None
    serial: int = 0
    page_keys: Sequence[int] = ()

    @property
    def deadline(self) -> float:
        """When the first token is due."""
        return self.arrival + self.slo.ttft

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output together, at most."""
        return len(self.prompt) + self.max_tokens


class Seq:
    """A request's progress on one instance. Its numbers are a column of the ledger's array, where
    policies read those of all sequences at once (see `schedulers.ledger.rows`).

    tokens: ids generated so far; only the engine reads and extends it. scored: what the engine
    keeps of its prompt's log-probabilities until the last are there; lane: what it knows of where
    the sequence is on the device. pages: ids of the pages that hold its KV, a list that only grows:
    where other pages take the place of its pages, another list does. begun_at: when its first step
    here began. cached: tokens of its prompt that were here before it began, or before its KV was
    asked for.
    """

    __slots__ = (
        "begun_at",
        "cached",
        "cells",
        "finish_reason",
        "lane",
        "pages",
        "request",
        "scored",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        *,
        computed: int = 0,
        num_tokens: int = 0,
        first_token_at: float | None = None,
        tokens: Sequence[int] = (),
    ):
        self.request = request
        self.tokens = list(tokens)
        self.scored: list[Any] = []
        self.lane: Any = None
        self.pages: list[int] = []
        self.begun_at: float | None = None
        self.cached = 0
        self.finish_reason: str | None = None
        first_at = math.nan if first_token_at is None else first_token_at
        length, tpot = len(request.prompt) + num_tokens, request.slo.tpot
        due = first_at + num_tokens * tpot
        self.cells = np.zeros(Column.NUM)
        self.cells[: Column.DUE + 1] = (
            request.arrival,
            request.deadline,
            tpot,
            request.max_tokens,
            computed,
            length,
            num_tokens,
            first_at,
            due,
        )
        self.cells[Column.WORST_SLACK] = math.inf
        self.cells[Column.READY] = 1.0
        self.cells[Column.SERIAL] = request.serial

    @property
    def computed(self) -> int:
        """How many of its tokens have their KV in `pages`; of a prompt that waits, how many are
        cached, and would be there if it began now.
        """
        return int(self.cells.item(Column.COMPUTED))

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return int(self.cells.item(Column.LENGTH))

    @property
    def computed_and_length(self) -> tuple[int, int]:
        """Both at once, for code that asks all sequences of a step."""
        cells = self.cells
        return int(cells.item(_COMPUTED)), int(cells.item(_LENGTH))

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return int(self.cells.item(Column.COUNT))

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next output token."""
        return self.length - self.computed

    @property
    def ready(self) -> bool:
        """Its KV is on this instance: False from hand-over until the transfer is written."""
        return bool(self.cells[Column.READY])

    @property
    def unbegun(self) -> bool:
        """Whether nothing was done for it here: no step, and no fetch of its KV."""
        return self.begun_at is None and not self.pages

    @property
    def first_token_at(self) -> float | None:
        """When its first output token was there, here or elsewhere."""
        at = float(self.cells[Column.FIRST_AT])
        return None if math.isnan(at) else at

    @property
    def worst_slack(self) -> float:
        """By how many seconds its tokens after the first kept their TPOT line, at the least."""
        return float(self.cells[Column.WORST_SLACK])

    def advance(self, count: int, now: float) -> bool:
        """Books `count` more tokens of its prompt; with the last of them comes its first output
        token. Returns whether it has.
        """
        cells = self.cells
        cells[Column.COMPUTED] += count
        if cells[Column.COMPUTED] < cells[Column.LENGTH]:
            return False
        cells[Column.LENGTH] += 1
        cells[Column.COUNT] = 1
        cells[Column.FIRST_AT] = now
        cells[Column.DUE] = now + cells[Column.TPOT]
        return True

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Ids of prompt and output, from position `start` up to `stop`."""
        num_prompt = len(self.request.prompt)
        if start >= num_prompt:
            return self.tokens[start - num_prompt : stop - num_prompt]
        ids = list(self.request.prompt[start:stop])
        ids += self.tokens[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]
        return ids
