"""The client of many runs ends with who started it, and says how it failed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.component.lab.test_tied import is_running
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
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_ends_in_a_run_is_an_error_with_the_end_of_its_log(tmp_path):
    log = tmp_path / "log"
    with BenchClient({}, log) as client:
        os.kill(client._process.pid, signal.SIGKILL)
        client._process.wait()
        with pytest.raises(ServerError, match=f"ended without an answer; the end of {log}"):
            client._ask([])
