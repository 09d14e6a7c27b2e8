"""The demo's rows: that a slow row is run again, and that rows which do not compare are told."""

import http.server
import io
import threading
from types import SimpleNamespace

import fakes
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kairos_jax import demo
from kairos_jax.lab.pace import differing, pace_of, pace_text, read_pace
from kairos_jax.lab.report.comparison import Run
from kairos_jax.observe.collectors import WorkerGauges
from kairos_jax.worker.tally import Steps
from schedulers.ledger.instance import Instance, Role


class Machine:
    """Serves pairs at these paces, one after another."""

    def __init__(self, *paces):
        self.paces, self.pairs, self.said = list(paces), [], []

    def replay(self, pair):
        self.pairs.append(pair)
        return Run(" + ".join(pair), [], self.paces.pop(0))

    def rows(self):
        runs = demo.replay_pairs(demo.PAIRS, self.replay, self.said.append)
        assert not self.paces
        assert [run.label for run in runs] == [" + ".join(pair) for pair in demo.PAIRS]
        return runs


def test_rows_of_one_pace_are_run_once():
    machine = Machine(1.0, 1.09, 1.04)
    runs = machine.rows()
    assert machine.pairs == list(demo.PAIRS)
    assert not machine.said
    assert pace_text(runs) == (
        "Pace (measured over predicted step time): fcfs + continuous 1.00, kairos + kairos 1.09, "
        "kairos_plus + kairos_plus 1.04."
    )


@pytest.mark.parametrize("row", range(3))
def test_a_row_at_another_pace_is_run_again_once(row):
    paces = [1.0, 1.02, 1.04]
    paces[row] *= 1.3
    machine = Machine(*paces, 1.05)
    runs = machine.rows()
    assert machine.pairs == [*demo.PAIRS, demo.PAIRS[row]]
    assert runs[row].pace == 1.05
    (said,) = machine.said
    assert runs[row].label in said
    assert "do not compare" not in pace_text(runs)


def test_rows_that_still_differ_do_not_compare():
    machine = Machine(1.0, 1.3, 1.02, 1.25)
    runs = machine.rows()
    assert [run.pace for run in runs] == [1.0, 1.25, 1.02], "what is nearer to the others is kept"
    text = "The rows do not compare: the machine's pace differed by 25%."
    assert text in pace_text(runs)
    assert [run.pace for run in Machine(1.0, 1.3, 1.02, 2.0).rows()] == [1.0, 1.3, 1.02]


@pytest.mark.parametrize(
    ("paces", "rows"),
    [
        ((1.0, 1.09, 1.05), []),
        ((0.8, 1.0, 1.3), [0, 2]),
        ((1.0, 1.06, 1.13), [2]),
        ((1.0,), []),
        ((3.0, 1.0), [0, 1]),
    ],
)
def test_rows_whose_pace_differs(paces, rows):
    assert differing(paces) == rows


def metrics(*steps):
    """A page of metrics of two workers that ran these (measured, predicted) steps."""
    workers = []
    for index, of_one in enumerate(steps):
        ran = Steps()
        for measured_s, predicted_s in of_one:
            ran.add(measured_s, predicted_s, 1)
        ledger = Instance(f"w{index}", Role.BOTH, fakes.CONFIG.limits(Role.BOTH))
        transport = SimpleNamespace(received_bytes=0)
        workers.append(SimpleNamespace(instance=ledger, ran=ran, transport=transport))
    registry = CollectorRegistry()
    registry.register(WorkerGauges(workers))
    return generate_latest(registry)


def test_the_pace_is_that_of_all_steps_of_all_workers():
    page = metrics([(0.1, 0.1), (0.3, 0.2)], [(0.5, 0.3)]).decode()
    assert pace_of(page) == pytest.approx(0.9 / 0.6)
    with pytest.raises(ValueError, match="no steps"):
        pace_of(metrics([], []).decode())


class Metrics(http.server.BaseHTTPRequestHandler):
    """A server's HTTP API, as far as the demo asks it."""

    def do_GET(self):
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(metrics([(0.3, 0.2)]))

    def log_message(self, *args):
        pass


def test_the_pace_is_read_from_the_server():
    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert read_pace(f"127.0.0.1:{server.server_port}") == pytest.approx(1.5)
        server.shutdown()
        thread.join()


def test_the_addresses_of_a_server_are_those_of_its_ready_line():
    out = ["starting\n", "ready: a on b; HTTP on 127.0.0.1:1, gRPC on 127.0.0.1:2\n"]
    said = []
    console = SimpleNamespace(print=lambda text, **style: said.append(text))
    found = demo._addresses(SimpleNamespace(stdout=out), console)
    assert found == ("127.0.0.1:1", "127.0.0.1:2")
    ended = SimpleNamespace(stdout=io.StringIO(), wait=lambda: 3)
    with pytest.raises(demo.ProcessFailed, match="ended with code 3 before it was ready"):
        demo._addresses(ended, console)
