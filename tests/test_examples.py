"""Every file of `examples/` runs, on a tiny model, and prints what its page says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import processes
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kairos_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
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
def site(tmp_path_factory):
    """The environment of the examples, and a profile of step times."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "profile.json").write_text(json.dumps(fakes.PROFILE))
    return os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def server(site, model):
    """Where a server listens: (HTTP, gRPC)."""
    profile = f"--profile={site['XDG_CACHE_HOME']}/profile.json"
    process = processes.Process("serve", profile, env=site, model=str(model))
    try:
        line = process.line("ready", 120)
        yield re.search(r"HTTP on (\S+), gRPC on (\S+)", line).groups()
    finally:
        process.end()


def run(site, *command):
    done = subprocess.run(command, cwd=ROOT, env=site, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(site, name, *arguments):
    return run(site, sys.executable, str(EXAMPLES / name), *arguments)


def test_every_example_is_on_the_page_and_tested():
    listed = re.findall(r"\]\((\S+?)\)", (EXAMPLES / "README.md").read_text())
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert set(listed) == there
    assert all(f'"{name}"' in Path(__file__).read_text() for name in there)


def test_chat_by_curl(site, server):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    answer = json.loads(run(site, str(EXAMPLES / "chat.sh"), 'Say "hi"', server[0]))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 32
    assert answer["choices"][0]["timing"]["ttft_s"] > 0
    # The quotes came through: each byte is a token.
    assert answer["usage"]["prompt_tokens"] == len('user: Say "hi"\nassistant: ')


def test_a_stream_with_the_openai_package(site, server):
    pytest.importorskip("openai", reason="needs the openai package")
    said = python(site, "openai_client.py", f"--base_url=http://{server[0]}/v1")
    assert re.search(r"TTFT met: (True|False), TPOT met: (True|False)\n$", said)


def test_a_stream_over_grpc(site, server):
    said = python(site, "grpc_client.py", f"--address={server[1]}", "--max_tokens=5")
    assert re.search(r"FINISH_REASON_(LENGTH|STOP): TTFT \d+\.\d+ s, met: (True|False)\n$", said)


def test_a_batch_without_a_server(site, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once upon a time\nhi\n")
    given = ("--config=tests/support/tiny_config.py", f"--model={model}", "--max_tokens=5")
    files = (f"--input={tmp_path}/prompts.txt", f"--output={tmp_path}/answers.jsonl")
    profile = f"--profile={site['XDG_CACHE_HOME']}/profile.json"
    assert python(site, "offline_batch.py", *given, *files, profile).startswith("2 prompts in ")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Once upon a time", "hi"]
    assert all(answer["text"] for answer in answers)


def test_a_policy_of_ones_own(site):
    _, *rows = python(site, "my_policy.py").splitlines()
    kept = {name: float(share) for name, share, _ in map(str.split, rows)}
    assert list(kept) == ["fcfs", "sjf", "patient", "kairos_plus"]
    assert kept["fcfs"] < kept["patient"] < kept["kairos_plus"]


def test_the_notebook(site, tmp_path):
    notebook = json.loads((EXAMPLES / "attainment.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # what a run printed is not committed
    source = "\n".join("".join(cell["source"]) for cell in cells)
    # Fewer requests than a reader would take, and the curves to look at.
    source = source.replace("NUM_REQUESTS = 2000", "NUM_REQUESTS = 200")
    assert "NUM_REQUESTS = 200\n" in source
    (tmp_path / "cells.py").write_text(f"{source}\nprint(curves)\nfigure.savefig('figure.png')\n")
    where = site | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads(done.stdout.replace("'", '"'))
    assert all(len(curve) == 6 and 0 <= min(curve) <= 100 for curve in curves.values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000
