"""Reads the ledger's pages for damage in the background, in the process that applies journals.

A thread of the lowest priority reads a table at a time, and then rests for nineteen times as long.
SQLite reads without the interpreter's lock, so applying goes on.

Invariant: reading takes at most a twentieth of a processor.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vllm_cost_meter.errors import in_one_line
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.damage.noticing import PageWatch
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

LOWEST_PRIORITY = 19
# Parts of a reading, of the time that a part takes.
REST = 19
# Until the ledger is there, and between parts that take no time.
PAUSE_S = 0.5
# Between two readings of everything.
ROUND_PAUSE_S = 600.0


async def watch(
    loop: ApplyLoop, wake: Callable[[], None], round_pause_s: float = ROUND_PAUSE_S
) -> None:
    """Read for ever, and have the loop deal with what is damaged; `wake` begins a pass."""
    thread = ThreadPoolExecutor(1, "cost-meter-watch", initializer=_give_way)
    pages: PageWatch | None = None
    while True:
        await asyncio.sleep(PAUSE_S)
        path = loop.path_to_watch
        if path is None:
            continue
        if pages is None:
            pages = PageWatch(path)
        began_s = time.monotonic()
        try:
            damage = await asyncio.get_running_loop().run_in_executor(thread, pages.look)
        except Exception as error:  # noqa: BLE001 - what cannot be read now is read later
            logger.warning("cost meter: the ledger cannot be read: %s", in_one_line(error))
            damage = None
        if damage is not None:
            loop.found_damage(damage)
            wake()
            pages = None
        await asyncio.sleep(REST * (time.monotonic() - began_s))
        if pages is not None and pages.is_at_end:
            await asyncio.sleep(round_pause_s)


def _give_way() -> None:
    # Linux has a priority for each thread.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
