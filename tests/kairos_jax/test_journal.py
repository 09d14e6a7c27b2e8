"""The binary that reads journals, on those of small simulations."""

import json
import subprocess
import sys

import pytest
from costs import decodes, prefills

from kairos_jax.journal import find_id
from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.journal import Journal, to_lines
from schedulers.ledger.request import Slo
from schedulers.simulation.scenario import Scenario, build
from schedulers.simulation.workload import SloClass, synthetic

PROFILE = {
    "prefill": {"base_s": 5e-3, "per_token_s": 32e-6, "per_token_sq_s": 0.66e-9},
    "decode": {"base_s": 7e-3, "per_seq_s": 20e-6, "per_context_token_s": 55e-9},
    "transfer": {"base_s": 2e-3, "per_token_s": 5.2e-6},
    "kv_capacity_tokens": 100_000,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a journal and the profile that it was scheduled by."""
    folder = tmp_path_factory.mktemp("run")
    cost = CostModel(
        prefills(**PROFILE["prefill"]),
        decodes(**PROFILE["decode"]),
        TransferCost(**PROFILE["transfer"]),
        PROFILE["kv_capacity_tokens"],
    )
    scenario = Scenario(cost, (SloClass(1.0, Slo(1.0, 0.025)),))
    simulation = build(scenario, synthetic(60, 30.0, seed=2))
    journal = Journal(lambda: simulation.now)
    for instance, _ in (*simulation.fleet.prefill, *simulation.fleet.decode):
        instance.journal = journal.recorder(instance)
    simulation.run()
    (folder / "journal.jsonl").write_text("".join(to_lines(journal.take())))
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    return folder


def journal(folder, *arguments):
    command = [sys.executable, "-m", "kairos_jax.journal", "--journal=journal.jsonl", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_it_explains_checks_and_exports(run):
    done = journal(run, "--explain=7", "--profile=profile.json", "--check")
    assert done.returncode == 0, done.stderr
    assert "request 7, from its arrival" in done.stdout or "arrived:" in done.stdout
    assert "live: laxity" in done.stdout, "what the policy thought"
    assert "decisions, all the same again" in done.stdout
    assert journal(run, "--perfetto=run.json").returncode == 0
    assert json.loads((run / "run.json").read_text())["traceEvents"]


def test_without_a_profile_it_says_when_tokens_were_due(run):
    done = journal(run, "--explain=7")
    assert done.returncode == 0
    assert "laxity" not in done.stdout


def test_decisions_of_other_policies_differ(run):
    done = journal(run, "--profile=profile.json", "--pack=0", "--prefill_policy=sjf", "--check")
    assert done.returncode == 1
    assert "decided otherwise" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --explain, --perfetto or --check"),
        (["--explain=999"], "no request '999'"),
        (["--check"], "--check needs the --profile"),
        (["--explain=1", "--journal=absent"], "--journal=absent: No such file"),
        (["--explain=1", "--profile=absent"], "profile absent"),
        (["--explain=1", "--profile=profile.json", "--decode_policy=foo"], "foo"),
    ],
)
def test_wrong_use(run, arguments, message):
    done = journal(run, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_live_request_is_found_by_the_name_that_its_client_knows():
    records: list = [("a", "instance", 0.0, "both", {}, True)]
    records += [("a", "add", 0.0, [id, 0.0, 1, 1, 1.0, 1.0, 0], 0, None) for id in ("7", "f0/x#1")]
    found = {asked: find_id(records, asked) for asked in ("7", "x", "x#1", "f0/x#1", "y")}
    assert found == {"7": "7", "x": "f0/x#1", "x#1": "f0/x#1", "f0/x#1": "f0/x#1", "y": "y"}
