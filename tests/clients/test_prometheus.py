"""A real Prometheus that scrapes the server, and promtool's opinion of what it gets."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def found(program: str) -> str:
    if (path := shutil.which(program)) is None:
        pytest.skip(f"there is no {program}; Debian's package `prometheus` has it")
    return path


CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: kairos
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.fixture
def prometheus(served, tmp_path):
    """The address of a Prometheus that scrapes the server each second, and the process."""
    target = served.url.removeprefix("http://")
    (tmp_path / "config.yml").write_text(CONFIG.format(target=target))
    process = subprocess.Popen(
        [
            *(found("prometheus"), f"--config.file={tmp_path}/config.yml"),
            *(f"--storage.tsdb.path={tmp_path}/data", "--web.listen-address=127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r'"Listening on" address=(\S+)', line):
                yield f"http://{match[1]}", process
                break
        else:
            pytest.fail("".join(said))
    finally:
        process.kill()
        process.communicate()


def query(address: str, expression: str) -> list[float]:
    """The values of what an expression selects now."""
    words = urllib.parse.urlencode({"query": expression})
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"{address}/api/v1/query?{words}") as answer,
    ):
        return [float(each["value"][1]) for each in json.load(answer)["data"]["result"]]
    return []


def test_prometheus_scrapes_it(served, prometheus):
    address, process = prometheus
    body = json.dumps({"prompt": "Once", "max_tokens": 4, "ignore_eos": True}).encode()
    url, kind = f"{served.url}/v1/completions", {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind)) as answer:
        answer.read()
    total = served.totals()["output_tokens"]
    by = time.monotonic() + 60
    while query(address, "sum(kairos_output_tokens_total)") != [total]:
        assert time.monotonic() < by
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"prometheus ended with code {process.wait(0.2)}")
    assert query(address, "up") == [1.0]
    (median,) = query(
        address,
        "histogram_quantile(0.5, sum by (le) (kairos_time_to_first_token_seconds_bucket))",
    )
    assert 0 < median < 60
    assert query(address, "vllm:num_requests_running") == [0.0]


def test_promtool_has_nothing_to_say(served, tmp_path):
    """Of the names under vLLM's prefix it has: they have a colon, as vLLM's do."""
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read()
    checked = subprocess.run(
        [found("promtool"), "check", "metrics"], input=text, capture_output=True
    )
    complaints = checked.stderr.decode().splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []
