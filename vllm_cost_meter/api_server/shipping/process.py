"""The process that sends the ledger to the fleet's database, beside an API server: main program.

It sends all that waits each few seconds, and at once when it is asked. With each interval it looks
for a new version of the settings that the fleet shares. While the database is away
it tries again, later and later, at a moment of its own: the servers of a fleet must not all come
back at once. Where budgets read the database they notice that it is back, and have it try at once.
Nothing waits for it but a server's stop, for a short time.

Invariant: an answer to a question means that the fleet has all that the ledger had before it.
"""

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_cost_meter.api_server.shipping.messages import (
    FLUSH,
    RETRY,
    STATE,
    ShippingHello,
    ShippingState,
)
from vllm_cost_meter.api_server.shipping.settings_puller import SettingsPuller
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet.outbox import Waiting
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.side_process import entry
from vllm_cost_meter.side_process.asked import settle
from vllm_cost_meter.side_process.entry import ToServer

logger = meter_logger()

T = TypeVar("T")

# Behind the tokens, and behind what applies the journals.
PRIORITY = 10
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 60.0


class _Shipping:
    """Sends, and answers the API server's questions."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-fleet")
        self._wake = asyncio.Event()
        self._asked: list[asyncio.Future[bool]] = []
        self._outage = Outage()
        self._failures = 0
        self._waiting = Waiting(0, 0)
        self._sent_at_ns: int | None = None
        self._puller: SettingsPuller | None = None
        self._pull_at_s = 0.0

    async def main(self, server: ToServer, hello: ShippingHello) -> None:
        """Begin: from now on there are answers."""
        sender = FleetSender(
            hello.ledger_url,
            hello.fleet_url,
            hello.interval_s,
            rows=hello.rows,
            files=None if hello.files is None else Path(hello.files),
            outbox_bytes_max=hello.outbox_bytes_max,
        )
        self._interval_s = hello.interval_s
        if hello.kept_path is not None:
            self._puller = SettingsPuller(Path(hello.kept_path), hello.fleet_url)
        server.ready()
        self._task = asyncio.create_task(self._run(server, sender, hello.interval_s))

    async def answer(self, name: str, _given: msgspec.Raw) -> bool:
        """Answer a question once the fleet has all that the ledger had before it."""
        if name != FLUSH:
            raise ValueError(f"expected the question {FLUSH!r}, got {name!r}")
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked.append(done)
        self._wake.set()
        return await done

    def take(self, name: str, _value: msgspec.Raw) -> None:
        """Take up news: after an outage, that the database is back."""
        if name != RETRY:
            raise ValueError(f"expected the news {RETRY!r}, got {name!r}")
        self._wake.set()

    async def _run(self, server: ToServer, sender: FleetSender, interval_s: float) -> None:
        retry_s = RETRY_FIRST_S
        while True:
            asked, self._asked = self._asked, []
            self._wake.clear()
            failure = await self._send_all(server, sender, is_last=bool(asked))
            for each in asked:
                settle(each, failure)
            if failure is not None:  # A ledger that cannot be read keeps no price from coming.
                await self._in_thread(lambda: self._pull(sender))
                self._tell(server, str(failure))
            if failure is None:
                pause_s, retry_s = interval_s, RETRY_FIRST_S
            else:
                pause_s = retry_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
                retry_s = min(2 * retry_s, RETRY_MOST_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _send_all(
        self, server: ToServer, sender: FleetSender, *, is_last: bool
    ) -> LedgerError | None:
        """Send shipments until nothing waits; return why that failed.

        A server asks once, when it stops: with `is_last` the fleet is told that this was all.
        """
        more = True
        while more:
            try:
                more = await self._in_thread(sender.step)
                self._waiting = await self._in_thread(sender.waiting)
                await self._in_thread(lambda: self._pull(sender))
            except LedgerError as error:
                await self._in_thread(lambda: self._look_at_outbox(sender))
                self._failed(server, error)
                return error
            self._worked(server, is_all=sender.is_all_sent)
        if is_last:
            try:
                await self._in_thread(sender.end)
            except LedgerError as error:
                self._failed(server, error)
                return error
        return None

    def _look_at_outbox(self, sender: FleetSender) -> None:
        """Learn how much waits while nothing can be sent, and free what is too much."""
        try:
            sender.shed()
            self._waiting = sender.waiting()
        except LedgerError:
            pass  # It is the ledger that fails, which the applier says.

    def _pull(self, sender: FleetSender) -> None:
        """Look for a new version of the settings, unless that was done within the interval."""
        if self._puller is None or time.monotonic() < self._pull_at_s:
            return
        self._pull_at_s = time.monotonic() + self._interval_s / 2
        try:
            self._puller.look(sender.shared())
        except LedgerError as error:  # The fleet is away, which its outage says.
            self._puller.error = str(error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _failed(self, server: ToServer, error: LedgerError) -> None:
        self._failures += 1
        if self._outage.failed():
            logger.warning(
                "cost meter: %s%s; what it is to get waits in the ledger",
                error,
                self._outage.so_far,
            )
        self._tell(server, str(error))

    def _worked(self, server: ToServer, *, is_all: bool) -> None:
        if (outage := self._outage.ended()) is not None:
            logger.info("cost meter: the fleet works again after %.0f s", outage[0])
        if is_all:
            self._sent_at_ns = time.time_ns()
        self._tell(server, None)

    def _tell(self, server: ToServer, last_error: str | None) -> None:
        state = ShippingState(
            last_error, self._failures, *self._waiting, sent_at_ns=self._sent_at_ns
        )
        if (puller := self._puller) is not None:
            state = msgspec.structs.replace(
                state,
                settings_version=puller.version,
                settings_seen_at_ns=puller.seen_at_ns,
                settings_error=puller.error,
            )
        server.tell(STATE, state)


if __name__ == "__main__":
    shipping = _Shipping()
    entry.run(ShippingHello, shipping.main, shipping.answer, shipping.take, priority=PRIORITY)
