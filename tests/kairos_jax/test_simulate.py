"""The simulator's command line: its answers against figures worked out by hand, and its errors."""

import json
import os
import signal
import subprocess
import sys

import pytest
from absl import flags

from kairos_jax.engine import profile_file
from kairos_jax.lab.report.simulation import run_text
from kairos_jax.process.command import UsageError
from kairos_jax.simulate import define_flags, scenario_of, simulated, workload_of
from schedulers.ledger.journal import check, from_lines
from schedulers.simulation.scenario import build

PROFILE = "--profile=llama3_8b_h100_roofline"
SLO = ("--ttft=1", "--tpot=0.025")
SYNTHETIC = (PROFILE, "--trace=synthetic", *SLO)
COMMAND = [sys.executable, "-m", "kairos_jax.simulate"]


def parsed(*arguments):
    values = flags.FlagValues()
    define_flags(values)
    assert values(["simulate", *arguments]) == ["simulate"]
    return values


def answer(*arguments):
    return simulated(parsed(*arguments))


@pytest.fixture
def azure(tmp_path):
    """Writes a trace of (seconds after noon, prompt, output); returns its path."""

    def write(*requests):
        path = tmp_path / "trace.csv"
        lines = [f"2023-11-16 12:00:{at:09.6f},{n},{m}" for at, n, m in requests]
        path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, ""]))
        return path

    return write


def test_a_lone_request_takes_what_the_profile_says(azure):
    trace = f"--trace={azure((0, 1000, 3), (30, 1000, 1))}"
    result = answer(PROFILE, *SLO, trace, "--pack=0")
    prefill_s = 5e-3 + 1000 * 32e-6 + 0.66e-9 * 1000**2
    transfer_s = 2e-3 + 1000 * 131072 / 25e9
    steps_s = [7e-3 + 20e-6 + 55e-9 * context for context in (1001, 1002)]
    assert result["ttft_s"]["p50"] == pytest.approx(prefill_s)
    assert result["tpot_s"]["p50"] == pytest.approx((transfer_s + sum(steps_s)) / 2)
    assert result["latency_max_s"] == pytest.approx(prefill_s + transfer_s + sum(steps_s))
    assert result["num_requests"] == 2
    assert result["e2e_attainment"] == result["strict_attainment"] == result["ttft_bound"] == 100


def test_all_figures_are_there():
    result = answer(*SYNTHETIC, "--rate=20", "--num_requests=200")
    json.dumps(result, allow_nan=False)
    assert {
        *("num_requests", "ttft_attainment", "tpot_attainment", "e2e_attainment"),
        *("strict_attainment", "goodput_rps", "decode_tokens_per_s", "ttft_s", "tpot_s"),
        *("latency_max_s", "e2e_by_output_decile", "e2e_by_class", "ttft_bound", "wall_s"),
    } <= set(result)
    assert len(result["e2e_by_output_decile"]) == 10
    assert set(result["ttft_s"]) == set(result["tpot_s"]) == {"p50", "p90", "p99"}
    assert result["settings"]["rate"] == pytest.approx(20)
    assert result["settings"]["max_batch"] == 256


def test_a_rate_stretches_the_traces_own_arrivals(azure):
    trace = f"--trace={azure((0, 10, 1), (1, 10, 1), (5, 10, 1), (20, 10, 1))}"
    values = parsed(PROFILE, *SLO, trace, "--rate=0.3", "--num_requests=3")
    assert [arrival.at for arrival in workload_of(values)] == pytest.approx([0, 2, 10])
    own = workload_of(parsed(PROFILE, *SLO, trace))
    assert [arrival.at for arrival in own] == [0, 1, 5, 20]
    even = workload_of(parsed(PROFILE, *SLO, trace, "--rate=4", "--arrivals=poisson"))
    assert even[-1].at - even[0].at == pytest.approx(1)


def test_mooncake_traces_are_read_too(tmp_path):
    path = tmp_path / "trace.jsonl"
    entry = {"timestamp": 0, "input_length": 500, "output_length": 20, "hash_ids": [1]}
    path.write_text("".join(json.dumps(entry | {"timestamp": at}) + "\n" for at in (0, 100)))
    assert answer(PROFILE, *SLO, f"--trace={path}")["e2e_attainment"] == 100


