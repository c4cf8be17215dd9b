"""Benchmark: the time of a ledger commit, which a reply waits for, and the records per second.

Method. The real writer writes to a real SQLite file. First it commits single records one after
another, as with the replies to one client: the figures are the median and the 99th percentile. Then
it gets all records at once, as on a server that never waits: the figure is records per second until
the last commit. A record is an engine request with one piece (two rows) and its HTTP request (one
row).

The comparison is sqlite3 alone, in this thread: the same rows in as many commits, in the same mode
(WAL, synchronous=NORMAL), in turn with the writer's. The ratio shows the cost of the writer's
thread, its queue and SQLAlchemy.

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

from vllm_cost_meter.ledger import rows
from vllm_cost_meter.ledger.writer import LedgerWriter
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


class Plain:
    """sqlite3 alone, with a ledger's tables and mode."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=NORMAL")

    def commit(self, part: EngineRequest, http: HttpRequest) -> None:
        """Write both records in one transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        for table, row in (
            ("requests", rows.part_row(part)),
            ("usage_pieces", rows.piece_rows(part)[0]),
            ("http_requests", rows.http_row(http)),
        ):
            places = ", ".join("?" * len(row))
            sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})"
            self._connection.execute(sql, tuple(row.values()))
        self._connection.execute("COMMIT")


def timed_ms(commit: Callable[[EngineRequest, HttpRequest], None], run_id: str) -> list[float]:
    """Return the time of each commit in a block, in ms."""
    took_ms = []
    for number in range(BLOCK):
        part, http = records(run_id, number)
        start_s = time.perf_counter()
        commit(part, http)
        took_ms.append((time.perf_counter() - start_s) * 1e3)
    return took_ms


def measure(folder: Path, blocks: int, at_once: int) -> dict[str, float]:
    """Return the figures of the writer and of sqlite3 alone, in turn, on files in a folder."""
    writer = LedgerWriter(f"sqlite:///{folder / 'writer.db'}")
    other = LedgerWriter(f"sqlite:///{folder / 'plain.db'}")
    for each in (writer, other):  # This creates both ledgers.
        each.start()
        each.commit().result()
    other.close()
    plain = Plain(folder / "plain.db")
    with_writer: list[float] = []
    alone: list[float] = []
    for block in range(blocks):
        with_writer += timed_ms(lambda *both: writer.commit(*both).result(), f"run-{block}")
        alone += timed_ms(plain.commit, f"run-{block}")
    many = [records("all-at-once", number) for number in range(at_once)]
    start_s = time.perf_counter()
    for both in many:
        writer.put(*both)
    writer.commit().result()
    took_s = time.perf_counter() - start_s
    writer.close()
    return {
        "commit_ms_median": round(statistics.median(with_writer), 3),
        "commit_ms_p99": round(statistics.quantiles(with_writer, n=100)[98], 3),
        "plain_ms_median": round(statistics.median(alone), 3),
        "plain_ms_p99": round(statistics.quantiles(alone, n=100)[98], 3),
        "ratio_of_medians": round(statistics.median(with_writer) / statistics.median(alone), 2),
        "requests_per_s": round(at_once / took_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time commits of the ledger.")
    parser.add_argument("--blocks", type=int, default=10, help=f"of {BLOCK} commits each")
    parser.add_argument("--at-once", type=int, default=20_000, help="requests handed over at once")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.blocks, options.at_once)
    for name, value in results.items():
        print(f"{name:<17} {value:>10}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
