"""Benchmark: what the meter adds to a complete reply, from the request to its last byte.

Method. One process has the middleware, the collector and the journal as an API server has them, and
a side process applies the journal. The engine is a few lines: it takes 5 ms for a request (a sleep
of the event loop), and then bills it. uvicorn serves it; clients ask over sockets, each its next
request when it has the last byte of the one before. A bare application with the same engine is
asked in turn, half a second each, so both meet the same machine. The figures are the differences of
median and 99th percentile, with one client and with sixteen. Without model time the figure is the
ratio of complete replies per second.

The comparison is the bare application.

Limits. Clients run in the server's event loop, and take a part of its time from both. With sixteen
clients the replies of a round end together, so the last one waits for the work of fifteen others:
that is the processor time of the middleware, sixteen times.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.bench_attribution import machine
from tests.soak.fake_server import FakeEngine
from tests.support.world import BODY, JSON, listening, make_runtime, replying
from vllm_cost_meter.api_server.middleware import CostMiddleware

BLOCK_S = 0.5
MODEL_S = 0.005
COST_HEADER = b"x-cost-meter-gpu-seconds"

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 0\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

Address = tuple[str, int]


async def client(at: Address, until_s: float, took_ms: list[float], expects_cost: bool) -> None:
    """Ask until the time is over, and note how long each complete reply took."""
    reader, writer = await asyncio.open_connection(*at)
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        writer.write(REQUEST)
        reply = await reader.readuntil(LAST_CHUNK)
        took_ms.append((time.perf_counter() - began_s) * 1e3)
        if (COST_HEADER in reply) is not expects_cost:
            raise RuntimeError(f"expected a cost: {expects_cost}, got {reply!r}")
    writer.close()


async def block(at: Address, clients: int, took_ms: list[float], expects_cost: bool) -> None:
    until_s = time.perf_counter() + BLOCK_S
    await asyncio.gather(*(client(at, until_s, took_ms, expects_cost) for _ in range(clients)))


class Servers:
    """The same application, metered and bare."""

    def __init__(self, folder: Path) -> None:
        self.runtime = make_runtime(folder)
        self._engine = FakeEngine(self.runtime, "run")
        self._names = iter(range(1 << 60))
        self.model_s = 0.0
        self.metered = CostMiddleware(
            replying(JSON, [BODY], before=self._generate), lambda: self.runtime
        )
        self.bare = replying(JSON, [BODY], before=self._wait)

    async def _wait(self) -> None:
        if self.model_s:
            await asyncio.sleep(self.model_s)

    async def _generate(self) -> None:
        await self._wait()
        self._engine.generate(f"run-{next(self._names)}")


async def measure(folder: Path, blocks: int) -> dict[str, float]:
    """Return the figures by name."""
    servers = Servers(folder)
    servers.runtime.applying.start()
    await asyncio.sleep(2)  # Until the side process is up.
    found: dict[str, float] = {}
    async with listening(servers.metered) as metered, listening(servers.bare) as bare:
        for model_s, clients in ((MODEL_S, 1), (MODEL_S, 16), (0.0, 1), (0.0, 16)):
            servers.model_s = model_s
            took: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(blocks):
                await block(bare, clients, took[False], expects_cost=False)
                await block(metered, clients, took[True], expects_cost=True)
            found |= _figures(took, clients, model_s, blocks)
    await servers.runtime.stop()
    return found


def _figures(
    took: dict[bool, list[float]], clients: int, model_s: float, blocks: int
) -> dict[str, float]:
    who = "one client" if clients == 1 else f"{clients} clients"
    if not model_s:
        return {
            f"{who}, no model: replies/s to bare": round(len(took[True]) / len(took[False]), 3),
            f"{who}, no model: metered replies/s": round(len(took[True]) / (blocks * BLOCK_S)),
        }
    cuts = {which: statistics.quantiles(ms, n=100) for which, ms in took.items()}
    return {
        f"{who}: p{of} added, ms": round(cuts[True][of - 1] - cuts[False][of - 1], 3)
        for of in (50, 99)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what the meter adds to a complete reply.")
    parser.add_argument("--blocks", type=int, default=20, help=f"of {BLOCK_S} s each, of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(measure(Path(folder), options.blocks))
    for name, value in results.items():
        print(f"{name:<44} {value:>10}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
