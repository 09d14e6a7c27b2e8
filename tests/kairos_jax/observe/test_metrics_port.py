"""The metrics port of workers: those who connect and say nothing take no more than their share."""

import socket
import urllib.request

import pytest

from kairos_jax.observe import metrics_port


@pytest.fixture
def port(monkeypatch):
    """Of a server that holds three connections."""
    monkeypatch.setattr(metrics_port, "_MOST", 3)
    monkeypatch.setattr(metrics_port, "_SILENCE_S", 0.5)
    server = metrics_port.serve_workers("127.0.0.1", 0, ())
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_more_connections_than_there_may_be_are_closed_and_silent_ones_soon(port):
    silent = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(10)]
    for each in silent:
        assert each.recv(1) == b"", "it was closed"
        each.close()
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as told:
        assert b"process_open_fds" in told.read()
