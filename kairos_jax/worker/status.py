"""What an instance holds and what it has run, in a few numbers, for metrics and the live page.

Read from another thread than the one that owns the ledger: each number is right, but they may be of
moments some microseconds apart.
"""

from dataclasses import dataclass

from kairos_jax.worker.tally import Steps
from schedulers.ledger.instance import Instance, Role

# Ids of prompts under way that are told of; a step rarely has as many.
MAX_BEGUN = 64


@dataclass(frozen=True, slots=True)
class Status:
    """waiting, running, parked: requests. used_pages, num_pages: of the KV pool. parked_tokens,
    parked_limit: tokens whose KV waits outside of it for decode, and how many may.

    steps, measured_s, predicted_s, sequences: of all steps since the start: how many, how long they
    took, what the cost model had said, and the sequences in them. begun: ids of prompts that are
    being computed.
    """

    waiting: int
    running: int
    parked: int
    used_pages: int
    num_pages: int
    parked_tokens: float
    parked_limit: float
    steps: int
    measured_s: float
    predicted_s: float
    sequences: int
    begun: tuple[str, ...] = ()


def status_of(ledger: Instance, ran: Steps) -> Status:
    """Of an instance and the steps that it ran."""
    limits, begun = ledger.limits, ()
    if ledger.role is not Role.DECODE:
        some = (seq.request.id for seq in ledger.running.values() if not seq.num_tokens)
        begun = tuple(id for id, _ in zip(some, range(MAX_BEGUN), strict=False))
    return Status(
        waiting=len(ledger.waiting),
        running=len(ledger.running) + len(ledger.ending),
        parked=len(ledger.parked),
        used_pages=limits.num_pages - ledger.pages.num_free,
        num_pages=limits.num_pages,
        parked_tokens=ledger.parked_tokens,
        parked_limit=limits.parked_tokens,
        steps=len(ran.seconds),
        measured_s=ran.seconds.sum,
        predicted_s=ran.predicted_s,
        sequences=int(ran.sequences.sum),
        begun=begun,
    )
