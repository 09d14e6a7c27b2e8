"""Malformed and hostile requests to a real server, by both of its APIs. `make fuzz` sends 100,000.

KAIROS_FUZZ_REQUESTS: how many. KAIROS_FUZZ_SEED: the same seed makes the same requests in the same
order. hypothesis makes the first 3,000 of them; the others are those, varied at random, which takes
a tenth of the time: see `fuzz_cases`.
"""

import asyncio
import os
import signal

import fuzz
import fuzz_cases
import pytest
from processes import Process

COUNT = int(os.environ.get("KAIROS_FUZZ_REQUESTS", "3000"))
SEED = int(os.environ.get("KAIROS_FUZZ_SEED", "0"))
# Between a fifth of the requests and all of them; as for the soak in test_faults.py. Three runs of
# 100,000 grew by 31, 41 and 53 MiB. A KiB of each request would be 78 MiB.
GROWN_MIB = 64
GROWN_FDS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + COUNT // 50)]


@pytest.fixture
def served(environment, profile, tmp_path):
    model = str(fuzz.write_model(tmp_path / "llama"))
    # Without --debug_dir: JAX's profiler keeps some MiB of each profile that is taken.
    process = Process("serve", profile, "--http_port=0", env=environment, model=model)
    try:
        yield fuzz.Served.of(process)
    finally:
        process.end()


def test_no_request_breaks_the_server_or_is_held_for_ever(served):
    async def main():
        before = await fuzz.greedy(served)
        cases = fuzz_cases.cases(COUNT, SEED, fuzz.paths())
        result = await fuzz.fuzz(served, cases, COUNT)
        return before, result, await fuzz.greedy(served)

    pid = served.process.pid
    before, result, after = asyncio.run(main())
    print(f"seed {SEED}: {result}")
    assert not result.wrong, result.wrong[:5]
    assert result.outcomes.total() == COUNT
    assert before[0] == before[1]
    assert after == before
    assert served.process.pid == pid
    warm, *later = result.marks
    for mark in later:
        assert mark.rss_mib - warm.rss_mib <= GROWN_MIB
        assert mark.fds - warm.fds <= GROWN_FDS
    served.process.send(signal.SIGTERM)
    assert served.process.wait() == 0
    assert not fuzz.serious(served.process.errors())
