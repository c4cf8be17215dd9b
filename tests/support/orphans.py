"""Whether a process ends with the one that started it, even where that could not clean up."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import wait_for

ENDS_WITHIN_S = 30


def is_running(pid: int) -> bool:
    """Return whether there is such a process, other than a dead one that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_child_ends_with(parent_code: str, *arguments: str) -> None:
    """Run Python code that prints its child's pid and waits, kill it, and see the child end."""
    command = [sys.executable, "-c", parent_code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not is_running(pid), timeout_s=ENDS_WITHIN_S)
