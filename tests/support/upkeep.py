"""Real ledgers to look after, and a process that writes to one as a server does."""

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Table, select

from tests.component.ledger.test_reader import HOUR, http, part, snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.rollups.bill_sums import (
    BillSums,
    energy_of_rows,
    stored_sums,
    sums_of_rows,
)
from vllm_cost_meter.ledger.rollups.rebuilding import SpanOfSums, differences, rebuild
from vllm_cost_meter.ledger.schema import energy_sums, metadata
from vllm_cost_meter.ledger.upkeep.kinds import RowKind, kind_of_rows
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.snapshot import ClassTotals

ROOT = Path(__file__).parents[2]
Rows = dict[str, set[tuple[Any, ...]]]


# What a bill uses otherwise in one hour.
TWO_HOURS = (UsagePiece(HOUR - 1, 60, 120, 5, 3), UsagePiece(HOUR, 40, 80, 3, 2))


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def fill(
    path: Path, run_id: str = "run", bills: int = 30, *, first: int = 1, number: int = 1
) -> None:
    """Write bills `first` to `bills` of a run, with the snapshot after the last one.

    Every third one is of two hours. Every fourth reply names no model, as its bill does, and so has
    a row of its own.
    """
    every = [
        part(seq, f"{run_id}-{seq}", run_id=run_id, **({} if seq % 3 else {"pieces": TWO_HOURS}))
        for seq in range(1, bills + 1)
    ]
    billed = sum(one.bill.gpu_time_ns for one in every)
    energies = tuple(RequestEnergy(seq, HOUR, 30, None) for seq in range(first, bills + 1))
    classes = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 30 * bills}
    state = snapshot(
        every,
        number,
        run_id,
        totals=ClassTotals(requests=billed, idle=1000, tail=3),
        energy=RunEnergy(30 * bills, None, 0, classes, (), {HOUR: classes}, energies),
    )
    writer = LedgerWriter(url_of(path))
    writer.start()
    replies = [
        replace(http(f"{run_id}-{seq}", at=seq), **({} if seq % 4 else {"model": None}))
        for seq in range(first, bills + 1)
    ]
    writer.commit(*every[first - 1 :], *replies, state).result(60)
    writer.close()


def rows_of(path: Path) -> Rows:
    """Return all rows of a ledger by table, with their columns in the schema's order."""
    with closing(sqlite3.connect(path)) as connection:
        return {
            name: set(connection.execute(f"SELECT {', '.join(table.c.keys())} FROM {name}"))
            for name, table in metadata.tables.items()
        }


def kept_tables() -> dict[str, Table]:
    """Return the tables whose rows are facts of their own; sums are made anew of these."""
    return {
        name: table
        for name, table in metadata.tables.items()
        if kind_of_rows(table) is not RowKind.SUM
    }


def without_sums(rows: Rows) -> Rows:
    return {name: rows[name] for name in kept_tables()}


def wrong_sums(path: Path) -> list[SpanOfSums | BillSums | str]:
    """Return the sums of a ledger that its rows do not add up to."""
    engine = open_database(url_of(path), create=False)
    try:
        with engine.connect() as connection:
            right = {sums.run_id: sums for sums in sums_of_rows(connection)}
            stored = stored_sums(connection)
            wrong = [stored.get(id, id) for id in right | stored if right.get(id) != stored.get(id)]
            e = energy_sums.c
            energies = {
                row.run_id: row.energy_mj
                for row in connection.execute(select(e.run_id, e.energy_mj))
            }
            if energies != energy_of_rows(connection):
                wrong.append(f"energies {energies}")
            return [*wrong, *differences(connection)]
    finally:
        engine.dispose()


def differences_of_audits(full: Mapping[str, Any], by_sums: Mapping[str, Any]) -> list[str]:
    """Return where an audit that reads all bills and one that reads their sums do not agree."""
    only_full = dict.fromkeys(("uneven_bills", "changed", "sums_difference_block_ms"))
    found = []
    for of in ("runs", "without_totals"):
        expected = [{**run, **only_full} for run in full[of]]
        found += [
            f"audits differ: {a} and by sums {b}"
            for a, b in zip(expected, by_sums[of], strict=True)
            if a != b
        ]
    rest = {"full", "runs", "without_totals"}
    found += [
        f"audits differ in {name}: {full[name]} and by sums {by_sums[name]}"
        for name in full.keys() - rest
        if full[name] != by_sums[name]
    ]
    return found


def sums_again(path: Path) -> None:
    """Make the sums of a ledger anew, of rows that a test has changed."""
    engine = open_database(url_of(path), create=False)
    with writing(engine).begin() as connection:
        rebuild(connection)
    engine.dispose()


def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes for a page that a disk has spoilt, the same each time."""
    return random.Random(seed).randbytes(size)


def sql(path: Path, statement: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


class Server:
    """A process that writes to a ledger as a server does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first = json.loads(process.stdout.readline())["committed"]

    def stop(self) -> int:
        """Let it end; return how many bills it committed."""
        self.process.stdin.close()
        committed = json.loads(self.process.stdout.readlines()[-1])["committed"]
        self.process.wait()
        return committed


@contextmanager
def server(path: Path, commits_per_s: float = 0, snapshots: int = sys.maxsize) -> Iterator[Server]:
    """Run such a process; it commits one bill before it is there, then so many each second.

    A snapshot comes with each of the first `snapshots` bills. After each commit it prints how many
    bills it has committed.
    """
    arguments = [str(path), str(commits_per_s), str(snapshots)]
    command = [sys.executable, "-m", "tests.support.upkeep", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def _serve(path: Path, commits_per_s: float, snapshots: int) -> None:
    import select
    import time

    writer = LedgerWriter(url_of(path))
    writer.start()
    bills, due = [], time.monotonic()
    while True:
        bills.append(part(len(bills) + 1, f"live-{len(bills) + 1}", run_id="live"))
        told = [snapshot(bills, len(bills), "live")] if len(bills) <= snapshots else []
        writer.commit(bills[-1], http(f"live-{len(bills)}"), *told)
        writer.commit().result(60)
        print(json.dumps({"committed": len(bills)}), flush=True)
        due += 1 / commits_per_s if commits_per_s else 3600
        if select.select([sys.stdin], [], [], max(due - time.monotonic(), 0))[0]:
            break
    writer.close()
    print(json.dumps({"committed": len(bills)}), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
