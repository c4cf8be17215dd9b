"""Benchmark: how long a reply waits for its journal, and how fast journals come into the ledger.

Method. The real journal writer appends an engine request with one piece and its HTTP request, one
after another, as with the replies to one client: the figures are the median and the 99th
percentile. Then it gets all requests at once, as on a server that never waits: the figure is
requests per second until the last write. Then the real applier brings that journal into a SQLite
file: the figures are requests per second, and its processor time for each.

The first yardstick is sqlite3 alone, in this thread: the same rows in a commit for each request
(WAL, synchronous=NORMAL), in turn with the journal's writes; and for the applier the same rows by
`executemany`, 1,000 requests to a commit. It has the ledger's tables and indexes, and one table of
sums by hour and tenant. So the ratios show what the journal saves a reply, and what the applier
costs beyond SQLite.

The second is what a typical proxy keeps: a row for each request in PostgreSQL (`spend_log.py`), a
hundred in a transaction. It says less of a request, and has no sums.

Bytes are those of the file when it is closed, and of each table and index in it.

Limits. Nothing else runs in this process. Beside a busy event loop the writer's thread also waits
for the interpreter's lock, up to 5 ms at a time; the figures of `bench_serving.py` include that.
The ledger is new, so its indexes have few pages, and a commit changes most of them: in a large one
a commit of few requests is cheaper than here, and one of many dearer. PostgreSQL does not sync its
files; it needs the programs of a server (`apt-get install postgresql`).
"""

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import apsw

from benchmarks import spend_log
from benchmarks.bench_attribution import machine
from benchmarks.made_requests import records
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger import rows
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.tables.packed import pack_id
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest
from vllm_cost_meter.units.time import NS_PER_HOUR

BLOCK = 100
# Requests to a commit of sqlite3 alone; the applier's commits have as many.
AT_ONCE = 1_000


_SUMS = (
    "CREATE TABLE sums (hour INTEGER, tenant TEXT, requests INTEGER, prompt_tokens INTEGER,"
    " output_tokens INTEGER, gpu_time_ns INTEGER, PRIMARY KEY (hour, tenant)) WITHOUT ROWID"
)
_ADD_TO_SUMS = (
    "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
    " requests = requests + excluded.requests,"
    " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
    " output_tokens = output_tokens + excluded.output_tokens,"
    " gpu_time_ns = gpu_time_ns + excluded.gpu_time_ns"
)


# The columns of ids but for the run's, which is stored as it is.
_IDS = ("request_id", "external_id", "response_id", "prompt_group")


class Plain:
    """sqlite3 alone, with a ledger's tables, indexes and mode, and one table of sums."""

    def __init__(self, path: Path) -> None:
        open_database(f"sqlite:///{path}").dispose()
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(_SUMS)

    def commit(self, *both: tuple[EngineRequest, HttpRequest]) -> None:
        """Write the rows of requests in one transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        values = [rows.part_row(part, rows.beside_bill(part, http)) for part, http in both]
        places = ", ".join("?" * len(values[0]))
        sql = f"INSERT INTO requests ({', '.join(values[0])}) VALUES ({places})"
        self._connection.executemany(sql, [_stored(row) for row in values])
        self._connection.executemany(_ADD_TO_SUMS, _sums(both))
        self._connection.execute("COMMIT")


def _stored(row: rows.TableRow) -> tuple[object, ...]:
    """Return a row's values as the ledger stores them."""
    return tuple(
        pack_id(value) if isinstance(value, str) and name.endswith(_IDS) else value
        for name, value in row.items()
    )


def _sums(both: Sequence[tuple[EngineRequest, HttpRequest]]) -> list[tuple[object, ...]]:
    found: dict[tuple[int, str], list[int]] = {}
    for part, http in both:
        bill = part.bill
        sums = found.setdefault((http.finished_at_ns // NS_PER_HOUR, http.owner.tenant), [0] * 4)
        sums[0] += 1
        sums[1] += bill.prompt_tokens
        sums[2] += bill.output_tokens
        sums[3] += bill.gpu_time_ns
    return [(*key, *sums) for key, sums in found.items()]


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
    # In a process of its own, as beside a server.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        applied = pool.submit(_applied, folder).result()
    requests = blocks * BLOCK + at_once
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for first in range(0, at_once, AT_ONCE):
        plain.commit(*many[first : first + AT_ONCE])
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
        **bytes_by_table(folder / "ledger.db", requests),
        **spend_log.measure(many),
    }


def bytes_by_table(path: Path, requests: int) -> dict[str, float]:
    """Return the bytes of each table and index for a request, those that have any."""
    asked = "SELECT name, sum(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC"
    with closing(apsw.Connection(str(path))) as connection:
        found = [(str(name), round(size / requests)) for name, size in connection.execute(asked)]
    return {f"bytes_of {name}": size for name, size in found if size}


def _applied(folder: Path) -> tuple[float, float]:
    """Apply the journals of a folder; return the seconds and the processor seconds it took."""
    batches = BatchWriter(f"sqlite:///{folder / 'ledger.db'}")
    batches.opened()  # once in the life of a server
    applier = Applier(batches, folder / "ledger.db.journal")
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
        print(f"{name:<42} {value:>10}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
