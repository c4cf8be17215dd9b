"""The command line `vllm-cost-meter`: the function that the entry point calls.

Invariant: this module loads no other at import, so `--version` answers at once.
"""

import os
import signal
import sys
from collections.abc import Sequence


def app(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replace the arguments of the process."""
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        from vllm_cost_meter.version import __version__

        try:
            print(__version__, flush=True)
        except BrokenPipeError:
            # As the other commands end, and without Python's flush, which would fail again.
            os._exit(128 + signal.SIGPIPE)
        return
    # What a command prints is its answer. Some versions of vLLM log to the same stream.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_cost_meter.cli.commands import app as commands

    commands(args=args)
