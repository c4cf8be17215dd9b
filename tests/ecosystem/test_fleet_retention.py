"""A fleet's database keeps the rows of requests for so many days, and no figure changes by that.

Method: the same records go into ledgers that send, and into one ledger that all share. Whatever the
fleet drops and gets again, it must have the answers of that one.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from typer.testing import CliRunner

from tests.component.ledger.test_reader import HOUR
from tests.ecosystem.postgresql import Server
from tests.ecosystem.roles import as_role, make_roles
from tests.ecosystem.test_fleet import changed, records_of, send, write
from tests.ecosystem.test_fleet_rows import figures
from tests.ecosystem.test_fleet_versions import made_of
from tests.ecosystem.test_postgresql import AS_OF, BOOK, _figures, rows, written
from tests.support.fleet import sent
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.fleet import upkeep
from vllm_cost_meter.ledger.fleet.migrating import migration_sql
from vllm_cost_meter.ledger.fleet.outbox import begin_again
from vllm_cost_meter.ledger.fleet.rows.dropping import FleetDropper
from vllm_cost_meter.ledger.fleet.rows.partitions import (
    PARTITIONED,
    drop_empty,
    is_partitioned,
    make_partitions,
    partition_sql,
)
from vllm_cost_meter.ledger.fleet.upkeep import migrate_fleet, tidy_fleet
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.retention.dropping import DroppedCounts, all_of, drop_rows
from vllm_cost_meter.records.requests import HttpRequest
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

# The midnight after all of it.
LAST_DAY = HOUR // HOURS_PER_DAY
CUTOFF = (LAST_DAY + 1) * HOURS_PER_DAY
LONG_AGO = "'2000-01-01T00:00:00.000000Z'"
ROWS = "SELECT count(*) FROM kept_requests"


def dropped(url: str, **options: int) -> DroppedCounts:
    """Drop what ended before the cutoff, long after anything came."""
    changed(url, f"UPDATE shipments SET received_at = {LONG_AGO}")
    return dropped_now(url, **options)


def dropped_now(url: str, **options: int) -> DroppedCounts:
    engine = create_engine(url)
    dropper = FleetDropper.of(engine, CUTOFF, **options)
    counts = all_of(dropper.steps())
    engine.dispose()
    return counts


def partition(url: str, *, is_first: bool) -> None:
    """Have partitions of the days of all rows, or drop those that are empty."""
    if is_first:
        migrate_fleet(url, by_day=True)
    engine = create_engine(url)
    with engine.begin() as connection:
        for each in PARTITIONED if is_partitioned(connection) else ():
            drop_empty(connection, each, CUTOFF)
            make_partitions(connection, each, LAST_DAY)
    engine.dispose()


def drop_in_ledger(url: str) -> None:
    engine = open_database(url)
    drop_rows(engine, CUTOFF)
    engine.dispose()


def join_anew(url: str) -> None:
    engine = open_database(url)
    with writing(engine).begin() as connection:
        begin_again(connection)
    engine.dispose()


def test_all_figures_stay_when_rows_are_dropped_and_come_again(tmp_path: Path, url: str) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    written(own, are_split=True)
    send(own, url)
    before = _figures(url)
    assert before == _figures(own)
    assert dropped(url, bills_at_once=7) == (48, 48)
    assert rows(url, ROWS) == [(0,)]
    assert _figures(url) == before
    join_anew(own)
    send(own, url)
    assert rows(url, ROWS) == [(0,)]
    assert _figures(url) == before


def test_a_reader_is_told_from_when_on_rows_are_kept(tmp_path: Path, url: str) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    written(own)
    send(own, url)
    dropped(url)
    drop_in_ledger(own)
    with LedgerReader(url, book=BOOK) as fleet, LedgerReader(own, book=BOOK) as ledger:
        told = [each.audit(as_of=AS_OF)["rows_kept_from"] for each in (fleet, ledger)]
    assert told[0] == told[1] is not None


def test_no_row_goes_while_others_of_its_request_may_be_on_their_way(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    written(own)
    send(own, url)
    # It has sent what it held a moment ago, and the bills are of a day to come.
    assert dropped_now(url).bills == 0
    changed(url, "UPDATE shipments SET sent_at = '2030-01-01T00:00:00.000000Z'")
    assert dropped_now(url).bills == 48


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_dropped_sent_and_sent_again_in_between_all_answers_are_those_of_one_ledger(
    tmp_path: Path, url: str, seed: int
) -> None:
    chance = random.Random(seed)
    alone = f"sqlite:///{tmp_path}/alone.db"
    ledgers = {run: f"sqlite:///{tmp_path}/{run}.db" for run in ("one", "two")}
    kinds = {"one": "fleet", "two": chance.choice(["fleet", "none"])}
    left = {run: records_of(run) for run in ledgers}
    by_day_at = chance.randint(1, 3) if seed % 2 else None
    for each in (alone, *ledgers.values()):
        open_database(each).dispose()
    while any(left.values()):
        run = chance.choice([run for run, of_run in left.items() if of_run])
        batch = [left[run].pop(0) for _ in range(min(chance.randint(1, 25), len(left[run])))]
        if left[run] and isinstance(left[run][0], HttpRequest):
            batch.append(left[run].pop(0))  # a day has passed since a bill before it goes
        write(ledgers[run], *batch)
        write(alone, *batch)
        doings: list[Callable[[], Any]] = [
            lambda: sent(ledgers["one"], url, rows=kinds["one"]),
            lambda: sent(ledgers["two"], url, rows=kinds["two"]),
            lambda: dropped(url),
            lambda: drop_in_ledger(ledgers["one"]),
            lambda: join_anew(ledgers[chance.choice(["one", "two"])]),
        ]
        for run_id, each in ledgers.items():  # the fleet has its tables, and knows both
            sent(each, url, rows=kinds[run_id])
        for doing in chance.sample(doings, 3):
            doing()
        if by_day_at is not None:
            by_day_at -= 1
            partition(url, is_first=by_day_at == 0)
    for run, each in ledgers.items():
        sent(each, url, stops=True, rows=kinds[run])
    assert figures(url) == figures(alone)
    dropped(url)
    assert figures(url) == figures(alone)
    with LedgerReader(url, book=BOOK) as reader:
        assert reader.audit(AS_OF, full=True)["balanced"] is True


# ---- partitions


def partitions_of(url: str) -> dict[str, int]:
    """Return how many rows of bills each partition has, by the end of its name."""
    of_bills = "inhparent = 'kept_requests'::regclass"
    names = rows(url, f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE {of_bills}")
    bills = [name for (name,) in names]
    counts = {name: rows(url, f"SELECT count(*) FROM {name}")[0][0] for name in bills}
    return {name.removeprefix("kept_requests_"): count for name, count in counts.items() if count}


def test_the_rows_of_a_day_have_a_partition_and_its_space_is_free_once_they_are_dropped(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_today", lambda connection: LAST_DAY + 1)
    own = f"sqlite:///{tmp_path}/ledger.db"
    written(own, ["before"])
    send(own, url)
    before = _figures(url)
    migrate_fleet(url, by_day=True)
    assert partitions_of(url) == {"rest": 24}
    assert _figures(url) == before

    monkeypatch.setattr(upkeep, "_today", lambda connection: LAST_DAY)
    assert said("tidy", "--fleet", url) == "tidied what 1 ledgers have sent\n"
    assert partitions_of(url) == {"20270115": 24}
    assert _figures(url) == before
    written(own, ["after"])
    send(own, url)
    assert partitions_of(url) == {"20270115": 48}
    assert _figures(url) == _figures(own)

    monkeypatch.setattr(upkeep, "_today", lambda connection: LAST_DAY + 3)
    changed(url, f"UPDATE shipments SET received_at = {LONG_AGO}")
    before = _figures(url)
    assert said("tidy", "--fleet", url, "--keep-rows-days", "3").endswith("of 0 bills" + REST)
    assert said("tidy", "--fleet", url, "--keep-rows-days", "2").endswith("of 48 bills" + REST48)
    assert partitions_of(url) == {}
    assert ("kept_requests_20270115",) not in rows(url, "SELECT relname FROM pg_class")
    assert _figures(url) == before


def test_rows_become_partitions_and_these_come_and_go_while_a_server_sends(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, alone = (f"sqlite:///{tmp_path}/{name}.db" for name in ("own", "alone"))
    send(own, url)
    records = [each for run in ("one", "two", "three") for each in records_of(run)]

    def sends() -> None:
        for at in range(0, len(records), 6):
            for each in (own, alone):
                write(each, *records[at : at + 6])
            sent(own, url)

    times = 0
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sends)
        migrate_fleet(url, by_day=True)
        while not sending.done():
            # By turns the day of the bills is today, and one whose partition goes if it is empty.
            today = LAST_DAY + 3 * (times % 2)
            monkeypatch.setattr(upkeep, "_today", lambda connection, today=today: today)
            tidy_fleet(url, keep_rows_days=2)
            times += 1
        sending.result()
    assert times > 3
    sent(own, url, stops=True)
    assert figures(url) == figures(alone)


REST = " and 0 HTTP requests; their sums stay\n"
REST48 = " and 48 HTTP requests; their sums stay\n"


def said(*words: str) -> str:
    done = CliRunner().invoke(app, ["fleet", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_roles_keep_their_rights_when_tables_and_views_are_made_anew(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    written(own, ["run"])
    send(own, url)
    make_roles(url)
    as_writer, as_reader = (as_role(url, role) for role in ("meter_writer", "meter_reader"))
    before = _figures(as_reader)
    migrate_fleet(url, by_day=True)
    assert _figures(as_reader) == before
    written(own, ["later"])
    send(own, as_writer)
    assert _figures(as_reader) == _figures(own)


def test_the_sql_for_an_administrator_makes_the_same_partitions(url: str, server: Server) -> None:
    by_hand = server.new_database()
    with psycopg.connect(by_hand.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(migration_sql())
        connection.execute(partition_sql())
    migrate_fleet(url, by_day=True)
    changed(url, DROP_DAYS)
    assert made_of(by_hand) == made_of(url)


DROP_DAYS = """
DO $$ DECLARE name TEXT; BEGIN
FOR name IN SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '_20[0-9]{6}$' LOOP
EXECUTE 'DROP TABLE ' || name; END LOOP; END $$
"""
