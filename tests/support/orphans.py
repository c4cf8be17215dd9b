"""Whether a process ends with the one that started it, even where that could not clean up."""

import signal
import subprocess
import sys
import time
from pathlib import Path

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
    deadline = time.monotonic() + ENDS_WITHIN_S
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
