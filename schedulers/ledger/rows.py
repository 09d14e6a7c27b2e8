"""Sequences by id, their numbers side by side in one array.

A policy looks at thousands of sequences in some tens of microseconds only if their numbers lie in
columns: `rows.length`, `rows.deadline` and so on are views of one array, a value a sequence.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np


class Column:
    """What is known of a sequence as a number, and where it stands. Times are seconds.

    DUE: when its next token is due, on the line of its TPOT from its first token. WORST_SLACK: by
    how much its tokens kept that line, at the least. CAPACITY: tokens that its pages hold. READY: 1
    if its KV is here. SERIAL: see `Request`. EXPECTED: output tokens in all, by `Outputs`.
    """

    ARRIVAL = 0
    DEADLINE = 1
    TPOT = 2
    MAX_TOKENS = 3
    COMPUTED = 4
    LENGTH = 5
    COUNT = 6
    FIRST_AT = 7
    DUE = 8
    WORST_SLACK = 9
    CAPACITY = 10
    READY = 11
    SERIAL = 12
    EXPECTED = 13
    NUM = 14


class HasCells(Protocol):
    """What stands in a row: its numbers are a view of the array, or its own until it is added."""

    cells: np.ndarray


T = TypeVar("T", bound=HasCells)


class Rows(Generic[T]):
    """A mapping from ids to sequences whose columns are arrays. Rows are in no order: the last one
    takes the place of one that leaves.

    seqs: in the order of their rows; to look at. cells: all columns [Column.NUM, len(self)].
    num_tokens: the sum of the lengths; code that changes a length in the array changes it too.
    num_removed: how many have left.
    """

    def __init__(self) -> None:
        self._store = np.zeros((Column.NUM, 64))
        self.seqs: list[T] = []
        self._ids: list[str] = []
        self._row: dict[str, int] = {}
        self.num_tokens = 0.0
        self.num_removed = 0
        self._changed()

    # As a mapping.

    def __len__(self) -> int:
        return len(self.seqs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, id: object) -> bool:
        return id in self._row

    def __getitem__(self, id: str) -> T:
        return self.seqs[self._row[id]]

    def get(self, id: str) -> T | None:
        row = self._row.get(id)
        return None if row is None else self.seqs[row]

    def values(self) -> list[T]:
        """The sequences, in the order of their rows."""
        return list(self.seqs)

    @property
    def ids(self) -> Collection[str]:
        """The ids, as a set to intersect with."""
        return self._row.keys()

    # As columns. Views: not to be written to, save by the ledger.

    @property
    def arrival(self) -> np.ndarray:
        return self.cells[Column.ARRIVAL]

    @property
    def deadline(self) -> np.ndarray:
        return self.cells[Column.DEADLINE]

    @property
    def tpot(self) -> np.ndarray:
        return self.cells[Column.TPOT]

    @property
    def computed(self) -> np.ndarray:
        return self.cells[Column.COMPUTED]

    @property
    def length(self) -> np.ndarray:
        return self.cells[Column.LENGTH]

    @property
    def count(self) -> np.ndarray:
        """Output tokens so far."""
        return self.cells[Column.COUNT]

    @property
    def first_at(self) -> np.ndarray:
        """When the first token came; nan before it."""
        return self.cells[Column.FIRST_AT]

    @property
    def due(self) -> np.ndarray:
        """When the next token is due; nan before the first."""
        return self.cells[Column.DUE]

    @property
    def capacity(self) -> np.ndarray:
        """Tokens that the pages held have room for."""
        return self.cells[Column.CAPACITY]

    @property
    def ready(self) -> np.ndarray:
        return self.cells[Column.READY] > 0

    @property
    def expected(self) -> np.ndarray:
        """Output tokens in all, as far as one can tell; more than `count` on a decode instance."""
        return self.cells[Column.EXPECTED]

    @property
    def serial(self) -> np.ndarray:
        return self.cells[Column.SERIAL]

    def at(self, row: int) -> T:
        return self.seqs[row]

    def id_at(self, row: int) -> str:
        return self._ids[row]

    def ids_at(self, rows: np.ndarray) -> list[str]:
        ids = self._ids
        return [ids[row] for row in rows.tolist()]

    # Of all rows: known until one joins or leaves.

    @property
    def ones(self) -> dict[str, int]:
        """1 for every id. Not to be written to."""
        if self._ones is None:
            self._ones = dict.fromkeys(self._ids, 1)
        return self._ones

    @property
    def least_tpot(self) -> float:
        """The least TPOT; infinity if there is none."""
        if self._least_tpot is None:
            self._least_tpot = float(np.minimum.reduce(self.tpot)) if self.seqs else math.inf
        return self._least_tpot

    def some(self, ids: Iterable[str]) -> dict[str, T]:
        """Those sequences, by id."""
        row, seqs = self._row, self.seqs
        return {id: seqs[row[id]] for id in ids}

    def ones_at(self, rows: np.ndarray) -> dict[str, int]:
        """1 for the ids of some rows."""
        ids = self._ids
        return {ids[row]: 1 for row in rows.tolist()}

    def where(self, ids: Mapping[str, Any]) -> np.ndarray:
        """The rows of those `ids` that are here, in their order."""
        row = self._row
        return np.array([row[id] for id in ids if id in row], dtype=np.intp)

    def select(self, rows: np.ndarray) -> "Rows[T]":
        """A copy with some of the rows, for looking at."""
        some: Rows[T] = Rows()
        some._store = self.cells[:, rows]
        some.seqs = [self.seqs[row] for row in rows.tolist()]
        some._ids = self.ids_at(rows)
        some._row = {id: row for row, id in enumerate(some._ids)}
        some._changed()
        some.num_tokens = float(some.length.sum())
        return some

    # Changes.

    def add(self, id: str, seq: T) -> None:
        row = len(self.seqs)
        if row == self._store.shape[1]:
            self._store = np.concatenate([self._store, np.zeros_like(self._store)], axis=1)
            for each, other in enumerate(self.seqs):
                other.cells = self._store[:, each]
        self._row[id] = row
        self.seqs.append(seq)
        self._ids.append(id)
        cells = self._store[:, row]
        cells[:] = seq.cells
        seq.cells = cells
        self.num_tokens += cells.item(Column.LENGTH)
        self._changed()

    def remove(self, id: str) -> T:
        """Takes it out; its numbers stay with it."""
        seq = self[id]
        seq.cells = seq.cells.copy()
        self._vacate(id)
        return seq

    def move(self, id: str, to: "Rows[T]") -> T:
        seq = self[id]
        to.add(id, seq)
        self._vacate(id)
        return seq

    def check(self) -> None:
        """Raises AssertionError if a sequence's numbers are not those of its row."""
        assert len(self.seqs) == len(self._ids) == len(self._row)
        for row, (id, seq) in enumerate(zip(self._ids, self.seqs, strict=True)):
            assert self._row[id] == row
            assert np.shares_memory(seq.cells, self._store[:, row]), f"cells of {id!r}"
        assert self.num_tokens == self.length.sum()

    def _vacate(self, id: str) -> None:
        """Gives the row of one that has its numbers elsewhere to the last."""
        row, last = self._row.pop(id), len(self.seqs) - 1
        cells = self._store[:, row]
        self.num_tokens -= cells.item(Column.LENGTH)
        last_seq, last_id = self.seqs.pop(), self._ids.pop()
        if row != last:
            cells[:] = last_seq.cells
            last_seq.cells = cells
            self.seqs[row], self._ids[row], self._row[last_id] = last_seq, last_id, row
        self.num_removed += 1
        self._changed()

    def _changed(self) -> None:
        """One has joined or left."""
        self.cells = self._store[:, : len(self.seqs)]
        self._ones: dict[str, int] | None = None
        self._least_tpot: float | None = None
