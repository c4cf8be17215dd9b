"""Benchmark: how long a reply waits for its journal, and how fast journals come into the ledger.

Method. The real journal writer appends an engine request with one piece and its HTTP request, one
after another, as with the replies to one client: the figures are the median and the 99th
percentile. Then it gets all requests at once, as on a server that never waits: the figure is
requests per second until the last write. Then the real applier brings that journal into a SQLite
file: the figures are requests per second, and its processor time for each.

The comparison is sqlite3 alone, in this thread: the same rows in a commit for each request (WAL,
synchronous=NORMAL), in turn with the journal's writes; and for the applier the same rows by
`executemany`, 500 requests to a commit, with the ledger's tables and indexes. So the ratios show
what the journal saves a reply, and what the applier costs beyond SQLite.

Limits. Nothing else runs in this process. Beside a busy event loop the writer's thread also waits
for the interpreter's lock, up to 5 ms at a time; the figures of `bench_serving.py` include that.
"""

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_attribution import machine

from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger import rows
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Usage

BLOCK = 100


def records(run_id: str, number: int) -> tuple[EngineRequest, HttpRequest]:
    """Return an engine request with its bill, and its HTTP request."""
    now_ns = time.time_ns()
    http_id = f"cost-{run_id}-{number:032x}"
    bill = Bill(
        run_id=run_id,
        seq=number + 1,
        request_id=f"cmpl-{number:016x}-0-01234567",
        engine_status="length_capped",
        method="tokens",
        prompt_tokens=128,
        cached_tokens=0,
        output_tokens=128,
        preemptions=0,
        steps=128,
        batch=1280,
        first_model=3,
        last_model=4,
        pieces=(UsagePiece(500_000, 1_000_000, 80_000_000, 128, 127),),
    )
    part = EngineRequest(
        bill=bill,
        http_request_id=http_id,
        response_id=f"cmpl-{number:016x}",
        external_id=f"cmpl-{number:016x}-0",
        prompt_group=bill.request_id,
        owner=Owner("alpha"),
        model="model",
        lora=None,
        route="/v1/completions",
        cost_nanousd=56_250,
        marginal_cost_nanousd=50_000,
        started_at_ns=now_ns,
        finished_at_ns=now_ns,
        latencies=Latencies(1.0, 10.0, 5.0, 700.0),
    )
    http = HttpRequest(
        http_request_id=http_id,
        response_id=part.response_id,
        x_request_id=None,
        owner=Owner("alpha"),
        model="model",
        route="/v1/completions",
        status=200,
        streamed=True,
        usage=Usage(128, 0, 128),
        gpu_time_ns=bill.gpu_time_ns,
        cost_nanousd=part.cost_nanousd,
        started_at_ns=now_ns,
        finished_at_ns=now_ns,
    )
    return part, http


TABLES = ("requests", "usage_pieces", "http_requests")


class Plain:
    """sqlite3 alone, with a ledger's tables, indexes and mode."""

    def __init__(self, path: Path) -> None:
        open_database(f"sqlite:///{path}").dispose()
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=NORMAL")

    def commit(self, *both: tuple[EngineRequest, HttpRequest]) -> None:
        """Write the rows of requests in one transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        for table, of_both in zip(TABLES, (_part, _piece, _http), strict=True):
            values = [of_both(*one) for one in both]
            places = ", ".join("?" * len(values[0]))
            sql = f"INSERT INTO {table} ({', '.join(values[0])}) VALUES ({places})"
            self._connection.executemany(sql, [tuple(row.values()) for row in values])
        self._connection.execute("COMMIT")


def _part(part: EngineRequest, _http: HttpRequest) -> rows.TableRow:
    return rows.part_row(part)


def _piece(part: EngineRequest, _http: HttpRequest) -> rows.TableRow:
    return rows.piece_rows(part)[0]


def _http(_part: EngineRequest, http: HttpRequest) -> rows.TableRow:
    return rows.http_row(http)


def timed_ms(keep: Callable[[EngineRequest, HttpRequest], None], run_id: str) -> list[float]:
    """Return the time to keep each request of a block, in ms."""
    took_ms = []
    for number in range(BLOCK):
        part, http = records(run_id, number)
        start_s = time.perf_counter()
        keep(part, http)
        took_ms.append((time.perf_counter() - start_s) * 1e3)
    return took_ms


def measure(folder: Path, blocks: int, at_once: int) -> dict[str, float]:
    """Return the figures of journal, applier and sqlite3 alone, on files in a folder."""
    writer = JournalWriter(folder / "ledger.db.journal")
    writer.start()
    plain = Plain(folder / "plain.db")
    journaled: list[float] = []
    alone: list[float] = []
    for block in range(blocks):
        journaled += timed_ms(lambda *both: writer.append(*both).result(), f"run-{block}")
        alone += timed_ms(lambda *both: plain.commit(both), f"run-{block}")
    many = [records("all-at-once", number) for number in range(at_once)]
    start_s = time.perf_counter()
    for both in many:
        writer.put(*both)
    writer.append().result()
    journal_s = time.perf_counter() - start_s
    writer.close()
    applied = _applied(folder)
    requests = blocks * BLOCK + at_once
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for first in range(0, at_once, 500):
        plain.commit(*many[first : first + 500])
    plain_s, plain_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return {
        "told_ms_median": round(statistics.median(journaled), 3),
        "told_ms_p99": round(statistics.quantiles(journaled, n=100)[98], 3),
        "plain_ms_median": round(statistics.median(alone), 3),
        "plain_ms_p99": round(statistics.quantiles(alone, n=100)[98], 3),
        "ratio_of_medians": round(statistics.median(journaled) / statistics.median(alone), 2),
        "journaled_per_s": round(at_once / journal_s),
        "applied_per_s": round(requests / applied[0]),
        "applier_cpu_ms_each": round(applied[1] / requests * 1e3, 4),
        "plain_per_s": round(at_once / plain_s),
        "plain_cpu_ms_each": round(plain_cpu_s / at_once * 1e3, 4),
        "bytes_each": round((folder / "ledger.db").stat().st_size / requests),
    }


def _applied(folder: Path) -> tuple[float, float]:
    """Apply the journals of a folder; return the seconds and the processor seconds it took."""
    applier = Applier(
        BatchWriter(f"sqlite:///{folder / 'ledger.db'}"), folder / "ledger.db.journal"
    )
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    while applier.apply():
        pass
    took = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    applier.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the journal and the applier.")
    parser.add_argument("--blocks", type=int, default=10, help=f"of {BLOCK} commits each")
    parser.add_argument("--at-once", type=int, default=20_000, help="requests handed over at once")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.blocks, options.at_once)
    for name, value in results.items():
        print(f"{name:<20} {value:>10}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
