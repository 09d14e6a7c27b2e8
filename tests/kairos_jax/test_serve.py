"""The binaries as processes: a server and its client, a conversion, a profile, wrong use."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import fakes
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kairos_jax.config import ServerConfig
from kairos_jax.config.files import read_file
from kairos_jax.engine.model import Model
from kairos_jax.net.credentials import Credentials
from kairos_jax.rpc import kairos_pb2_grpc
from kairos_jax.serve import Prepared, serve
from models.checkpoint import open_checkpoint
from schedulers.cost import CostModel
from schedulers.ledger.journal import from_lines, replay

ROOT = Path(__file__).parents[2]
TLS = ROOT / "tests/support/tls"
CONFIG = "--config=tests/support/tiny_config.py"
MODEL = "--model=tests/golden/llama"


def run(environment, binary, *arguments):
    command = [sys.executable, "-m", f"kairos_jax.{binary}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@contextlib.contextmanager
def server(environment, *arguments):
    """A server process that is ready, and its address. before: what it said until then."""
    command = [sys.executable, "-m", "kairos_jax.serve", "--port=0", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.before = ""
        for line in process.stdout:
            process.before += line
            if line.startswith("ready"):
                yield process, line.split()[-1]
                break
        else:
            pytest.fail(f"no server: {process.communicate()[1]}")
    finally:
        process.kill()
        process.communicate()


def ask(environment, address, *arguments):
    return run(environment, "client", f"--address={address}", "--output=json", *arguments)


def golden_case(index=0):
    cases = json.loads((ROOT / "tests/golden/llama/golden.json").read_text())["cases"]
    prompt = ",".join(map(str, cases[index]["prompt"]))
    flags = (f"--prompt_token_ids={prompt}", "--max_tokens=32", "--temperature=0", "--ignore_eos")
    return flags, cases[index]["output"]


def test_a_server_answers_refuses_and_drains(environment, profile):
    flags, expected = golden_case()
    with server(environment, CONFIG, MODEL, profile) as (process, address):
        done = ask(environment, address, *flags, "--request_id=mine")
        answer = json.loads(done.stdout)
        assert answer["token_ids"] == expected
        assert answer["request_id"] == "mine"
        assert answer["finish_reason"] == "length"
        done = ask(environment, address, "--prompt=text")
        assert done.returncode == 2
        assert "prompt.text needs a tokenizer" in done.stderr
        port = address.rpartition(":")[2]
        done = run(environment, "serve", CONFIG, MODEL, f"--port={port}")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"error: --host=127.0.0.1 --port={port}: cannot listen on 127.0.0.1:{port}: "
            "Address already in use"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout.read().split() == ["draining", "drained"]


def test_a_model_alone_is_served_under_the_name_that_is_asked_for(environment, profile, tmp_path):
    """Without a config; and the config that it makes is the same from a file."""
    flags, expected = golden_case()
    dump = tmp_path / "made.py"
    few = ("--config.prefill.max_chunk=32", "--config.decode.max_batch=4")  # programs
    small = ("--config.max_context=128", "--config.kernels=cpu", *few)
    given = (MODEL.removeprefix("--model="), *small, "--config.served_model_name=mine")
    done = run(environment, "serve", *given, f"--dump_config={dump}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {dump}: edit it, and serve it with --config={dump}\n"
    made = ServerConfig.from_dict(read_file(str(dump)))
    assert (made.name, made.colocated, made.max_context) == ("mine", True, 128)
    with server(environment, *given, profile) as (process, address):
        assert "no --config: for a CPU with" in process.before
        assert "1 x 1 colocated, float32, max_context 128" in process.before
        done = ask(environment, address, *flags, "--model=mine")
        assert json.loads(done.stdout)["token_ids"] == expected
        done = ask(environment, address, *flags, "--model=llama")
        assert (done.returncode, "'llama'" in done.stderr) == (2, True)
        url = f"http://{process.before.partition('HTTP on ')[2].partition(',')[0]}"
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            assert [each["id"] for each in json.load(answer)["data"]] == ["mine"]
        body = {"model": "mine", "prompt": [5, 6], "max_tokens": 2}
        head = {"content-type": "application/json"}
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked) as answer:
            assert json.load(answer)["model"] == "mine"
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert 'model_name="mine"' in answer.read().decode()


def test_a_config_is_printed_as_it_was_dumped(environment, tmp_path):
    dump = tmp_path / "made.py"
    given = ("config", "smollm2_135m_cpu", "--config.slo.ttft=7", "--config.rules.mlp=")
    assert run(environment, *given, f"--dump_config={dump}").returncode == 0
    again = run(environment, *given, f"--dump_config={dump}")
    assert (again.returncode, again.stderr) == (2, f"error: --dump_config={dump}: File exists\n")
    assert run(environment, "config", str(dump)).stdout == dump.read_text()
    made = ServerConfig.from_dict(read_file(str(dump)))
    assert (made.slo.ttft, made.rules.mlp, made.rules.heads) == (7.0, None, "tensor")


@pytest.mark.parametrize("binary", ["router", "prefill"])
def test_a_process_of_several_says_how_to_get_a_config(environment, binary):
    done = run(environment, binary)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config is missing: the processes of a server share one")
    assert "--dump_config=FILE" in done.stderr


def test_keys_hold_for_grpc_without_http_too(environment, profile, tmp_path):
    keys, key = tmp_path / "keys", tmp_path / "key"
    keys.write_text("first\nsecond\n")
    key.write_text("second\n")
    flags, expected = golden_case()
    given = (f"--api_keys_file={keys}", "--http_port=-1")
    with server(environment, CONFIG, MODEL, profile, *given) as (_, address):
        refused = ask(environment, address, *flags)
        assert (refused.returncode, "UNAUTHENTICATED" in refused.stderr) == (2, True)
        done = ask(environment, address, *flags, f"--api_key_file={key}")
        assert json.loads(done.stdout)["token_ids"] == expected


def test_ctrl_c_drains_too(environment, profile):
    with server(environment, CONFIG, MODEL, profile) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_an_orbax_checkpoint_serves_on_other_meshes(environment, profile, tmp_path):
    """Two that prefill with packed weights, and a mesh with copies of kv heads for decode."""
    done = run(environment, "convert", "--source=tests/golden/llama", f"--output={tmp_path}/c")
    assert done.returncode == 0, done.stderr
    flags, expected = golden_case(1)
    meshes = (
        "--config.kernels=auto",
        "--config.prefill.instances=2",
        "--config.decode.devices=8",
    )
    with server(environment, CONFIG, f"--model={tmp_path}/c", profile, *meshes) as (_, address):
        assert json.loads(ask(environment, address, *flags).stdout)["token_ids"] == expected


def test_a_profile_is_measured_and_kept(optimized_environment, tmp_path):
    """And the programs are kept, which the server loads: both as XLA makes them for users."""
    environment = optimized_environment
    path = tmp_path / "profile.json"
    done = run(environment, "profile", CONFIG, MODEL, f"--output={path}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"prefill R2 .*, decode R2", done.stdout)
    made = json.loads(path.read_text())
    assert made["source"] == "measured"
    # On so small a model noise may decide: see test_profiling.py.
    assert made["decode"]["form"] in made["fit"]["decode"]["forms"]
    assert made["fit"]["decode"]["declared"] == "padded"
    assert made["kv_capacity_tokens"] == 1024
    assert {
        "name",
        "model",
        "device",
        "dtype",
        "date",
        "prefill",
        "transfer",
        "fit",
        "samples",
    } <= set(made)
    flags, expected = golden_case(2)
    with server(environment, CONFIG, MODEL, f"--profile={path}") as (_, address):
        assert json.loads(ask(environment, address, *flags).stdout)["token_ids"] == expected


@pytest.mark.slow
def test_a_colocated_server_measures_its_profile_and_keeps_a_journal(environment, tmp_path):
    journal = tmp_path / "journal.jsonl"
    flags, expected = golden_case(2)
    options = ("--config.colocated=true", f"--journal={journal}")
    with server(environment, CONFIG, MODEL, *options) as (process, address):
        assert json.loads(ask(environment, address, *flags).stdout)["token_ids"] == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with journal.open() as lines:
        *_, last = replay(from_lines(lines))
    assert last.instance.id == "colocated-0"
    assert last.instance.outputs.num_finished == 1


def test_a_dead_instance_ends_the_server_with_code_1(tiny_llama, capsys):
    engines = fakes.fake_engines(fakes.CONFIG)
    engines[-1].fail = RuntimeError("the device is on fire")
    prepared = Prepared(
        Model(open_checkpoint(tiny_llama), None), engines, {}, CostModel.from_profile(fakes.PROFILE)
    )
    server_ready = threading.Event()

    async def main():
        serving = asyncio.ensure_future(
            serve(fakes.CONFIG, "127.0.0.1", 0, 30.0, lambda: server_ready.wait(30) and prepared)
        )
        while not (starting := capsys.readouterr().out):
            await asyncio.sleep(0)
        async with grpc.aio.insecure_channel(starting.split()[-1]) as channel:
            stub = kairos_pb2_grpc.KairosStub(channel)
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="the server is starting"):
                await stub.Generate(fakes.ask([1], 9)).read()
            server_ready.set()
            assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="its step failed"):
                async for _ in stub.Generate(fakes.ask([1], 9)):
                    pass
            assert await asyncio.wait_for(serving, 30) == 1

    asyncio.run(main())


def test_clients_come_over_tls_to_where_it_is_served(environment, tiny_llama, capsys):
    prepared = Prepared(
        Model(open_checkpoint(tiny_llama), None),
        fakes.fake_engines(fakes.CONFIG),
        {},
        CostModel.from_profile(fakes.PROFILE),
    )
    public = Credentials((TLS / "peer.pem").read_bytes(), (TLS / "peer.key").read_bytes())

    question = ("--prompt_token_ids=3,1,4", "--max_tokens=5", "--temperature=0", "--ignore_eos")

    async def main():
        where = "127.0.0.1", 0, 30.0
        serving = asyncio.ensure_future(
            serve(fakes.CONFIG, *where, lambda: prepared, public=public)
        )
        said = ""
        while "ready" not in said:
            await asyncio.sleep(0)
            said += capsys.readouterr().out
        address = said.split()[-1]
        answers = [
            await asyncio.to_thread(ask, environment, address, f"--tls_ca={TLS}/{ca}", *question)
            for ca in ("ca.pem", "other_ca.pem")
        ]
        signal.raise_signal(signal.SIGTERM)
        assert await asyncio.wait_for(serving, 30) == 0
        return answers

    done, refused = asyncio.run(main())
    assert json.loads(done.stdout)["token_ids"] == fakes.expected_tokens([3, 1, 4], 5)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]  # after what gRPC logs
    assert last.startswith("error: UNAVAILABLE: ")
    assert "CERTIFICATE_VERIFY_FAILED" in last


@pytest.mark.parametrize("binary", ["router", "decode"])
@pytest.mark.slow
def test_a_health_port_in_use_is_one_line_and_code_2(environment, binary):
    workers = ("--prefill=127.0.0.1:1", "--decode=127.0.0.1:1") if binary == "router" else ()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = (CONFIG, MODEL, "--port=0", f"--health_port={port}", *workers)
        done = run(environment, binary, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: --health_port={port}: cannot listen on 127.0.0.1:{port}: Address already in use"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([CONFIG, "--prot=1"], "unknown flag --prot: did you mean --port?"),
        (["--max-model-len=4"], "unknown flag --max-model-len: use --config.max_context"),
        (["--config.page_size=0"], "config.page_size must be at least 1, got 0"),
        ([CONFIG, "--port=99999"], "port"),
        (["--config=nowhere.py"], "nowhere.py"),
        ([CONFIG, "--config.decode.colour=red"], "no such config key --config.decode.colour"),
        ([CONFIG, "--config.page_size=0"], "config.page_size must be at least 1, got 0"),
        ([CONFIG, "--journal=/dev/null/x"], "--journal=/dev/null/x: /dev/null is not a folder"),
        ([CONFIG, "--public_tls_key=x"], "--public_tls_cert is missing"),
        ([CONFIG, "one", "two"], "unexpected argument 'two'"),
        ([CONFIG, MODEL, "extra"], "unexpected argument 'extra' beside --model"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(environment, arguments, words):
    done = run(environment, "serve", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_router_does_not_start_where_its_token_would_go_in_the_clear(environment, tmp_path):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    for targets in (
        ("--prefill=127.0.0.1:1,10.0.0.7:50061", "--decode=127.0.0.1:1"),
        ("--prefill=127.0.0.1:1", "--decode=dns:decode.example:50071"),
    ):
        done = run(environment, "router", CONFIG, f"--token_file={tmp_path}/token", *targets)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: --token_file needs --tls_ca to call ")
        assert len(done.stderr.splitlines()) == 1


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _not_a_gguf(path):
    path.write_bytes(b"GGUF" + bytes(20))


def test_models_that_cannot_be_served_end_it_with_the_reason(environment, profile, tmp_path):
    corrupt = tmp_path / "corrupt"
    shutil.copytree(ROOT / "tests/golden/llama", corrupt)
    _cut_short(corrupt / "model.safetensors")
    broken = tmp_path / "broken.gguf"
    _not_a_gguf(broken)
    for arguments, words in (
        ([f"--model={corrupt}"], str(corrupt)),
        ([f"--model={broken}"], str(broken)),
        (["--model=no-such-model"], "no-such-model"),
        (
            [
                MODEL,
                "--config.max_context=4096",
                "--config.prefill.kv_tokens=4096",
                "--config.prefill.parked_tokens=4096",
                "--config.decode.kv_tokens=4096",
            ],
            "at most the model's 1024, got 4096",
        ),
        ([MODEL, "--config.decode.devices=5"], "cannot be split evenly over the 5 devices"),
        ([MODEL, "--cpu_devices=1"], "need 2 devices, and there are 1 cpu devices"),
    ):
        done = run(environment, "serve", CONFIG, profile, "--port=0", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
