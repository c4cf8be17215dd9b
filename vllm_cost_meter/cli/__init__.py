"""The command `vllm-cost-meter`, as the entry point calls it.

Invariant: to load this module loads nothing else, so that `--version` is there at once.
"""

import os
import signal
import sys
from collections.abc import Sequence


def app(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` stand for those of the process."""
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        from vllm_cost_meter.version import __version__

        try:
            print(__version__, flush=True)
        except BrokenPipeError:
            # As the other commands end, and without Python's flush, which would fail again.
            os._exit(128 + signal.SIGPIPE)
        return
    from vllm_cost_meter.cli.commands import app as commands

    commands(args=args)
