"""Builds the workers that a config describes: a ledger, a policy and an engine each."""

import functools
import secrets
from collections.abc import Callable, Sequence

from kairos_jax.config import ServerConfig
from kairos_jax.engine.engine import Engine
from kairos_jax.kv.transport import KVTransport
from kairos_jax.worker.messages import Event
from kairos_jax.worker.page_keys import page_keys
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance, Policy, Role
from schedulers.ledger.journal import Journal
from schedulers.policies import decode, prefill
from schedulers.policies.colocated import policy_for
from schedulers.policies.routing import Summary, outline


def build_workers(
    config: ServerConfig,
    engines: Sequence[Engine],
    cost: CostModel,
    transport: KVTransport,
    emit: Callable[[Event], None],
    journal: Journal | None = None,
) -> list[Worker]:
    """One for each of the config's roles, not yet started. journal: told of all that happens to
    their ledgers.
    """
    return [
        build_worker(config, begins, name, engine, cost, transport, emit, journal)
        for begins, name, engine in zip(config.begins, config.names, engines, strict=True)
    ]


def build_worker(
    config: ServerConfig,
    begins: Role,
    name: str,
    engine: Engine,
    cost: CostModel,
    transport: KVTransport,
    emit: Callable[[Event], None],
    journal: Journal | None = None,
) -> Worker:
    """One worker, not yet started. begins: as of `ServerConfig.begins`."""
    role = config.role(begins)
    receives = config.fluid and begins is Role.DECODE
    instance = Instance(name, role, engine.limits, receives=receives)
    if journal:
        instance.journal = journal.recorder(instance)
    policy = build_policy(config, role, cost)
    demotes = config.prefill.policy in prefill.DEMOTING, config.decode.policy in decode.DEMOTING
    summed_up = functools.partial(_outline, cost, (*demotes, config.fluid))
    keys = None
    part = config.decode if role is Role.DECODE else config.prefill
    if part.prefix_cache:
        keys = functools.partial(page_keys, engine.limits.page_size, secrets.token_bytes(32))
    return Worker(instance, policy, engine, transport, emit, summed_up, page_keys=keys)


def build_policy(config: ServerConfig, role: Role, cost: CostModel) -> Policy:
    """The policy of an instance of this role."""
    return policy_for(role, cost, config.prefill.policy, config.decode.policy, config.prefill.pack)


def _outline(
    cost: CostModel, how: tuple[bool, bool, bool], instance: Instance, now: float
) -> Summary:
    return outline(instance, cost, now, *how)
