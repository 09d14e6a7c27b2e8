"""Who may take an offer, until when, and what frees it."""

import math

import jax.numpy as jnp
import pytest

from kairos_jax.kv.leases import Claimant, Leases, State
from kairos_jax.kv.transport import Ticket

ME, OTHER = Claimant(1, 1), Claimant(2, 1)


@pytest.fixture
def leases():
    return Leases(lease_s=10.0, claim_s=5.0)


def offer(leases, ticket, now=0.0):
    leases.open(ticket)
    leases.extend(ticket, [jnp.ones(4)], True, now)


def test_a_ticket_is_good_for_one_claim_by_one_peer(leases):
    ticket = Ticket("a", 3)
    offer(leases, ticket)
    lease = leases.claim(ticket.uuid, "a", ME, 1.0)
    assert lease.state is State.CLAIMED
    assert leases.claim(ticket.uuid, "a", ME, 2.0) is lease  # a retry
    for someone in (OTHER, Claimant(ME.identity, 2)):
        with pytest.raises(PermissionError, match="'a' was claimed already"):
            leases.claim(ticket.uuid, "a", someone, 2.0)


def test_what_is_not_offered_cannot_be_claimed(leases):
    ticket = Ticket("a", 3)
    offer(leases, ticket)
    for uuid, id in ((ticket.uuid ^ 1, "a"), (ticket.uuid, "b")):
        with pytest.raises(LookupError, match=f"request '{id}'"):
            leases.claim(uuid, id, ME, 1.0)
    leases.release(ticket.uuid)
    leases.release(ticket.uuid)
    with pytest.raises(LookupError):
        leases.claim(ticket.uuid, "a", ME, 1.0)


def test_offers_run_out_and_claims_too(leases):
    unclaimed, claimed = Ticket("a", 3), Ticket("b", 3)
    offer(leases, unclaimed)
    offer(leases, claimed)
    leases.claim(claimed.uuid, "b", ME, 2.0)
    assert leases.expire(6.9) == []
    assert [lease.ticket for lease in leases.expire(7.0)] == [claimed]
    assert leases.expire(9.9) == []
    assert [lease.ticket for lease in leases.expire(10.0)] == [unclaimed]
    assert len(leases) == 0


def test_what_still_grows_does_not_run_out(leases):
    ticket = Ticket("a", 30)
    leases.open(ticket)
    leases.extend(ticket, [1], False, 0.0)
    leases.claim(ticket.uuid, "a", ME, 1.0)
    assert leases.expire(math.nextafter(math.inf, 0)) == []
    leases.extend(ticket, [2], True, 100.0)
    (lease,) = leases
    assert lease.kv == [1, 2]
    assert leases.expire(104.9) == []
    assert leases.expire(105.0) == [lease]
    leases.extend(ticket, [3], True, 106.0)  # it has ended: passed over
    assert lease.kv == []


def test_release_deletes_what_a_transfer_server_holds(leases):
    ticket, array = Ticket("a", 3), jnp.ones(4)
    offer(leases, ticket)
    lease = leases.claim(ticket.uuid, "a", ME, 1.0)
    lease.registered.append(array)
    leases.delivered(ticket.uuid, OTHER)
    assert len(leases) == 1
    leases.delivered(ticket.uuid, ME)
    assert array.is_deleted()
    assert lease.state is State.RELEASED
    assert lease.changed.is_set()


def test_uuids_are_64_random_bits():
    uuids = {Ticket("a", 1).uuid for _ in range(1000)}
    assert len(uuids) == 1000
    assert max(uuids).bit_length() == 64


def test_a_lease_does_not_run_out_while_it_is_taken_however_slowly():
    leases, now = Leases(lease_s=10.0, claim_s=5.0), 0.0
    ticket = Ticket("a", 8)
    leases.open(ticket)
    leases.extend(ticket, ["block"], True, 0.0)
    lease = leases.claim(ticket.uuid, "a", Claimant(1, 2), 0.0)
    with leases.in_call(lease, lambda: now):
        assert not leases.expire(100.0)
        now = 100.0
    assert not leases.expire(104.0), "its time begins anew where the call ends"
    assert leases.expire(105.0) == [lease]
