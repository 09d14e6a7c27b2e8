"""What all decode policies use: batches of rows, and the decision under light load."""

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance
from schedulers.policies.room import Room

NONE = np.empty(0, np.intp)
_FIRST = np.zeros(1, np.intp)


def all_running(cost: CostModel, instance: Instance) -> Batch:
    """A step of all running sequences; nothing waits."""
    running = instance.running
    return Batch(running.ones, predicted_s=cost.decode_all(running)) if running.seqs else Batch()


def under_light_load(cost: CostModel, instance: Instance, share: float, room: Room) -> Batch | None:
    """A step of all sequences, and a fetch of the others, if a step of all takes at most `share` of
    the least TPOT; else None.
    """
    running, waiting = instance.running, instance.waiting
    if len(running.seqs) + len(waiting.seqs) > instance.limits.max_batch:
        return None
    tpot = min(running.least_tpot, waiting.least_tpot)
    step_s = cost.decode_all(running, waiting)
    if instance.pace * step_s > share * tpot:
        return None
    if not waiting.seqs:
        return Batch(running.ones, predicted_s=step_s)
    here, far = in_turn(instance, room)
    whole = here.size == len(waiting.seqs)
    return batch_of(cost, instance, room.all, here, far, room, step_s if whole else None)


def in_turn(instance: Instance, room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Of the waiting rows, by arrival: the rows whose KV is here, and the rows to fetch now."""
    waiting = instance.waiting
    if len(waiting.seqs) > 1:
        order = waiting.arrival.argsort(kind="stable")
        here = order[waiting.ready[order]]
        return here, room.fetch(order) if here.size < order.size else NONE
    (seq,) = waiting.seqs
    if seq.ready:
        return _FIRST, NONE
    if seq.pages or not room.take(instance.pages_needed(seq)):
        return NONE, NONE
    return NONE, _FIRST


def batch_of(
    cost: CostModel,
    instance: Instance,
    step: np.ndarray,
    admit: np.ndarray,
    fetch: np.ndarray,
    room: Room,
    step_s: float | None = None,
) -> Batch:
    """step_s: what the step takes, if it is known."""
    running, waiting = instance.running, instance.waiting
    fetched = tuple(waiting.ids_at(fetch)) if fetch.size else ()
    evicted = tuple(running.id_at(row) for row in room.evict)
    if not step.size + admit.size:
        return Batch({}, fetched, evicted)
    whole = step.size == len(running)
    work = running.ones if whole else running.ones_at(step)
    if admit.size:
        work = work | waiting.ones_at(admit)
    if step_s is None and whole and not admit.size:
        step_s = cost.decode_all(running)
    elif step_s is None:
        step_s = cost.decode_of(np.concatenate([running.length[step], waiting.length[admit]]))
    return Batch(work, fetched, evicted, step_s)
