"""Steps as a model takes them, made by hand: apart from what the engine makes of a ledger."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from models.kv_cache import StepInput

Part = tuple[int, int, int]
"""Which sequence, the position of its first token in the step, and how many they are."""


def packed(
    parts: Sequence[Part],
    tables: np.ndarray,
    page_size: int,
    num_pages: int,
    size: tuple[int, int] | None = None,
    tokens: Sequence[Sequence[int]] = (),
) -> StepInput:
    """The parts' tokens one after the other, then padding.

    tables: the pages of each sequence [N, M]. size: tokens and sequences of the step; None: as many
    as there are. tokens: ids of all tokens of each sequence; without them all are 0.
    """
    total = sum(count for *_, count in parts)
    num_tokens, num_sequences = size or (total, len(parts))
    past = num_pages * page_size
    ids, positions = np.zeros(num_tokens), np.zeros(num_tokens)
    slots = np.arange(past, past + num_tokens)
    starts, contexts = np.full(num_sequences + 1, total), np.zeros(num_sequences)
    pages = np.zeros((num_sequences, tables.shape[1]))
    at = 0
    for index, (sequence, start, count) in enumerate(parts):
        places = np.arange(start, start + count)
        table = tables[sequence]
        positions[at : at + count] = places
        slots[at : at + count] = table[places // page_size] * page_size + places % page_size
        if tokens:
            ids[at : at + count] = tokens[sequence][start : start + count]
        starts[index], contexts[index], pages[index] = at, start + count, table
        at += count
    arrays = ids, positions, slots, starts, contexts, pages
    return StepInput(*(jnp.asarray(each, jnp.int32) for each in arrays))
