"""What a router knows of its workers: the same as if all were added up anew."""

from dataclasses import replace

import fakes
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_jax.kv.transport import Ticket
from kairos_jax.routing.fleet import Fleet
from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Handover, Submit
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import flowing
from schedulers.policies.routing import Summary, prompt_s

COST = CostModel.from_profile(fakes.PROFILE)
SLO = Slo(1.0, 0.05)
COUNT = 4
# What happens to one of the workers, and how many tokens it is about.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "book", "stays", "unbook", "hand_over", "cancel", "update"]),
        st.integers(0, COUNT - 1),
        st.integers(1, 60),
    ),
    max_size=25,
)


class Plain:
    """A worker as a list of all that happened since its last summary."""

    def __init__(self, summary):
        self.said, self.sent, self.booked, self.num_received = summary, [], {}, 0

    def summary(self):
        """All added up, in the order in which a peer counts it."""
        summary = self.said
        for kind, tokens in (*self.sent, *self.booked.values()):
            if kind == "prompt":
                own_s = prompt_s(asked("", tokens), summary, COST)
                load = summary.load
                summary = summary.with_prompt(SLO.ttft, own_s, 0.0)
                summary = replace(summary.with_context(tokens, SLO, COST), load=load)
                summary = replace(summary, parked_room=summary.parked_room - tokens)
            elif kind == "stays":
                summary = replace(summary, load=summary.with_context(tokens, SLO, COST).load)
            else:
                summary = summary.with_context(tokens, SLO, COST)
        return summary


def asked(id, tokens):
    return Request(id, 0.0, [1] * tokens, 50, SLO)


def happens(kind, peer, plain, tokens):
    """One step, told to both. The id of a place says how long its sequence is."""
    id = str(tokens)
    match kind:
        case "submit":
            peer.submit(Submit(asked(id, tokens)), 0.0)
            plain.sent.append(("prompt", tokens))
        case "book":
            peer.book(id, tokens, SLO)
            plain.booked[id] = ("context", tokens)
        case "stays":
            peer.stays(tokens, SLO)
            plain.sent.append(("stays", tokens))
        case "unbook" | "cancel":
            getattr(peer, kind)(id)
            plain.booked.pop(id, None)
        case "hand_over":
            peer.hand_over(Handover(asked(id, tokens), (7,), 0.5, Ticket(id, tokens)))
            plain.booked.pop(id, None)
            plain.sent.append(("context", tokens + 1))
        case "update":
            # All but the last one of what was sent had arrived.
            sent = [each for each in plain.sent if each[0] != "stays"]
            plain.said = replace(plain.said, load=tokens / 60, room=plain.said.room - 1)
            plain.sent = sent[-1:]
            plain.num_received += len(sent) - len(plain.sent)
            peer.update(plain.said, plain.num_received)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=COUNT, max_size=COUNT), STEPS, st.integers(1, 60))
def test_decisions_are_those_of_summaries_that_are_added_up_anew(loads, steps, tokens):
    fleet, plains = Fleet(COST, clock=lambda: 0.0), []
    for index, load in enumerate(loads):
        name, receives = f"b{index}", index % 2 == 1
        summary = Summary(
            name, Role.BOTH, load, [0.5], [load], 1.0, load, 300.0, flows=True, receives=receives
        )
        fleet.join(Peer(name, Role.BOTH, lambda message: None, COST, summary))
        plains.append(Plain(summary))
    peers = list(fleet.peers.values())
    for kind, index, length in steps:
        happens(kind, peers[index], plains[index], length)
        assert peers[index].summary == plains[index].summary()
    summaries, request = [plain.summary() for plain in plains], asked("new", tokens)
    chosen = fleet.choose_prefill(peers, Submit(request))
    assert chosen is peers[flowing.route_prompt(request, summaries, COST, 0.0)]
    placed = fleet.place(peers[0], tokens, SLO, late=False)
    expected = flowing.place(tokens, SLO, False, summaries, 0, COST, 0.0)
    assert placed == (peers[expected.index], expected.why)