@pytest.mark.parametrize("decode", ["continuous", "kairos", "kairos_plus"])
@pytest.mark.parametrize("prefill", ["fcfs", "sjf", "edf", "kairos", "kairos_plus"])
def test_every_policy_ends_every_request_and_none_beats_the_bound(prefill, decode):
    policies = (f"--prefill_policy={prefill}", f"--decode_policy={decode}")
    result = answer(*SYNTHETIC, *policies, "--rate=24", "--num_requests=200", "--pack=0")
    assert result["num_failed"] == 0
    assert result["ttft_attainment"] <= result["ttft_bound"] < 100
    for each in result["e2e_by_output_decile"]:
        assert 0 <= each <= 100


@pytest.mark.parametrize(
    "flag",
    [
        *("--num_prefill=2", "--pack=1", "--noise=0.1", "--classes=0.5:1:0.025,0.5:2:0.025"),
        "--num_prefill=2 --num_decode=2",
    ],
)
def test_the_bound_is_null_where_it_is_not_exact(flag):
    flags = ("--pack=0", "--rate=20", "--num_requests=60", *flag.split())
    result = answer(*SYNTHETIC, *flags)
    assert result["ttft_bound"] is None


def test_the_bound_counts_chunks_and_classes_of_one_ttft(azure):
    # Two at once, of 0.5 s each in chunks of 4096: only one can be in time.
    trace = f"--trace={azure((0, 12000, 2), (0, 12000, 2))}"
    classes = "--classes=0.5:0.6:0.025,0.5:0.6:0.1"
    assert answer(PROFILE, classes, trace, "--pack=0")["ttft_bound"] == 50
    assert answer(PROFILE, "--classes=1:1.3:0.025", trace, "--pack=0")["ttft_bound"] == 100


def test_same_seed_same_answer():
    arguments = (*SYNTHETIC, "--rate=20", "--num_requests=100", "--noise=0.2")
    first, again, other = (answer(*arguments, f"--seed={seed}") for seed in (3, 3, 4))
    del first["wall_s"], again["wall_s"]
    assert first == again
    assert first["ttft_s"] != other["ttft_s"]


def test_classes_are_told_apart():
    classes = "--classes=0.7:1:0.025,0.3:10:0.1"
    result = answer(*SYNTHETIC, classes, "--rate=20", "--num_requests=400")
    interactive, batch = result["e2e_by_class"]
    assert (interactive["ttft"], batch["ttft"]) == (1, 10)
    assert interactive["share"] == pytest.approx(0.7, abs=0.07)
    assert interactive["share"] + batch["share"] == 1


def test_policies_cannot_tell_how_long_an_output_is():
    values = parsed(*SYNTHETIC, "--num_requests=100")
    simulation = build(scenario_of(values), workload_of(values))
    assert len({request.max_tokens for request in simulation.requests}) == 1


def test_bias_is_of_the_policies_alone(azure):
    trace = f"--trace={azure((0, 1000, 3))}"
    exact, off = (answer(PROFILE, *SLO, trace, f"--bias={bias}") for bias in (0, 0.5))
    assert exact["latency_max_s"] == off["latency_max_s"]


def test_a_journal_replays_to_the_same_decisions(tmp_path):
    path = tmp_path / "journal.jsonl"
    values = parsed(*SYNTHETIC, "--rate=30", "--num_requests=60", f"--journal={path}")
    simulated(values)
    fleet = build(scenario_of(values), workload_of(values)).fleet
    policies = {instance.id: policy for instance, policy in (*fleet.prefill, *fleet.decode)}
    with path.open() as lines:
        assert check(from_lines(lines), policies) > 100


def test_a_table_for_people():
    classes = "--classes=0.5:1:0.1,0.5:9:0.1"
    text = run_text(answer(*SYNTHETIC, "--rate=20", "--num_requests=50", classes))
    assert text.startswith("50 requests at 20 requests/s, 1 prefill + 1 decode, kairos_plus")
    assert text.count("class ") == 2
    assert max(map(len, text.splitlines())) <= 110


def test_a_request_is_explained_and_the_run_drawn(tmp_path):
    path = tmp_path / "trace.json"
    arguments = ("--rate=40", "--num_requests=60", "--explain=59", f"--perfetto={path}")
    result = answer(*SYNTHETIC, *arguments)
    assert "arrived" in result["explained"][0]
    assert result["explained"][-1].endswith(("SLO attained", "TTFT", "TPOT"))
    assert result["explained"][-1] in run_text(result)
    assert len(json.loads(path.read_text())["traceEvents"]) > 100


