"""An API server with the real runtime, middleware, journal and applier; its engine is a few lines.

It starts in a second or two, so it can be killed often. Run as a program it serves on a port until
it gets SIGTERM, and stops then as a real one does.
"""

import asyncio
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

from tests.support.builders import make_bill, make_snapshot
from tests.support.world import BODY, JSON, Engine, make_runtime, replying
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.api_server.runtime import Runtime
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

SNAPSHOT_INTERVAL_S = 0.5


class FakeEngine(Engine):
    """Bills each request at once, for a time that no other has, and keeps books."""

    def __init__(self, runtime: Runtime, run_id: str) -> None:
        super().__init__(runtime)
        self.run_id = run_id
        self._billed_ns = 0
        self._snapshots = 0
        self._hours: dict[int, int] = {}
        self._started_at_ns = time.time_ns()

    def bill(self, request_id: str, prefill_ns: int = 0, decode_ns: int = 0) -> Bill:
        self.seq += 1
        ns = random.randrange(10**6, 10**10)
        hour = time.time_ns() // NS_PER_HOUR
        self._billed_ns += ns
        self._hours[hour] = self._hours.get(hour, 0) + ns
        return make_bill(
            run_id=self.run_id, seq=self.seq, request_id=request_id,
            pieces=(UsagePiece(hour, ns, 0, 8, 5, marginal_ns=ns),),
        )  # fmt: skip

    async def keep_books(self) -> None:
        """Journal a snapshot now and then, as the poller does."""
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)
            self._snapshots += 1
            hours = {hour: ClassTotals(requests=ns) for hour, ns in self._hours.items()}
            self.runtime.writer.put(
                make_snapshot(
                    run_id=self.run_id, number=self._snapshots, last_seq=self.seq,
                    billed_ns=self._billed_ns, totals=ClassTotals(requests=self._billed_ns),
                    hours=hours, taken_at_ns=time.time_ns(), started_at_ns=self._started_at_ns,
                )
            )  # fmt: skip


async def serve(folder: Path, port: int, run_id: str) -> None:
    """Serve until SIGTERM."""
    runtime = make_runtime(folder, opens=False, durability=random.choice(("process", "disk")))
    engine = FakeEngine(runtime, run_id)
    names = iter(range(10**9))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reply = replying(JSON, [BODY], before=lambda: engine.generate(f"{run_id}-{next(names)}"))
        await reply(scope, receive, send)

    config = uvicorn.Config(
        CostMiddleware(app, lambda: runtime), port=port, lifespan="off", log_level="error"
    )
    server = uvicorn.Server(config)
    runtime.applying.start()
    books = asyncio.create_task(engine.keep_books())
    await server.serve()
    books.cancel()
    await runtime.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # A file that may not grow is an error here.
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
