"""Who asked a side process for its next pass of work is told when that has ended, or why it failed.

Invariant: each asker is told once.
"""

import asyncio

from vllm_cost_meter.errors import LedgerError


def settle(asked: "asyncio.Future[bool]", failure: LedgerError | None) -> None:
    """Tell an asker, unless it does not wait any more."""
    if asked.done():
        return
    if failure is None:
        asked.set_result(True)
    else:
        asked.set_exception(failure)
