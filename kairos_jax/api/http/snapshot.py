"""What a server is at, for the live page: what waits by laxity, what runs by slack, how many met
their SLO in the last minutes, requests and tokens a second, and how the instances are.

A request is lost if it can no longer keep its SLO, as predicted now. It counts as missed at once,
not only when it ends: under overload requests that are lost wait for minutes.

However much there is, a snapshot has so many rows and counts for the rest. It may be made on
another thread than the event loop's: each number is right, but they may be of moments some
microseconds apart.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kairos_jax.api.backend import Backend
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.status import Status
from schedulers.ledger.instance import Role

# Requests that are told one by one: the most urgent, and the lost ones; and instances.
MAX_ROWS, MAX_LOST = 12, 6
MAX_INSTANCES = 64
# Request ids are the clients' own, and may be longer.
MAX_NAME = 64
# Requests are counted below the first, between each two, and from the last on; seconds.
LAXITY_BOUNDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLACK_BOUNDS = (-1.0, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.5)


def snapshot(backend: Backend, now: float) -> dict[str, Any]:
    """Ready for JSON. Times are seconds; `now` is on the router's clock."""
    router, validator = backend.router, backend.validator
    config, tokenizer = validator.config, validator.tokenizer
    peers = sorted(router.peers, key=lambda peer: (peer.role is Role.DECODE, peer.id))
    statuses = {peer.id: peer.look() for peer in peers}
    waiting, running = [], []
    for stream in router.streams:
        (waiting if stream.last_token_at is None else running).append(stream)
    judged, flow = backend.metrics.judged, backend.metrics.flow
    queued = _queued(waiting, router, statuses, now)
    runs, lost = _running(running, router, now)
    for objective in ("ttft", "both"):
        lost[objective] += queued["lost"]["count"]
    return {
        "at": round(now, 4),
        "model": validator.model,
        "text": tokenizer is not None,
        "chat": tokenizer is not None and tokenizer.chat_template is not None,
        "max_tokens": config.max_tokens,
        "slo": {"ttft_s": config.slo.ttft, "tpot_s": config.slo.tpot},
        "policies": [config.prefill.policy, config.decode.policy],
        "tokens": len(backend.metrics.gaps),
        "judged": {"slot_s": judged.slot_s, "slots": judged.slots(now), "lost": lost},
        "flow": {"slot_s": flow.slot_s, "slots": flow.slots(now)},
        "queued": queued,
        "running": runs,
        "instances": [_instance(peer, statuses[peer.id], now) for peer in peers[:MAX_INSTANCES]],
        "num_instances": len(peers),
    }


def _queued(
    streams: Sequence[Stream], router: Router, statuses: dict[str, Status | None], now: float
) -> dict[str, Any]:
    """Those without a token: first those in prefill, then by laxity. lost: in the same order,
    those that can no longer be in time.
    """
    begun = {id for status in statuses.values() if status for id in status.begun}
    pace = {peer.id: peer.summary.pace for peer in router.peers}
    where = [_where(stream) for stream in streams]
    prompt = np.array([len(stream.request.prompt) for stream in streams], dtype=float)
    paces = np.array([pace.get(id, 1.0) for id in where])
    due_s = np.array([stream.request.deadline for stream in streams]) - now
    # A router that has met no worker yet knows of no step times.
    laxity = due_s - paces * np.nan_to_num(router.fleet.cost.prefill_s(prompt))
    waits = np.array([stream.request.id not in begun for stream in streams], dtype=bool)
    # How much of a prompt in prefill is computed is not known here: it may be in time until it is
    # due.
    laxity = np.where(waits | (laxity >= 0), laxity, np.minimum(due_s, 0.0))
    lost = laxity < 0

    def row(at: int) -> dict[str, Any]:
        stream = streams[at]
        return {
            "name": stream.name[:MAX_NAME],
            "state": "queued" if waits[at] else "prefill",
            "prompt": int(prompt[at]),
            "waited_s": round(now - stream.request.arrival, 4),
            "laxity_s": round(laxity.item(at), 4),
            "due_s": round(due_s.item(at), 4),
            "at": _shown(where[at]),
        }

    first, others = _apart(np.lexsort((laxity, waits)), lost)
    return _counted(laxity, LAXITY_BOUNDS) | {
        "begun": int((~waits).sum()),
        "rows": [row(at) for at in first],
        "lost": {"count": int(lost.sum()), "rows": [row(at) for at in others]},
    }


