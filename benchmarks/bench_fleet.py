"""Benchmark: how fast servers' ledgers go into a fleet's PostgreSQL, and what that costs whom.

Method. Ledgers of `--ledgers` servers, each with `--runs` engines, get requests in transactions of
a hundred, as appliers write them: without a fleet and with one, in turn, so the first figure is
what the outbox adds to an applier. Then the real senders empty their outboxes, one after another,
as fast as that goes: requests per second, and the processor seconds of the senders and of
PostgreSQL's processes for a million requests. Bytes are those of all tables and indexes. `--rows
none` sends sums only.

Then the audit, the tenants of all time and one request are asked for, each three times, by a reader
of its own; the median is given. The comparison is the same question to a ledger in SQLite with the
requests of one server.

With `--paced-s` ledgers get as many requests a second as `--rate` says, for so long, and their
senders send each two seconds, as beside a server. The lag of a transaction is the time from its
commit in the ledger to the end of the step that has sent it.

With `--month` a fleet of so many servers has 20 tenants in each hour of 30 days, as tidying leaves
it: how long reports of the month, of a day, and of the month by hours take, and the audit.

Limits. Senders, PostgreSQL and this process share two cores, over a Unix socket. PostgreSQL does
not sync its files. All bills are of one hour.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import create_engine, select, text

from benchmarks.bench_attribution import machine
from benchmarks.made_fleet import made_fleet
from benchmarks.made_requests import records
from tests.ecosystem.postgresql import postgresql
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.sender import INTERVAL_S, FleetSender
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.time import NS_PER_HOUR

AT_ONCE = 100
TIMES = 3
# A question that takes longer is asked once.
ONCE_S = 10.0
# A process of a ledger starts in so long, one beside the other.
START_S_EACH = 1.0


def written(url: str, server: int, runs: int, requests: int) -> float:
    """Write a server's requests into its ledger; return the processor seconds it took."""
    batches = BatchWriter(url)
    took_s = 0.0
    for first in range(0, requests, AT_ONCE):
        batch: list[Any] = []
        for number in range(first, first + AT_ONCE):
            batch += records(f"run-{server:03d}-{number % runs:04d}", number // runs)
        began_s = time.process_time()
        batches.write(batch)
        took_s += time.process_time() - began_s
    batches.drop()
    return took_s


def joined(url: str, fleet: str, rows: str = "fleet") -> None:
    """Make a ledger that sends to the fleet, and has nothing yet."""
    open_database(url).dispose()
    sender = FleetSender(url, fleet, rows=rows)
    while sender.step():
        pass
    sender.close()


def waiting_bytes(url: str) -> int:
    """Return how many bytes the outbox of a ledger has."""
    engine = open_database(url)
    with engine.connect() as connection:
        found = outbox.waiting(connection).content_bytes
    engine.dispose()
    return found


def postgres_s() -> float:
    """Return the processor seconds of all of PostgreSQL's processes, also of those that ended."""
    found = 0.0
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "postgres":
            times = process.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found


def asked(url: str, request_id: str) -> dict[str, float]:
    """Return how long questions take, in seconds."""
    with LedgerReader(url) as reader:
        questions: dict[str, Callable[[], Any]] = {
            "audit": reader.audit,
            "tenants": reader.tenants,
            "one request": lambda: reader.look_up(request_id),
        }
        return {name: _median_s(ask) for name, ask in questions.items()}


def _median_s(ask: Callable[[], Any]) -> float:
    found = []
    for _ in range(TIMES):
        began_s = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began_s)
        if found[-1] > ONCE_S:
            break
    return statistics.median(found)


