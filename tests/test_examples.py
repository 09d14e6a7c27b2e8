"""Every file of `examples/` and every command of the README runs, on a tiny model, and prints what
its page says.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import documents
import processes
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kairos_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Few programs, of a config that is made.
SMALL = tuple(
    f"--config.{value}"
    for value in ("max_context=128", "decode.max_batch=2", "prefill.max_chunk=32")
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The golden Llama with a tokenizer whose tokens are bytes, and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests/golden/llama" / name, directory)
    tokens = [f"<{id}>" for id in range(8)] + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens[:8])
    Tokenizer(backend, frozenset({2, 3}), chat_template=TEMPLATE).save(directory)
    return directory


@pytest.fixture(scope="module")
def server(environment, model, profile):
    """Where a server listens: (HTTP, gRPC)."""
    process = processes.Process("serve", profile, env=environment, model=str(model))
    try:
        line = process.line("ready", 120)
        yield re.search(r"HTTP on (\S+), gRPC on (\S+)", line).groups()
    finally:
        process.end()


def run(environment, *command):
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(environment, name, *arguments):
    return run(environment, sys.executable, str(EXAMPLES / name), *arguments)


def test_every_example_is_on_the_page_and_tested():
    listed = re.findall(r"\]\((\S+?)\)", (EXAMPLES / "README.md").read_text())
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert set(listed) == there
    assert all(f'"{name}"' in Path(__file__).read_text() for name in there)


def test_chat_by_curl(environment, server):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    answer = json.loads(run(environment, str(EXAMPLES / "chat.sh"), 'Say "hi"', server[0]))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 32
    assert answer["choices"][0]["timing"]["ttft_s"] > 0
    # The quotes came through: each byte is a token.
    assert answer["usage"]["prompt_tokens"] == len('user: Say "hi"\nassistant: ')


def test_a_stream_with_the_openai_package(environment, server):
    pytest.importorskip("openai", reason="needs the openai package")
    said = python(environment, "openai_client.py", f"--base_url=http://{server[0]}/v1")
    assert re.search(r"TTFT met: (True|False), TPOT met: (True|False)\n$", said)


def test_a_stream_over_grpc(environment, server):
    said = python(environment, "grpc_client.py", f"--address={server[1]}", "--max_tokens=5")
    assert re.search(r"FINISH_REASON_(LENGTH|STOP): TTFT \d+\.\d+ s, met: (True|False)\n$", said)


def test_a_batch_without_a_server(environment, model, profile, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once upon a time\nhi\n")
    given = ("--config=tests/support/tiny_config.py", f"--model={model}", "--max_tokens=5")
    files = (f"--input={tmp_path}/prompts.txt", f"--output={tmp_path}/answers.jsonl")
    assert python(environment, "offline_batch.py", *given, *files, profile).startswith(
        "2 prompts in "
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Once upon a time", "hi"]
    assert all(answer["text"] for answer in answers)


def test_a_policy_of_ones_own(environment):
    _, *rows = python(environment, "my_policy.py").splitlines()
    kept = {name: float(share) for name, share, _ in map(str.split, rows)}
    assert list(kept) == ["fcfs", "sjf", "patient", "kairos_plus"]
    assert kept["fcfs"] < kept["patient"] < kept["kairos_plus"]


def test_the_notebook(environment, tmp_path):
    notebook = json.loads((EXAMPLES / "attainment.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # what a run printed is not committed
    source = "\n".join("".join(cell["source"]) for cell in cells)
    # Fewer requests than a reader would take, and the curves to look at.
    source = source.replace("NUM_REQUESTS = 2000", "NUM_REQUESTS = 200")
    assert "NUM_REQUESTS = 200\n" in source
    (tmp_path / "cells.py").write_text(f"{source}\nprint(curves)\nfigure.savefig('figure.png')\n")
    where = environment | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads(done.stdout.replace("'", '"'))
    assert all(len(curve) == 6 and 0 <= min(curve) <= 100 for curve in curves.values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# The README. A command of it is named by how it begins.


def readme(start, replaced=None):
    """The words of the README's one command that begins so. replaced: parts of it, by what they
    stand for here.
    """
    (command,) = (each for each in documents.of_page("README.md") if each.startswith(start))
    for old, new in (replaced or {}).items():
        assert old in command
        command = command.replace(old, str(new))
    return runnable(command)


def runnable(command):
    first, *rest = documents.words(command)
    return [sys.executable, "-m", "kairos_jax", *rest] if first == "kairos" else [first, *rest]


PLAIN = "kairos serve PATH_OR_ID"
MADE = ["make demo", "make test", "make serve", "make sweep", "make paper"]


def test_every_command_of_the_readme_is_tested():
    tested = re.findall(r'readme\(\s*"(.*?)(?<!\\)"[,)]', Path(__file__).read_text())
    tested = [start.replace(r"\"", '"') for start in tested] + [PLAIN, *MADE]
    for command in documents.of_page("README.md"):
        assert any(command.startswith(start) for start in tested), command


def test_curl_of_the_readme(environment, server):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    answer = json.loads(run(environment, *readme("curl localhost", {"localhost:8000": server[0]})))
    assert answer["usage"]["completion_tokens"] <= 32


def test_the_openai_package_of_the_readme(environment, server):
    pytest.importorskip("openai", reason="needs the openai package")
    page = (ROOT / "README.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "localhost:8000" in source
    program = source.replace("localhost:8000", server[0]) + "print(answer.usage.completion_tokens)"
    assert 0 < int(run(environment, sys.executable, "-c", program)) <= 64


def test_the_client_of_the_readme(environment, server):
    at = f"--address={server[1]}"
    assert run(environment, *readme("kairos client --prompt="), at).strip()
    # At a rate that keeps the test short.
    replayed = readme("kairos client --trace=", {"--rate=2 ": "--rate=50 "})
    assert "kairos_plus + kairos_plus" in " ".join(run(environment, *replayed, at).split())


class Started:
    """A command that serves. said: the line that told that it is ready."""

    def __init__(self, environment, *command, folder=ROOT):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=pipe, text=True
        )
        self.said = next(line for line in self._process.stdout if line.startswith("ready"))

    @property
    def address(self):
        """Of its gRPC API."""
        return self.said.split()[-1]

    def stop(self):
        """By Ctrl-C. Returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.communicate()


