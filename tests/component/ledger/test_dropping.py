"""Rows of old requests are dropped: their sums stay, and nothing that is known is forgotten."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select

from tests.component.ledger.test_reader import HOUR, NOW, http, part, snapshot
from tests.support.builders import make_open, reply_of
from tests.support.upkeep import fill, rows_of, sql, url_of, wrong_sums
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion, compared
from vllm_cost_meter.ledger.economics.figures import OF_SLO
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.retention.dropping import (
    DroppedCounts,
    Dropper,
    count_rows,
    cutoff_of,
    drop_rows,
    newest_cutoff,
)
from vllm_cost_meter.ledger.schema import requests
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.ledger.upkeep.repairing import repair
from vllm_cost_meter.units.time import NS_PER_HOUR

# All that `part` and `http` make ended on the day before this midnight.
MIDNIGHT = HOUR + 16
LATER_NS = (MIDNIGHT + 1) * NS_PER_HOUR
KEPT_FROM = "2027-01-16T00:00:00.000000Z"
AT = AsOf(NOW, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = open_database(url_of(path))
    yield engine
    engine.dispose()


def put(engine: Engine, *records: Any) -> None:
    with writing(engine).begin() as connection:
        write(connection, records)


def left(engine: Engine) -> tuple[list[int], list[str]]:
    """Return the numbers of the bills and the ids of the HTTP requests that are left."""
    with engine.connect() as connection:
        bills = connection.execute(select(requests.c.seq).order_by(requests.c.seq))
        ids = connection.execute(select(replies.c.http_request_id).order_by("http_request_id"))
        return list(bills.scalars()), list(ids.scalars())


def audit(path: Path) -> Any:
    with LedgerReader(url_of(path)) as reader:
        by_sums, by_rows = reader.audit(AT), reader.audit(AT, full=True)
    assert by_sums["balanced"] == by_rows["balanced"]
    return by_rows


def test_an_exchange_stays_whole_as_long_as_anything_of_it_ended_later(engine):
    bills = [part(1, "h1"), part(2, "h1", finished_at_ns=LATER_NS), part(3, "h2"), part(4, None)]
    put(
        engine, *bills, http("h1"), http("h2", finished_at_ns=LATER_NS), http("h3"), snapshot(bills)
    )
    assert drop_rows(engine, MIDNIGHT) == DroppedCounts(1, 1)
    assert left(engine) == ([1, 2, 3], ["h1", "h2"])
    assert drop_rows(engine, MIDNIGHT + 24) == DroppedCounts(3, 2)
    assert left(engine) == ([], [])


def test_an_exchange_with_a_request_that_has_no_bill_stays(engine):
    bills = [part(1, "h1"), part(2, "h2")]
    put(engine, *bills, http("h1"), http("h2"), snapshot(bills))
    put(engine, make_open(request_id="other", http_request_id="h1"))
    drop_rows(engine, MIDNIGHT)
    assert left(engine) == ([1], ["h1"])


def test_bills_beyond_the_last_snapshot_stay_and_those_of_a_run_without_one_go(engine, path):
    bills = [part(seq, f"h{seq}") for seq in (1, 2, 3)]
    put(engine, *bills, snapshot(bills[:2]), part(9, "bare", run_id="bare"))
    before = audit(path)
    assert before["rows_kept_from"] is None
    drop_rows(engine, MIDNIGHT)
    assert left(engine) == ([3], [])
    assert audit(path) == {**before, "rows_kept_from": KEPT_FROM}
    assert before["without_totals"][0]["missing_bills"] == ["1-8"]


def test_a_bill_that_comes_again_is_known_and_one_that_was_missing_is_counted(engine, path):
    bills = [part(seq, f"h{seq}") for seq in range(1, 6)]
    put(engine, *bills[:2], *bills[3:], snapshot(bills))
    drop_rows(engine, MIDNIGHT)
    assert audit(path)["runs"][0]["missing_bills"] == ["3"]
    put(engine, *bills[:2], *(http(f"h{seq}") for seq in range(1, 6)))
    assert audit(path)["runs"][0]["missing_bills"] == ["3"]
    assert left(engine)[0] == []
    put(engine, *bills)
    assert left(engine)[0] == [3]
    assert audit(path)["balanced"] is True
    drop_rows(engine, MIDNIGHT)
    assert left(engine) == ([], [])
    assert audit(path)["balanced"] is True
    assert wrong_sums(path) == []


def test_an_open_request_whose_bill_may_have_been_dropped_does_not_come_back(engine):
    bill = part(1, "h1")
    put(engine, bill, snapshot([bill]))
    drop_rows(engine, MIDNIGHT)
    again = make_open(request_id=bill.bill.request_id, started_at_ns=bill.started_at_ns)
    put(engine, again, replace(again, request_id="new", started_at_ns=LATER_NS))
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT request_id FROM open_requests").scalars().all()
    assert found == ["new"]


def test_whoever_reads_does_not_wait_for_bills_that_were_dropped(engine, path):
    bills = [part(seq, f"h{seq}") for seq in range(1, 4)]
    put(engine, *bills, snapshot(bills))
    drop_rows(engine, MIDNIGHT)
    with LedgerReader(url_of(path)) as reader:
        # It would wait for so long.
        reader.tenants(as_of=AsOf(NOW, 10_000))


def test_steps_are_small_and_a_pass_that_was_stopped_goes_on(engine):
    bills = [part(seq, f"h{seq}") for seq in range(1, 8)]
    put(engine, *bills, *(http(f"h{seq}") for seq in range(1, 8)), snapshot(bills))
    dropper = Dropper(engine, MIDNIGHT, bills_at_once=3)
    assert dropper.step() == DroppedCounts(3, 3)
    with engine.connect() as connection:
        assert count_rows(connection, MIDNIGHT) == DroppedCounts(4, 4)
    assert drop_rows(engine, MIDNIGHT) == DroppedCounts(4, 4)


def test_a_pass_begins_at_a_midnight(engine):
    with pytest.raises(ValueError, match="midnight, got 500017"):
        Dropper(engine, MIDNIGHT + 1)


@pytest.mark.parametrize("date", ["2027-01-16", "2027-1-1", "yesterday", "2027-02-30", "", "10000"])
def test_rows_of_today_and_of_the_day_before_cannot_be_dropped(date):
    now_ns = (MIDNIGHT - 1) * NS_PER_HOUR  # on 2027-01-15
    assert newest_cutoff(now_ns) == MIDNIGHT - 48
    assert cutoff_of("2027-01-14", now_ns) == MIDNIGHT - 48
    with pytest.raises(ValueError, match="before: expected a date such as .* 2027-01-14 at the"):
        cutoff_of(date, now_ns)


# ---- what says that rows are gone


def test_answers_that_need_rows_say_from_when_on_there_are_any(engine, path):
    bills = [part(1, "h1"), part(2, "h2", finished_at_ns=LATER_NS)]
    put(engine, *bills, http("h1"), http("h2", finished_at_ns=LATER_NS), snapshot(bills))
    with LedgerReader(url_of(path)) as reader:
        assert reader.kept_from() is None
        assert reader.requests()["rows_kept_from"] is None
        # Nothing is that old, so nothing is gone.
        drop_rows(engine, MIDNIGHT - 24)
        assert reader.kept_from() is None
        drop_rows(engine, MIDNIGHT)
        assert reader.kept_from() == KEPT_FROM
        page = reader.requests()
        assert page["rows_kept_from"] == KEPT_FROM
        assert [row["http_request_id"] for row in page["requests"]] == ["h2"]


def test_figures_of_rows_are_within_a_percent_or_null_where_rows_were_dropped(engine, path):
    bills = [part(seq, f"h{seq}") for seq in range(1, 11)]
    later = part(11, "h11", finished_at_ns=LATER_NS)
    replies = [http(f"h{seq}") for seq in range(1, 11)]
    put(engine, *bills, *replies, later, http("h11", finished_at_ns=LATER_NS))
    put(engine, snapshot([*bills, later]))
    bounds = Declared(ttft_ms=11.0)
    with LedgerReader(url_of(path)) as reader:
        exact = economics(reader, bounds, as_of=AT)["figures"]
        assert exact["good_requests"] == 5
        drop_rows(engine, MIDNIGHT)
        whole = economics(reader, bounds, as_of=AT)
        assert whole["rows_kept_from"] == KEPT_FROM
        found = whole["figures"]
        for name in OF_SLO:
            assert found[name] is None, name
        assert whole["slo"]["met"] is None
        for name in ("ttft_p50_ms", "ttft_p99_ms", "e2e_p99_ms"):
            assert found[name] == pytest.approx(exact[name], rel=0.0101)
        rest = {name for name in exact if name not in OF_SLO and "_p" not in name}
        assert {name: found[name] for name in rest} == {name: exact[name] for name in rest}
        # Nothing of a later window was dropped.
        assert economics(reader, bounds, MIDNIGHT, as_of=AT)["figures"]["good_requests"] == 0


def test_requests_that_were_dropped_are_compared_with_no_api(engine, path):
    bill = part(1, "h1")
    put(engine, bill, http("h1"), snapshot([bill]))
    drop_rows(engine, MIDNIGHT)
    window = "2027-01-15T00:00:00Z,2027-01-17T00:00:00Z"
    with (
        LedgerReader(url_of(path)) as reader,
        pytest.raises(ValueError, match="window: expected one from 2027-01-16T00:00:00"),
    ):
        compared(reader, ComparisonQuestion(window), [], None)


# ---- the file


def test_an_old_copy_brings_no_dropped_row_back(path, tmp_path):
    fill(path, bills=20)
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    engine = open_database(url_of(path))
    drop_rows(engine, MIDNIGHT)
    before = rows_of(path)
    assert merge(url_of(path), [copy], 1)
    assert rows_of(path) == before
    assert audit(path)["balanced"] is True
    # And the other way round: what was dropped there is not in the rows here any more.
    merge(url_of(copy), [path], 1)
    assert rows_of(copy)["requests"] == set()
    assert audit(copy)["balanced"] is True
    assert wrong_sums(copy) == []
    engine.dispose()


def test_a_reply_beside_another_bill_of_a_dropped_exchange_does_not_come_back(tmp_path):
    dropped, copy = tmp_path / "dropped.db", tmp_path / "copy.db"
    first, second = (part(1, "h1", run_id=run) for run in ("first", "second"))
    engine = open_database(url_of(dropped))
    put(engine, first, http("h1"))
    drop_rows(engine, MIDNIGHT)
    engine.dispose()
    engine = open_database(url_of(copy))
    put(engine, second, reply_of(second, http("h1")))
    put(engine, first)
    engine.dispose()
    assert sql(copy, "SELECT run_id FROM requests WHERE reply_status = 200") == [("second",)]
    other_way = tmp_path / "other_way.db"
    other_way.write_bytes(copy.read_bytes())
    merge(url_of(dropped), [copy], 1)
    merge(url_of(other_way), [dropped], 1)
    for path in (dropped, other_way):
        assert sql(path, "SELECT sum(requests) FROM rollup_hours") == [(1,)]
        assert sql(path, "SELECT count(*) FROM replies") == [(0,)]
        assert sql(path, "SELECT run_id, ended_at = finished_at FROM requests") == [("second", 1)]
        assert wrong_sums(path) == []


def test_ledgers_that_both_dropped_what_the_other_did_not_are_not_merged(tmp_path):
    paths = [tmp_path / "one.db", tmp_path / "other.db"]
    bills = [part(seq, f"h{seq}") for seq in (1, 2)]
    for path, bill in zip(paths, bills, strict=True):
        engine = open_database(url_of(path))
        put(engine, bill, snapshot(bills))
        drop_rows(engine, MIDNIGHT)
        engine.dispose()
    before = rows_of(paths[0])
    with pytest.raises(LedgerError, match="got bills 2 dropped only there and bills 1 only here"):
        merge(url_of(paths[0]), [paths[1]], 1)
    assert rows_of(paths[0]) == before


def test_a_bill_dropped_beyond_a_snapshot_that_comes_later_is_refused(tmp_path):
    paths = [tmp_path / "one.db", tmp_path / "other.db"]
    bills = [part(seq, f"h{seq}") for seq in (1, 2)]
    for path, records in zip(paths, (bills, [snapshot(bills[:1])]), strict=True):
        engine = open_database(url_of(path))
        put(engine, *records)
        drop_rows(engine, MIDNIGHT)
        engine.dispose()
    with pytest.raises(LedgerError, match="one that counts 1 bills, and bill 2 dropped"):
        merge(url_of(paths[0]), [paths[1]], 1)


def test_a_repair_keeps_what_dropped_rows_add_up_to(path):
    fill(path, bills=20)
    engine = open_database(url_of(path))
    drop_rows(engine, MIDNIGHT)
    engine.dispose()
    before, answer = rows_of(path), audit(path)
    repair(url_of(path), NOW, force=True)
    assert rows_of(path) == before
    assert audit(path) == answer
    assert answer["balanced"] is True
    assert [check.name for check in check_ledger(url_of(path), full=True) if not check.ok] == []


def test_an_audit_finds_that_what_dropped_bills_add_up_to_was_changed(path):
    fill(path, bills=20)
    engine = open_database(url_of(path))
    drop_rows(engine, MIDNIGHT)
    engine.dispose()
    sql(path, "UPDATE dropped_hours SET prefill_ns = prefill_ns + 1")
    repair(url_of(path), NOW, force=True)
    assert audit(path)["balanced"] is False
    with open_database(url_of(path)).connect() as connection:
        assert connection.execute(select(func.count()).select_from(requests)).scalar_one() == 0