def measure(
    ledgers: int, runs: int, requests: int, fleet: str, folder: Path, rows: str
) -> dict[str, Any]:
    """Return all figures; `requests` is the number of each ledger."""
    urls = [f"sqlite:///{folder / f'{number}.db'}" for number in range(ledgers)]
    without_s = with_s = 0.0
    for number, url in enumerate(urls):
        joined(url, fleet, rows)
        without_s += written(f"sqlite:///{folder / 'alone.db'}", number, runs, requests)
        with_s += written(url, number, runs, requests)
        if number < ledgers - 1:
            (folder / "alone.db").unlink()
    total = ledgers * requests
    waiting = sum(map(waiting_bytes, urls))
    sender_s, database_s, wall_s = time.process_time(), postgres_s(), time.perf_counter()
    for url in urls:
        sender = FleetSender(url, fleet, rows=rows)
        while sender.step():
            pass
        sender.close()
    wall_s = time.perf_counter() - wall_s
    sender_s, database_s = time.process_time() - sender_s, postgres_s() - database_s
    engine = create_engine(fleet)
    with engine.connect() as connection:
        size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
        there = int(connection.execute(text("SELECT SUM(bills) FROM bill_sums")).scalar_one())
    engine.dispose()
    ledger = open_database(urls[0])
    with ledger.connect() as connection:
        one = connection.execute(select(schema.requests.c.http_request_id).limit(1)).scalar_one()
    ledger.dispose()
    assert there == total, (there, total)
    return {
        "requests": total,
        "engines": ledgers * runs,
        "applier_ms_per_request": {
            "without a fleet": 1000 * without_s / total,
            "with one": 1000 * with_s / total,
            "ratio": with_s / without_s,
        },
        "requests_per_s": total / wall_s,
        "sender_s_per_million": 1e6 * sender_s / total,
        "postgresql_s_per_million": 1e6 * database_s / total,
        "outbox_bytes_per_request": waiting / total,
        "database_bytes_per_request": size / total,
        "questions_s": asked(fleet, one),
        "questions_s_to_one_ledger": asked(urls[0], one),
    }


class Paced:
    """The ledger of one server that gets requests at a pace, and its sender, each in a thread.

    Each ledger has a process of its own, as on a machine of its own.
    """

    def __init__(self, name: str, fleet: str, folder: Path, at_once: int) -> None:
        url = f"sqlite:///{folder / f'{name}.db'}"
        joined(url, fleet)
        self._name = name
        self._batches = BatchWriter(url)
        self._sender = FleetSender(url, fleet)
        self._engine = open_database(url)
        self._lock = threading.Lock()
        # When the rows of the outbox were committed, by number.
        self._put_at_s: dict[int, float] = {}
        self._number = 0
        self._at_once = at_once
        self.lags_s: list[float] = []

    def write(self) -> None:
        """Write requests in one transaction."""
        numbers = range(self._number, self._number + self._at_once)
        self._number += self._at_once
        self._batches.write([each for n in numbers for each in records(self._name, n)])
        with self._engine.connect() as connection, self._lock:
            if (known := outbox.read_sender(connection)) is not None:
                self._put_at_s[known.last_number] = time.monotonic()

    def send(self, over: threading.Event) -> None:
        """Send as the process beside a server does, until all is sent after the end."""
        while not over.is_set() or self._put_at_s:
            while self._sender.step():
                with self._engine.connect() as connection:
                    known = outbox.read_sender(connection)
                now_s = time.monotonic()
                with self._lock:
                    sent = [n for n in self._put_at_s if known and n <= known.sent_number]
                    self.lags_s += [now_s - self._put_at_s.pop(number) for number in sent]
            over.wait(INTERVAL_S)

    def run(self, every_s: float, next_s: float, ends_s: float) -> list[float]:
        """Write and send from one instant to another, by the machine's clock; return the lags."""
        over = threading.Event()
        sending = threading.Thread(target=self.send, args=(over,))
        sending.start()
        while next_s < ends_s:
            time.sleep(max(next_s - time.monotonic(), 0))
            self.write()
            next_s += every_s
        over.set()
        sending.join()
        self._batches.drop()
        self._sender.close()
        self._engine.dispose()
        return self.lags_s


