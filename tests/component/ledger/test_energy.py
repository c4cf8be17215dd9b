"""The energy of requests, tenants and runs in the ledger: sums by hand, and what is null.

Snapshots say what an honest engine would; `test_energy_meter.py` has those of the real one.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import HOUR, T0, make_bill, make_part, make_snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot

NOW = T0 + 10**9


class Ledger:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = LedgerWriter(f"sqlite:///{path}")
        self._writer.start()
        self._writer.commit().result(10)
        self.reader = LedgerReader(f"sqlite:///{path}")

    def write(self, *records: EngineRequest | Snapshot) -> None:
        self._writer.commit(*records).result(10)

    def close(self) -> None:
        self._writer.close()
        self.reader.close()

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute(statement).fetchall()

    def request(self, http_request_id: str) -> tuple[int | None, str | None]:
        row = self.reader.request(self.reader.find(http_request_id)[0])
        listed = self.reader.requests()["requests"]
        (same,) = [each for each in listed if each["http_request_id"] == http_request_id]
        assert (same["energy_mj"], same["energy_reason"]) == (
            row["energy_mj"],
            row["energy_reason"],
        )
        return row["energy_mj"], row["energy_reason"]

    def report(self, *hours: int) -> dict[str, Any]:
        return self.reader.tenants(*hours, as_of=AsOf(NOW, 0))

    def rows(self, *hours: int) -> dict[str, tuple[int | None, int | None]]:
        """Return energy and number of unknown requests by tenant and class, if there is either."""
        rows = self.report(*hours)["tenants"]
        found = {row["tenant"]: (row["energy_mj"], row["energy_unknown_requests"]) for row in rows}
        return {name: each for name, each in found.items() if each not in ((0, None), (None, None))}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.db")
    yield ledger
    ledger.close()


def part(seq: int, tenant: str = "alice", hours: tuple[int, ...] = (HOUR,)) -> EngineRequest:
    """One engine request, in an HTTP request of its own: `http-run-SEQ`."""
    pieces = tuple(UsagePiece(hour, 100, 200, 8, 5) for hour in hours)
    return make_part(make_bill(seq=seq, pieces=pieces), tenant=tenant)


def told(seq: int, mj: int | None, hour: int = HOUR) -> RequestEnergy:
    return RequestEnergy(seq, hour, mj, "error" if mj is None else None)


def energy(*told: RequestEnergy, hours: dict[int, dict[str, int]] | None = None, **mj: int):
    """What an engine says that told these requests, and used this besides, all of it in HOUR."""
    classes = dict.fromkeys(ENERGY_CLASSES, 0) | mj
    classes["requests"] += sum(each.energy_mj or 0 for each in told)
    return RunEnergy(
        sum(classes.values()), None, 0, classes, (), hours or {HOUR: classes}, tuple(told)
    )


def snapshot(energy: RunEnergy, last_seq: int = 9, **changes: Any) -> Snapshot:
    totals = ClassTotals(requests=300 * last_seq, idle=1_000)
    return make_snapshot(
        **{"totals": totals, "last_seq": last_seq, "billed_ns": totals.requests, **changes},
        energy=energy,
    )


# Requests


def test_the_energy_of_a_request_is_pending_until_a_snapshot_tells_it(ledger):
    ledger.write(part(1))
    assert ledger.request("http-run-1") == (None, "pending")
    ledger.write(snapshot(energy(idle=5), last_seq=1))
    assert ledger.request("http-run-1") == (None, "pending")
    ledger.write(snapshot(energy(told(1, 700), idle=5), last_seq=1, number=2))
    assert ledger.request("http-run-1") == (700, None)


def test_an_energy_may_come_before_the_bill_through_another_api_server(ledger):
    ledger.write(snapshot(energy(told(1, 700)), last_seq=1))
    ledger.write(part(1))
    assert ledger.request("http-run-1") == (700, None)


def test_a_request_whose_energy_is_unknown_says_why(ledger):
    ledger.write(part(1), snapshot(energy(told(1, None)), last_seq=1))
    assert ledger.request("http-run-1") == (None, "error")


def test_a_request_of_an_engine_that_counts_no_energy_has_the_reason_of_the_engine(ledger):
    never = RunEnergy(None, "no_device: vLLM runs on cpu, not on NVIDIA GPUs", 1_000)
    ledger.write(part(1), snapshot(never, last_seq=1))
    assert ledger.request("http-run-1") == (None, never.reason)
    assert ledger.sql("SELECT * FROM request_energy") == []
    assert ledger.sql("SELECT * FROM energy_hours") == []


def test_a_request_that_ran_in_two_hours_used_the_sum_and_of_one_unknown_hour_nothing_known(
    ledger,
):
    ledger.write(part(1), part(2))
    two = (told(1, 700), told(1, 30, HOUR + 1), told(2, 50), told(2, None, HOUR + 1))
    ledger.write(snapshot(energy(*two), last_seq=2))
    assert ledger.request("http-run-1") == (730, None)
    assert ledger.request("http-run-2") == (None, "error")


def test_an_exchange_used_what_its_parts_used_if_all_are_known(ledger):
    ledger.write(*(replace(part(seq), http_request_id="h") for seq in (1, 2)))
    ledger.write(snapshot(energy(told(1, 700)), last_seq=2))
    assert ledger.request("h") == (None, "pending")
    ledger.write(snapshot(energy(told(2, 20), requests=700), last_seq=2, number=2))
    assert ledger.request("h") == (720, None)
    parts = ledger.reader.request(ledger.reader.find("h")[0])["parts"]
    assert [(each["energy_mj"], each["energy_reason"]) for each in parts] == [
        (700, None),
        (20, None),
    ]


# Writing


def test_what_is_told_twice_is_written_once_and_the_first_stands(ledger):
    for number, mj in ((1, 700), (2, 999)):
        ledger.write(snapshot(energy(told(1, mj)), number=number))
    assert ledger.sql("SELECT * FROM request_energy") == [("run", 1, HOUR, 700, None)]


def test_two_snapshots_in_one_batch_keep_what_either_told(ledger):
    ledger.write(
        snapshot(energy(told(2, 20), requests=700), number=2),
        snapshot(energy(told(1, 700)), number=1),
    )
    assert ledger.sql("SELECT seq, energy_mj FROM request_energy") == [(1, 700), (2, 20)]
    assert ledger.sql("SELECT energy_mj FROM snapshots") == [(720,)]


def test_an_older_snapshot_that_comes_late_overwrites_no_energy(ledger):
    ledger.write(snapshot(energy(idle=9), number=2))
    ledger.write(snapshot(energy(idle=5), number=1))
    assert ledger.sql("SELECT energy_mj, idle_mj FROM snapshots") == [(9, 9)]
    assert ledger.sql("SELECT number, idle_mj FROM energy_hours") == [(2, 9)]


# Reports


def test_the_rows_and_what_is_nobodys_add_up_to_the_energy_of_the_engine(ledger):
    ledger.write(part(1), part(2), part(3, "bob"))
    ledger.write(
        snapshot(
            energy(told(1, 700), told(2, 20), told(3, 5), idle=70, in_flight=8, unattributed=2),
            last_seq=3,
        )
    )
    assert ledger.rows() == {
        "alice": (720, 0),
        "bob": (5, 0),
        "__idle__": (70, None),
        "__in_flight__": (8, None),
    }
    report = ledger.report()
    assert (report["energy_mj"], report["requests_mj"], report["unattributed_mj"]) == (805, 725, 2)
    summary = ledger.reader.summary(as_of=AsOf(NOW, 0))
    assert (summary["idle_mj"], summary["in_flight_mj"], summary["startup_mj"]) == (70, 8, None)


def test_a_tenant_is_charged_with_what_is_known_and_the_rest_is_counted(ledger):
    ledger.write(*(part(seq) for seq in (1, 2, 3)), part(4, "bob"))
    ledger.write(snapshot(energy(told(1, 700), told(2, None), told(4, None), idle=3), last_seq=4))
    # The second is unknown, the third not told yet; of bob nothing is known.
    assert ledger.rows() == {"alice": (700, 2), "bob": (None, 1), "__idle__": (3, None)}


def test_where_no_engine_counts_energy_all_is_null_and_nothing_0(ledger):
    ledger.write(part(1), snapshot(RunEnergy(None, "no_device: none"), last_seq=1))
    assert ledger.rows() == {}
    report = ledger.report()
    assert (report["energy_mj"], report["requests_mj"], report["unattributed_mj"]) == (None,) * 3
    assert all(row["energy_mj"] is None for row in report["tenants"])


def test_an_hour_has_its_own_energy_and_unknown_requests(ledger):
    ledger.write(part(1, hours=(HOUR, HOUR + 1)), part(2, "bob", hours=(HOUR + 1,)))
    requests = (told(1, 700), told(1, None, HOUR + 1))
    none = dict.fromkeys(ENERGY_CLASSES, 0)
    hours = {HOUR: {**none, "requests": 700, "idle": 5}, HOUR + 1: {**none, "idle": 6}}
    ledger.write(snapshot(energy(*requests, idle=11, hours=hours), last_seq=2))
    # Bob's request finished in this hour, and used nothing in it.
    assert ledger.rows(HOUR, HOUR + 1) == {
        "alice": (700, 0),
        "bob": (0, 0),
        "__idle__": (5, None),
    }
    assert ledger.rows(HOUR + 1, HOUR + 2) == {
        "alice": (None, 1),
        "bob": (None, 1),
        "__idle__": (6, None),
    }
    assert ledger.report(HOUR, HOUR + 1)["energy_mj"] == 705
    assert ledger.report(HOUR + 2, HOUR + 3)["energy_mj"] is None


def test_engines_that_count_and_others_that_do_not_are_told_apart(ledger):
    ledger.write(part(1), make_part(make_bill(run_id="other")))
    ledger.write(snapshot(energy(told(1, 700), idle=5), last_seq=1))
    none = RunEnergy(None, "no_counter: too old", 1_000)
    ledger.write(snapshot(none, last_seq=1, run_id="other", engine_index=1))
    assert ledger.rows() == {"alice": (700, 1), "__idle__": (5, None)}
    runs = {run["run_id"]: run for run in ledger.report()["runs"]}
    assert (runs["run"]["energy_mj"], runs["run"]["energy_reason"]) == (705, None)
    assert (runs["other"]["energy_mj"], runs["other"]["energy_unknown_ns"]) == (None, 1_000)
    assert runs["other"]["energy_reason"] == "no_counter: too old"


def test_a_bill_after_the_cut_is_not_in_the_report_and_neither_is_its_energy(ledger):
    ledger.write(part(1), part(2), snapshot(energy(told(1, 700)), last_seq=1))
    ledger.sql("INSERT INTO request_energy VALUES ('run', 2, 500000, 50, NULL)")
    assert ledger.rows() == {"alice": (700, 0)}
    assert ledger.reader.audit(as_of=AsOf(NOW, 0))["runs"][0]["energy_difference_mj"] == 0


def test_what_a_dead_engine_had_in_flight_is_lost(ledger):
    ledger.write(snapshot(energy(in_flight=40, lost=2)))
    later = ledger.reader.tenants(as_of=AsOf(NOW + 10**12, 0))["tenants"]
    rows = {row["tenant"]: row["energy_mj"] for row in later}
    assert (rows["__in_flight__"], rows["__lost__"]) == (0, 42)


def test_a_run_names_its_gpus(ledger):
    devices = (("NVIDIA L4", "GPU-1"), (None, "MIG-2"))
    ledger.write(snapshot(replace(energy(idle=1), devices=devices)))
    ledger.write(snapshot(energy(idle=1), run_id="other"))
    assert [run["devices"] for run in ledger.report()["runs"]] == [
        None,
        [{"name": "NVIDIA L4", "uuid": "GPU-1"}, {"name": None, "uuid": "MIG-2"}],
    ]


# The audit


def test_the_audit_finds_an_energy_that_is_missing(ledger):
    ledger.write(part(1), snapshot(energy(told(1, 700), idle=5), last_seq=1))
    (run,) = ledger.reader.audit(as_of=AsOf(NOW, 0))["runs"]
    assert (run["energy_mj"], run["energy_difference_mj"], run["balanced"]) == (705, 0, True)
    ledger.sql("DELETE FROM request_energy")
    (run,) = ledger.reader.audit(as_of=AsOf(NOW, 0), full=True)["runs"]
    assert (run["energy_difference_mj"], run["balanced"]) == (700, False)


def test_books_without_energy_balance(ledger):
    ledger.write(part(1), snapshot(RunEnergy(None, "no_device: none"), last_seq=1))
    (run,) = ledger.reader.audit(as_of=AsOf(NOW, 0))["runs"]
    assert (run["energy_mj"], run["energy_difference_mj"], run["balanced"]) == (None, None, True)
