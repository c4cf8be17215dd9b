"""Benchmark: how fast servers' ledgers go into a fleet's PostgreSQL, and what that costs whom.

Method. Ledgers of `--ledgers` servers, each with `--runs` engines, get requests in transactions of
a hundred, as appliers write them: without a fleet and with one, in turn, so the first figure is
what the outbox adds to an applier. Then the real senders empty their outboxes, one after another,
as fast as that goes: requests per second, and the processor seconds of the senders and of
PostgreSQL's processes for a million requests. Bytes are those of all tables and indexes.

Then the audit, the tenants of all time and one request are asked for, each three times, by a reader
of its own; the median is given. The comparison is the same question to a ledger in SQLite with the
requests of one server.

Limits. Sender, PostgreSQL and this process share two cores, over a Unix socket. PostgreSQL does not
sync its files. All bills are of one hour.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import create_engine, text

from benchmarks.bench_attribution import machine
from benchmarks.made_requests import records
from tests.ecosystem.postgresql import postgresql
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.ledger.reader import LedgerReader

AT_ONCE = 100
TIMES = 3


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


def joined(url: str, fleet: str) -> None:
    """Make a ledger that sends to the fleet, and has nothing yet."""
    open_database(url).dispose()
    sender = FleetSender(url, fleet)
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
    return statistics.median(found)


def measure(ledgers: int, runs: int, requests: int, fleet: str, folder: Path) -> dict[str, Any]:
    """Return all figures; `requests` is the number of each ledger."""
    urls = [f"sqlite:///{folder / f'{number}.db'}" for number in range(ledgers)]
    without_s = with_s = 0.0
    for number, url in enumerate(urls):
        joined(url, fleet)
        without_s += written(f"sqlite:///{folder / 'alone.db'}", number, runs, requests)
        with_s += written(url, number, runs, requests)
        if number < ledgers - 1:
            (folder / "alone.db").unlink()
    total = ledgers * requests
    waiting = sum(map(waiting_bytes, urls))
    sender_s, database_s, wall_s = time.process_time(), postgres_s(), time.perf_counter()
    for url in urls:
        sender = FleetSender(url, fleet)
        while sender.step():
            pass
        sender.close()
    wall_s = time.perf_counter() - wall_s
    sender_s, database_s = time.process_time() - sender_s, postgres_s() - database_s
    engine = create_engine(fleet)
    with engine.connect() as connection:
        size = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
        there = connection.execute(text("SELECT COUNT(*) FROM requests")).scalar_one()
        one = connection.execute(text("SELECT http_request_id FROM requests LIMIT 1")).scalar_one()
    engine.dispose()
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


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledgers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=10, help="engines of each server")
    parser.add_argument("--requests", type=int, default=10_000, help="of each server")
    given = parser.parse_args()
    print(machine())
    with (
        postgresql() as server,
        tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder,
    ):
        found = measure(
            given.ledgers, given.runs, given.requests, server.new_database(), Path(folder)
        )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