def run_paced(paced: Callable[[], Paced], *times_s: float) -> list[float]:
    """Run the ledger of one server; return the lags."""
    return paced().run(*times_s)


def paced(
    ledgers: int, rate: float, seconds: float, fleet: str, folder: Path, at_once: int
) -> dict[str, Any]:
    """Return how far the fleet is behind ledgers that get so many requests a second in all.

    A transaction of a ledger has `at_once` of them.
    """
    every_s = at_once * ledgers / rate
    begins_s = time.monotonic() + START_S_EACH * ledgers
    ends_s = begins_s + seconds
    connections = 0
    asked = "SELECT COUNT(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
    engine = create_engine(fleet)
    with ProcessPoolExecutor(ledgers, multiprocessing.get_context("spawn")) as pool:
        firsts_s = [begins_s + every_s * number / ledgers for number in range(ledgers)]
        running = [
            pool.submit(
                run_paced,
                partial(Paced, f"paced-{number}", fleet, folder, at_once),
                *(every_s, first_s, ends_s),
            )
            for number, first_s in enumerate(firsts_s)
        ]
        time.sleep(max(begins_s - time.monotonic(), 0))
        used_s = postgres_s()
        with engine.connect() as connection:
            while time.monotonic() < ends_s:
                time.sleep(1)
                connections = max(connections, connection.execute(text(asked)).scalar_one())
                connection.rollback()
        used_s = postgres_s() - used_s
        lags_s = sorted(lag for each in running for lag in each.result())
    with engine.connect() as connection:
        bills = int(connection.execute(text("SELECT SUM(bills) FROM bill_sums")).scalar_one())
    engine.dispose()
    return {
        "requests_per_s": bills / seconds,
        "seconds": seconds,
        "lag_p50_s": lags_s[len(lags_s) // 2],
        "lag_p99_s": lags_s[len(lags_s) * 99 // 100],
        "lag_max_s": lags_s[-1],
        "connections": connections,
        "postgresql_cores": used_s / seconds,
    }


def month(servers: int, fleet: str) -> dict[str, Any]:
    """Return how long a month's reports take for a fleet of so many servers, in seconds."""
    made_fleet(fleet, servers, 20)
    this_hour = time.time_ns() // NS_PER_HOUR
    with LedgerReader(fleet) as reader:
        return {
            "servers": servers,
            "month_by_tenant_s": _median_s(lambda: reader.tenants(this_hour - 720, this_hour)),
            "day_by_tenant_s": _median_s(lambda: reader.tenants(this_hour - 24, this_hour)),
            "audit_s": _median_s(reader.audit),
            "month_by_tenant_and_hour_s": _median_s(lambda: reader.report(aggregate="tenant,hour")),
        }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledgers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=10, help="engines of each server")
    parser.add_argument("--requests", type=int, default=10_000, help="of each server")
    parser.add_argument("--rows", default="fleet", choices=["fleet", "none"])
    parser.add_argument("--paced-s", type=float, help="in place of the rest: so long at a pace")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="requests in a transaction")
    parser.add_argument("--rate", type=float, default=1_000, help="requests a second, of all")
    parser.add_argument(
        "--month", type=int, nargs="*", help="in place of the rest: so many servers"
    )
    given = parser.parse_args()
    print(machine())
    with (
        postgresql() as server,
        tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder,
    ):
        if given.month is not None:
            for servers in given.month:
                print(json.dumps(month(servers, server.new_database()), indent=2), flush=True)
            return
        if given.paced_s is not None:
            fleet = server.new_database()
            times = given.rate, given.paced_s
            found: Any = paced(given.ledgers, *times, fleet, Path(folder), given.at_once)
        else:
            sizes = given.ledgers, given.runs, given.requests
            found = measure(*sizes, server.new_database(), Path(folder), given.rows)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
