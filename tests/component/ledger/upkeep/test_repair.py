"""Repair a ledger: whatever pages are spoilt, every row outside of them is saved.

SQLite itself says which rows are where: its table `dbstat` has the number of cells of each page.
"""

import random
import sqlite3
import stat
import struct
from contextlib import closing

import pytest

from tests.support.ledger_writer import LedgerWriter
from tests.support.older import as_version_17
from tests.support.upkeep import (
    fill,
    kept_tables,
    noise,
    rows_of,
    server,
    sql,
    url_of,
    wrong_sums,
)
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, http_requests, metadata, usage_pieces
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.repairing import repair

PAGE = 4096
NOW_NS = 1_800_000_000 * 10**9
ASIDE = "ledger.db.damaged-20270115T080000Z"
BILLS = 400
PAGE_KINDS = (0x02, 0x05, 0x0A, 0x0D)

# Sums are not saved, but made anew of the rows that are.
KEPT = kept_tables()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A ledger of two runs, and what is where in it."""
    path = tmp_path_factory.mktemp("whole") / "ledger.db"
    fill(path, "run", BILLS)
    fill(path, "other", 50)
    return path


@pytest.fixture
def ledger(whole, tmp_path):
    (tmp_path / "ledger.db").write_bytes(whole.read_bytes())
    return tmp_path / "ledger.db"


def pages_of(path):
    """Return (page, tree, kind, cells) of every page that a tree uses."""
    query = "SELECT pageno, name, pagetype, ncell FROM dbstat"
    return sql(path, query)


def spoil(path, *pages, seed=1):
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * PAGE)
            file.write(noise(PAGE, seed + page))


def lost_at_most(path, pages):
    """Return by table how many rows are in these pages: cells of tables, not of indexes."""
    lost = dict.fromkeys(metadata.tables, 0)
    for page, tree, kind, cells in pages_of(path):
        # The version of the schema follows from its tables where it is lost.
        if page in pages and tree in lost and tree != "schema_version":
            without_rowid = not metadata.tables[tree].dialect_options["sqlite"]["with_rowid"]
            lost[tree] += cells if kind == "leaf" or without_rowid else 0
    return lost


def assert_saved(path, before, lost):
    """Assert that a ledger has all rows but those lost, and no row that was not there."""
    after = rows_of(path)
    for name in KEPT:
        assert after[name] <= before[name], name
        assert len(after[name]) == len(before[name]) - lost[name], name
    assert wrong_sums(path) == []
    wrong = [one for one in check_ledger(url_of(path)) if not one.ok]
    assert wrong == []


def test_a_ledger_that_is_not_damaged_stays_as_it_is(ledger):
    before = ledger.read_bytes()
    assert repair(url_of(ledger), NOW_NS) is None
    assert ledger.read_bytes() == before
    assert not ledger.with_name(ASIDE).exists()


def test_by_force_a_sound_ledger_is_written_anew_with_every_row(ledger):
    before = rows_of(ledger)
    done = repair(url_of(ledger), NOW_NS, force=True)
    assert rows_of(ledger) == before
    assert {one.name: one.missing for one in done.tables} == dict.fromkeys(KEPT, 0)
    assert done.missing_bills == {}
    assert (done.unclear_pages, done.foreign_tables) == (0, [])


@pytest.mark.parametrize("table", ["requests", "usage_pieces", "http_requests", "request_energy"])
def test_of_a_table_only_the_rows_in_the_spoilt_leaf_are_lost(ledger, whole, table):
    leaves = [page for page, tree, kind, _ in pages_of(whole) if (tree, kind) == (table, "leaf")]
    # Noise that begins as a page of a tree does would seem to lead to another one.
    spoilt = leaves[1]
    seed = next(n for n in range(100) if noise(PAGE, n + spoilt)[0] not in PAGE_KINDS)
    spoil(ledger, spoilt, seed=seed)
    damaged = ledger.read_bytes()
    done = repair(url_of(ledger), NOW_NS)
    lost = lost_at_most(whole, {spoilt})
    assert lost[table] > 0
    assert_saved(ledger, rows_of(whole), lost)
    (row,) = [one for one in done.tables if one.name == table]
    assert row.saved == len(rows_of(whole)[table]) - lost[table]
    assert row.damaged_pages == 1
    # The others have an index that lists their rows.
    if table not in ("request_energy", "usage_pieces"):
        assert row.missing == lost[table]
    assert done.aside == ledger.with_name(ASIDE)
    assert done.aside.read_bytes() == damaged
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600


def test_lost_bills_are_named_by_their_numbers(ledger, whole):
    leaves = [
        page for page, tree, kind, _ in pages_of(whole) if (tree, kind) == ("requests", "leaf")
    ]
    spoil(ledger, leaves[1], leaves[2], leaves[5])
    done = repair(url_of(ledger), NOW_NS)
    there = {seq for (seq,) in sql(ledger, "SELECT seq FROM requests WHERE run_id='run'")}
    missing = set(range(1, BILLS + 1)) - there
    assert missing
    assert list(done.missing_bills) == ["run"]
    assert numbers(done.missing_bills["run"]) == missing
    writer = LedgerWriter(url_of(ledger))
    writer.start()
    writer.commit().result(10)
    writer.close()


def numbers(ranges):
    found = set()
    for text in ranges:
        first, _, last = text.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("kind", ["internal", "index", "roots"])
def test_nothing_is_lost_with_the_pages_above_the_rows_and_with_indexes(ledger, whole, kind):
    tables = metadata.tables
    by_kind = {
        "internal": [
            page for page, tree, k, _ in pages_of(whole)
            if k == "internal" and tree in tables and tree not in ("usage_pieces", "request_energy")
        ],
        "index": [p for p, t, _, _ in pages_of(whole) if t not in tables and t != "sqlite_schema"],
        "roots": [
            root for name, root in sql(whole, "SELECT name, rootpage FROM sqlite_master")
            if name in ("requests", "http_requests")
        ],
    }  # fmt: skip
    assert by_kind[kind]
    spoil(ledger, *by_kind[kind])
    repair(url_of(ledger), NOW_NS)
    assert_saved(ledger, rows_of(whole), dict.fromkeys(tables, 0))
    names = {name for (name,) in sql(ledger, "SELECT name FROM sqlite_master WHERE type='index'")}
    assert {index.name for table in tables.values() for index in table.indexes} <= names


@pytest.mark.parametrize("size", [16, 100, PAGE])
def test_nothing_is_lost_with_the_header_of_the_file(ledger, whole, size):
    with ledger.open("r+b") as file:
        file.write(noise(size))
    repair(url_of(ledger), NOW_NS)
    assert_saved(ledger, rows_of(whole), dict.fromkeys(metadata.tables, 0))


def test_a_page_of_definitions_costs_no_row_of_a_table_that_can_be_told_from_all_others(
    ledger, whole
):
    pages = [page for page, tree, _, _ in pages_of(whole) if tree == "sqlite_schema" and page > 1]
    for page in pages:
        (ledger.parent / "ledger.db").write_bytes(whole.read_bytes())
        spoil(ledger, page)
        done = repair(url_of(ledger), NOW_NS)
        lost = [one.name for one in done.tables if one.saved < len(rows_of(whole)[one.name])]
        # Hours of time and of energy have the same columns: left out, and said.
        assert set(lost) <= {"engine_hours", "energy_hours"}
        assert bool(lost) <= bool(done.unclear_pages)


# The latter took the index of another table for rows, before.
@pytest.mark.parametrize("seed", [*range(12), 241, 648, 1333])
def test_whatever_pages_are_spoilt_every_row_outside_of_them_is_saved(ledger, whole, seed):
    chance = random.Random(seed)
    count = ledger.stat().st_size // PAGE
    # Pages of definitions are another test's: with them goes what tells some tables apart.
    schema = {page for page, tree, _, _ in pages_of(whole) if tree == "sqlite_schema"}
    small = {
        page for page, tree, _, _ in pages_of(whole) if tree in ("engine_hours", "energy_hours")
    }
    open_to = [page for page in range(1, count + 1) if page not in schema | small]
    spoilt = set(chance.sample(open_to, chance.randint(1, 12)))
    if chance.random() < 0.3:
        spoilt.add(1)
    spoil(ledger, *spoilt, seed=seed)
    repair(url_of(ledger), NOW_NS, force=True)
    assert_saved(ledger, rows_of(whole), lost_at_most(whole, spoilt))


# The latter have damaged names of tables, of columns and roots, which cost whole tables before.
@pytest.mark.parametrize("seed", [*range(12), 122, 134, 147, 390, 524, 609, 1062])
def test_whatever_bits_are_flipped_every_row_outside_of_their_pages_is_saved(ledger, whole, seed):
    chance = random.Random(seed)
    data = bytearray(ledger.read_bytes())
    flipped = [chance.randrange(PAGE, len(data)) for _ in range(chance.randint(1, 40))]
    for at in flipped:
        data[at] ^= 1 << chance.randrange(8)
    ledger.write_bytes(data)
    repair(url_of(ledger), NOW_NS, force=True)
    before, after = rows_of(whole), rows_of(ledger)
    lost = lost_at_most(whole, {at // PAGE + 1 for at in flipped})
    for name in KEPT:
        kept = len(before[name] & after[name])
        assert kept >= len(before[name]) - lost[name], name
        assert len(after[name]) <= len(before[name]), name


# ---- the log


@pytest.fixture
def with_log(tmp_path):
    """A ledger whose server was killed with most of it in the log, and its rows."""
    path = tmp_path / "ledger.db"
    fill(path)
    with server(path, commits_per_s=200) as running:
        while path.with_name("ledger.db-wal").stat().st_size < 120 * (PAGE + 24):
            pass
        running.process.kill()
        running.process.wait()
    return path


def rows_in_copy(path, folder):
    folder.mkdir()
    for suffix in ("", "-wal"):
        (folder / f"ledger.db{suffix}").write_bytes(path.with_name(path.name + suffix).read_bytes())
    return rows_of(folder / "ledger.db")


def frames(wal):
    """Return (page, size after commit) of each frame of a log."""
    data = wal.read_bytes()
    step = PAGE + 24
    return [struct.unpack(">2I", data[at : at + 8]) for at in range(32, len(data) - step + 1, step)]


def test_behind_a_spoilt_frame_of_the_log_the_rest_is_saved(with_log, tmp_path):
    before = rows_in_copy(with_log, tmp_path / "before")
    wal = with_log.with_name("ledger.db-wal")
    written = frames(wal)
    # A page that was written again later: nothing of it is lost for good.
    at = next(
        n for n in range(10, len(written)) if any(p == written[n][0] for p, _ in written[n + 1 :])
    )
    with wal.open("r+b") as file:
        file.seek(32 + at * (PAGE + 24) + 24)
        file.write(noise(PAGE))
    by_sqlite = rows_in_copy(with_log, tmp_path / "by_sqlite")
    assert len(by_sqlite["requests"]) < len(before["requests"])
    done = repair(url_of(with_log), NOW_NS)
    assert done.damaged_frames == 1
    assert rows_of(with_log) == before
    assert done.aside.with_name(ASIDE + "-wal").exists()


@pytest.mark.parametrize("spoilt", ["header", "checksum", "salts"])
def test_a_log_whose_own_numbers_are_spoilt_loses_nothing(with_log, tmp_path, spoilt):
    before = rows_in_copy(with_log, tmp_path / "before")
    at = {"header": 0, "checksum": 32 + 30 * (PAGE + 24) + 16, "salts": 32 + 30 * (PAGE + 24) + 8}
    wal = with_log.with_name("ledger.db-wal")
    page = frames(wal)[30][0]
    with wal.open("r+b") as file:
        file.seek(at[spoilt])
        file.write(noise(32 if spoilt == "header" else 4))
    repair(url_of(with_log), NOW_NS)
    after = rows_of(with_log)
    if spoilt == "salts" and page not in [p for p, _ in frames(wal_aside(with_log))[31:]]:
        assert len(after["requests"]) >= len(before["requests"]) - 10
    else:
        assert after == before


def wal_aside(path):
    return path.with_name(ASIDE + "-wal")


@pytest.mark.parametrize("seed", range(12))
def test_whatever_bits_of_the_log_are_flipped_every_row_outside_of_them_is_saved(
    with_log, tmp_path, seed
):
    before = rows_in_copy(with_log, tmp_path / "before")
    wal = with_log.with_name("ledger.db-wal")
    chance, data, step = random.Random(seed), bytearray(wal.read_bytes()), PAGE + 24
    written = frames(wal)
    last = max(n for n, (_, size_after) in enumerate(written) if size_after)
    flipped = {chance.randrange(32, 32 + last * step) for _ in range(chance.randint(1, 6))}
    for at in flipped:
        data[at] ^= 1 << chance.randrange(8)
    wal.write_bytes(data)
    spoilt = {written[(at - 32) // step][0] for at in flipped}
    lost = lost_at_most(tmp_path / "before" / "ledger.db", spoilt)
    repair(url_of(with_log), NOW_NS)
    after = rows_of(with_log)
    for name in KEPT:
        assert len(before[name] & after[name]) >= len(before[name]) - lost[name], name
    assert all(one.ok for one in check_ledger(url_of(with_log)))


def test_what_was_not_committed_is_not_saved(tmp_path):
    path = tmp_path / "ledger.db"
    fill(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA cache_size=1")  # A small cache spills into the log.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("UPDATE requests SET route='committed'")
        connection.commit()
        connection.execute("UPDATE requests SET route=hex(randomblob(2000))")
        data, log = path.read_bytes(), path.with_name("ledger.db-wal").read_bytes()
        assert len(log) > 10 * PAGE
        connection.rollback()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(data)
    path.with_name("ledger.db-wal").write_bytes(log)
    repair(url_of(path), NOW_NS, force=True)
    assert sql(path, "SELECT DISTINCT route FROM requests") == [("committed",)]


# ---- when it is refused, and other versions


def test_it_is_refused_while_a_server_uses_the_ledger(ledger):
    with server(ledger) as running:
        with pytest.raises(LedgerError, match="in use by process"):
            repair(url_of(ledger), NOW_NS, force=True)
        assert running.stop() == 1
    assert not ledger.with_name(ASIDE).exists()
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]


def test_without_room_and_for_what_is_no_ledger_nothing_is_changed(ledger, tmp_path):
    spoil(ledger, 8)
    with pytest.raises(LedgerError, match="free bytes to save the rows"):
        repair(url_of(ledger), NOW_NS, free=lambda _: 1000)
    (tmp_path / "text").write_text("no ledger " * 1000)
    with pytest.raises(LedgerError, match="is it a ledger"):
        repair(url_of(tmp_path / "text"), NOW_NS)
    sql(tmp_path / "other.db", "CREATE TABLE mine (x)")
    with pytest.raises(LedgerError, match="is it a ledger"):
        repair(url_of(tmp_path / "other.db"), NOW_NS)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {
        "ledger.db", "text", "other.db",
    }  # fmt: skip


def test_a_ledger_of_an_older_schema_is_repaired_and_migrated(ledger, whole):
    pieces = ", ".join(column.name for column in usage_pieces.c)
    of_one_hour = f"SELECT {pieces} FROM requests WHERE hour IS NOT NULL"
    with closing(sqlite3.connect(ledger)) as connection, connection:
        as_version_17(connection.execute)
    sql(ledger, f"INSERT INTO usage_pieces ({pieces}) {of_one_hour}")
    sql(ledger, "ALTER TABLE requests DROP COLUMN hour")
    for table in ("requests", "usage_pieces"):
        sql(ledger, f"ALTER TABLE {table} DROP COLUMN charge_error_ns")
    for table in ("requests", "open_requests", "http_requests"):
        sql(ledger, f"ALTER TABLE {table} DROP COLUMN tenant_above")
    for column in ("labels", "preemption_paid_by"):
        sql(ledger, f"ALTER TABLE runs DROP COLUMN {column}")
    sql(ledger, "UPDATE schema_version SET version=7")
    root = sql(ledger, "SELECT rootpage FROM sqlite_master WHERE name='schema_version'")[0][0]
    spoil(ledger, root)
    repair(url_of(ledger), NOW_NS)
    assert sql(ledger, "SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]
    assert len(rows_of(ledger)["requests"]) == BILLS + 50
    assert rows_of(ledger)["usage_pieces"] == rows_of(whole)["usage_pieces"]
    of_old = "labels IS NULL AND preemption_paid_by = 'victim'"
    assert sql(ledger, f"SELECT count(*) FROM runs WHERE {of_old}") == [(2,)]
    assert all(one.ok for one in check_ledger(url_of(ledger), full=True))


def test_replies_that_a_migration_moves_beside_their_bills_are_not_missing(ledger, whole):
    with closing(sqlite3.connect(ledger)) as connection, connection:
        as_version_17(connection.execute)
    (told,) = sql(ledger, "SELECT count(*) FROM http_requests")[0]
    done = repair(url_of(ledger), NOW_NS, force=True)
    (row,) = [one for one in done.tables if one.name == "http_requests"]
    assert (row.saved, row.missing) == (told, 0)
    assert rows_of(ledger)["http_requests"] == rows_of(whole)["http_requests"]
    assert sql(ledger, "SELECT count(*) FROM replies") == [(told,)]


@pytest.mark.parametrize("table", ["requests", "http_requests"])
def test_of_an_older_ledger_the_rest_is_saved_where_one_definition_is_lost(ledger, table):
    with closing(sqlite3.connect(ledger)) as connection, connection:
        as_version_17(connection.execute)
    kept = {"requests": "http_requests", "http_requests": "requests"}[table]
    (rows,) = sql(ledger, f"SELECT count(*) FROM {kept}")[0]
    data, definition = ledger.read_bytes(), f"CREATE TABLE {table} ".encode()
    assert definition in data
    ledger.write_bytes(data.replace(definition, definition.lower()[::-1]))
    repair(url_of(ledger), NOW_NS, force=True)
    assert len(rows_of(ledger)[table]) == 0
    assert sql(ledger, f"SELECT count(*) FROM {kept}") == [(rows,)]
    columns = sql(ledger, "SELECT name FROM pragma_table_info('http_requests')")
    assert {name for (name,) in columns} == set(http_requests.c.keys())


def test_no_value_is_taken_for_anothers_where_an_older_definition_is_lost(ledger):
    """Migrated, `labels` and `host` are at the end; with the definition goes their order."""
    for column in ("host", "precision"):
        sql(ledger, f"ALTER TABLE runs DROP COLUMN {column}")
        sql(ledger, f"ALTER TABLE runs ADD COLUMN {column} TEXT NOT NULL DEFAULT 'unknown'")
    sql(ledger, "ALTER TABLE requests DROP COLUMN cut_ns")
    sql(ledger, "ALTER TABLE requests ADD COLUMN cut_ns BIGINT NOT NULL DEFAULT 0")
    data = ledger.read_bytes()
    ledger.write_bytes(data.replace(b"CREATE TABLE runs", b"CREATE TABLE rXns"))
    done = repair(url_of(ledger), NOW_NS, force=True)
    (row,) = [one for one in done.tables if one.name == "runs"]
    assert (row.saved, row.missing) == (0, 2)
    assert len(rows_of(ledger)["requests"]) == BILLS + 50


def test_rows_that_are_older_than_a_column_get_what_a_migration_gives_them(ledger):
    sql(ledger, "ALTER TABLE runs DROP COLUMN host")
    sql(ledger, "ALTER TABLE runs ADD COLUMN host TEXT NOT NULL DEFAULT 'unknown'")
    spoil(ledger, *[p for p, t, _, _ in pages_of(ledger) if t == "ix_requests_http"])
    repair(url_of(ledger), NOW_NS)
    assert sql(ledger, "SELECT DISTINCT host, model FROM runs") == [("unknown", "m")]


def test_tables_of_others_stay_in_the_damaged_file_and_are_named(ledger):
    sql(ledger, "CREATE TABLE notes (text TEXT)")
    assert repair(url_of(ledger), NOW_NS, force=True).foreign_tables == ["notes"]
