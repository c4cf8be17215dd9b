"""Benchmark: budgets over a fleet: how far they are exceeded, and what it costs to read the fleet.

Method of the first part. Two servers with one simulated GPU each, and everything else real: each
has a journal, the processes that apply it, send it and count budgets, and one PostgreSQL is between
them. A server runs one request after another as long as its budgets admit it, each of `REQUEST_S`;
each second it takes a snapshot of what runs. One budget covers both. At the end all bills are added
up: what is beyond the limit was exceeded. The bound is that of docs/howto/budgets.md. In two cases
the database is away for `AWAY_S` seconds, from before the limit is reached.

Method of the second part. A fleet of `--servers` servers, each with a bill of each of `--tenants`
tenants in each hour of 30 days, put together as old shipments are. A budget in USD for each tenant.
The first look reads it all. Then each server sends bills of all tenants, and looks read that.

Limits. All of it shares two cores, over Unix sockets. Engines are records.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.bench_attribution import machine
from benchmarks.bench_fleet import postgres_s
from benchmarks.made_fleet import amount_names, made_fleet
from tests.ecosystem.postgresql import postgresql
from tests.support.builders import make_bill, make_open, make_part, make_snapshot
from tests.support.fleet_budgets import away
from vllm_cost_meter.api_server.applying.follower import Applying
from vllm_cost_meter.api_server.applying.messages import ApplierHello
from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.api_server.budgets.messages import CountedFleet
from vllm_cost_meter.api_server.shipping.follower import Shipping
from vllm_cost_meter.api_server.shipping.messages import ShippingHello
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.opening import open_fleet, parse_fleet_url
from vllm_cost_meter.ledger.fleet_use.kept import figures_path
from vllm_cost_meter.ledger.fleet_use.others import FRESH_S_MIN, FleetUse, OwnRuns
from vllm_cost_meter.prices.book import NO_PRICES
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, decide
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

REQUEST_S = 0.25
SNAPSHOT_S = 1.0
FLEET_S = 2.0
LIMIT_S = 20
AWAY_S = 25
MAX_AGE_NS = 5 * NS_PER_SECOND
# From a use to the figures of another server that have it: snapshot, apply, send, read, look.
LATENCY_S = SNAPSHOT_S + 0.1 + FLEET_S + FLEET_S + 0.75
BUDGET = Budget("both", LIMIT_S * NS_PER_SECOND, "gpu_seconds", "day", tenant="acme")


class Server:
    """A server with one simulated GPU."""

    def __init__(self, folder: Path, name: str, fleet: str, *, fails_closed: bool) -> None:
        path = folder / f"{name}.db"
        url = f"sqlite:///{path}"
        self.name, self._fails_closed = name, fails_closed
        self.used_ns = 0
        self.refused: str | None = None
        self._seq = self._number = 0
        self._began_ns: int | None = None
        self._writer = JournalWriter(folder_of_ledger(path))
        self._applying = Applying(ApplierHello(url, sends=True))
        self._shipping = Shipping(ShippingHello(url, fleet, FLEET_S))
        counted = CountedFleet(fleet, FLEET_S, str(figures_path(path, 0)))
        self._follower = BudgetFollower(url, fleet=counted)
        self._figures = BudgetFigures()

    async def start(self) -> None:
        self._writer.start()
        self._applying.start()
        self._shipping.start()
        self._tasks = [asyncio.create_task(work()) for work in (self._snapshots, self._looks)]
        async with asyncio.timeout(60):
            while not self._is_counted():
                await asyncio.sleep(0.1)

    def _is_counted(self) -> bool:
        others = [each.others for each in self._figures.standings]
        return any(each is not None and each.stale is None for each in others)

    async def serve(self, seconds: float) -> None:
        """Run request after request while the budget admits it, for so long."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            stale = self._figures.stale(time.monotonic_ns(), MAX_AGE_NS)
            verdict = decide(self._figures.standings, stale, self._fails_closed)
            self.refused = None if verdict.kind == "admitted" else verdict.kind
            if self.refused is not None:
                await asyncio.sleep(0.05)
                continue
            self._seq += 1
            id = f"{self.name}-{self._seq}"
            opened = make_open(request_id=id, http_request_id=id, tenant="acme")
            self._writer.put(opened)
            self._began_ns = began_ns = time.monotonic_ns()
            await asyncio.sleep(REQUEST_S)
            self._began_ns = None
            ns = time.monotonic_ns() - began_ns
            self.used_ns += ns
            piece = UsagePiece(time.time_ns() // NS_PER_HOUR, 0, ns, 0, 1)
            bill = make_bill(run_id=self.name, seq=self._seq, request_id=id, pieces=(piece,))
            part = make_part(bill, tenant="acme", finished_at_ns=time.time_ns())
            self._follower.pending.add(part)
            self._writer.put(part)

    async def _snapshots(self) -> None:
        while True:
            self._number += 1
            began_ns = self._began_ns
            ns = 0 if began_ns is None else time.monotonic_ns() - began_ns
            live = ((f"{self.name}-{self._seq}", Accrued(decode_ns=ns)),) if ns else ()
            self._writer.put(
                make_snapshot(
                    run_id=self.name,
                    number=self._number,
                    taken_at_ns=time.time_ns(),
                    totals=ClassTotals(idle=1_000, in_flight=ns),
                    live=live,
                )
            )
            await asyncio.sleep(SNAPSHOT_S)

    async def _looks(self) -> None:
        while True:
            try:
                found = await self._follower.follow((BUDGET,), NO_PRICES)
            except CostMeterError:
                found = None
            if found is not None:
                self._figures = found
                self._shipping.try_again()
            await asyncio.sleep(SNAPSHOT_S / 4)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._follower.stop()
        await asyncio.to_thread(self._writer.close)
        await self._applying.stop()
        await self._shipping.stop()


async def exceeded(fleet: str, *, is_away: bool, fails_closed: bool) -> dict[str, Any]:
    """Return by how much two servers exceed a budget, in GPU-seconds, and the bound."""
    folder = Path(tempfile.mkdtemp(prefix="cost-meter-bounds-"))
    servers = [Server(folder, name, fleet, fails_closed=fails_closed) for name in ("one", "two")]
    await asyncio.gather(*(server.start() for server in servers))
    # Alone a server would need LIMIT_S; together they need half of it.
    serving = [asyncio.create_task(server.serve(LIMIT_S + AWAY_S + 15)) for server in servers]
    refused = None
    if is_away:
        await asyncio.sleep(LIMIT_S / 4)
        with away(fleet):
            await asyncio.sleep(AWAY_S)
            refused = [server.refused for server in servers]
    await asyncio.gather(*serving)
    after = [server.refused for server in servers]
    used_s = sum(server.used_ns for server in servers) / NS_PER_SECOND
    known_s = LATENCY_S
    if is_away:
        known_s += FRESH_S_MIN if fails_closed else AWAY_S
    for server in servers:
        await server.stop()
    return {
        "database": f"away for {AWAY_S} s" if is_away else "there",
        "fail_closed": fails_closed,
        "exceeded_s": round(used_s - LIMIT_S, 2),
        "bound_s": round(len(servers) * (known_s + REQUEST_S), 2),
        "while_away": refused,
        "after": after,
    }


def sent_more(engine: Any, servers: int, tenants: int, turn: int) -> None:
    """Have each server send bills of all tenants in the present hour."""
    amounts = amount_names(engine)
    first = 10 * turn
    values = {"servers": servers, "tenants": tenants, "now": time.time_ns() // NS_PER_HOUR}
    values |= {"first": first, "last": first + 9}
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO shipments SELECT 's' || s, :first, :last, '', '', '', 2 FROM"
            " generate_series(1, :servers) AS s",
            f"INSERT INTO sent_rollup_hours (sender_id, first_number, hour, group_id,"
            f" {', '.join(amounts)}) SELECT 's' || s, :first, :now, s * 1000 + t,"
            f" {', '.join('1000' for _ in amounts)} FROM generate_series(1, :servers) AS s,"
            " generate_series(1, :tenants) AS t",
            "INSERT INTO sent_bill_sums SELECT 's' || s, :first, 'run-' || s, 20, 740, 1000, 0,"
            " 'x', '', '' FROM generate_series(1, :servers) AS s",
        ):
            connection.execute(text(statement), values)


def cost(fleet: str, servers: int, tenants: int) -> dict[str, Any]:
    """Return how long looks at a large fleet take, in seconds."""
    made_fleet(fleet, servers, tenants)
    engine = open_fleet(parse_fleet_url(fleet))
    folder = Path(tempfile.mkdtemp(prefix="cost-meter-looks-"))
    ledger = f"sqlite:///{folder}/ledger.db"
    open_database(ledger).dispose()
    kept = figures_path(folder / "ledger.db", 0)
    use = FleetUse(ledger, fleet, FLEET_S, kept)
    budgets = [
        Budget(f"b{n}", 10**15, "usd", "month" if n % 2 else "rolling", tenant=f"tenant-{n}")
        for n in range(1, tenants + 1)
    ]
    nobody = OwnRuns({}, {})

    def timed(work: Any) -> float:
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s

    def look() -> None:
        use.look(budgets, time.time_ns())

    def taken() -> None:
        use.others(budgets, [], nobody, time.time_ns())

    first = {"read": timed(look), "add_up": timed(taken)}
    later = []
    for turn in range(1, 11):
        sent_more(engine, servers, tenants, turn)
        began_s = postgres_s()
        later.append((timed(look), timed(taken), postgres_s() - began_s))
    idle = [timed(look) for _ in range(10)]
    engine.dispose()
    use.close()
    again = FleetUse(ledger, fleet, FLEET_S, kept)
    restart_s = timed(lambda: again.others(budgets, [], nobody, time.time_ns()))
    again.close()
    read, take, database = (statistics.median(each) for each in zip(*later, strict=True))
    return {
        "first_read_s": round(first["read"], 2),
        "first_add_up_s": round(first["add_up"], 2),
        "kept_bytes": kept.stat().st_size,
        "later_read_s": round(read, 3),
        "later_take_s": round(take, 3),
        "database_cpu_s": round(database, 3),
        "nothing_new_s": round(statistics.median(idle), 3),
        "after_restart_s": round(restart_s, 2),
    }


def main() -> None:
    """Run both parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, default=40)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--only", choices=["bounds", "cost"])
    given = parser.parse_args()
    answer: dict[str, Any] = {"machine": machine()}
    with postgresql() as server:
        if given.only != "bounds":
            answer["cost"] = cost(server.new_database(), given.servers, given.tenants)
        if given.only != "cost":
            answer["bounds"] = [
                asyncio.run(exceeded(server.new_database(), is_away=gone, fails_closed=closed))
                for gone, closed in ((False, False), (True, False), (True, True))
            ]
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
