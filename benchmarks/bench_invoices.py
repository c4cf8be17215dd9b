"""Benchmark: how long an import of provider bills keeps a server from writing to the ledger.

Method. A ledger gets months of hourly invoice lines for a fleet (100 nodes, 12 months; 72,000 lines
per month), imported as a user imports them. Then one more month is imported while another process
commits request bills one by one with the real writer. Every 2 ms that process tries, on a separate
connection that does not wait, whether the file can be written. `locked_s` is the longest time for
which it could not, `commit_s` the longest commit of a bill, `import_s` the whole import. Then the
same file is imported again, and once more with one further day.

Limits. The file is in the page cache. The other process takes a core of its own.
"""

import argparse
import contextlib
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench_attribution import machine
from made_requests import records

from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import InvoiceLine
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.units.time import NS_PER_HOUR

FIRST_HOUR = 490_000
MONTH_HOURS = 720
DAY_HOURS = 24


def a_file(nodes: int, begin: int, hours: int) -> InvoiceFile:
    """Return a bill file with one line per node and hour."""
    lines = {
        InvoiceLine(
            f"arn:aws:ec2:us-east-1:123456789012:instance/i-{node:017x}",
            "gpu",
            (begin + hour) * NS_PER_HOUR,
            (begin + hour + 1) * NS_PER_HOUR,
            2_500_000_000 + hour,
            f"2026-{begin}",
            "BoxUsage:p5.48xlarge",
        ): f"bill.csv:{hour}"
        for node in range(nodes)
        for hour in range(hours)
    }
    return InvoiceFile("bill.csv", {}, lines, 0)


def serve(path: str) -> None:
    """Commit bills until standard input ends; then print the longest commit and lock time."""
    batches = BatchWriter(f"sqlite:///{path}")
    done = threading.Event()
    locked: list[float] = []
    probe = threading.Thread(target=_probe, args=(path, done, locked))
    probe.start()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    batches.write(records("first", 0))
    print("ready", flush=True)
    longest_s, number = 0.0, 0
    run_id = str(time.time_ns())
    while not done.is_set():
        started_s = time.perf_counter()
        batches.write(records(run_id, number))
        longest_s, number = max(longest_s, time.perf_counter() - started_s), number + 1
        time.sleep(0.01)
    probe.join()
    print(json.dumps({"locked_s": max(locked), "commit_s": longest_s, "commits": number}))
    batches.drop()


def _probe(path: str, done: threading.Event, locked: list[float]) -> None:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    free_at_s = time.perf_counter()
    while not done.is_set():
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            now_s = time.perf_counter()
            locked.append(now_s - free_at_s)
            free_at_s = now_s
        time.sleep(0.002)
    connection.close()


def measured(path: Path, file: InvoiceFile) -> dict[str, float]:
    """Import a file while another process commits bills; return the figures of both."""
    command = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin
        assert server.stdout
        server.stdout.readline()
        started_s = time.perf_counter()
        answer = import_invoice(f"sqlite:///{path}", file, NS_PER_HOUR, time.time_ns())
        import_s = time.perf_counter() - started_s
        output, _ = server.communicate()
    return {"lines": answer["lines"], "import_s": import_s, **json.loads(output)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print figures as JSON only")
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        open_database(f"sqlite:///{path}").dispose()
        for month in range(given.months):
            file = a_file(given.nodes, FIRST_HOUR + month * MONTH_HOURS, MONTH_HOURS)
            import_invoice(f"sqlite:///{path}", file, NS_PER_HOUR, month)
        begin = FIRST_HOUR + given.months * MONTH_HOURS
        found = {
            "a month": measured(path, a_file(given.nodes, begin, MONTH_HOURS)),
            "the same again": measured(path, a_file(given.nodes, begin, MONTH_HOURS)),
            "and a day": measured(path, a_file(given.nodes, begin, MONTH_HOURS + DAY_HOURS)),
        }
        size = path.stat().st_size
    if given.json:
        print(json.dumps({"machine": machine(), "bytes": size, **found}))
        return
    print(machine(), f"{size / 1e6:.0f} MB", sep="\n")
    for name, figures in found.items():
        shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
