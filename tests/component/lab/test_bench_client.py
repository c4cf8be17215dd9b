"""The client of many runs ends with who started it, and says how it failed."""

import os
import signal

import pytest

from tests.support.orphans import assert_child_ends_with
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.bench_client import BenchClient

# A parent that starts a client, and waits.
PARENT = """
import os, sys, time
from pathlib import Path
from vllm_cost_meter.lab.bench_client import BenchClient
client = BenchClient({}, Path(sys.argv[1]))
print(client._process.pid, flush=True)
time.sleep(600)
"""


def test_the_client_ends_when_the_process_that_started_it_is_killed(tmp_path):
    assert_child_ends_with(PARENT, str(tmp_path / "log"))


def test_a_client_that_ends_in_a_run_is_an_error_with_the_end_of_its_log(tmp_path):
    log = tmp_path / "log"
    with BenchClient({}, log) as client:
        os.kill(client._process.pid, signal.SIGKILL)
        client._process.wait()
        with pytest.raises(ServerError, match=f"ended without an answer; the end of {log}"):
            client._ask([])
