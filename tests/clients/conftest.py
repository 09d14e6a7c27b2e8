"""The real server with the default model, for programs of others. `make clients` runs these."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import ROOT, Process
from prometheus_client.parser import text_string_to_metric_families

from kairos_jax.process import hub

CONFIG = "configs/smollm2_135m_cpu.py"


@dataclass(frozen=True)
class Served:
    """A server. url: of its HTTP API; model: the name it serves; directory: the same model as
    Hugging Face has it, with its tokenizer.
    """

    url: str
    model: str
    directory: Path

    def totals(self) -> dict[str, float]:
        """What the server has counted so far: requests by outcome, tokens, who is in progress."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        found: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            name = {
                "kairos_requests_total": sample.labels.get("outcome"),
                "kairos_prompt_tokens_total": "prompt_tokens",
                "kairos_output_tokens_total": "output_tokens",
                "kairos_requests_in_progress": "in_progress",
            }.get(sample.name)
            if name:
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """What has changed in the totals."""
        now = self.totals()
        return {name: now[name] - before.get(name, 0.0) for name in now}


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """A server with the default model, as `make serve` starts it."""
    directory = tmp_path_factory.mktemp("model") / hub.DEFAULT_MODEL
    given = (f"--source={hub.DEFAULT_MODEL}", f"--output={directory}", "--format=hugging_face")
    subprocess.run([sys.executable, "-m", "kairos_jax.convert", *given], cwd=ROOT, check=True)
    process = Process(
        "serve", "--http_port=0", env=os.environ, config=CONFIG, model=hub.DEFAULT_MODEL
    )
    try:
        # "...; HTTP on 127.0.0.1:1234, gRPC on 127.0.0.1:5678"
        address = process.line("ready", 600).partition("HTTP on ")[2].partition(",")[0]
        yield Served(f"http://{address}", hub.DEFAULT_MODEL, directory)
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in process.errors()
    finally:
        process.end()
