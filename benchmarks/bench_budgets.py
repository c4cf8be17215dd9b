"""Benchmark: how long budgets take to be counted, and what that costs the process that serves.

Method. A SQLite ledger has one engine run with --bills bills (default 300,000) of as many tenants
as there are budgets (default 250), over 400 hours; each tenant has a budget for 60 days, half of
them in USD. Measured in this process, each --repeat times, as median (min to max):

- the first look, which counts everything;
- a usual look, a second later: one new snapshot and 100 new bills;
- a look while 1,000 numbers of bills are missing;
- a recount beside it: the time until a budget of another tenant is served, at a look every 250 ms,
  the longest of these looks, and the age of the oldest figures meanwhile.

Then the process that counts in a server (`api_server/budgets/process.py`) does the first look, its
start included, and a recount, asked from an event loop here. A ticker sleeps 5 ms on that loop: its
delay is measured three times for 20 looks, and between them for as many pauses without one. A
thread writes a bill and a snapshot before each.

Limits. Everything is in the page cache, and nobody writes meanwhile. The ticker's loop has nothing
else to do; what it waits for is the decoding of figures and the processor.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from bench_attribution import machine
from made_requests import records
from sqlalchemy import Engine

from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.engine.books import EngineBooks, EngineState
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures
from vllm_cost_meter.units.time import NS_PER_HOUR

RUN = "run"
HOURS = 400
AT_ONCE = 20_000
NEW_BILLS = 100
MISSING = 1_000
TICK_S = 0.005
LOOK_EVERY_S = 0.25
BOOK = PriceBook([PriceEntry("price", Decimal("2.5"), "the contract", None)])
STATE = EngineState(running=0, waiting=0, kv_cache_usage=None, own_ns=0, errors=0, state="on")
ENGINE = EngineIdentity("model", 0, "0.32.0", "a GPU", "tp=1 pp=1 dp=1", 1, "tokens", native=True)


class World:
    """A ledger of one run, whose engine goes on."""

    def __init__(self, folder: Path, bills: int, tenants: int) -> None:
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        self.tenants = tenants
        self.seq = 0
        self._engine: Engine = open_database(self.url)
        now_ns, unix_ns = time.monotonic_ns(), time.time_ns()
        self._books = EngineBooks(
            run_id=RUN, engine=ENGINE, created_ns=now_ns, now_ns=now_ns, unix_ns=unix_ns
        )
        self.go_on(bills)

    def go_on(self, bills: int, missing: int = 0) -> None:
        """Write the next bills, and the next snapshot; every second of them may be missing."""
        with writing(self._engine).begin() as connection:
            for at in range(0, bills, AT_ONCE):
                count = min(AT_ONCE, bills - at)
                write(connection, [self._bill(at + n, bills) for n in range(count)])
            for _ in range(missing):
                self.seq += 1
                write(connection, [self._bill(0, 1)])
            now_ns, unix_ns = time.monotonic_ns(), time.time_ns()
            write(connection, [self._books.snapshot(now_ns, unix_ns, -1, STATE)])

    def _bill(self, number: int, bills: int) -> EngineRequest:
        self.seq += 1
        part, _ = records(RUN, self.seq - 1)
        hour = time.time_ns() // NS_PER_HOUR - (bills - 1 - number) * HOURS // bills
        pieces = (UsagePiece(hour, 1_000_000, 80_000_000, 128, 127),)
        owner = Owner(f"tenant-{self.seq % self.tenants}")
        return replace(part, bill=part.bill._replace(pieces=pieces), owner=owner)

    def budgets(self, of: str = "tenant") -> tuple[Budget, ...]:
        """Return a budget for each tenant, half of them in USD."""
        return tuple(
            Budget(
                f"budget-{n}",
                10**15,
                "usd" if n % 2 else "gpu_seconds",
                "rolling",
                tenant=f"{of}-{n}",
                days=60,
            )
            for n in range(self.tenants)
        )


def timed_ms(spending: Spending, budgets: Sequence[Budget]) -> tuple[float, BudgetFigures]:
    """Return how long a look takes, and what it says."""
    start_s = time.perf_counter()
    figures = spending.look(budgets, BOOK, time.time_ns())
    return (time.perf_counter() - start_s) * 1e3, figures


def looks_ms(world: World, spending: Spending, count: int) -> list[float]:
    """Return the times of looks that each find a new snapshot and new bills."""
    took_ms = []
    for _ in range(count):
        world.go_on(NEW_BILLS)
        took_ms.append(timed_ms(spending, world.budgets())[0])
    return took_ms


def recount(world: World, spending: Spending) -> Iterator[tuple[str, float]]:
    """Look every 250 ms until a new budget is served; yield what that took."""
    wanted = (*world.budgets(), Budget("new", 1, "gpu_seconds", "rolling", tenant="new", days=60))
    start_s, longest_ms, oldest_ms = time.perf_counter(), 0.0, 0.0
    while True:
        world.go_on(NEW_BILLS)
        took_ms, figures = timed_ms(spending, wanted)
        longest_ms = max(longest_ms, took_ms)
        if figures.heard_ns is not None:
            oldest_ms = max(oldest_ms, (time.monotonic_ns() - figures.heard_ns) / 1e6)
        if len(figures.standings) == len(wanted):
            break
        time.sleep(max(0.0, LOOK_EVERY_S - took_ms / 1e3))
    yield "recount_until_served_ms", (time.perf_counter() - start_s) * 1e3
    yield "recount_longest_look_ms", longest_ms
    yield "recount_oldest_figures_ms", oldest_ms


async def delays_ms(until: asyncio.Event) -> list[float]:
    """Return how much later than 5 ms each tick came, until the event."""
    late_ms = []
    while not until.is_set():
        start_s = time.perf_counter()
        await asyncio.sleep(TICK_S)
        late_ms.append((time.perf_counter() - start_s - TICK_S) * 1e3)
    return late_ms


async def ticking_ms(world: World, follower: BudgetFollower | None) -> list[float]:
    """Return the delays of the ticker while a follower looks 20 times; None: nobody looks."""
    done = asyncio.Event()
    ticking = asyncio.create_task(delays_ms(done))
    for _ in range(20):
        # In a thread of this process, as a server writes its ledger.
        await asyncio.to_thread(world.go_on, 1)
        if follower is not None:
            await follower.follow(world.budgets(), BOOK)
        await asyncio.sleep(LOOK_EVERY_S)
    done.set()
    return await ticking


async def beside_a_loop(world: World) -> dict[str, float]:
    """Have another process count, and return what the loop that asks it noticed."""
    follower = BudgetFollower(world.url, timeout_s=120)
    start_s = time.perf_counter()
    await follower.follow(world.budgets(), BOOK)
    first_ms = (time.perf_counter() - start_s) * 1e3
    alone_ms: list[float] = []
    beside_ms: list[float] = []
    for _ in range(3):
        alone_ms += await ticking_ms(world, None)
        beside_ms += await ticking_ms(world, follower)
    start_s, wanted = time.perf_counter(), world.budgets()[1:] + world.budgets("other")[:1]
    while True:
        figures = await follower.follow(wanted, BOOK)
        if figures is not None and figures.standings[-1].budget.tenant == "other-0":
            break
        await asyncio.sleep(LOOK_EVERY_S)
    recount_ms = (time.perf_counter() - start_s) * 1e3
    await follower.stop()
    return {
        "process_first_look_ms": first_ms,
        "process_recount_ms": recount_ms,
        "tick_alone_p99_ms": statistics.quantiles(alone_ms, n=100)[98],
        "tick_beside_p99_ms": statistics.quantiles(beside_ms, n=100)[98],
        "tick_alone_max_ms": max(alone_ms),
        "tick_beside_max_ms": max(beside_ms),
    }


def measure(folder: Path, bills: int, tenants: int, repeat: int) -> dict[str, list[float]]:
    """Return all figures, each as often as it was measured."""
    found: dict[str, list[float]] = {}
    world = World(folder, bills, tenants)
    for _ in range(repeat):
        spending = Spending(world.url)
        found.setdefault("first_look_ms", []).append(timed_ms(spending, world.budgets())[0])
        found.setdefault("usual_look_ms", []).extend(looks_ms(world, spending, 10))
        for name, ms in recount(world, spending):
            found.setdefault(name, []).append(ms)
        spending.close()
    for name, ms in asyncio.run(beside_a_loop(world)).items():
        found[name] = [ms]
    world.go_on(0, missing=MISSING)
    spending = Spending(world.url)
    timed_ms(spending, world.budgets())
    found["look_with_gaps_ms"] = looks_ms(world, spending, 10)
    spending.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the counting of budgets.")
    parser.add_argument("--bills", type=int, default=300_000)
    parser.add_argument("--budgets", type=int, default=250, help="and as many tenants")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the ledger goes; a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.bills, options.budgets, options.repeat)
    for name, values in found.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:<26} {median:>10.1f}  ({low:.1f} to {high:.1f}, n = {len(values)})")
    if options.json:
        print(json.dumps({name: round(statistics.median(ms), 2) for name, ms in found.items()}))


if __name__ == "__main__":
    main()
