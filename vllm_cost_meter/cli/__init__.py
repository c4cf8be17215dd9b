"""The command `vllm-cost-meter`, as the entry point calls it.

Invariant: to load this module loads nothing else, so that `--version` is there at once.
"""

import os
import sys
from collections.abc import Sequence

# What a shell reports of a command that SIGPIPE ended.
PIPE_CLOSED = 141


def app(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` stand for those of the process."""
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        from vllm_cost_meter.version import __version__

        try:
            print(__version__, flush=True)
        except BrokenPipeError:
            # Python flushes once more at its end, to nobody then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(PIPE_CLOSED)
        return
    from vllm_cost_meter.cli.commands import app as commands

    commands(args=args)