def ask(environment, server):
    command = ["-m", "kairos_jax", "client", f"--address={server.address}", "--prompt=hi"]
    return run(environment, sys.executable, *command, "--max_tokens=3")


@pytest.mark.slow
def test_a_server_of_ones_own_model(environment, model, profile, tmp_path):
    write = readme("kairos serve PATH_OR_ID --dump_config=", {"PATH_OR_ID": model})
    here = {"cwd": tmp_path, "env": environment, "text": True, "timeout": 120}
    done = subprocess.run([*write, *SMALL], **here, stdout=subprocess.PIPE)
    assert "wrote mine.py: edit it, and serve it with --config=mine.py" in done.stdout
    command = readme("kairos serve --config=mine.py")
    with Started(environment, *command, "--port=0", profile, folder=tmp_path) as server:
        assert ask(environment, server).strip()
        assert server.stop() == 0


def test_a_server_without_a_config_and_the_journal_of_it(environment, model, profile, tmp_path):
    said = tmp_path / "journal.jsonl"
    assert PLAIN in documents.of_page("README.md")
    command = runnable(PLAIN.replace("PATH_OR_ID", str(model)))
    here = ("--port=0", f"--journal={said}", *SMALL, profile)
    with Started(environment, *command, *here) as server:
        client = [sys.executable, "-m", "kairos_jax", "client", f"--address={server.address}"]
        answer = json.loads(
            run(environment, *client, "--prompt=hi", "--max_tokens=3", "--output=json")
        )
        assert server.stop() == 0
    names = {"FILE": said, "REQUEST_ID": answer["request_id"], "--profile=profile.json": profile}
    timeline = run(environment, *readme("kairos journal --journal=FILE", names))
    assert "arrived: 2 prompt tokens" in timeline
    assert "with 3 tokens" in timeline


def test_converting_and_measuring_of_the_readme(environment, model, tmp_path):
    names = {"PATH_OR_ID": model, "checkpoints/mine": tmp_path / "mine"}
    run(environment, *readme("kairos convert --source=PATH_OR_ID", names))
    names = {"smollm2_135m_cpu": "tests/support/tiny_config.py", "profile.json": tmp_path / "p"}
    run(environment, *readme("kairos profile --config=", names), f"--model={tmp_path / 'mine'}")
    assert json.loads((tmp_path / "p").read_text())["source"] == "measured"


@pytest.mark.slow
def test_roles_of_the_readme(environment, model, profile):
    config, common = {"FILE": "tests/support/tiny_config.py"}, (f"--model={model}", profile)
    prefill = readme("kairos prefill --config=FILE", config | {"50061": "0"})
    decode = readme("kairos decode --config=FILE", config | {"50062": "0"})
    with (
        Started(environment, *prefill, *common) as first,
        Started(environment, *decode, *common) as second,
    ):
        places = {"HOST:50061": first.address, "HOST:50062": second.address}
        router = readme("kairos router --config=FILE", config | places)
        with Started(environment, *router, common[0], "--port=0") as front:
            assert ask(environment, front).strip()
            assert front.stop() == 0


def test_simulations_of_the_readme(environment):
    one = readme("kairos simulate --profile=llama3_8b_h100_roofline --trace=synthetic --rate=30")
    assert "attained %" in run(environment, *one, "--num_requests=100")
    advise = readme(
        "kairos simulate --profile=llama3_8b_h100_roofline --trace=synthetic --advise",
        {"--devices=4": "--devices=2"},
    )
    assert "1 prefill + 1 decode" in run(environment, *advise, "--num_requests=40")


def test_the_plan_of_the_readme(environment):
    assert "TPU v5e: 1 x 4 prefill + 1 x 4 decode" in run(
        environment, *readme("kairos plan --config=")
    )


@pytest.mark.parametrize("command", MADE)
def test_make_knows_the_targets_of_the_readme(command):
    assert any(each.startswith(command) for each in documents.of_page("README.md"))
    assert documents.of_make(command.split()[1]) or command == "make test"


@pytest.mark.slow
@pytest.mark.parametrize(("target", "page"), [("sweep", "report.html"), ("paper", "paper.md")])
def test_what_make_simulates(environment, tmp_path, target, page):
    (command,) = documents.of_make(target)
    assert f"--output=out/{target}" in command
    command = command.replace(f"out/{target}", str(tmp_path))
    command = re.sub(r"--trace=\S*/\S*", "--trace=synthetic", command)
    assert run(environment, *runnable(command)).strip()
    assert (tmp_path / page).exists()
