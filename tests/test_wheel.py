"""The wheel holds all that the tree has, and serves without the tree."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import fakes
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "kairos_jax", "models", "schedulers")
UV = Path(sys.executable).parent / "uv"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its own folders beside what it builds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [UV, "build", "--quiet", "--wheel", "--out-dir", built, source]
    subprocess.run(command, check=True, timeout=180)
    (path,) = built.glob("*.whl")
    return path


def tracked(*paths: str) -> list[str]:
    command = ["git", "ls-files", "--", *paths]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(not UV.exists(), reason="there is no uv beside this Python")
def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == set(tracked(*PACKAGES))


@pytest.mark.slow
@pytest.mark.skipif(not UV.exists(), reason="there is no uv beside this Python")
def test_the_wheel_alone_serves_and_simulates(wheel, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    install = [UV, "pip", "install", "--quiet", "--python", python, wheel]
    subprocess.run(install, check=True, timeout=300)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    alone = {"cwd": tmp_path, "env": environment, "text": True}

    kairos = tmp_path / "env" / "bin" / "kairos"
    listed = subprocess.run([kairos], capture_output=True, timeout=60, **alone)
    assert (listed.returncode, "  serve " in listed.stdout) == (0, True)
    shown = [kairos, "config", "smollm2_135m_cpu", "--config.slo.ttft=7"]
    done = subprocess.run(shown, capture_output=True, timeout=120, **alone)
    assert (done.returncode, '"ttft": 7.0' in done.stdout) == (0, True), done.stderr

    simulate = [kairos, "simulate", "--profile=llama3_8b_h100_roofline"]
    simulate += ["--trace=synthetic", "--rate=20", "--num_requests=50"]
    simulate += ["--num_prefill=2", "--num_decode=1", "--ttft=1", "--tpot=0.025", "--output=json"]
    done = subprocess.run(simulate, capture_output=True, timeout=120, **alone)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)

    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(fakes.PROFILE))
    model = ROOT / "tests" / "golden" / "llama"
    serve = [kairos, "serve", model, "--port=0", f"--profile={profile}", "--end_with_stdin"]
    serve += ["--config.max_context=256", "--config.kernels=cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(serve, **pipes, **alone) as server:
        try:
            assert server.stdout
            by = time.monotonic() + 120
            ready = next(line for line in server.stdout if line.startswith("ready:"))
            assert time.monotonic() < by
            address = ready.partition("HTTP on ")[2].partition(",")[0]
            body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}).encode()
            url, kind = f"http://{address}/v1/completions", {"content-type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, body, kind)) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 3
            with urllib.request.urlopen(f"http://{address}/page/live.js") as page:
                assert page.status == 200
        finally:
            assert server.stdin
            server.stdin.close()
        assert server.wait(60) == 0
