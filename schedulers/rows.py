"""Sequences by id, their numbers side by side in one array.

A policy looks at thousands of sequences in some tens of microseconds only if their numbers lie in
columns: `rows.length`, `rows.deadline` and so on are views of one array, a value a sequence.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """

    def __init__(self) -> None:
        self._cells = np.zeros((Column.NUM, 64))
        self._seqs: list[T] = []
        self._ids: list[str] = []
        self._row: dict[str, int] = {}
        self.num_removed = 0

    # As a mapping.

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, id: object) -> bool:
        return id in self._row

    def __getitem__(self, id: str) -> T:
        return self._seqs[self._row[id]]

    def get(self, id: str) -> T | None:
        row = self._row.get(id)
        return None if row is None else self._seqs[row]

    @property
    def seqs(self) -> Sequence[T]:
        """The sequences, in the order of their rows: the list itself, to look at."""
        return self._seqs

    def values(self) -> list[T]:
        """The sequences, in the order of their rows."""
        return list(self._seqs)

    @property
    def ids(self) -> Collection[str]:
        """The ids, as a set to intersect with."""
        return self._row.keys()

    # As columns. Views: not to be written to, save by the ledger.

    @property
    def cells(self) -> np.ndarray:
        """All columns [Column.NUM, len(self)]."""
        return self._cells[:, : len(self._seqs)]

    @property
    def arrival(self) -> np.ndarray:
        return self._cells[Column.ARRIVAL, : len(self._seqs)]

    @property
    def deadline(self) -> np.ndarray:
        return self._cells[Column.DEADLINE, : len(self._seqs)]

    @property
    def tpot(self) -> np.ndarray:
        return self._cells[Column.TPOT, : len(self._seqs)]

    @property
    def computed(self) -> np.ndarray:
        return self._cells[Column.COMPUTED, : len(self._seqs)]

    @property
    def length(self) -> np.ndarray:
        return self._cells[Column.LENGTH, : len(self._seqs)]

    @property
    def count(self) -> np.ndarray:
        """Output tokens so far."""
        return self._cells[Column.COUNT, : len(self._seqs)]

    @property
    def due(self) -> np.ndarray:
        """When the next token is due; nan before the first."""
        return self._cells[Column.DUE, : len(self._seqs)]

    @property
    def capacity(self) -> np.ndarray:
        """Tokens that the pages held have room for."""
        return self._cells[Column.CAPACITY, : len(self._seqs)]

    @property
    def ready(self) -> np.ndarray:
        return self._cells[Column.READY, : len(self._seqs)] > 0

    @property
    def expected(self) -> np.ndarray:
        """Output tokens in all, as far as one can tell; more than `count` on a decode instance."""
        return self._cells[Column.EXPECTED, : len(self._seqs)]

    @property
    def serial(self) -> np.ndarray:
        return self._cells[Column.SERIAL, : len(self._seqs)]

    def at(self, row: int) -> T:
        return self._seqs[row]

    def id_at(self, row: int) -> str:
        return self._ids[row]

    def ids_at(self, rows: np.ndarray) -> list[str]:
        ids = self._ids
        return [ids[row] for row in rows.tolist()]

    def ones(self) -> dict[str, int]:
        """1 for every id."""
        return dict.fromkeys(self._row, 1)

    def where(self, ids: Mapping[str, Any]) -> np.ndarray:
        """The rows of those `ids` that are here, in their order."""
        row = self._row
        return np.array([row[id] for id in ids if id in row], dtype=np.intp)

    def select(self, rows: np.ndarray) -> "Rows[T]":
        """A copy with some of the rows, for looking at."""
        some: Rows[T] = Rows()
        some._cells = self._cells[:, rows]
        some._seqs = [self._seqs[row] for row in rows.tolist()]
        some._ids = self.ids_at(rows)
        some._row = {id: row for row, id in enumerate(some._ids)}
        return some

    # Changes.

    def add(self, id: str, seq: T) -> None:
        row = len(self._seqs)
        if row == self._cells.shape[1]:
            self._cells = np.concatenate([self._cells, np.zeros_like(self._cells)], axis=1)
            for each, other in enumerate(self._seqs):
                other.cells = self._cells[:, each]
        self._row[id] = row
        self._seqs.append(seq)
        self._ids.append(id)
        cells = self._cells[:, row]
        cells[:] = seq.cells
        seq.cells = cells

    def remove(self, id: str) -> T:
        """Takes it out; its numbers stay with it."""
        row = self._row.pop(id)
        seq, last_seq, last_id = self._seqs[row], self._seqs.pop(), self._ids.pop()
        seq.cells = seq.cells.copy()
        if last_seq is not seq:
            cells = self._cells[:, row]
            cells[:] = last_seq.cells
            last_seq.cells = cells
            self._seqs[row], self._ids[row], self._row[last_id] = last_seq, last_id, row
        self.num_removed += 1
        return seq

    def move(self, id: str, to: "Rows[T]") -> T:
        seq = self.remove(id)
        to.add(id, seq)
        return seq

    def check(self) -> None:
        """Raises AssertionError if a sequence's numbers are not those of its row."""
        assert len(self._seqs) == len(self._ids) == len(self._row)
        for row, (id, seq) in enumerate(zip(self._ids, self._seqs, strict=True)):
            assert self._row[id] == row
            assert np.shares_memory(seq.cells, self._cells[:, row]), f"cells of {id!r}"