def test_packaged_profiles_can_be_used():
    assert "llama3_8b_h100_roofline" in profile_file.packaged()
    for name in profile_file.packaged():
        assert profile_file.read(name)["source"] in ("measured", "roofline")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--prefill_policy=lifo", "prefill_policy must be one of fcfs, sjf, edf, kairos, kairos_p"),
        ("--decode_policy=lifo", "decode_policy must be one of continuous, kairos, kairos_plus"),
        ("--profile=nowhere.json", "no such file"),
        ("--trace=nowhere.csv", "No such file"),
        ("--rate=0", "rate must be positive, got 0"),
        ("--rate=nan", "rate must be positive, got nan"),
        ("--ttft=0.01", "slo.tpot must be less than slo.ttft"),
        ("--tpot=0", "slo.tpot must be a positive number"),
        ("--classes=0.5:1:0.02,0.3:2:0.1", "shares must sum to 1"),
        ("--classes=1:1", "class 1: must be SHARE:TTFT:TPOT"),
        ("--num_prefill=0", "num_prefill must be at least 1"),
        ("--num_decode=-1", "num_decode must be at least 1"),
        ("--max_batch=0", "max_batch must be at least 1"),
        ("--chunk=0", "chunk must be at least 1"),
        ("--noise=-1", "noise must be finite and at least 0"),
        ("--bias=-1", "bias must be finite and above -1"),
        ("--pack=-1", "pack must be at least 0"),
        ("--journal=/dev/null/file", "--journal=/dev/null/file: /dev/null is not a folder"),
        ("--perfetto=/dev/null/file", "--perfetto=/dev/null/file: /dev/null is not a folder"),
        ("--explain=2000", "--explain=2000: requests are 0 to 1999"),
        ("--devices=2", "--devices goes with --advise"),
        ("--seed=-1", "seed must be at least 0"),
        ("--colocated=2 --num_decode=1", "--num_decode does not go with --colocated"),
    ],
)
def test_wrong_use_is_told_by_name(flag, words):
    with pytest.raises(UsageError) as caught:
        answer(*SYNTHETIC, *flag.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_malformed_line_is_told_by_its_number(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 12:00:00,10,x\n")
    with pytest.raises(UsageError, match="line 2: GeneratedTokens"):
        answer(PROFILE, *SLO, f"--trace={path}")


def test_more_requests_than_the_trace_has(azure):
    with pytest.raises(UsageError, match=r"--num_requests=3, but .* has only 2"):
        answer(PROFILE, *SLO, f"--trace={azure((0, 9, 9), (1, 9, 9))}", "--num_requests=3")


def test_a_request_longer_than_the_kv_that_there_is(azure):
    trace = f"--trace={azure((0, 9, 9), (1, 400_000, 9))}"
    with pytest.raises(UsageError, match=r"request 1 has 400000 . 9 tokens"):
        answer(PROFILE, *SLO, trace)


def test_a_profile_that_lacks_a_coefficient(tmp_path):
    profile = profile_file.read("llama3_8b_h100_roofline")
    del profile["decode"]["per_seq_s"]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    with pytest.raises(UsageError, match=r"decode\.per_seq_s"):
        answer(*SYNTHETIC, f"--profile={path}")


def test_flags_that_are_missing():
    for flag in ("--profile", "--trace", "--ttft", "--tpot"):
        with pytest.raises(UsageError, match=f"{flag} is missing"):
            answer(*(each for each in SYNTHETIC if not each.startswith(flag)))


def test_as_a_process_it_prints_one_object_and_leaves_jax_alone():
    code = (
        "import sys; from absl import flags; from kairos_jax import simulate as s\n"
        "from kairos_jax.process import command\n"
        "s.define_flags(flags.FLAGS)\n"
        "def main(argv):\n"
        "    code = s.main(argv)\n"
        "    heavy = [n for n in ('jax', 'matplotlib', 'grpc') if n in sys.modules]\n"
        "    print(heavy, file=sys.stderr)\n"
        "    return code\n"
        "command.run(main)"
    )
    arguments = [*SYNTHETIC, "--rate=20", "--num_requests=20", "--output=json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert json.loads(done.stdout)["num_requests"] == 20


@pytest.mark.parametrize("flag", ["--decode_policy=x", "--such_a_flag=1", "--rate=much", "word"])
def test_as_a_process_wrong_use_is_one_line_and_code_2(flag):
    done = subprocess.run([*COMMAND, *SYNTHETIC, flag], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_it_with_130(tmp_path):
    fifo = tmp_path / "journal"
    os.mkfifo(fifo)
    arguments = [*SYNTHETIC, "--num_requests=100000", f"--journal={fifo}"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        with fifo.open():  # once it opens the other end, it is about to run
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "")
