"""Run a command that ends when the process that started it ends, however that came about.

`python -m vllm_cost_meter.lab.tied PARENT_PID COMMAND...` asks Linux for a SIGTERM at the death of
the starting thread, and becomes the command. A kill -9 of the parent leaves it no time to end its
children itself. Elsewhere than on Linux the command is merely run.

Invariant: nothing is run for a parent that is gone already.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    """Become `command`, tied to the parent. Returns only if the parent is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have died before the line above.
    if os.getppid() == parent_pid:
        os.execv(command[0], command)  # noqa: S606 - the command of our caller


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
