"""Benchmark: how long questions take over a large ledger, and how many bytes a request takes in it.

Method. A month of requests, spread evenly over 1,000 tenants and all hours, of an engine a day,
goes through the ledger's own inserts, 500 requests to a transaction, as the applier writes them.
Then each question is asked three times by the library's reader in a process of its own, and the
median is given, with the process's peak memory above that of an empty question. The ledger's size
is that of its file after a checkpoint.

The comparison is the same question to a tenth of the requests: a time that grows with hours,
tenants and models, and not with requests, has a ratio near 1.

A ledger of its own has many short engine runs: an audit looks at each of them.

Limits. One model, one price. The file is in the page cache.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench_attribution import machine
from made_requests import records

from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot
from vllm_cost_meter.units.calendar import month_hours

MONTH = "2026-11"
TENANTS = 1_000
# An engine a day.
RUNS = 30
AT_ONCE = 500
NS_PER_HOUR = 3_600 * 10**9
BOOK = PriceBook([PriceEntry("prices[0]", Decimal("2.5"), "list", None)])
TIMES = 3


def make(path: Path, requests: int, runs: int) -> float:
    """Write a month of requests into a new ledger; return the processor seconds it took.

    Each run serves for a day; there are several runs a day if there are more than days.
    """
    first_hour, after = month_hours(MONTH)
    days = (after - first_hour) // 24
    each_day = requests // runs
    engine = writing(open_database(f"sqlite:///{path}"))
    began_s = time.process_time()
    for run in range(runs):
        day = run % days
        run_id = f"run-{run:04d}"
        batch: list[Any] = []
        spent = [0] * 24
        for number in range(each_day):
            hour = number * 24 // each_day
            at = first_hour + day * 24 + hour
            part, http = _request(run_id, run, number, at)
            spent[hour] += part.bill.gpu_time_ns
            batch += (part, http)
            if len(batch) >= 2 * AT_ONCE:
                _write(engine, batch)
                batch = []
        _write(engine, [*batch, _snapshot(run_id, first_hour + day * 24, spent, each_day)])
    took_s = time.process_time() - began_s
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return took_s


def _write(engine: Any, batch: list[Any]) -> None:
    with engine.begin() as connection:
        write(connection, batch)


def _request(run_id: str, run: int, number: int, hour: int) -> Any:
    part, http = records(run_id, number)
    owner = Owner(f"tenant-{(number * 7919) % TENANTS:04d}", NamedBy("api_key"))
    ended_ns = hour * NS_PER_HOUR + (number % 3_500) * 10**9
    bill = part.bill._replace(
        request_id=f"cmpl-{run:08x}{number:08x}-0-01234567",
        pieces=(UsagePiece(hour, 1_000_000, 80_000, 128, 127),),
    )
    response_id = f"cmpl-{run:08x}{number:08x}"
    times = {"started_at_ns": ended_ns - 700_000_000, "finished_at_ns": ended_ns}
    part = replace(
        part,
        bill=bill,
        owner=owner,
        response_id=response_id,
        external_id=f"{response_id}-0",
        prompt_group=bill.request_id,
        **times,
    )
    http = replace(http, owner=owner, response_id=response_id, **times)
    return part, http


def _snapshot(run_id: str, first_hour: int, spent: list[int], bills: int) -> Snapshot:
    hours = {
        first_hour + hour: ClassTotals(requests=ns, idle=NS_PER_HOUR - ns)
        for hour, ns in enumerate(spent)
    }
    busy_ns = sum(spent)
    return Snapshot(
        run_id=run_id,
        number=1,
        taken_at_ns=(first_hour + 24) * NS_PER_HOUR,
        started_at_ns=first_hour * NS_PER_HOUR,
        wall_ns=24 * NS_PER_HOUR,
        engine=EngineIdentity(
            model="model",
            engine_index=0,
            vllm_version="0.32.0",
            hardware="a GPU",
            parallelism="tp=1 pp=1 dp=1",
            gpus=1,
            method="tokens",
            native=True,
            kv_blocks=1000,
            kv_block_size=16,
            host="node-1",
            precision="bfloat16",
            meter_version="0.1.0",
            labels={},
        ),
        totals=ClassTotals(requests=busy_ns, idle=24 * NS_PER_HOUR - busy_ns),
        hours=hours,
        last_seq=bills,
        billed_ns=busy_ns,
        running=0,
        waiting=0,
        kv_cache_usage=None,
        steps=bills,
        busy_ns=busy_ns,
        own_ns=0,
        errors=0,
        state="on",
        prior="none",
    )


def questions(reader: LedgerReader) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the questions by name."""
    low, high = month_hours(MONTH)
    as_of = AsOf(now_ns=high * NS_PER_HOUR)
    yield "tenants of the month", lambda: reader.tenants(low, high, as_of=as_of)
    yield "statement of all tenants", lambda: reader.statement(MONTH, as_of=as_of)
    yield (
        "economics of the trailing week",
        lambda: economics(reader, Declared(), high - 168, high, as_of),
    )
    yield "summary", lambda: reader.summary(as_of=as_of)
    yield "one tenant", lambda: reader.tenant("tenant-0001", low, high, as_of=as_of)
    yield "audit", lambda: reader.audit(as_of)
    yield "audit --full", lambda: reader.audit(as_of, full=True)


def ask(path: Path, only: str = "") -> dict[str, float]:
    """Ask all questions that begin so; return the median of each in ms, and the memory in MiB."""
    found = {}
    with LedgerReader(f"sqlite:///{path}", book=BOOK) as reader:
        reader.unseen([])
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, question in questions(reader):
            if not name.startswith(only):
                continue
            took = []
            for _ in range(TIMES):
                began_s = time.perf_counter()
                question()
                took.append((time.perf_counter() - began_s) * 1e3)
            found[f"{name}, ms"] = round(statistics.median(took), 1)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    return {**found, "memory, MiB": round(peak_kib / 1024, 1)}


def measure(folder: Path, requests: int, runs: int, only: str = "") -> dict[str, float]:
    path = folder / f"{requests}-{runs}.db"
    cpu_s = make(path, requests, runs)
    command = [sys.executable, __file__, "--ask", str(path), "--only", only]
    asked = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        "runs": runs,
        "requests": requests,
        "bytes a request": round(path.stat().st_size / requests, 1),
        "inserts' CPU, ms a request": round(cpu_s / requests * 1e3, 4),
        **json.loads(asked.stdout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the answers over a large ledger.")
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=2_000, help="runs of the ledger of many runs")
    parser.add_argument("--only", default="", help="ask only questions whose names begin so")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder")
    parser.add_argument("--ask", type=Path, help="ask a ledger that is there, and print JSON")
    options = parser.parse_args()
    if options.ask is not None:
        print(json.dumps(ask(options.ask, options.only)))
        return
    print(f"Machine: {machine()}\n\n{__doc__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tenth = measure(Path(folder), options.requests // 10, RUNS, options.only)
        whole = measure(Path(folder), options.requests, RUNS, options.only)
        many = measure(Path(folder), 10 * options.runs, options.runs, "audit")
    for name, value in whole.items():
        ratio = value / tenth[name] if tenth[name] else float("nan")
        print(f"{name:<36} {value:>12} {tenth[name]:>12} {ratio:>8.2f}")
    print("\nA ledger of many runs:")
    for name, value in many.items():
        print(f"{name:<36} {value:>12}")


if __name__ == "__main__":
    main()