def _running(
    streams: Sequence[Stream], router: Router, now: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """Those with a token, by slack: until the next is due on the line of the TPOT. And how many of
    them can no longer keep the TTFT, the TPOT, and both.
    """
    tpot = np.array([each.request.slo.tpot for each in streams])
    first_at = np.array([each.first_token_at or now for each in streams], dtype=float)
    made = np.array([len(each.tokens) for each in streams], dtype=float)
    most = np.array([each.request.max_tokens for each in streams], dtype=float)
    deadline = np.array([each.request.deadline for each in streams])
    with np.errstate(over="ignore"):  # a TPOT may be as large as a number can be
        slack = first_at + made * tpot - now
        line_end = first_at + np.maximum(most - 1, 0.0) * tpot
    # A request that is behind may catch up, but no step is shorter than its base: at best all
    # tokens up to max_tokens come at that pace. nan: no worker has said how long steps take.
    least_s = np.nan_to_num(router.fleet.cost.decode_base_s)
    left = np.maximum(most - made, 0.0)
    no_tpot = (left > 0) & (now + left * least_s > line_end)
    no_ttft = first_at > deadline
    lost = no_ttft | no_tpot

    def row(at: int) -> dict[str, Any]:
        missed = [name for name, no in (("TTFT", no_ttft), ("TPOT", no_tpot)) if no[at]]
        told = _progress(streams[at], now) | {"slack_s": round(slack.item(at), 4)}
        return told | ({"missed": missed} if missed else {})

    first, others = _apart(slack.argsort(kind="stable"), lost)
    told = _counted(slack, SLACK_BOUNDS) | {
        "rows": [row(at) for at in first],
        "lost": {"count": int(lost.sum()), "rows": [row(at) for at in others]},
    }
    counts = {"ttft": no_ttft, "tpot": no_tpot, "both": lost}
    return told, {name: int(which.sum()) for name, which in counts.items()}


def _apart(order: np.ndarray, lost: np.ndarray) -> tuple[list[int], list[int]]:
    """The first of an order that can keep their SLO, and the first of those that are lost."""
    gone = lost[order].astype(bool)
    return order[~gone][:MAX_ROWS].tolist(), order[gone][:MAX_LOST].tolist()


def _progress(stream: Stream, now: float) -> dict[str, Any]:
    request, timing = stream.request, stream.timing()
    moving = len(stream.peers) > 1  # its KV is still with another
    return {
        "name": stream.name[:MAX_NAME],
        "state": "transfer" if moving else "decode",
        "prompt": len(request.prompt),
        "tokens": len(stream.tokens),
        "max_tokens": request.max_tokens,
        "queue_s": round(timing.queue_s, 4),
        "prefill_s": round(timing.prefill_s, 4),
        "transfer_s": None if timing.transfer_s is None else round(timing.transfer_s, 4),
        "ttft_s": round(timing.ttft_s, 4),
        "ttft_met": timing.ttft_met,
        "tpot_s": None if timing.tpot_s is None else round(timing.tpot_s, 5),
        "at": _shown(_where(stream)),
    }


def _counted(values: np.ndarray, bounds: Sequence[float]) -> dict[str, Any]:
    """How many there are, below zero and between any two bounds."""
    places = np.searchsorted(bounds, values, side="right")
    counts = np.bincount(places, minlength=len(bounds) + 1).tolist()
    late = int((values < 0).sum())
    return {"count": values.size, "late": late, "bounds": list(bounds), "counts": counts}


def _instance(peer: Peer, status: Status | None, now: float) -> dict[str, Any]:
    summary = peer.summary
    told: dict[str, Any] = {
        "id": _shown(peer.id),
        "role": peer.role.value,
        "taking": not peer.draining,
        "queue_s": _finite(summary.work_s(now)),
        "load": _finite(summary.load),
        "pace": _finite(summary.pace),
        "status": None,
    }
    if status:
        shown = asdict(status) | {"parked_limit": _finite(status.parked_limit)}
        del shown["begun"]  # told with the requests themselves
        told["status"] = shown
    return told


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return round(value, 4) if math.isfinite(value) else None


def _where(stream: Stream) -> str:
    """The id of the worker that has it in hand; none for a moment while it is sent elsewhere."""
    for peer in stream.peers[-1:]:
        return peer.id
    return ""


def _shown(id: str) -> str:
    """A worker's name, without which start of it this is."""
    return id.partition("@")[0][:MAX_NAME]
