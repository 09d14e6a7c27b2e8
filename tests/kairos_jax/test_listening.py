"""Addresses that cannot be listened on: told at once, with the flag, its value and the reason."""

import asyncio
import re
import socket

import fakes
import pytest

from kairos_jax import role, router, serve
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.kv.options import TransferOptions
from kairos_jax.net import address
from kairos_jax.net.credentials import PLAIN
from kairos_jax.process.command import UsageError
from kairos_jax.worker.server import RoleOptions
from schedulers.ledger.instance import Role

HOST = "127.0.0.1"
ELSEWHERE = "192.0.2.1"  # of a network for documents, so of no host
IN_USE, NOT_OURS = "Address already in use", "Cannot assign requested address"


class Begun(Exception):
    """What takes long has begun."""


def prepare():
    raise Begun


async def run_worker(host=HOST, port=0, health_port=0, metrics_port=0, kv_host="", kind="jax"):
    options = RoleOptions(host, port, HOST, health_port=health_port, metrics_port=metrics_port)
    carried = TransferOptions(kind, kv_host or host)
    await role.serve(fakes.CONFIG, Role.DECODE, options, PLAIN, carried, prepare)


async def run_router(host=HOST, port=0, health_port=0, http_port=0):
    http = HttpOptions(http_port)
    options = router.RouterOptions(host, port, {}, health_port=health_port, http=http)
    await router.serve(fakes.CONFIG, options, PLAIN)


async def run_serve(host=HOST, port=0, http_port=0):
    await serve.serve(fakes.CONFIG, host, port, 0.0, prepare, http=HttpOptions(http_port))


RUNS = {
    run_worker: ("port", "health_port", "metrics_port"),
    run_router: ("port", "health_port", "http_port"),
    run_serve: ("port", "http_port"),
}


def refused(coroutine) -> str:
    """What a binary prints behind "error: ", with code 2."""
    with pytest.raises(UsageError) as error:
        asyncio.run(coroutine)
    return str(error.value)


@pytest.mark.parametrize(("run", "flag"), [(run, flag) for run in RUNS for flag in RUNS[run]])
def test_a_port_in_use(run, flag):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(run(**{flag: port}))
    given = f"--host={HOST} --port" if flag == "port" else f"--{flag}"
    assert told == f"{given}={port}: cannot listen on {HOST}:{port}: {IN_USE}"


@pytest.mark.parametrize("run", RUNS)
def test_a_host_that_is_another_is_told_before_the_other_ports(run):
    with socket.create_server((HOST, 0)) as taken:
        others = dict.fromkeys(RUNS[run], taken.getsockname()[1]) | {"port": 0}
        told = refused(run(host=ELSEWHERE, **others))
    assert told == f"--host={ELSEWHERE} --port=0: cannot listen on {ELSEWHERE}: {NOT_OURS}"


def test_a_host_for_kv_that_is_another():
    told = refused(run_worker(kv_host=ELSEWHERE))
    assert told == f"--kv_host={ELSEWHERE}: cannot listen on {ELSEWHERE}: {NOT_OURS}"


def test_a_host_for_kv_is_of_no_account_where_no_transfer_server_listens():
    with pytest.raises(Begun):
        asyncio.run(run_worker(kv_host=ELSEWHERE, kind="grpc"))


def test_what_is_no_name_of_a_host():
    reason = "cannot listen on a..b: no name of a host"
    with pytest.raises(OSError, match=re.escape(reason)):
        address.listen("a..b", 0)
