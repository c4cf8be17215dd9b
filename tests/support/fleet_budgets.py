"""Servers of a fleet whose budgets are counted: their ledgers, senders and looks.

Engines are records, everything else is real: ledgers, senders, PostgreSQL, the kept figures.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.builders import make_bill, make_open, make_part, make_snapshot
from tests.support.fleet import sent
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet_use.kept import figures_path
from vllm_cost_meter.ledger.fleet_use.others import FleetUse
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot
from vllm_cost_meter.tenants.budgets import Budget, Standing
from vllm_cost_meter.units.time import NS_PER_HOUR

# Of records, and of looks whose instant matters: no test depends on the hour in which it runs.
NOW = (time.time_ns() // NS_PER_HOUR) * NS_PER_HOUR + NS_PER_HOUR // 2
THIS_HOUR = NOW // NS_PER_HOUR
INTERVAL_S = 0.5


def budget(**changes) -> Budget:
    """Return a budget of 100 GPU-ns in 30 days, of the tenant `acme`."""
    values = {"name": "b", "limit": 100, "unit": "gpu_seconds", "period": "rolling"}
    return Budget(**{**values, "tenant": "acme", **changes})


def bill(run_id: str, seq: int, ns: int, tenant: str = "acme", hour: int = THIS_HOUR, **changes):
    """Return a bill of one hour."""
    request = changes.pop("request_id", f"{run_id}-r{seq}")
    made = make_bill(
        run_id=run_id, seq=seq, request_id=request, pieces=(UsagePiece(hour, 0, ns, 0, 1),)
    )
    return make_part(made, tenant=tenant, **{"finished_at_ns": NOW, **changes})


def running(run_id: str, number: int, *, host: str = "vm", **used_ns: int) -> Snapshot:
    """Return a snapshot taken now, of requests that run: their ids without the run's name."""
    live = tuple((f"{run_id}-{name}", Accrued(decode_ns=ns)) for name, ns in used_ns.items())
    totals = ClassTotals(idle=1000, in_flight=sum(used_ns.values()))
    return make_snapshot(
        run_id=run_id,
        number=number,
        taken_at_ns=time.time_ns(),
        totals=totals,
        live=live,
        host=host,
    )


def opened(run_id: str, name: str, tenant: str = "acme"):
    """Return the announcement of a request."""
    id = f"{run_id}-{name}"
    return make_open(request_id=id, http_request_id=id, tenant=tenant, started_at_ns=NOW)


class FleetServer:
    """One server: its ledger, what it sends, and what its budgets have used."""

    def __init__(self, folder: Path, name: str, fleet: str) -> None:
        self.path = folder / f"{name}.db"
        self.url = f"sqlite:///{self.path}"
        self.fleet = fleet
        open_database(self.url).dispose()
        self.start()

    def start(self) -> None:
        """Begin to count, as a process that starts does."""
        kept = figures_path(self.path, 0)
        self.use = FleetUse(self.url, self.fleet, INTERVAL_S, kept)
        self.spending = Spending(self.url, fleet=self.use)

    def stop(self) -> None:
        """End as a process that is killed."""
        self.spending.close()
        self.use.close()

    def write(self, *records: Record) -> None:
        """Have the ledger get records in one transaction."""
        writer = BatchWriter(self.url)
        assert writer.write(records) == []
        writer.drop()

    def send(self, *, stops: bool = False) -> None:
        """Send all that the ledger has."""
        sent(self.url, self.fleet, stops=stops)

    def read(self, *budgets: Budget, now_ns: int | None = None) -> None:
        """Read the fleet."""
        self.use.look(budgets or (budget(),), now_ns or time.time_ns())

    def standings(
        self, *budgets: Budget, now_ns: int | None = None, book: PriceBook = NO_PRICES
    ) -> Sequence[Standing]:
        """Return where budgets stand, by what was read."""
        found = self.spending.look(budgets or (budget(),), book, now_ns or time.time_ns())
        return found.standings

    def used(self, *budgets: Budget, now_ns: int | None = None, book: PriceBook = NO_PRICES):
        """Read the fleet, and return what budgets have used."""
        self.read(*budgets, now_ns=now_ns)
        return [each.total for each in self.standings(*budgets, now_ns=now_ns, book=book)]


@contextmanager
def away(fleet: str) -> Iterator[None]:
    """Have the fleet's database away, to whoever is connected and whoever comes."""
    name = fleet.split("/")[3].split("?")[0]
    admin = fleet.replace("+psycopg", "").replace(f"/{name}?", "/postgres?")
    ends = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute(ends)
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def execute(fleet: str, statement: str) -> None:
    """Run a statement in a fleet's database."""
    with psycopg.connect(fleet.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement)


def _rows(fleet: str, query: str) -> list[tuple]:
    with psycopg.connect(fleet.replace("+psycopg", "")) as connection:
        return connection.execute(query).fetchall()


def put_together(fleet: str, keep: int = 0) -> None:
    """Put old shipments together, under a number below all; the last `keep` stay as they are."""
    for table, keys in (
        ("sent_rollup_hours", ("hour", "group_id")),
        ("sent_bill_sums", ("run_id",)),
    ):
        columns = [
            name
            for (name,) in _rows(
                fleet,
                "SELECT column_name FROM information_schema.columns"
                f" WHERE table_name = '{table}' ORDER BY ordinal_position",
            )
            if name not in ("sender_id", "first_number", *keys)
        ]
        amounts = [
            f"MIN({name})"
            if name in ("method", "started_at", "finished_at")
            else f"MOD(SUM({name}), {1 << 62})"
            for name in columns
        ]
        old = (
            f"first_number < COALESCE((SELECT first_number FROM shipments AS s WHERE s.sender_id ="
            f" {table}.sender_id ORDER BY first_number DESC OFFSET {keep} - 1 LIMIT 1), 0)"
            if keep
            else "true"
        )
        key = ", ".join(keys)
        execute(
            fleet,
            f"WITH gone AS (DELETE FROM {table} WHERE {old} RETURNING *)"
            f" INSERT INTO {table} (sender_id, first_number, {key}, {', '.join(columns)})"
            f" SELECT sender_id, -1, {key}, {', '.join(amounts)} FROM gone"
            f" GROUP BY sender_id, {key}",
        )
