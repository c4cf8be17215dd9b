"""A server that is tied to its command ends with it, even where nobody could clean up."""

import os
import subprocess
import sys

import pytest

from tests.support.orphans import assert_child_ends_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a parent's death")

# The parent: it starts a child that is tied to it, in a session of its own as servers are.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-m", "vllm_cost_meter.lab.tied", str(os.getpid()),
     sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE,
)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_tied_command_ends_when_its_parent_is_killed():
    assert_child_ends_with(PARENT)


def test_nothing_is_run_for_a_parent_that_is_gone_already(tmp_path):
    gone = tmp_path / "ran"
    other_pid = 1 if os.getpid() != 1 else 2
    subprocess.run(
        [sys.executable, "-m", "vllm_cost_meter.lab.tied", str(other_pid), "/usr/bin/touch", gone],
        check=True,
    )
    assert not gone.exists()


def test_a_command_whose_parent_lives_is_run(tmp_path):
    made = tmp_path / "ran"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_cost_meter.lab.tied",
            str(os.getpid()),
            "/usr/bin/touch",
            made,
        ],
        check=True,
    )
    assert made.exists()
