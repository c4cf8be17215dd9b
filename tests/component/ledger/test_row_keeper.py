"""A server keeps the rows of requests for so many days, and trusts no clock that was just set."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.component.ledger.test_reader import HOUR
from tests.support.logs import lines_of
from tests.support.upkeep import fill, rows_of, sql, sums_again, url_of
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.fleet.outbox import begin, begin_again
from vllm_cost_meter.ledger.retention.keeping import FIRST_LOOK_S, LOOK_PAUSE_S, RowKeeper
from vllm_cost_meter.units.time import NS_PER_HOUR

DAY_S = 86_400
# The rows that `fill` makes are of the day before this midnight.
MIDNIGHT_NS = (HOUR + 16) * NS_PER_HOUR


class Clock:
    """A wall clock, and one that nobody sets."""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self.at_s = 1_000.0

    def pass_by(self, seconds: float) -> None:
        self.now_ns += round(seconds * 10**9)
        self.at_s += seconds

    def keeper(
        self, days: int | None, bytes_max: int | None = None, archive: Path | None = None
    ) -> RowKeeper:
        return RowKeeper(days, bytes_max, archive, lambda: self.now_ns, lambda: self.at_s)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = open_database(url_of(path), busy_timeout_s=0.01)
    yield engine
    engine.dispose()


def steps(keeper: RowKeeper, engine: Engine) -> None:
    for _ in range(5):
        keeper.step(engine)


def bills(path: Path) -> int:
    return len(rows_of(path)["requests"])


def test_rows_of_so_many_days_before_today_are_kept(path, engine):
    clock = Clock(MIDNIGHT_NS)
    keeper = clock.keeper(days=2)
    clock.pass_by(DAY_S + FIRST_LOOK_S)
    steps(keeper, engine)
    assert bills(path) == 30
    clock.pass_by(DAY_S)
    steps(keeper, engine)
    assert bills(path) == 0
    assert sql(path, "SELECT max(kept_from_hour) FROM row_cutoffs") == [(HOUR + 16,)]


def test_nothing_is_dropped_right_after_the_start_nor_twice_an_hour(path, engine):
    clock = Clock(MIDNIGHT_NS + 9 * DAY_S * 10**9)
    keeper = clock.keeper(days=2)
    clock.pass_by(FIRST_LOOK_S - 1)
    steps(keeper, engine)
    assert bills(path) == 30
    clock.pass_by(1)
    steps(keeper, engine)
    assert bills(path) == 0
    fill(path, "other")
    clock.pass_by(LOOK_PAUSE_S - 1)
    steps(keeper, engine)
    assert bills(path) == 30
    clock.pass_by(1)
    steps(keeper, engine)
    assert bills(path) == 0


def test_no_row_goes_by_a_clock_that_was_just_set(path, engine):
    clock = Clock(MIDNIGHT_NS)
    keeper = clock.keeper(days=2)
    clock.now_ns += 400 * DAY_S * 10**9
    clock.pass_by(FIRST_LOOK_S)
    steps(keeper, engine)
    assert bills(path) == 30
    clock.now_ns -= 400 * DAY_S * 10**9
    clock.pass_by(FIRST_LOOK_S)
    steps(keeper, engine)
    clock.pass_by(FIRST_LOOK_S)
    steps(keeper, engine)
    assert bills(path) == 30


def test_a_ledger_that_is_busy_is_one_line_and_is_tried_again_in_an_hour(path, engine, caplog):
    clock = Clock(MIDNIGHT_NS + 9 * DAY_S * 10**9)
    keeper = clock.keeper(days=2)
    clock.pass_by(FIRST_LOOK_S)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with lines_of(caplog) as lines:
            steps(keeper, engine)
            (line,) = lines()
    assert "old rows of requests cannot be dropped, trying again in an hour" in line
    assert bills(path) == 30
    clock.pass_by(LOOK_PAUSE_S)
    steps(keeper, engine)
    assert bills(path) == 0


def test_passes_that_nobody_waits_for_drop_rows(path):
    clock = Clock(MIDNIGHT_NS + 9 * DAY_S * 10**9)
    keeper = clock.keeper(days=2)
    loop = ApplyLoop(url_of(path), keeper=keeper)
    clock.pass_by(FIRST_LOOK_S)
    loop.run_pass(is_asked=True)
    assert bills(path) == 30
    for _ in range(5):
        loop.run_pass(is_asked=False)
    assert bills(path) == 0
    loop.close()


# ---- so many bytes


def at_days(path: Path, *days: int) -> None:
    """Let the bills of each run end on a day of its own, so many days before the midnight."""
    for number, day in enumerate(days):
        fill(path, f"run-{number}", bills=200)
        ended = (MIDNIGHT_NS - day * DAY_S * 10**9) // 1000
        run_id = f"run-{number}"
        both = "finished_at = ?1, ended_at = ?1"
        sql(path, f"UPDATE requests SET {both} WHERE run_id = ?2", ended, run_id)
        ids = f"{run_id}-%"
        sql(
            path,
            "UPDATE http_requests SET finished_at = ? WHERE response_id LIKE ?",
            ended,
            "resp-" + ids,
        )
    sums_again(path)


def used(path: Path) -> int:
    pages, free = (sql(path, f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count"))
    return (pages - free) * 4096


def test_the_oldest_days_go_until_no_more_bytes_are_used(tmp_path):
    path = tmp_path / "ledger.db"
    at_days(path, 6, 5, 4, 3)
    engine = open_database(url_of(path))
    clock = Clock(MIDNIGHT_NS)
    bound = used(path) - 200_000
    keeper = clock.keeper(None, bound)
    clock.pass_by(FIRST_LOOK_S)
    steps(keeper, engine)
    assert used(path) <= bound
    left = sorted({row[0] for row in sql(path, "SELECT DISTINCT run_id FROM requests")})
    assert left
    assert left == ["run-0", "run-1", "run-2", "run-3"][4 - len(left) :]
    assert sql(path, "SELECT bills FROM bill_sums") == [(200,)] * 4
    engine.dispose()


def test_a_day_whose_rows_must_stay_holds_up_no_later_one(tmp_path):
    path = tmp_path / "ledger.db"
    at_days(path, 6, 4)
    # No snapshot counts these bills.
    sql(path, "UPDATE snapshots SET last_seq = 0 WHERE run_id = 'run-0'")
    engine = open_database(url_of(path))
    clock = Clock(MIDNIGHT_NS)
    keeper = clock.keeper(None, 1)
    clock.pass_by(FIRST_LOOK_S)
    steps(keeper, engine)
    assert sql(path, "SELECT DISTINCT run_id FROM requests") == [("run-0",)]
    engine.dispose()


def test_rows_of_today_and_of_the_day_before_stay_however_large_the_ledger_is(tmp_path, caplog):
    path = tmp_path / "ledger.db"
    at_days(path, 3, 0)
    engine = open_database(url_of(path))
    clock = Clock(MIDNIGHT_NS + 3600 * 10**9)
    keeper = clock.keeper(None, 1)
    clock.pass_by(FIRST_LOOK_S)
    with lines_of(caplog) as lines:
        steps(keeper, engine)
        clock.pass_by(LOOK_PAUSE_S)
        steps(keeper, engine)
        said = [line for line in lines() if "more than keep_rows_bytes (1)" in line]
    assert len(said) == 1
    assert sql(path, "SELECT DISTINCT run_id FROM requests") == [("run-1",)]
    engine.dispose()


def test_rows_that_a_fleet_lacks_go_for_no_age_but_where_the_ledger_is_too_large(tmp_path, caplog):
    path = tmp_path / "ledger.db"
    at_days(path, 6, 4)
    engine = open_database(url_of(path))
    with writing(engine).begin() as connection:
        begin_again(connection)
        begin(connection)
    clock = Clock(MIDNIGHT_NS)
    by_age = clock.keeper(1)
    clock.pass_by(FIRST_LOOK_S)
    steps(by_age, engine)
    assert len(sql(path, "SELECT DISTINCT run_id FROM requests")) == 2
    by_size = clock.keeper(1, used(path) - 1)
    clock.pass_by(FIRST_LOOK_S)
    with lines_of(caplog) as lines:
        steps(by_size, engine)
        said = [line for line in lines() if "may not be in the fleet" in line]
    assert sql(path, "SELECT DISTINCT run_id FROM requests") == [("run-1",)]
    assert len(said) == 1
    engine.dispose()


def until_done(keeper: RowKeeper, engine: Engine, is_done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_done() and time.monotonic() < deadline_s:
        keeper.step(engine)
        time.sleep(0.01)


def test_with_an_archive_rows_go_into_files_first_and_nobody_waits_for_them(path, engine, tmp_path):
    clock = Clock(MIDNIGHT_NS + 2 * DAY_S * 10**9)
    keeper = clock.keeper(1, archive=tmp_path / "archive")
    keeper.step(engine)
    clock.pass_by(FIRST_LOOK_S)
    until_done(keeper, engine, lambda: bills(path) == 0)
    assert bills(path) == 0
    assert [file.name for file in (tmp_path / "archive" / "requests").iterdir()] == [
        "2027-01-15.parquet"
    ]


def test_while_the_archive_cannot_be_written_no_row_goes_and_the_log_says_so(
    path, engine, tmp_path, caplog
):
    (tmp_path / "archive").write_text("a file")
    clock = Clock(MIDNIGHT_NS + 2 * DAY_S * 10**9)
    keeper = clock.keeper(1, archive=tmp_path / "archive")
    clock.pass_by(FIRST_LOOK_S)
    with lines_of(caplog) as lines:
        steps(keeper, engine)
        (line,) = lines()
    assert bills(path) == 30
    assert "cannot be dropped" in line
    assert "archive: cannot be written: File exists" in line
    (tmp_path / "archive").unlink()
    clock.pass_by(LOOK_PAUSE_S)
    until_done(keeper, engine, lambda: bills(path) == 0)
    assert bills(path) == 0
